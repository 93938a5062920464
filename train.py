"""Pretrain a small Llama.

    python train.py config/train_11m.py                        # the quick start: corpus, training, curve and a paragraph within ten minutes
    python train.py config/train_11m.py --seed=1 --out_dir=out/11m-seed1
    python train.py config/train_11m.py --resume=True          # after Ctrl-C, SIGTERM, kill -9 or a power cut

A flat script: settings, system, data, model and optimizer, the loss, schedule, evaluation, saving, the loop.

Row r of the batch of step i is a pure function of (seed, i, r), and so is everything else that is drawn. Hence a resumed run is the run that was never
stopped, bit for bit on a CPU, and evaluating more often changes nothing.
"""
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

import configurator
from model import Llama, ModelConfig
from runs import checkpoints, fail, load_checkpoint, load_corpus, read_log, write_atomic

HERE = os.path.dirname(os.path.abspath(__file__))


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Config:
    # Run
    out_dir: str = "out/run"  # the run folder; a second run wants a second folder
    dataset: str = "docstrings"  # name of a prepared corpus; docstrings is built when it is missing
    data_dir: str = os.path.join(HERE, "data")  # where the prepared corpora are
    seed: int = 0  # of initial weights and of everything that is drawn
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # of the matrix products: auto, float32 or bfloat16; weights and optimizer stay float32
    compile: bool = True  # torch.compile the block, where the machine has a compiler
    resume: bool = False  # go on from the newest checkpoint in out_dir
    expected: str = ""  # the result to expect and the hash of its corpus, shown beside this run's
    # Model
    d_model: int = 96  # width of the residual stream
    n_layers: int = 12  # transformer blocks
    n_heads: int = 12  # query heads; divides d_model into even widths
    n_kv_heads: int = 4  # key/value heads; divides n_heads
    d_ff: int = 384  # hidden width of the SwiGLU
    block_size: int = 512  # tokens in a row
    # Optimization
    batch_size: int = 64  # rows in an optimizer step, over all accumulation
    micro_batch_size: int = 0  # rows in memory at once; 0 takes the whole batch
    max_steps: int = 6000  # optimizer steps
    lr: float = 3e-4  # peak learning rate of AdamW
    warmup_steps: int = 2500  # steps from 0 to the peak
    schedule: str = "linear"  # after the warm-up: linear or cosine to zero at max_steps, or constant
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # largest norm of the gradient
    # Objectives
    meta_ratio: float = 0.0  # share of steps that are meta-learning steps; 0 is a plain language model
    # Looking and saving
    eval_interval: int = 250  # steps between evaluations
    eval_steps: int = 16  # batches in an evaluation, evenly spaced over the validation text
    ckpt_interval: int = 500  # steps between checkpoints
    log_interval: int = 1  # steps between printed lines; log.jsonl has every step


def check(config):
    """End the program with one line that names the setting, if a combination of settings makes no sense."""
    positive = "d_model n_layers n_heads n_kv_heads d_ff block_size batch_size max_steps eval_interval eval_steps ckpt_interval log_interval".split()
    for name in positive:
        if getattr(config, name) < 1:
            fail(f"{name} = {getattr(config, name)}: {name} must be at least 1")
    for name in ("seed", "micro_batch_size", "warmup_steps"):
        if getattr(config, name) < 0:
            fail(f"{name} = {getattr(config, name)}: {name} must not be negative")
    for name, choices in (("device", ("auto", "cpu", "cuda")), ("dtype", ("auto", "float32", "bfloat16")), ("schedule", ("linear", "cosine", "constant"))):
        if getattr(config, name) not in choices:
            fail(f"{name} = {getattr(config, name)!r}: {name} is one of {', '.join(choices)}")
    if not 0 < config.lr < 1:
        fail(f"lr = {config.lr}: lr must lie between 0 and 1 (3e-4 is the paper's)")
    if not (0 <= config.weight_decay < math.inf and 0 < config.grad_clip):
        fail(f"weight_decay = {config.weight_decay}, grad_clip = {config.grad_clip}: the first must not be negative, the second must be positive")
    if config.d_model % config.n_heads or config.d_model // config.n_heads % 2:
        fail(f"d_model = {config.d_model} must divide into n_heads = {config.n_heads} heads of an even width (rotary positions turn pairs)")
    if config.n_heads % config.n_kv_heads:
        fail(f"n_kv_heads = {config.n_kv_heads} must divide n_heads = {config.n_heads}: each key/value head serves equally many query heads")
    if config.micro_batch_size and config.batch_size % config.micro_batch_size:
        fail(f"micro_batch_size = {config.micro_batch_size} must divide batch_size = {config.batch_size}")
    if config.meta_ratio != 0:
        fail(f"meta_ratio = {config.meta_ratio}: only 0, the plain language model, is there so far")


