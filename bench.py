"""How fast is it? Steps beside those of the peers that one would pick instead.

    pip install -r requirements-bench.txt
    python bench.py                # all of it, about twenty minutes on two cores
    python bench.py lm meta        # or some of: lm meta generate ner startup

The ways to do a thing take turns (A B A B), each time in a process of its own that begins with a step that is
not counted. A row has the median time of a step, the fastest and the slowest, the ratio to the first way, and
the peak memory. Let nothing else run. Ignore a ratio that differs from 1 by less than the brackets' width.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial

from plumbing.files import ROOT, fail, write_atomic
from plumbing.settings import Count, load

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval_ner
import maml
import smlmt
from model import Llama, ModelConfig, compile_parts
from plumbing.checkpoint import hf_config
from plumbing.corpus import load_corpus
from plumbing.machine import choose_device, choose_dtype, peak_memory

@dataclass
class Config:
    rounds: Count = 3  # turns of each way
    steps: Count = 5  # counted steps in a turn
    data_dir: str = str(ROOT / "data")  # where the docstrings corpus is
    out: str = "bench.json"  # where the numbers go

config, words = load(Config, __doc__)
device = choose_device("auto")
DTYPES = list(dict.fromkeys([choose_dtype("auto", device), torch.float32]))
SHAPES = {  # the model, rows of a language-model step; episodes, window length, ways, shots of a meta step
    "quick start": (ModelConfig(vocab_size=4096, block_size=128), 16, (4, 16, 16, 4)),
    "11m": (ModelConfig(), 8, (1, 128, 32, 4)),
    "65m": (ModelConfig(d_model=384, d_ff=1536), 2, (1, 64, 16, 4)),
}

# --------------------------------------------------------------------------------------------------
# What is measured: functions that set something up and return one step of it

def optimized(parameters, loss):
    """A step of AdamW on loss()."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step

def make_model(name, peer):
    """Our model, or Hugging Face's of the same shape, which ends no text."""
    shape = SHAPES[name][0]
    if not peer:
        return Llama(shape).to(device)
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(**hf_config(shape), eos_token_id=None)).to(device)

def lm_step(name, peer, compiled, dtype):
    """A language-model step."""
    shape, B, _ = SHAPES[name]
    model = make_model(name, peer)
    idx = torch.randint(shape.vocab_size, (B, shape.block_size + 1), device=device)
    if compiled:
        model.compile(dynamic=False) if peer else compile_parts(model)

    def loss():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if peer:
                return model(input_ids=idx[:, :-1], labels=idx[:, :-1], use_cache=False).loss
            return model(idx[:, :-1], idx[:, 1:])
    return optimized(model.parameters(), loss)

def meta_step(name, backbone_again):
    """A meta step of first order: ours, or with the backbone run again in each inner step."""
    shape, _, (E, length, n_way, shots) = SHAPES[name]
    corpus = load_corpus(f"{config.data_dir}/docstrings")
    sampler = smlmt.Sampler(np.asarray(corpus.train), corpus.token_bytes, eot=corpus.eot, mask=corpus.mask,
                            n_way=n_way, k_shot=shots, q_query=shots, episode_len=length)
    episodes = [vars(sampler.episode(i)) for i in range(E)]
    e = {key: torch.from_numpy(np.stack([episode[key] for episode in episodes])).to(device)
         for key in episodes[0] if key.startswith(("support", "query"))}
    model = Llama(shape).to(device)
    compile_parts(model)
    head = {key: p.to(device).requires_grad_() for key, p in maml.init_head(shape.d_model, n_way).items()}

    def features(part):  # (E, M, C)
        tokens, positions = e[part], e[f"{part}_pos"]
        half = torch.autocast(device.type, DTYPES[0], enabled=DTYPES[0] != torch.float32)
        with half, torch.set_grad_enabled(part == "query"):
            return model.features_at(tokens.flatten(0, 1), positions.flatten()).unflatten(0, positions.shape)

    def ours():
        batch = features("support"), e["support_labels"], features("query"), e["query_labels"]
        return maml.episode_loss(head, *batch, lr=1.0, steps=10)[0]

    def rerun_backbone():
        heads, logits = {key: p.expand(E, *p.shape) for key, p in head.items()}, torch.vmap(maml.head_logits)
        for _ in range(10):
            scores = logits(heads, maml.scaled(features("support"))).flatten(0, 1)  # (E M, N)
            loss = E * F.cross_entropy(scores, e["support_labels"].flatten())
            gradient = torch.autograd.grad(loss, list(heads.values()))
            heads = {key: p - g for (key, p), g in zip(heads.items(), gradient, strict=True)}
        scores = logits(heads, maml.scaled(features("query"))).flatten(0, 1)
        return F.cross_entropy(scores, e["query_labels"].flatten())
    return optimized([*model.parameters(), *head.values()], rerun_backbone if backbone_again else ours)

