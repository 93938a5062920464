"""A training run on disk and among processes: folder, log, resuming, signals. The loop is in train.py."""
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from plumbing import figures
from plumbing.checkpoint import check_sha256, checkpoints, load_model, save_checkpoint
from plumbing.corpus import load_corpus
from plumbing.files import ROOT, attempt, fail, lock, on_signals, read_json, reason, write_atomic
from plumbing.machine import choose_device, choose_dtype, not_compiled, peak_memory

# A resumed run may differ from the run that was begun in these settings only.
MAY_CHANGE = set("""out_dir data_dir device dtype compile resume micro_batch_size micro_episodes max_steps lr
eval_interval eval_steps ckpt_interval log_interval wandb wandb_project""".split())
BUDGETS = "lm_tokens episode_tokens support_tokens query_tokens flops seconds".split()
SHOWN = "lm_loss meta_loss query_acc_before query_acc inline_words lr grad_norm skipped loss_scale".split()

class Run:
    """A run: its processes, device, folder, log and progress. `stopping`: a signal has asked it to end."""

    def __init__(self, config):
        self.config, self.signal, self.stopping = config, None, False
        self.tracker, self.log_file = None, None
        # Set by torchrun. Without an address they come from a cluster's scheduler: ignore them.
        launch = os.environ if {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() else {}
        self.rank, local_rank = (int(launch.get(key) or 0) for key in ("RANK", "LOCAL_RANK"))
        self.world = int(launch.get("WORLD_SIZE") or 1)
        tasks = config.episodes_per_step if config.meta_ratio and config.mix != "inline" else self.world
        if self.world > min(config.batch_size, tasks):
            fail(f"{self.world} processes need a batch_size and episodes_per_step of at least {self.world}")
        self.device = choose_device(config.device, local_rank)
        self.dtype = choose_dtype(config.dtype, self.device)
        why_not = not_compiled(self.device) if config.compile else "compile = False"
        self.compile = not why_not
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
        gpu = self.device.type == "cuda"
        self.steps_late = int(gpu)  # how late the metrics of a step are logged
        where = torch.cuda.get_device_name() if gpu else f"{self.device}, {torch.get_num_threads()} threads"
        compiled = f"not compiled ({why_not})" if why_not else "compiled"
        self.print(f"system  {self.world} x {where}, {str(self.dtype)[6:]} products, {compiled}")
        if self.world > 1:
            dist.init_process_group("nccl" if gpu else "gloo", device_id=self.device if gpu else None)
        if self.rank == 0:
            self.open_folder()

    def open_folder(self):
        """Lock the run folder, which must hold a run if it is to be resumed, and none otherwise."""
        folder, resume = Path(self.config.out_dir), self.config.resume
        has_config = (folder / "config.json").exists()
        is_run = has_config and "corpus_hash" in read_json(folder / "config.json")
        if has_config and not is_run or (folder / "meta.json").exists():
            fail(f"{folder} holds a model or a corpus and no training run; take another --out_dir")
        if resume and not is_run:
            fail(f"resume = True, but {folder} holds no run; check --out_dir, or leave --resume out")
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        has_steps = any(line["step"] for line in read_log(folder))  # without any, it may be begun again
        if not resume and (has_steps or checkpoints(folder)):
            fail(f"{folder} already holds a run: continue it with --resume=True, or take another --out_dir")
        for path in folder.glob("*.tmp"):  # of a process that was killed while it saved
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def load_corpus(self):
        """The corpus that the settings name. The default one is built when it is missing."""
        config, folder = self.config, f"{self.config.data_dir}/{self.config.dataset}"
        if self.rank == 0 and config.dataset == "docstrings" and not os.path.exists(f"{folder}/meta.json"):
            self.print(f"data    building the default corpus, once, in {folder}")
            script = [sys.executable, ROOT / "data/prepare.py", "docstrings", f"--data_dir={config.data_dir}"]
            if code := subprocess.run(script).returncode:
                sys.exit(code)  # it has said why
        self.barrier()
        corpus = self.corpus = load_corpus(folder)
        if (shortest := min(len(corpus.train), len(corpus.val))) <= config.block_size:
            fail(f"block_size = {config.block_size}, but a split of {folder} has {shortest} tokens: lower it")
        self.print(f"data    {config.dataset} {corpus.hash}: {len(corpus.train):,} training tokens, "
                   f"{len(corpus.val):,} for validation, vocabulary {corpus.vocab_size:,}")
        return corpus

    def start(self, model, head, optimizer, scaler):
        """Begin or resume; returns the step that is done already."""
        self.model, self.head, self.optimizer, self.scaler = model, head, optimizer, scaler
        self.params = dict(model.named_parameters())
        self.params |= {f"head.{name}": p for name, p in head.items() if p.requires_grad}
        self.progress, self.costs = Counter(dict.fromkeys(BUDGETS, 0)), costs(self.config, model)
        step, lines = self.resume() if self.config.resume else (0, [])
        self.evals = {line["step"]: line for line in lines if line["kind"] == "eval"}
        self.collapse = next((line for line in lines if line["kind"] == "collapse"), None)
        self.print(f"model   {model.n_params():,} parameters, {model.config}")
        self.barrier()  # nobody writes before all have read
        if self.rank == 0:
            self.write_folder(lines)
        self.choose_micro_batches(model)
        self.first_step, self.skipped, self.unlogged, self.clock = step, 0, [], time.perf_counter()
        on_signals(self.stop)  # until here they end the process at once: nothing was begun
        return step

    def resume(self):
        """Load the newest checkpoint; returns its step and the lines of the log up to it."""
        config, begun = self.config, read_json(f"{self.config.out_dir}/config.json")
        for key, setting in (dataclasses.asdict(config) | {"corpus_hash": self.corpus.hash}).items():
            if key not in MAY_CHANGE and begun.get(key, setting) != setting:
                fail(f"cannot resume with {key} = {setting}: the run was begun with {key} = {begun[key]}")
        step = max(checkpoints(config.out_dir), default=0)
        if not step:  # it was stopped before its first checkpoint
            self.print(f"resume  {config.out_dir} has no checkpoint: from the start")
            return 0, []
        lines = read_log(config.out_dir, up_to=step)
        if len({line["step"] for line in lines if line["kind"] not in ("eval", "collapse")}) < step:
            fail(f"{config.out_dir}/log.jsonl lacks steps up to {step}, the newest checkpoint: copy it again")
        if config.max_steps < step:
            fail(f"cannot resume with max_steps = {config.max_steps}: {step} steps are done")
        loaded = load_model(config.out_dir)
        if not os.path.exists(f"{loaded.path}/optimizer.safetensors"):
            fail(f"cannot resume from {loaded.path}: only a run's newest two checkpoints keep the optimizer")
        remedy = "delete this folder to resume from the step before"
        with attempt(f"read {loaded.path}", remedy), torch.no_grad():
            check_sha256(loaded.path, loaded.state, "optimizer.safetensors")
            moments = load_file(f"{loaded.path}/optimizer.safetensors")
            self.model.load_state_dict(loaded.model.state_dict())
            for name, p in self.head.items():
                p.copy_(loaded.head[name])
            for key, moment in moments.items():  # exp_avg/norm.weight
                kind, _, name = key.partition("/")
                self.optimizer.state[self.params[name]][kind] = moment.to(self.device)
            self.scaler.load_state_dict(loaded.state["scaler"] or self.scaler.state_dict())  # {}: it was off
            self.progress = Counter({key: loaded.progress[key] for key in BUDGETS})
        self.print(f"resume  {config.out_dir} after step {step}")
        return step, lines

    def write_folder(self, lines):
        """config.json says how the run was made; the log loses what came after the checkpoint."""
        folder = self.config.out_dir
        describe = "git describe --always --dirty=+ --abbrev=12"  # the commit, with a + where files differ
        git = subprocess.run(describe, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")}
        system = {"processes": self.world, "device": str(self.device), "dtype": str(self.dtype),
                  "threads": torch.get_num_threads(), "platform": platform.platform()}
        made = dataclasses.asdict(self.config) | {
            "vocab_size": self.corpus.vocab_size, "corpus_hash": self.corpus.hash, "system": system,
            "git": git, "argv": sys.argv[1:], "versions": {"python": platform.python_version(), **versions}}
        made["wandb_id"] = read_json(f"{folder}/config.json").get("wandb_id") if self.config.resume else None
        if self.config.wandb:
            with attempt("reach Weights & Biases", f"WANDB_MODE=offline keeps the records in {folder}/wandb"):
                import wandb
                quiet = wandb.Settings(init_timeout=30, silent=True)
                self.tracker = wandb.init(
                    project=self.config.wandb_project, name=Path(folder).absolute().name, id=made["wandb_id"],
                    resume="allow", dir=folder, config=made, settings=quiet)
            made["wandb_id"] = self.tracker.id
        write_atomic(f"{folder}/log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_atomic(f"{folder}/config.json", json.dumps(made, indent=2))
        self.log_file = open(f"{folder}/log.jsonl", "ab", buffering=0)

    # Processes, signals, memory

    def print(self, text):
        """Print at once, from one process for all. A reader that went away (`| head`) must not end a run."""
        if self.rank == 0:
            with contextlib.suppress(OSError):
                os.write(1, f"{text}\n".encode("utf8", "replace"))  # unlike print, also in a signal handler

    def all_reduce(self, tensor):
        """The sum of a tensor over all processes, in place."""
        if self.world > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:  # gloo says so; with nccl torchrun ends the others
                self.end(1, f"another process is gone; continue with --resume=True ({reason(error)[:80]})")
        return tensor

    def all_reduce_gradients(self, params):
        """Sum the gradients of params over all processes, in one message."""
        if self.world > 1:
            gradients = [p.grad for p in params if p.grad is not None]
            vector_to_parameters(self.all_reduce(parameters_to_vector(gradients)), gradients)

    def gather(self, features, places, first_row):
        """Features (E, M, C) at places (E, M) of a step's rows, b T + t for position t of row b.

        features (B, T, C): of this process's rows, the first of which is row `first_row` of the step. Every
        process computes the whole loss, and gradients are summed later: so divide the loss by `world`. Own
        features get `world` times the gradient to make up for it; those of other processes are constants.
        """
        own, first = features.flatten(0, 1), first_row * features.size(1)
        mine = (places >= first) & (places < first + len(own))
        own = own[(places - first).clamp(0, len(own) - 1)] * mine[..., None]
        everyone = self.all_reduce(own.detach().clone())
        return everyone + self.world * (own - own.detach())  # adds 0, and the gradient

    def barrier(self):
        """Return when all processes have come here."""
        if self.world > 1:
            self.all_reduce(torch.zeros(1, device=self.device)).item()

    def stop(self, number, frame):
        """A signal: the loop finishes its step, saves, and leaves. A second one ends the process at once."""
        signal.signal(number, signal.SIG_DFL)
        self.signal = signal.Signals(number)
        self.print(f"\n{self.signal.name}: saving after this step (once more to leave at once)")

    def end(self, code, error=""):
        """End this process. With several, skip torch's clean-up: one exit in four aborted in it."""
        if error:
            print(f"error: {error}", file=sys.stderr)
        if self.tracker:
            self.tracker.finish(code)
        if self.world > 1:
            os._exit(code)
        sys.exit(code)

    def choose_micro_batches(self, model):
        """Micro-batch sizes: the settings; where 0, what fits in half a GPU's free memory (on a CPU all)."""
        c, shape, tokens = self.config, model.config, 2**60  # no limit
        if self.device.type == "cuda":
            # Bytes that the backward pass keeps for a token: in each block, and for its logits.
            kept = 40 * shape.d_model * shape.n_layers + 4 * shape.vocab_size
            tokens = torch.cuda.mem_get_info()[0] / 2 / (kept if self.compile else 3 * kept)
        windows = c.q_query + c.k_shot * (c.second_order or c.target != "head")  # of a word
        # Inline tasks need all rows at once; their evaluations take one episode at a time.
        rows, episodes = (c.batch_size, 1) if c.mix == "inline" else (c.micro_batch_size, c.micro_episodes)
        sizes = {"lm": (rows, c.batch_size, c.block_size),
                 "meta": (episodes, c.episodes_per_step, c.n_way * windows * c.episode_len)}
        self.micro = {kind: setting or min(most, 2 ** int(math.log2(max(1, tokens / length))))
                      for kind, (setting, most, length) in sizes.items()}

    def micro_batches(self, n, kind):
        """This process's share of n rows ("lm") or episodes ("meta"), as slices that memory has room for."""
        first, last = self.rank * n // self.world, (self.rank + 1) * n // self.world
        return [slice(i, min(i + self.micro[kind], last)) for i in range(first, last, self.micro[kind])]

    def within_memory(self, function, *inputs):
        """function(*inputs). If a GPU's memory runs out, begin again with micro-batches of half the size."""
        try:
            return function(*inputs)
        except torch.OutOfMemoryError:
            if max(self.micro.values()) < 2 or self.config.mix == "inline":
                raise
        # Outside of `except`, which would keep the tensors of the step alive.
        self.micro = {kind: max(1, size // 2) for kind, size in self.micro.items()}
        self.print("memory  ran out: {lm} rows, {meta} episodes at a time now".format_map(self.micro))
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        return self.within_memory(function, *inputs)

    # The log, checkpoints, the end

    def log(self, line):
        """One object a line, handed to the system before the next step begins."""
        text = f"{json.dumps(line)}\n".encode() if self.log_file else b""
        while text:  # a disk that fills up takes a part first
            text = text[self.log_file.write(text) :]
        if self.tracker:
            self.tracker.log(line, step=line["step"])

    def log_step(self, step, metrics, norm, lr):
        """Log a step's metrics, summed over processes (norm is that of all): on a GPU one step later."""
        stop = torch.full((), float(self.signal is not None), device=self.device)  # so that all stop together
        scale = self.scaler.scale(torch.ones(1, device=self.device))  # read later, it would be a later step's
        values = torch.cat((self.all_reduce(torch.stack([*metrics.values(), stop])), norm[None], scale))
        copied = (torch.cuda if self.steps_late else torch.cpu).Event()
        values = values.to("cpu", non_blocking=bool(self.steps_late))
        copied.record()  # behind the copy, before the next step
        self.unlogged.append((step, list(metrics), values, copied, lr))
        self.flush_log(self.steps_late)

    def flush_log(self, all_but=0):
        """Log all steps done but the newest `all_but`."""
        while len(self.unlogged) > all_but:
            self.write_step(*self.unlogged.pop(0))

    def write_step(self, step, names, values, copied, lr):
        """Check, log and print the metrics of a step. What is not finite ends the run."""
        copied.synchronize()
        *values, stop, norm, scale = values.tolist()
        self.stopping, line = bool(stop), dict(zip(names, values, strict=True))
        losses = {key: line[key] for key in ("lm_loss", "meta_loss") if key in line}
        finite = math.isfinite(sum(losses.values()) + norm)
        self.skipped = 0 if finite else self.skipped + 1  # float16 may overflow for some steps
        if self.skipped == (20 if self.scaler.is_enabled() else 1):
            self.not_finite(step, text_of(losses | {"grad_norm": norm}))
        line["lr"] = lr
        line |= {"grad_norm": norm} if finite else {"skipped": self.skipped, "loss_scale": scale}
        kind = "joint" if len(losses) == 2 else next(iter(losses)).removesuffix("_loss")
        seconds = self.tick()
        self.progress.update(self.costs[kind])  # adds
        speed = (self.costs[kind]["lm_tokens"] + self.costs[kind]["episode_tokens"]) / seconds
        self.log({"step": step, "kind": kind, **line, **self.progress, "tokens_per_second": speed})
        # The running mean of a step's seconds. The first steps compile and say nothing of the others.
        self.pace = seconds if step < self.first_step + 3 else 0.95 * self.pace + 0.05 * seconds
        if step % self.config.log_interval == 0:
            left = int(self.pace * (self.config.max_steps - step))
            shown = text_of({key: line[key] for key in SHOWN if key in line})
            self.print(f"step {step:6d}/{self.config.max_steps}  {shown}  "
                       f"{speed / 1e3:.1f}k tok/s  left {left // 60}m{left % 60:02d}s")

    def tick(self):
        """Seconds since the last call; progress["seconds"] adds them up, over interruptions too."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.progress["seconds"] += seconds
        return seconds

    def log_eval(self, step, metrics):
        if not math.isfinite(metrics["val_loss"]):
            self.not_finite(step, f"validation loss {metrics['val_loss']}")
        self.tick()
        self.evals[step] = {"step": step, "kind": "eval", **metrics, **self.progress}
        self.log(self.evals[step])
        errors = {key: f"±{metrics[f'{key}_se']:.3f}" for key in metrics if f"{key}_se" in metrics}
        text = "  ".join(f"{key} {value:.4f}{errors.get(key, '')}" for key, value in metrics.items()
                         if key.startswith(("val_", "heldout_")) and not key.endswith(("_se", "_before")))
        self.print(f"eval {step:6d}/{self.config.max_steps}  {text}")

    def log_collapse(self, step, drop):
        """drop: what spectra.change_point found, or None."""
        if drop:
            self.collapse = {"step": step, "kind": "collapse", **drop, "action": self.config.on_collapse}
            self.log(self.collapse | self.progress)
            self.print(f"collapse  {drop['curve']} fell by {drop['size']:.1%} at step {drop['at']}")

    def not_finite(self, step, what):
        """Training has come apart: nothing of this step is saved."""
        newest = max(checkpoints(self.config.out_dir), default="none")
        error = f"step {step}: {what}; the last checkpoint is {newest}. Try a lower lr, a longer warm-up"
        self.end(1, "" if self.rank else error)  # all processes are here

    def save(self, step, spectra):
        """Write a checkpoint, whole or not at all. spectra: the arrays that spectra.measure gives."""
        self.flush_log()
        if not all(p.isfinite().all() for p in self.params.values()):
            self.not_finite(step, "weights are not finite")
        if self.rank == 0:
            os.fsync(self.log_file.fileno())  # a checkpoint never knows of steps that the log has lost
            moments = {f"{key}/{name}": moment for name, p in self.params.items()
                       for key, moment in self.optimizer.state.get(p, {}).items()}
            state = {"settings": dataclasses.asdict(self.config), "progress": self.progress,
                     "corpus_hash": self.corpus.hash, "scaler": self.scaler.state_dict()}
            save_checkpoint(self.config.out_dir, step, self.model, self.head, moments, self.corpus.tokenizer,
                            spectra, state)
        self.tick()  # the time it took is no step's

    def report(self, autocast):
        """A sampled paragraph, the result, and curves.png."""
        if self.rank:
            return
        folder, eot, rng = self.config.out_dir, self.corpus.eot, torch.Generator(self.device).manual_seed(0)
        with autocast, torch.compiler.set_stance("force_eager"):  # each length would be compiled
            idx = torch.tensor([[eot]], device=self.device)
            ids = self.model.generate(idx, 160, temperature=0.8, top_k=50, generator=rng)[0, 1:].tolist()
        ids = ids[: ids.index(eot)] if eot in ids else ids
        self.print(f"\n{self.corpus.tokenizer.decode(ids).strip()}\n")
        metrics = self.evals[max(self.evals)] | {"GiB": peak_memory(self.device), "n_way": self.config.n_way}
        self.print("result  val_loss {val_loss:.4f}, {val_bits_per_byte:.4f} bits per byte, "
                   "after {step:,} steps, {lm_tokens:,} LM tokens, {episode_tokens:,} episode tokens, "
                   "{flops:.2e} FLOPs, {seconds:.0f} s, peak memory {GiB:.2f} GiB".format_map(metrics))
        if "heldout_query_acc" in metrics:
            self.print("result  held-out words: query accuracy {heldout_query_acc:.3f} ± "
                       "{heldout_query_acc_se:.3f} after adaptation, chance 1/{n_way}".format_map(metrics))
        title = f"{folder} after {metrics['step']:,} steps"
        figure = figures.curves(read_log(folder), dataclasses.asdict(self.config), title)
        figures.save(figure, f"{folder}/curves.png")
        self.print(f"curves  {folder}/curves.png\nrun     {folder}")

    def finish(self, done):
        self.barrier()  # no process ends while another still communicates
        if not done:
            self.print(f"stopped. To continue, give the same command with --resume=True in {os.getcwd()}")
        self.end(0 if done else 128 + (self.signal or signal.SIGTERM))

def read_log(folder, up_to=math.inf):
    """The lines of log.jsonl up to and including step `up_to`. A last line torn by a crash is left out."""
    path = Path(folder, "log.jsonl")
    with attempt(f"read {path}", "copy the log again, or delete the damaged line"):
        texts = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        lines = json.loads(b"[" + b",\n".join(texts) + b"]")  # an error then names the line
        return [line for line in lines if line["kind"] and line["step"] <= up_to]  # no kind: damaged

def text_of(metrics):
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())

def costs(config, model):
    """Tokens and FLOPs of a step of each kind. Padding is computed on, so it counts."""
    tokens = config.batch_size * config.block_size
    lm = Counter(lm_tokens=tokens, flops=tokens * model.flops_per_token(
        config.block_size, backward=True, unembedding=True))
    windows = config.episodes_per_step * config.n_way  # for one shot
    support, query = (windows * shots * config.episode_len for shots in (config.k_shot, config.q_query))
    forward, both = (model.flops_per_token(config.episode_len, backward, unembedding=False)
                     for backward in (False, True))
    flops = support * (both if config.second_order else forward) + query * both
    if config.target != "head":  # the model runs in each inner step; then come the metrics
        inner = config.inner_steps * both * (3 if config.second_order else 1)
        flops = support * (inner + 2 * forward) + query * (both + forward)
    widths = [config.d_model, *[config.head_hidden] * (config.head_layers - 1), config.n_way]
    head_size = sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(widths))
    head = Counter(flops=windows * (config.k_shot * config.inner_steps + config.q_query) * 6 * head_size)
    meta = head + Counter(
        support_tokens=support, query_tokens=query, episode_tokens=support + query, flops=flops)
    # Inline tasks read nothing of their own.
    return {"lm": lm, "meta": meta, "joint": lm + (head if config.mix == "inline" else meta)}