config, rest = configurator.load(Config, sys.argv[1:], __doc__)
if rest:
    fail(f"cannot read {rest[0]}: a config file ends in .py, a setting is --key=value (see --help)")
check(config)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# System

started = time.perf_counter()
if config.device == "cuda" and not torch.cuda.is_available():
    fail("device = cuda, but torch finds no CUDA GPU here; take --device=cpu, or install a CUDA build of torch")
device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")

if config.dtype != "auto":
    dtype = getattr(torch, config.dtype)
elif device.type == "cuda":
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
else:  # bfloat16 products are a gain only where the processor has instructions for them
    features = torch.cpu.get_capabilities()
    dtype = torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16") else torch.float32
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

if device.type == "cpu" and sys.platform == "linux":
    # A fresh page of memory costs more than the arithmetic on it. Have glibc keep what is freed: one arena, no mmap per tensor, no trimming.
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it

compiler = device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
note = "" if config.compile and compiler else ", not compiled" + ("" if compiler else " (no C++ compiler found)")
print(f"system  {name}, {str(dtype).removeprefix('torch.')} products{note}")


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Data

corpus_dir = os.path.join(config.data_dir, config.dataset)
if not os.path.exists(os.path.join(corpus_dir, "meta.json")):
    prepare = [sys.executable, os.path.join(HERE, "data", "prepare.py"), config.dataset, f"--data_dir={config.data_dir}"]
    if config.dataset != "docstrings":
        fail(f"no corpus {corpus_dir}: prepare it with python data/prepare.py {config.dataset} --source=FILES, or take --dataset=docstrings")
    print("data    building the default corpus, once")
    if subprocess.run(prepare).returncode:
        fail(f"could not build the default corpus; to see why, run {' '.join(prepare[1:])}")
corpus = load_corpus(corpus_dir)
for split, tokens in (("training", corpus.train), ("validation", corpus.val)):
    if len(tokens) <= config.block_size:
        fail(f"block_size = {config.block_size} is longer than the {split} split of {corpus_dir} ({len(tokens)} tokens): lower it, or take more text")
print(f"data    {config.dataset} {corpus.meta['corpus_hash']}: {len(corpus.train):,} training tokens, {len(corpus.val):,} for validation, "
      f"vocabulary {corpus.vocab_size:,}")

LM_ROWS = 0  # streams of randomness: each has its own numbers, so that drawing from one never moves another


def draw(stream, step):
    """The generator of a stream at a step: a pure function of (seed, stream, step)."""
    return np.random.default_rng((config.seed, stream, step))


def rows(tokens, starts):
    """Inputs and targets (B, T) int64 on the device: the T tokens from each start, and the same shifted by one."""
    batch = np.stack([tokens[start : start + config.block_size + 1] for start in starts]).astype(np.int64)  # (B, T + 1)
    batch = torch.from_numpy(batch)
    batch = batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch
    return batch[:, :-1], batch[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Model and optimizer

torch.manual_seed(config.seed)
shape = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig) if hasattr(config, field.name)}
model = Llama(ModelConfig(**shape, vocab_size=corpus.vocab_size)).to(device)
if config.compile and compiler:
    for block in model.blocks:  # the block, not the model: one compilation serves all layers, and training starts sooner
        block.compile()
matrices = [p for p in model.parameters() if p.dim() >= 2]
vectors = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
print(f"model   {model.n_params():,} parameters: d {config.d_model}, {config.n_layers} layers, {config.n_heads} heads / {config.n_kv_heads} kv heads")


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The loss


def lm_step(step):
    """Next-token prediction on the rows of this step. Leaves gradients in the parameters; returns what to log and what it cost."""
    starts = draw(LM_ROWS, step).integers(len(corpus.train) - config.block_size, size=config.batch_size)
    micro = config.micro_batch_size or config.batch_size
    total = 0.0
    for first in range(0, config.batch_size, micro):
        idx, targets = rows(corpus.train, starts[first : first + micro])
        with autocast:
            loss = model(idx, targets)
        (loss * micro / config.batch_size).backward()
        total += loss.detach() * micro / config.batch_size
    tokens = config.batch_size * config.block_size
    return {"lm_loss": total.item()}, {"lm_tokens": tokens, "flops": tokens * model.flops_per_token(config.block_size, backward=True, unembedding=True)}


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Schedule