def generate_step(name, peer):
    """The likeliest 64 tokens after 16, in float32. Both models keep the keys and values of tokens read."""
    model = make_model(name, peer).eval()
    idx = torch.randint(SHAPES[name][0].vocab_size, (1, 16), device=device)
    if peer:
        return partial(model.generate, idx, max_new_tokens=64, do_sample=False, use_cache=True)
    return partial(model.generate, idx, 64, temperature=0)

def ner_tuning(name, cached):
    """Head-only tuning on 1,000 sentences of 20 words, with 300 to stop by, for ten epochs."""
    corpus, shape = load_corpus(f"{config.data_dir}/docstrings"), SHAPES[name][0]
    text = np.resize(corpus.tokenizer.decode(corpus.val[:60_000].tolist()).split(), 26_000).tolist()
    tags = np.random.default_rng(0).choice(["O", "B-PER"], 26_000, p=[0.95, 0.05]).tolist()
    sentences = [eval_ner.Sentence(text[i : i + 20], tags[i : i + 20], "") for i in range(0, 26_000, 20)]
    train, dev, model = sentences[:1000], sentences[1000:], Llama(shape).to(device).eval()
    settings = eval_ner.Config(head_epochs=10, patience=0, device=device.type)
    rows, dev_rows = (eval_ner.rows_of(corpus.tokenizer, part, settings) for part in (train, dev))

    def step():
        read = eval_ner.frozen(model) if cached else torch.no_grad()(partial(eval_ner.word_features, model))
        eval_ner.tune(settings, read, [], shape.d_model, rows, dev_rows, dev, seed=0)
    return step

def first_step(name, warm):
    """A run of one step, with or without what an earlier run compiled."""
    kept = tempfile.TemporaryDirectory()

    def step():
        with tempfile.TemporaryDirectory() as fresh:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{kept.name if warm else fresh}/cache"}
            command = [sys.executable, ROOT / "train.py", f"config/train_{name}.py", "--max_steps=1",
                       f"--data_dir={config.data_dir}", f"--out_dir={fresh}/run"]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return step

LM = {f"{'Hugging Face' if peer else 'ours'}, {'compiled' if compiled else 'eager'} {str(dtype)[6:]}":
      (peer, compiled, dtype) for dtype in DTYPES for compiled in (True, False) for peer in (False, True)}
PARTS = {  # part of the benchmark: (what sets up a step, names of models, {way: what else it takes})
    "lm": (lm_step, SHAPES, LM),
    "meta": (meta_step, SHAPES, {"ours": [False], "backbone in each inner step": [True]}),
    "generate": (generate_step, SHAPES, {"ours": [False], "Hugging Face": [True]}),
    "ner": (ner_tuning, ["quick start"], {"features computed once": [True], "at each step": [False]}),
    "startup": (first_step, ["11m"], {"compiled by an earlier run": [True], "not yet compiled": [False]})}

def measure(step):
    """What the process of one way does: print the seconds of its steps and the peak memory."""
    seconds = []
    for _ in range(config.steps + 1):
        start = time.perf_counter()
        step()
        getattr(torch, device.type).synchronize()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds[1:], "GiB": peak_memory(device)}))

def compare(part, name, ways):
    """Run the ways in turn and print a table; returns its rows."""
    rows = {way: {"part": part, "model": name, "way": way, "seconds": []} for way in ways}
    options = [f"--steps={config.steps}", f"--data_dir={config.data_dir}"]
    for way in tqdm([*ways] * config.rounds, f"{part}, {name}", leave=False, disable=None):
        command = [sys.executable, __file__, part, name, way, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            fail(f"{part}, {name}, {way}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}", code=1)
        result = json.loads(done.stdout.splitlines()[-1])
        rows[way] |= result | {"seconds": rows[way]["seconds"] + result["seconds"]}
    print(f"\n{part}, {name}")
    first = np.median(next(iter(rows.values()))["seconds"])
    for way, row in rows.items():
        low, median, high = np.percentile(row["seconds"], [0, 50, 100])
        print(f"  {way:34}  {1e3 * median:9.2f} ms [{1e3 * low:.2f}, {1e3 * high:.2f}]  "
              f"{median / first:6.2f} x the first  {row['GiB']:.2f} GiB", flush=True)
    return list(rows.values())

if words[1:] and words[1] in SHAPES:  # the process of one way
    part, name, way = words
    set_up, _, ways = PARTS[part]
    measure(set_up(name, *ways[way]))
    sys.exit()
if set(words) - set(PARTS):
    fail(f"cannot measure {' '.join(words)}: there are {', '.join(PARTS)}")
print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
results = []
for part in words or PARTS:
    _, names, ways = PARTS[part]
    for name in names:
        results += compare(part, name, ways)
        write_atomic(config.out, json.dumps(results, indent=1))
print(f"\nwritten {config.out}")
