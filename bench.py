"""How fast is it? Side by side with the peers that one would pick instead, and with what the machine allows.

    pip install -r requirements-bench.txt
    python bench.py                                            # all of it: about half an hour on two cores
    python bench.py lm meta                                    # or some of: lm meta data ner spectra startup

Each comparison runs in one process, its ways in turn (A B A B ...), after one round that is not counted, in which what is compiled compiles. A
row has the median time and, in brackets, the fastest and the slowest; ratios are of medians. Machines are noisy: let nothing else run, and believe no
ratio nearer to 1 than the brackets are wide. Peak memory is that of a process of its own. The numbers go to bench.json too.
"""
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import configurator
import maml
import smlmt
import spectra
from model import Llama, ModelConfig
from runs import fail, keep_freed_memory, load_checkpoint, load_corpus, write_atomic

HERE = os.path.dirname(os.path.abspath(__file__))
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Config:
    rounds: int = 7  # counted rounds of each comparison
    shapes: str = ""  # of lm and meta, with commas between; empty takes all that suit the device (see SHAPES)
    data_dir: str = os.path.join(HERE, "data")  # where the docstrings corpus is, of which the episodes and the text are
    out: str = "bench.json"  # where the numbers go


# name -> shape, rows in a step, and a meta step's episodes, their windows' length, ways, shots and queries
SHAPES = {"quick start": (ModelConfig(vocab_size=4096, block_size=128), 16, (4, 16, 16, 4, 4)),
          "11m": (ModelConfig(), 8, (1, 128, 32, 4, 4)),
          "65m": (ModelConfig(d_model=384, d_ff=1536), 2, (1, 64, 16, 4, 4))}  # fmt: skip