def lr_at(step):
    """Learning rate of a step, counted from 1: linear warm-up, then down to zero just after max_steps, or constant."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    left = (config.max_steps + 1 - step) / (config.max_steps + 1 - config.warmup_steps)  # 1 at the peak, 0 after the last step
    return config.lr * {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[config.schedule]


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate():
    """Loss on rows spread evenly over the validation text, the same rows for every seed, step and run."""
    model.eval()
    n_rows = min(config.eval_steps * config.batch_size, len(corpus.val) // (config.block_size + 1))
    starts = np.linspace(0, len(corpus.val) - config.block_size - 1, n_rows).astype(np.int64)
    total = 0.0
    for chunk in np.array_split(starts, math.ceil(n_rows / (config.micro_batch_size or config.batch_size))):
        with autocast:
            total += model(*rows(corpus.val, chunk)).item() * len(chunk)
    model.train()
    loss = total / n_rows
    return {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) * corpus.val_tokens_per_byte}


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Saving


def save(step):
    """Write the checkpoint of a step whole or not at all, then take the optimizer out of the third newest: two are enough to go on from."""
    state = {
        "model": model.state_dict(), "head": {}, "optimizer": optimizer.state_dict(), "scaler": {},
        "step": step, "progress": progress, "config": dataclasses.asdict(config) | {"vocab_size": corpus.vocab_size},
    }  # fmt: skip
    write_atomic(os.path.join(config.out_dir, f"ckpt_{step:06d}.pt"), lambda file: torch.save(state, file))
    for path in list(checkpoints(config.out_dir).values())[-3:-2]:
        older = load_checkpoint(path)
        if older["optimizer"]:
            write_atomic(path, lambda file: torch.save(older | {"optimizer": {}, "scaler": {}}, file))


def plot():
    """Draw loss.png from log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(config.out_dir)
    train = np.array([(line["step"], line["lm_loss"]) for line in lines if line["kind"] == "lm"]).reshape(-1, 2)
    val = np.array([(line["step"], line["val_loss"]) for line in lines if line["kind"] == "eval"]).reshape(-1, 2)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*train.T, color="0.75", linewidth=0.8, label="training, each step")
    axes.plot(*val.T, color="#0072b2", marker="o", markersize=4, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=f"{config.out_dir}: validation loss {val[-1, 1]:.3f} after {int(val[-1, 0]):,} steps")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = os.path.join(config.out_dir, "loss.png")
    write_atomic(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    return path


def git_commit():
    """The commit of this code, with a + where files differ from it; empty outside a git checkout."""
    try:
        text = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=HERE, capture_output=True, text=True, timeout=10)
        return text.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


config_path = os.path.join(config.out_dir, "config.json")
log_path = os.path.join(config.out_dir, "log.jsonl")
step, progress = 0, {"lm_tokens": 0, "episode_tokens": 0, "flops": 0.0, "seconds": 0.0}
if os.path.exists(config_path) and not config.resume:
    fail(f"{config.out_dir} already holds a run: go on with --resume=True, or take another --out_dir")
if config.resume:
    if not os.path.exists(config_path):
        fail(f"resume = True, but {config.out_dir} holds no run; check --out_dir, or leave --resume out to start one")
    found = checkpoints(config.out_dir)
    if found:
        checkpoint = load_checkpoint(found[max(found)], device)
        for key in [*shape, "seed", "batch_size"]:
            was, now = checkpoint["config"][key], getattr(config, key)
            if was != now:
                fail(f"cannot resume {config.out_dir} with {key} = {now}: the run was begun with {key} = {was}")
        if checkpoint["config"]["vocab_size"] != corpus.vocab_size:
            fail(f"cannot resume {config.out_dir} on this corpus: its vocabulary is {corpus.vocab_size}, the run's was {checkpoint['config']['vocab_size']}")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, progress = checkpoint["step"], checkpoint["progress"]
        if checkpoint["config"]["max_steps"] != config.max_steps:
            print(f"resume  max_steps was {checkpoint['config']['max_steps']} and is now {config.max_steps}: from here on the learning rate follows the "
                  f"{config.schedule} schedule of {config.max_steps} steps, {lr_at(step + 1):.2e} at the next step")
    kept = read_log(config.out_dir, up_to=step if found else -1)  # what was logged after the checkpoint is done again
    write_atomic(log_path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in kept).encode()))
    print(f"resume  {config.out_dir} after step {step}")

os.makedirs(config.out_dir, exist_ok=True)
for name in ("tokenizer.tiktoken", "meta.json"):
    shutil.copyfile(os.path.join(corpus_dir, name), os.path.join(config.out_dir, name))