if device.type == "cuda":  # the paper's micro-batches, in rows of 512 and 2,048 tokens
    sizes = {"11m": (96, 384, 64), "65m": (384, 1536, 32), "181m": (768, 3072, 16), "570m": (1536, 6144, 8)}
    SHAPES |= {f"{name} x {T}": (ModelConfig(d_model=d, d_ff=ff, block_size=T), rows * 512 // T, (1, 128, 32, 4, 4))
               for name, (d, ff, rows) in sizes.items() for T in (512, 2048)}  # fmt: skip
found = []  # what was measured: a dict for each row


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Measuring


def finish():
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function):
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def run(*words):
    """What `python words...` prints, or the last thing that it says if it fails; a process that is killed says nothing."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    said = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}, perhaps for lack of memory"])[-1]
    return fail(f"{' '.join(words)}: {said.removeprefix('error: ')}", code=1) if done.returncode else done.stdout


def compare(title, ways, rounds, work=None, unit="", extra=None):
    """Time functions {name: function} in turn, print a table, return {name: median seconds}. work: what one call does, in `unit`s, of each or all."""
    times = {name: [] for name in ways}
    with tqdm(total=(rounds + 1) * len(ways), desc=title, leave=False, disable=None) as progress:
        for count in range(rounds + 1):
            for name, function in ways.items():
                took = seconds(function)
                if count:
                    times[name].append(took)
                progress.update()
    medians = {name: statistics.median(values) for name, values in times.items()}
    base, width = next(iter(medians.values())), max(map(len, ways))
    print(f"\n{title}")
    for name, values in times.items():
        row = {"comparison": title, "way": name, "seconds": medians[name], "low": min(values), "high": max(values), **(extra or {}).get(name, {})}
        shown = f"  {name:{width}}  {1e3 * medians[name]:9.2f} ms [{1e3 * min(values):.2f}, {1e3 * max(values):.2f}]"
        if len(ways) > 1:
            row["times the first"] = medians[name] / base
            shown += f"  {medians[name] / base:6.2f} x the first"
        if work:
            row[f"{unit}/s"] = (work[name] if isinstance(work, dict) else work) / medians[name]
            shown += f"  {row[f'{unit}/s']:12,.0f} {unit}/s"
        for key in (extra or {}).get(name, {}):
            row[key] /= medians[name] if key == "share of peak" else 1
            shown += f"  {row[key]:.1%} {key.removeprefix('share ')}" if key.startswith("share") else f"  {key} {row[key]:.2f}"
        print(shown, flush=True)
        found.append(row)
    return medians


def note(title, value, unit, text=""):
    """A number that is not a comparison."""
    print(f"  {title}: {value:,.4g} {unit}{text}", flush=True)
    found.append({"what": title, "value": value, "unit": unit})


def machine():
    """The top of the report: what this machine is, and what it allows at this moment. Returns {dtype: FLOP/s of a large matrix product}."""
    name, peak, n = platform.processor() or platform.machine(), {}, 2048 if device.type == "cpu" else 8192
    with contextlib.suppress(OSError):
        name = next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    name += f", {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    print(name)
    found.append({"machine": name})
    torch.set_float32_matmul_precision("high")
    for dtype in (torch.float32, torch.bfloat16):
        a, b, c = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(3))
        peak[dtype] = 2 * n**3 / min(seconds(lambda a=a, b=b, c=c: torch.mm(a, b, out=c)) for _ in range(10))
        note(f"matrix product {n} x {n}, {str(dtype)[6:]}", peak[dtype] / 1e9, "GFLOP/s")
    a, b = torch.ones(2, 2**26, device=device)  # 256 MiB each
    note("copy within memory, reads and writes", 2 * a.nbytes / min(seconds(lambda: b.copy_(a)) for _ in range(5)) / 1e9, "GB/s")
    if device.type == "cpu":
        note("the same into fresh pages", 2 * a.nbytes / min(seconds(a.clone) for _ in range(5)) / 1e9, "GB/s")
    return peak


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Language-model steps


def autocast(dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def hugging_face(shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_ff, num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads, max_position_embeddings=shape.block_size,
        use_cache=False)).to(device)  # fmt: skip


def lm_step(kind, shape, rows, compiled, dtype):
    """A function that makes one step of AdamW on `rows` rows: of our model, of ours with plain cross-entropy, or of Hugging Face's."""
    model = hugging_face(shape) if kind == "HF" else Llama(shape).to(device)
    idx = torch.from_numpy(np.random.default_rng(0).integers(shape.vocab_size, size=(rows, shape.block_size + 1))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled and kind == "HF":
        model.compile(dynamic=False)
    elif compiled:
        plain = model.loss
        model.compile_parts()
        model.loss = plain if kind == "plain" else model.loss

    def step():
        with autocast(dtype):
            loss = model(input_ids=idx[:, :-1], labels=idx[:, :-1]).loss if kind == "HF" else model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


LM_WAYS = {f"{name}, {'compiled' if compiled else 'eager'} {str(dtype)[6:]}": (kind, compiled, dtype)
           for dtype in (torch.bfloat16, torch.float32) for compiled in (True, False)
           for kind, name in (("ours", "ours"), ("HF", "Hugging Face"))}  # fmt: skip
LM_WAYS["ours with plain cross-entropy, compiled bfloat16"] = ("plain", True, torch.bfloat16)


def peak_memory(name, way):
    """GiB that a process of its own takes, at most, to make three steps."""
    return float(run(os.path.abspath(__file__), "peak", name, way))


def bench_lm(config, peak):
    for name in shapes(config):
        shape, rows, _ = SHAPES[name]
        tokens, model = rows * shape.block_size, Llama(shape)
        flops = tokens * model.flops_per_token(shape.block_size, backward=True, unembedding=True)
        ways = {way: lm_step(kind, shape, rows, compiled, dtype) for way, (kind, compiled, dtype) in LM_WAYS.items()}
        extra = {way: {"share of peak": flops / peak[dtype]} for way, (_, _, dtype) in LM_WAYS.items()}
        for way in tqdm(LM_WAYS, "peak memory", leave=False, disable=None):
            ways[way]()  # so that its kernels are there, and the compiler's memory is not taken for the step's
            extra[way]["GiB"] = peak_memory(name, way)
        compare(f"language-model step, {name}: {model.n_params():,} parameters, {rows} x {shape.block_size} tokens", ways, config.rounds, tokens,
                "tokens", extra)  # fmt: skip


def shapes(config):
    wanted = config.shapes.split(",") if config.shapes else [name for name in SHAPES if device.type == "cpu" or " x " in name]
    for name in wanted:
        if name not in SHAPES:
            fail(f"shapes = {name}: no such shape; there are {', '.join(SHAPES)}")
    return wanted


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Meta steps


def meta_ways(shape, n_episodes, n_way, k, q, sampler):
    """Functions that make one meta step in several ways, or a part of one: {name: function}."""
    model, numbers, parts = Llama(shape).to(device), iter(range(10**9)), (("support", k), ("query", q))
    model.compile_parts()
    head = {key: p.to(device).requires_grad_() for key, p in maml.init_head(shape.d_model, n_way).items()}
    parameters = [*model.parameters(), *head.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def episodes():
        drawn = [sampler.episode(next(numbers)) for _ in range(n_episodes)]
        return {field: torch.from_numpy(np.stack([getattr(e, field) for e in drawn])).to(device)
                for part, _ in parts for field in (part, f"{part}_pos", f"{part}_labels")}  # fmt: skip

    def features(batch, part, e=slice(None), grad=False):  # (E, M, C) of the support or query of all episodes, or of some
        tokens, positions = batch[part][e], batch[f"{part}_pos"][e]  # (E, M, L), (E, M)
        with autocast(torch.bfloat16), torch.set_grad_enabled(grad):
            return model.features_at(tokens.flatten(0, 1), positions.flatten()).unflatten(0, positions.shape)

    def update(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def ours(first_order=True):
        batch = episodes()
        return update(maml.episode_loss(head, features(batch, "support", grad=not first_order), batch["support_labels"],
                                        features(batch, "query", grad=True), batch["query_labels"], lr=1.0, steps=10,
                                        first_order=first_order)[0])  # fmt: skip

    def backbone_again():
        """The straightforward way: episode by episode, the frozen backbone runs on the support in every inner step."""
        batch, losses = episodes(), []
        for e in range(n_episodes):
            adapted = dict(head)
            for _ in range(10):
                support = maml.scaled(features(batch, "support", slice(e, e + 1))[0])
                loss = F.cross_entropy(maml.head_logits(adapted, support), batch["support_labels"][e])
                gradient = torch.autograd.grad(loss, list(adapted.values()))
                adapted = {key: p - g for (key, p), g in zip(adapted.items(), gradient, strict=True)}
            query = maml.scaled(features(batch, "query", slice(e, e + 1), grad=True)[0])
            losses.append(F.cross_entropy(maml.head_logits(adapted, query), batch["query_labels"][e]))
        return update(torch.stack(losses).mean())

    def with_higher():
        """The same head driven by the library `higher`, on features that are computed once."""
        import higher

        batch, losses = episodes(), []
        linear = torch.nn.Linear(shape.d_model, n_way, device=device)
        linear.load_state_dict({key.removeprefix("0."): p for key, p in head.items()})
        both = [maml.scaled(features(batch, part, grad=part == "query")) for part, _ in parts]  # (E, M, C) each
        for e, (support, query) in enumerate(zip(*both, strict=True)):
            with higher.innerloop_ctx(linear, torch.optim.SGD(linear.parameters(), lr=1.0), track_higher_grads=False) as (adapted, inner):
                for _ in range(10):
                    inner.step(F.cross_entropy(adapted(support), batch["support_labels"][e]))
                losses.append(F.cross_entropy(adapted(query), batch["query_labels"][e]))
        return update(torch.stack(losses).mean())

    fixed = [torch.randn(n_episodes, n_way * shots, shape.d_model, device=device) for _, shots in parts]
    labels = [torch.arange(n_way, device=device).repeat_interleave(shots).expand(n_episodes, -1) for _, shots in parts]

    def inner_loop():
        maml.episode_loss(head, fixed[0], labels[0], fixed[1], labels[1], lr=1.0, steps=10)[0].backward()

    return {"meta step, first order": ours, "meta step, second order": functools.partial(ours, False), "backbone in every inner step": backbone_again,
            "head driven by higher": with_higher, "of a meta step: sampler": episodes, "of a meta step: inner loop": inner_loop}  # fmt: skip


def bench_meta(config, peak):
    corpus = load_corpus(os.path.join(config.data_dir, "docstrings"))
    for name in shapes(config):
        shape, rows, (n_episodes, length, n_way, k, q) = SHAPES[name]
        sampler = smlmt.Sampler(np.asarray(corpus.train), corpus.token_bytes, eot=corpus.eot, mask=corpus.mask, n_way=n_way, k_shot=k, q_query=q,
                                episode_len=length)  # fmt: skip
        tokens, lm_tokens = n_episodes * n_way * (k + q) * length, rows * shape.block_size
        ways = meta_ways(shape, n_episodes, n_way, k, q, sampler)
        work = dict.fromkeys(ways, tokens) | {"language-model step": lm_tokens}
        ways["language-model step"] = lm_step("ours", shape, rows, True, torch.bfloat16)
        medians = compare(f"meta step, {name}: {n_episodes} of {n_way}-way {k}+{q}, windows of {length}", ways, config.rounds, work, "tokens")
        meta = medians["meta step, first order"]
        note("meta step per token against a language-model step per token", meta / tokens / (medians["language-model step"] / lm_tokens), "x")
        note("backbone in every inner step against ours", medians["backbone in every inner step"] / meta, "x")
        for part in ("sampler", "inner loop"):
            note(f"share of a meta step: {part}", 100 * medians[f"of a meta step: {part}"] / meta, "%")


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The rest


def bench_data(config, peak):
    import tokenizers

    import export_hf

    corpus = load_corpus(os.path.join(config.data_dir, "docstrings"))
    texts = [text for text in corpus.encoding.decode(np.asarray(corpus.train).tolist()).split("<|endoftext|>") if text]
    size = sum(len(text.encode()) for text in texts) / 1e6
    hugging_face = tokenizers.Tokenizer.from_str(json.dumps(export_hf.hf_tokenizer(corpus.encoding, corpus.meta)))
    compare(f"encoding {size:.1f} MB in {len(texts):,} documents", {
        "tiktoken, as data/prepare.py": lambda: corpus.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()),
        "Hugging Face tokenizers": lambda: hugging_face.encode_batch_fast(texts)}, min(3, config.rounds), size, "MB")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "text.jsonl"), "w", encoding="utf8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        script = os.path.join(HERE, "data", "prepare.py")
        for way, words in (("its own vocabulary of 4,096", ()), ("a given vocabulary", (f"--tokenizer={config.data_dir}/docstrings",))):
            took = seconds(functools.partial(run, script, "text", f"--source={folder}/text.jsonl", f"--data_dir={folder}/data", *words))
            note(f"data/prepare.py of the same text, {way}, start included", size / took, "MB/s", f" ({took:.1f} s)")


def bench_ner(config, peak):
    import eval_ner

    corpus, shape = load_corpus(os.path.join(config.data_dir, "docstrings")), SHAPES["quick start"][0]
    words, rng = corpus.encoding.decode(np.asarray(corpus.val[:60_000]).tolist()).split(), np.random.default_rng(0)
    sentences = [eval_ner.Sentence(words[i : i + 20], rng.choice(["O", "B-PER"], 20, p=[0.95, 0.05]).tolist(), "") for i in range(0, 26_000, 20)]
    settings = eval_ner.Config(head_epochs=10, patience=0, device=device.type)
    train, dev = (eval_ner.rows_of(corpus.encoding, part, settings) for part in (sentences[:1000], sentences[1000:]))
    model = Llama(shape).to(device).eval()

    def tuned(read):
        eval_ner.tune(settings, read, [], shape.d_model, train, dev, sentences[1000:], seed=0)

    medians = compare("head-only named entities: 1,000 sentences of 20 words, 300 to stop by, 10 epochs", {
        "features computed once": lambda: tuned(eval_ner.frozen(model)),
        "features computed at each step": lambda: tuned(torch.no_grad()(functools.partial(eval_ner.word_features, model)))},
        min(3, config.rounds))  # fmt: skip
    note("plain against cached", medians["features computed at each step"] / medians["features computed once"], "x")


def bench_spectra(config, peak):
    for d, ff in ((96, 384), (96, 50304), (1536, 6144)):
        matrix = torch.randn(ff, d)
        compare(f"singular values of {ff} x {d}", {"spectra.singular_values, float64": lambda matrix=matrix: spectra.singular_values(matrix),
                                                   "torch.linalg.svdvals, float64": lambda matrix=matrix: torch.linalg.svdvals(matrix.double()),
                                                   "torch.linalg.svdvals, float32": lambda matrix=matrix: torch.linalg.svdvals(matrix)},
                min(3, config.rounds))  # fmt: skip
    model = Llama(SHAPES["quick start"][0]).to(device)
    batch = [part.to(device) for part in spectra.probe(np.random.default_rng(0).integers(4096, size=100_000), 128)]
    compare("looking inside a quick-start model", {"at an evaluation": lambda: spectra.measure(model, batch[0]),
                                                   "at a checkpoint": lambda: spectra.measure(model, *batch)}, config.rounds)  # fmt: skip
    checkpoint = {"step": 0, "progress": {}, "config": {}, "head": {}, "model": model.state_dict(),
                  "optimizer": {key: torch.zeros_like(p) for part in "ab" for key, p in model.state_dict().items()}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ckpt.pt")
        compare("a quick-start checkpoint", {"save": lambda: write_atomic(path, lambda file: torch.save(checkpoint, file)),
                                             "load": lambda: load_checkpoint(path),
                                             "load by torch alone, no checksums": lambda: torch.load(path, weights_only=True)},
                config.rounds)  # fmt: skip
    idx, peer = torch.zeros(1, 1, dtype=torch.int64, device=device), hugging_face(replace(SHAPES["quick start"][0], block_size=512))
    options = {"max_new_tokens": 127, "min_new_tokens": 127, "do_sample": True, "use_cache": True, "pad_token_id": 0}
    compare("sampling 127 tokens, one text, float32", {"ours": lambda: model.generate(idx, 127),
                                                       "Hugging Face": lambda: peer.generate(idx, **options)}, min(3, config.rounds), 127, "tokens")


def bench_startup(config, peak):
    """From the command to the first step, with and without what torch.compile keeps from earlier runs; then a whole default run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [os.path.join(HERE, "train.py"), "config/train_11m.py", f"--data_dir={config.data_dir}"]
        for way in ("nothing compiled yet", "compiled by an earlier run"):
            out, start = f"--out_dir={folder}/{way.replace(' ', '-')}", time.perf_counter()
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
            words = [sys.executable, *command, out, "--max_steps=3", "--warmup_steps=1"]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
            for line in process.stdout:
                if line.startswith("step      1/"):
                    note(f"from the command to the end of the first step, {way}", time.perf_counter() - start, "s")
            if process.wait():
                fail("train.py did not come to its third step, for the reason above", code=1)
        out = os.path.join(folder, "run")
        took = seconds(functools.partial(run, *command, f"--out_dir={out}"))
        lines = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"), encoding="utf8")]
    note(f"a default run, {lines[-1]['step']:,} steps, start and end included", took, "s")
    deltas = [(line, line["seconds"] - before["seconds"]) for before, line in zip([{"seconds": 0}, *lines], lines, strict=False)]
    for kind in ("lm", "meta"):
        chosen = [line for line in lines if line["kind"] == kind]
        tokens = {a["step"]: a[f"{'lm' if kind == 'lm' else 'episode'}_tokens"] for a in chosen}
        each = np.diff([0, *tokens.values()]) / np.array([line["tokens_per_second"] for line in chosen])
        note(f"{kind} step, median", 1e3 * float(np.median(each)), "ms")
    evaluating = sum(delta for line, delta in deltas if line["kind"] == "eval" and line["step"])
    note("share of evaluations, looking inside included, after the first", 100 * evaluating / lines[-1]["seconds"], "%")
    looking = {row["way"]: row["seconds"] for row in found if row.get("comparison") == "looking inside a quick-start model"}
    if looking:
        evals, saves = sum(line["kind"] == "eval" for line in lines), 3
        inside = evals * looking["at an evaluation"] + saves * looking["at a checkpoint"]
        note(f"share of looking inside ({evals} evaluations, {saves} checkpoints)", 100 * inside / lines[-1]["seconds"], "%")


# ----------------------------------------------------------------------------------------------------------------------------------------------------

BENCHES = {"lm": bench_lm, "meta": bench_meta, "data": bench_data, "ner": bench_ner, "spectra": bench_spectra, "startup": bench_startup}


def main():
    if len(sys.argv) == 4 and sys.argv[1] == "peak" and sys.argv[2] in SHAPES and sys.argv[3] in LM_WAYS:  # a process of its own, see peak_memory
        shape, rows, _ = SHAPES[sys.argv[2]]
        step = lm_step(LM_WAYS[sys.argv[3]][0], shape, rows, *LM_WAYS[sys.argv[3]][1:])
        for _ in range(3):
            step()
        if device.type == "cuda":
            print(torch.cuda.max_memory_allocated() / 2**30)
        else:  # unlike getrusage's, this number knows nothing of the process that started this one
            print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20)
        return
    config, wanted = configurator.load(Config, sys.argv[1:], __doc__)
    for name in wanted:
        if name not in BENCHES:
            fail(f"cannot measure {name!r}: there are {', '.join(BENCHES)}")
    if config.rounds < 1:
        fail(f"rounds = {config.rounds}: at least 1")
    shapes(config)
    if not os.access(os.path.dirname(os.path.abspath(config.out)), os.W_OK):  # better known before the work
        fail(f"out = {config.out}: its folder is not there or may not be written to; take another --out")
    if not os.path.exists(os.path.join(config.data_dir, "docstrings", "meta.json")):
        fail(f"no corpus docstrings in {config.data_dir}: make it with python data/prepare.py docstrings")
    try:
        import higher  # noqa: F401
        import transformers

        transformers.logging.set_verbosity_error()
    except ImportError as error:
        fail(f"{error.name} is not installed: pip install -r requirements-bench.txt")
    peak = machine()
    keep_freed_memory()  # as in training
    for name in wanted or BENCHES:
        BENCHES[name](config, peak)
        write_atomic(config.out, lambda file: file.write(json.dumps(found, indent=1).encode()))
    print(f"\nwritten {config.out}")


if __name__ == "__main__":
    main()