made = {
    "vocab_size": corpus.vocab_size, "corpus_hash": corpus.meta["corpus_hash"], "git": git_commit(), "argv": sys.argv[1:],
    "system": {"device": str(device), "dtype": str(dtype), "threads": torch.get_num_threads(), "platform": platform.platform()},
    "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")},
}  # fmt: skip
write_atomic(config_path, lambda file: file.write(json.dumps(dataclasses.asdict(config) | made, indent=2).encode()))
log_file = open(log_path, "a", encoding="utf8")


def log(line):
    """One object a line, on the disk before the next step begins."""
    log_file.write(json.dumps(line) + "\n")
    log_file.flush()


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The loop

stopped_by = None


def stop(signum, frame):
    """First Ctrl-C or SIGTERM: finish the step, save, leave. Second: leave at once; the last checkpoint stands."""
    global stopped_by
    stopped_by = signal.Signals(signum)
    signal.signal(signum, signal.SIG_DFL)
    print(f"\n{stopped_by.name}: saving after this step (once more to leave at once)", flush=True)


def look():
    """Evaluate, print and log."""
    numbers = evaluate()
    log({"step": step, "kind": "eval", **numbers, **progress})
    print(f"eval {step:6d}/{config.max_steps}  val_loss {numbers['val_loss']:.4f}  bits/byte {numbers['val_bits_per_byte']:.4f}", flush=True)
    return numbers


signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
model.train()
clock = time.perf_counter()  # since the last reading; progress["seconds"] adds up over interruptions
first_step, eta_clock = step, None
if step == 0:
    look()
while step < config.max_steps and not stopped_by:
    # ------------------------------------------------------------------------------------------------------------------------------------------------
    step += 1
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step)
    numbers, cost = lm_step(step)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
    if not math.isfinite(numbers["lm_loss"] + norm):
        log_file.close()
        last = max(checkpoints(config.out_dir), default=None)
        fail(f"step {step}: loss {numbers['lm_loss']}, gradient norm {norm}. Nothing of this step was saved; the last checkpoint is "
             f"{'none' if last is None else f'of step {last}'}. Try a lower lr or a longer warm-up", code=1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # ------------------------------------------------------------------------------------------------------------------------------------------------
    now = time.perf_counter()
    seconds, clock = now - clock, now
    for key, value in cost.items():
        progress[key] += value
    progress["seconds"] += seconds
    line = {"step": step, "kind": "lm", **numbers, "lr": lr_at(step), "grad_norm": norm, **progress, "tokens_per_second": cost["lm_tokens"] / seconds}
    log(line)
    if eta_clock is None:  # the first step compiles and says nothing about the others
        eta_clock = now
    left = (now - eta_clock) / max(1, step - first_step - 1) * (config.max_steps - step)
    if step % config.log_interval == 0 or step == config.max_steps:
        print(f"step {step:6d}/{config.max_steps}  lm_loss {numbers['lm_loss']:.4f}  lr {lr_at(step):.2e}  norm {norm:.2f}  "
              f"{line['tokens_per_second'] / 1e3:.1f}k tok/s  left {int(left // 60)}m{int(left % 60):02d}s", flush=True)
    last_step = step == config.max_steps
    if step % config.eval_interval == 0 or last_step:
        look()
    if step % config.ckpt_interval == 0 or last_step or stopped_by:
        save(step)

if stopped_by and step < config.max_steps:
    print(f"stopped after step {step}, saved. To go on: python train.py {' '.join(sys.argv[1:])}" + (" --resume=True" if not config.resume else ""))
    sys.exit(128 + stopped_by)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# What came of it

final = [line for line in read_log(config.out_dir) if line["kind"] == "eval"][-1]
generator = torch.Generator(device).manual_seed(config.seed)
with autocast:
    ids = model.eval().generate(torch.tensor([[corpus.eot]], device=device), 160, temperature=0.8, top_k=50, generator=generator)[0, 1:].tolist()
text = corpus.encoding.decode(ids[: ids.index(corpus.eot)] if corpus.eot in ids else ids)
print(f"\n{text.strip()}\n")
print(f"result  val_loss {final['val_loss']:.4f}, {final['val_bits_per_byte']:.4f} bits per byte, after {step:,} steps, {progress['lm_tokens']:,} tokens, "
      f"{progress['flops']:.2e} FLOPs, {time.perf_counter() - started:.0f} s")
if config.expected:
    same = corpus.meta["corpus_hash"] in config.expected
    print(f"expect  {config.expected}" + ("" if same else f"; this corpus is {corpus.meta['corpus_hash']} (other package versions), so expect a slightly other number"))
print(f"curve   {plot()}\nrun     {config.out_dir}")
