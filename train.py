"""Pretrain a small Llama, by next-token prediction interleaved with first-order MAML on few-shot tasks cut from the same text.

    python train.py config/train_11m.py                        # the quick start: corpus, training, curves and a paragraph within minutes
    python train.py config/train_11m.py --meta_ratio=0 --out_dir=out/11m-vanilla        # its baseline, on the same batches
    python train.py config/train_11m.py --resume=True          # after Ctrl-C, SIGTERM, kill -9 or a power cut
    torchrun --nproc_per_node=8 train.py config/train_570m.py  # one process a GPU; without GPUs they meet through gloo

A flat script: settings, system, data, model and optimizer, the two losses, schedule, evaluation, saving, the loop. At each step a coin chooses one of
the losses (Africa et al. 2025, https://arxiv.org/abs/2508.02189); the one where model, episodes and inner loop meet is `run_episodes`.

Everything drawn is a pure function of (seed, stream, step). Hence a resumed run is the run that was never stopped, bit for bit on a CPU, evaluating
more often changes nothing, a language-model step i sees the same text in every run of a seed, and how many processes share a step does not matter.
"""
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zlib
from dataclasses import dataclass

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends the program and shows no traceback

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import configurator
import maml
import smlmt
import spectra
from model import Llama, ModelConfig
from runs import cannot_write, checkpoints, decode, fail, keep_freed_memory, load_checkpoint, load_corpus, lock, read_json, read_log, write_atomic

HERE = os.path.dirname(os.path.abspath(__file__))
started = time.perf_counter()
rank, world, local_rank = (int(os.environ.get(name, one)) for name, one in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # from torchrun


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
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16 or float16 (scaled gradients); weights and optimizer stay float32
    compile: bool = True  # torch.compile the block, where the machine has a compiler
    resume: bool = False  # go on from the newest checkpoint in out_dir
    expected: str = ""  # the result to expect and the hash of its corpus, shown beside this run's
    wandb: bool = False  # show the run on Weights & Biases too, or with WANDB_MODE=offline keep it for a later `wandb sync`
    wandb_project: str = "nanomaml"  # under this project
    # Model
    d_model: int = 96  # width of the residual stream
    n_layers: int = 12  # transformer blocks
    n_heads: int = 12  # query heads; divides d_model into even widths
    n_kv_heads: int = 4  # key/value heads; divides n_heads
    d_ff: int = 384  # hidden width of the SwiGLU
    block_size: int = 512  # tokens in a row
    # Optimization
    batch_size: int = 64  # rows in a language-model step, over all processes and accumulation
    micro_batch_size: int = 0  # rows that a process has in memory at once; 0 takes all its rows
    max_steps: int = 6000  # optimizer steps of either kind
    lr: float = 3e-4  # peak learning rate of AdamW, the outer loop
    warmup_steps: int = 2500  # steps from 0 to the peak
    schedule: str = "linear"  # after the warm-up: linear or cosine to zero at max_steps, or constant
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # largest norm of the gradient
    # Meta-learning: episodes
    meta_ratio: float = 0.0  # share of steps that are meta steps; 0 is the vanilla baseline, the paper has 0.5
    n_way: int = 16  # words to tell apart in an episode
    k_shot: int = 4  # support windows a word
    q_query: int = 4  # query windows a word
    episodes_per_step: int = 1  # episodes in a meta step, over all processes
    micro_episodes: int = 0  # episodes that a process has in memory at once; 0 takes all its episodes
    episode_len: int = 64  # longest window in tokens; independent of block_size
    readout: str = "before"  # features are read before the blank, at it (mask), or at the last token of the window
    word_min_count: int = 20  # the band of words: least occurrences in the pool
    word_max_count: int = 5000  # most occurrences in the pool
    on_collapse: str = "off"  # when an effective rank collapses: stop, vanilla (no meta steps from there), meta (none before), or off
    pool_tokens: int = 10_000_000  # text in memory for the episodes; refreshed every 1,000 steps where the corpus is larger
    # Meta-learning: inner loop
    inner_steps: int = 10  # gradient steps on the support set; 0 is the multi-task control
    inner_lr: float = 10.0  # their learning rate, on features of length about 1
    second_order: bool = False  # differentiate through the inner gradients
    target: str = "head"  # what adapts: the head alone, or with it attention, mlp, attention+mlp, norms or all of the blocks
    target_layers: str = ""  # of which blocks, as 0,1,5; empty is all of them, and then norms and all have the final norm too
    target_lr: float = 0.01  # inner learning rate of the target's parameters; inner_lr is the head's
    head_layers: int = 1  # linear layers in the head that adapts; the paper has 4
    head_hidden: int = 128  # width of its hidden layers
    shuffle_labels: bool = False  # control: permute support labels within the episode, so that support teaches nothing
    # Looking and saving
    eval_interval: int = 250  # steps between evaluations
    eval_steps: int = 16  # batches in an evaluation, evenly spaced over the validation text
    ckpt_interval: int = 500  # steps between checkpoints
    log_interval: int = 1  # steps between printed lines; log.jsonl has every step


# What adapts in the inner loop: the beginnings of its parameters' names within a block.
TARGETS = {"head": (), "attention": ("attention.",), "mlp": ("mlp.",), "attention+mlp": ("attention.", "mlp."),
           "norms": ("attention_norm.", "mlp_norm."), "all": ("",)}  # fmt: skip


def check(config):
    """End the program with one line that names the setting, if a value or a combination of settings makes no sense."""
    least = {"n_way": 2, "episode_len": smlmt.MIN_WINDOW} | dict.fromkeys("seed micro_batch_size warmup_steps micro_episodes inner_steps".split(), 0)
    most = {"n_layers": 1000, "head_layers": 1000, "n_way": 65_536, "inner_steps": 1000}
    for field in dataclasses.fields(config):
        value, low, high = getattr(config, field.name), least.get(field.name, 1), most.get(field.name, 2**63 - 1)
        if field.type is int and not low <= value <= high:
            fail(f"{field.name} = {value}: {field.name} must be at {f'least {low}' if value < low else f'most {high}'}")
        if field.type is str and not value.isprintable():
            fail(f"{field.name} = {value!r}: {field.name} is text in one line, without control characters")
    choices = {"device": "auto cpu cuda", "dtype": "auto float32 bfloat16 float16", "schedule": "linear cosine constant",
               "readout": "before mask last", "target": " ".join(TARGETS), "on_collapse": "off stop vanilla meta"}  # fmt: skip
    for name, words in choices.items():
        if getattr(config, name) not in words.split():
            fail(f"{name} = {getattr(config, name)!r}: {name} is one of {', '.join(words.split())}")
    if not 0 < config.lr < 1:
        fail(f"lr = {config.lr}: lr must lie between 0 and 1 (3e-4 is the paper's)")
    if not (0 <= config.weight_decay < math.inf and config.grad_clip > 0 and 0 < config.inner_lr < math.inf and 0 < config.target_lr < math.inf):
        fail(f"weight_decay = {config.weight_decay}, grad_clip = {config.grad_clip}, inner_lr = {config.inner_lr}, target_lr = {config.target_lr}: "
             "the first must not be negative, the others must be positive")
    if config.d_model % config.n_heads or config.d_model // config.n_heads % 2:
        fail(f"d_model = {config.d_model} must divide into n_heads = {config.n_heads} heads of an even width (rotary positions turn pairs)")
    if config.n_heads % config.n_kv_heads:
        fail(f"n_kv_heads = {config.n_kv_heads} must divide n_heads = {config.n_heads}: each key/value head serves equally many query heads")
    memory, rows, episodes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), config.batch_size, config.episodes_per_step
    C, H = config.d_model, config.head_hidden
    held = {  # settings -> numbers that a machine has in memory at the very least, whatever else it has
        "d_model n_layers d_ff": config.n_layers * C * (2 * C + 3 * config.d_ff),
        "d_model head_layers head_hidden": (C * H + (config.head_layers - 2) * H * H) * (config.head_layers > 1),
        "batch_size micro_batch_size block_size": max(rows, min(rows, config.micro_batch_size or rows) * config.block_size),
        "episodes_per_step micro_episodes n_way k_shot q_query episode_len": min(episodes, config.micro_episodes or episodes)
            * config.n_way * (config.k_shot + config.q_query) * config.episode_len * (config.meta_ratio > 0),
    }  # fmt: skip
    for names, numbers in held.items():
        if 4 * numbers > memory:
            shown = ", ".join(f"{name} = {getattr(config, name)}" for name in names.split())
            fail(f"{shown}: this takes {4 * numbers / 2**30:,.0f} GiB of memory or more, and this machine has {memory / 2**30:,.0f}: lower one")
    for name in ["batch_size"] + ["episodes_per_step"] * (config.meta_ratio > 0):
        if getattr(config, name) < world:
            fail(f"{name} = {getattr(config, name)}, but there are {world} processes to share it: raise {name}, or start fewer")
    if set(config.target_layers.split(",")) - {"", *map(str, range(config.n_layers))}:
        fail(f"target_layers = {config.target_layers}: write the numbers of blocks, 0 to {config.n_layers - 1}, as 0,1,5, or nothing for all")
    if config.target == "head" and config.target_layers:
        fail(f"target_layers = {config.target_layers} chooses among blocks, but target = head adapts none: set target, or leave target_layers out")
    if config.target != "head" and config.inner_steps == 0:
        fail(f"target = {config.target} does not adapt with inner_steps = 0: raise inner_steps, or take --target=head")
    if not 0 <= config.meta_ratio <= 1:
        fail(f"meta_ratio = {config.meta_ratio}: a share lies between 0 and 1 (0 is the vanilla baseline)")
    if config.meta_ratio == 0 and config.on_collapse in ("vanilla", "meta"):
        fail(f"on_collapse = {config.on_collapse} switches meta steps off or on, but meta_ratio = 0 has none: raise meta_ratio")
    if config.on_collapse != "off" and (config.max_steps - config.warmup_steps) // config.eval_interval + 1 < spectra.LEAST_VALUES:
        fail(f"on_collapse = {config.on_collapse} takes {spectra.LEAST_VALUES} evaluations after warm-up, and eval_interval = {config.eval_interval} "
             "gives fewer: lower it")
    if config.meta_ratio == 0 and config.readout == "mask":
        fail("readout = mask needs meta_ratio above 0: language-model steps never show <|mask|>, so a vanilla model is read at before or last")


with contextlib.redirect_stderr(open(os.devnull, "w") if rank else sys.stderr):  # all processes find the same mistake: one of them tells
    config, rest = configurator.load(Config, sys.argv[1:], __doc__)
    if rest:
        fail(f"cannot read {rest[0]}: a config file ends in .py, a setting is --key=value (see --help)")
    check(config)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# System

stopped_by = None  # the signal that asks the loop to end
builder = None  # the process that prepares the default corpus
tracker = None  # the run on Weights & Biases


def say(text):
    """Print at once, or go on in silence: a reader that went away (`| head`, Ctrl-C on `| tee`) must not end a run. One process speaks for all."""
    if rank:
        return
    try:
        os.write(1, f"{text}\n".encode())  # print may not be called while printing, as a signal handler might
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def stop(signum, frame):
    """First Ctrl-C or SIGTERM: the loop finishes its step, saves, and leaves. Second: leave at once; the last checkpoint stands."""
    global stopped_by
    stopped_by = signal.Signals(signum)
    signal.signal(signum, signal.SIG_DFL)
    say(f"\n{stopped_by.name}: saving after this step (once more to leave at once)")


def leave(signum, frame):
    """Ctrl-C or SIGTERM before the loop: there is nothing to save."""
    if builder:
        builder.terminate()
        builder.wait()
    say("\nstopped before the first step; nothing was begun")
    os._exit(128 + signum)


for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, leave)


def unexpected(kind, error, trace):
    """What an exception that nobody caught prints: a line where memory has run out, else all there is to find the mistake by."""
    if issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        print("error: out of memory: lower micro_batch_size and micro_episodes (0 takes all at once), block_size or the size of the model; "
              "the last checkpoint stands", file=sys.stderr)  # fmt: skip
        end(1)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = unexpected

if config.device == "cuda" and not torch.cuda.is_available():
    fail("device = cuda, but torch finds no CUDA GPU here; take --device=cpu, or install a CUDA build of torch")
device = torch.device("cuda", local_rank) if config.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    if local_rank >= torch.cuda.device_count():
        fail(f"process {local_rank} of this machine has no GPU, it has {torch.cuda.device_count()}: lower --nproc_per_node of torchrun")
    torch.cuda.set_device(device)

if config.dtype != "auto":
    dtype = getattr(torch, config.dtype)
elif device.type == "cuda":
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
else:  # bfloat16 products are a gain only where the processor has instructions for them
    has = torch.cpu.get_capabilities()
    dtype = torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16") else torch.float32
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 gradients below 6e-8 are zero: multiply the loss, divide later

if device.type == "cpu":
    keep_freed_memory()
torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it

cxx = shlex.split(os.environ.get("CXX", "g++"))[0]  # with Python's headers, what torch.compile needs on a CPU
compiler = device.type == "cuda" or (shutil.which(cxx) and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
note = "" if config.compile and compiler else ", not compiled" + ("" if compiler else " (no C++ compiler with Python headers found)")
say(f"system  {world} x {where}, {str(dtype).removeprefix('torch.')} products{note}" if world > 1 else
    f"system  {where}, {str(dtype).removeprefix('torch.')} products{note}")

if world > 1:
    store = next(dist.rendezvous("env://"))[0]  # torchrun's: it outlives each of us
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                            device_id=device if device.type == "cuda" else None)  # fmt: skip


def end(code, mistake=""):
    """End this process, with a line about a mistake unless another process, which finds the same, was first to tell. One of several does not
    wait for its threads, nor for one that is lost: torch aborted one end in four with "terminate called" when it did."""
    told = 0
    with contextlib.suppress(RuntimeError):  # the store is lost too
        told = store.add("told", 1) - 1 if mistake and world > 1 else 0
    if mistake and not told:
        print(f"error: {mistake}", file=sys.stderr)
    if tracker:
        tracker.finish(code)
    if world == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def over_all(tensor):
    """The sum of a tensor over all processes, in place; their one way to speak with each other."""
    if world > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            end(1, f"another process of this run is gone ({reason}); the last checkpoint stands, go on with --resume=True")
    return tensor


def wait():
    """Return when all processes have come here. Reading the sum is what waits: on a GPU all_reduce returns before it is there."""
    over_all(torch.zeros(1, device=device)).item()


def chunks(n, size):
    """This process's share of n rows or episodes, as slices of at most `size`; 0 sets no limit."""
    first, last = rank * n // world, (rank + 1) * n // world
    return [slice(i, min(i + (size or n), last)) for i in range(first, last, size or n)]


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Data

config_path, log_path = (os.path.join(config.out_dir, name) for name in ("config.json", "log.jsonl"))
if rank:  # the first process goes ahead up to the loop: it may have a corpus to build, or find a mistake, of which it tells
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        wait()
if config.resume and not os.path.exists(config_path):
    fail(f"resume = True, but {config.out_dir} holds no run; check --out_dir, or leave --resume out to start one")
try:
    os.makedirs(config.out_dir, exist_ok=True)
except OSError as error:
    fail(f"cannot make the run folder {config.out_dir}: {error.strerror}; take another --out_dir")
if not rank:
    lock(config.out_dir)
    if not config.resume and (os.path.exists(config_path) or checkpoints(config.out_dir)):
        fail(f"{config.out_dir} already holds a run: go on with --resume=True, or take another --out_dir")

corpus_dir = os.path.join(config.data_dir, config.dataset)
if not os.path.exists(os.path.join(corpus_dir, "meta.json")):
    prepare = [sys.executable, os.path.join(HERE, "data", "prepare.py"), config.dataset, f"--data_dir={config.data_dir}"]
    if config.dataset != "docstrings":
        where = "" if config.data_dir == Config.data_dir else f" --data_dir={shlex.quote(config.data_dir)}"
        fail(f"no corpus {corpus_dir}: prepare it with python data/prepare.py {config.dataset} --source=FILES{where}, or take --dataset=docstrings")
    say("data    building the default corpus, once")
    builder = subprocess.Popen(prepare)
    if code := builder.wait():
        sys.exit(code)  # it has said why
    builder = None
corpus = load_corpus(corpus_dir)
for split, tokens in (("training", corpus.train), ("validation", corpus.val)):
    if len(tokens) <= config.block_size:
        fail(f"block_size = {config.block_size} is longer than the {split} split of {corpus_dir} ({len(tokens)} tokens): lower it, or take more text")
say(f"data    {config.dataset} {corpus.meta['corpus_hash']}: {len(corpus.train):,} training tokens, {len(corpus.val):,} for validation, "
      f"vocabulary {corpus.vocab_size:,}")
parts = {source["name"]: source["val_range"] for source in corpus.meta["sources"]}  # of the validation text
parts = parts if len(parts) > 1 else {}
if short := [name for name, (first, last) in parts.items() if last - first <= config.block_size]:
    say(f"data    too little validation text for a loss of their own: {', '.join(short)}")

LM_ROWS, COIN, EPISODES, POOL, SHUFFLE = range(5)  # streams of randomness: drawing from one never moves another


def draw(stream, *index):
    """The random generator of a stream at an index (the step, say): a pure function of (seed, stream, index)."""
    return np.random.default_rng((config.seed, stream, *index))


def to_device(array):
    """A numpy integer array as an int64 tensor on the device, copied while the GPU works on."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def rows(tokens, starts):
    """Inputs and targets, each (B, T): the T tokens from each of the B starts, and the same shifted by one."""
    batch = to_device(np.stack([tokens[start : start + config.block_size + 1] for start in starts]))  # (B, T + 1)
    return batch[:, :-1], batch[:, 1:]


def sampler_of(tokens, seed):
    """An episode sampler over a pool of text, with this run's settings. ValueError: the text cannot give such episodes."""
    wanted = {name: getattr(config, name) for name in "n_way k_shot q_query episode_len readout word_min_count word_max_count".split()}
    return smlmt.Sampler(tokens, corpus.token_bytes, eot=corpus.eot, mask=corpus.mask, seed=seed, **wanted)


POOL_STEPS = 1000  # steps between two pools, where the corpus is larger than one
sampler, sampler_number = None, None


def training_episode(step, e):
    """Episode e of a step. The pool of text behind it is a function of the step too; only a corpus larger than a pool has more than one."""
    global sampler, sampler_number
    number = 0 if len(corpus.train) <= config.pool_tokens else step // POOL_STEPS
    if number != sampler_number:
        try:
            text = smlmt.pool(corpus.train, config.pool_tokens, (config.seed, POOL), number, eot=corpus.eot)
            sampler, sampler_number = sampler_of(text, (config.seed, EPISODES)), number
        except ValueError as error:
            end(2 if step == 1 else 1, f"no episodes from {corpus_dir} at step {step}: {error}")
    episode = sampler.episode((step, e))
    if config.shuffle_labels:
        episode = dataclasses.replace(episode, support_labels=draw(SHUFFLE, step, e).permutation(episode.support_labels))
    return episode


if config.meta_ratio > 0:
    training_episode(1, 0)  # a corpus that cannot give episodes is better known before the work
try:  # the same episodes for every run, seed and step: words of training and words that training never asks about
    val_sampler = sampler_of(smlmt.pool(corpus.val, config.pool_tokens, 0, 0, eot=corpus.eot), 0)
    val_sampler.episode(0, heldout=True)
except ValueError as error:
    val_sampler = None
    say(f"data    no episodes in evaluations: {error}")


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Model and optimizer

torch.manual_seed(config.seed)
shape = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig) if hasattr(config, field.name)}
model = Llama(ModelConfig(**shape, vocab_size=corpus.vocab_size)).to(device)
if config.compile and compiler:
    model.compile_parts()
# The multi-task control cannot tell permuted labels apart without adapting: its head has an output for each id of the vocabulary.
multi_task = config.inner_steps == 0
n_out = corpus.vocab_size if multi_task else config.n_way
head = maml.init_head(config.d_model, n_out, config.head_layers, config.head_hidden, torch.Generator().manual_seed(config.seed))
head = {name: p.to(device).requires_grad_(config.meta_ratio > 0) for name, p in head.items()}
parameters = [p for p in [*model.parameters(), *head.values()] if p.requires_grad]
groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
          {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
say(f"model   {model.n_params():,} parameters: d {config.d_model}, {config.n_layers} layers, {config.n_heads} heads / {config.n_kv_heads} kv heads")


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# What adapts in the inner loop besides the head


class Reader(torch.nn.Module):
    """The model with `features_at` for its forward, since functional_call calls no other method."""

    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, tokens, positions):
        return self.model.features_at(tokens, positions)


reader = Reader()
layers = sorted({int(word) for word in config.target_layers.split(",") if word}) or range(config.n_layers)
names = tuple(f"model.blocks.{i}.{beginning}" for i in layers for beginning in TARGETS[config.target])
names += ("model.norm.",) if config.target in ("norms", "all") and not config.target_layers else ()
target = {name: p for name, p in reader.named_parameters() if names and name.startswith(names)}
# An inner gradient passes by no scaler: instead of float16 it takes float32.
inner_autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The two losses. Each leaves its gradient in the parameters and returns what to log, this process's share of each mean.


def lm_step(step):
    """Next-token prediction on the rows of this step."""
    starts = draw(LM_ROWS, step).integers(len(corpus.train) - config.block_size, size=config.batch_size)
    total = torch.zeros((), device=device)
    for part in chunks(config.batch_size, config.micro_batch_size):
        idx, targets = rows(corpus.train, starts[part])
        with autocast:
            loss = model(idx, targets) * (len(idx) / config.batch_size)
        scaler.scale(loss).backward()
        total += loss.detach()
    return {"lm_loss": total}


def run_episodes(episodes, head, columns=False, steps=config.inner_steps):
    """Mean query loss of E episodes after adaptation, and the numbers of each, (E,): the one place where model, episodes and inner loop meet.

    At first order the support features need no graph: the head adapts on them as constants, and the backbone learns from the query alone.
    """
    field = {f.name: to_device(np.stack([getattr(e, f.name) for e in episodes])) for f in dataclasses.fields(smlmt.Episode)}  # (E, ...)
    if config.target != "head":
        return run_episodes_through(field, head, steps)

    def features(tokens, positions):  # (E, M, L) tokens, read at (E, M) positions -> (E, M, C)
        return model.features_at(tokens.flatten(0, 1), positions.flatten()).unflatten(0, positions.shape)

    with autocast, contextlib.nullcontext() if config.second_order else torch.no_grad():
        support = features(field["support"], field["support_pos"])
    with autocast:
        query = features(field["query"], field["query_pos"])
    start = maml.columns(head, field["words"]) if columns else head
    return maml.episode_loss(start, support, field["support_labels"], query, field["query_labels"],
                             lr=config.inner_lr, steps=steps, first_order=not config.second_order)


def run_episodes_through(field, head, steps):
    """run_episodes for a target within the backbone, which then runs in each inner step: an episode at a time, its weights handed in by name."""
    # FORK HERE for other parameters to adapt: name their initial values in `start`, and say in `logits` how the model reads with them.
    start = {**target, **{f"head.{name}": p for name, p in head.items()}}
    rates = {name: config.inner_lr if name.startswith("head.") else config.target_lr for name in start}

    def logits(params, windows):  # windows: tokens (M, L) and the positions (M,) to read -> (M, N)
        with inner_autocast:
            features = torch.func.functional_call(reader, {name: params[name] for name in target}, windows)  # (M, C)
        return maml.head_logits({name: params[f"head.{name}"] for name in head}, maml.scaled(features))

    losses, numbers = [], []
    # Compiled blocks know nothing of torch.func, and fused attention has no second derivative.
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH) if config.second_order else contextlib.nullcontext():
        for e in range(len(field["words"])):
            support, query = (((field[name][e], field[f"{name}_pos"][e]), field[f"{name}_labels"][e]) for name in ("support", "query"))
            loss, number = maml.adapted_loss(logits, start, support, query, lr=rates, steps=steps, first_order=not config.second_order)
            losses.append(loss)
            numbers.append(number)
    return torch.stack(losses).mean(), {name: torch.stack([number[name] for number in numbers]) for name in numbers[0]}


def meta_step(step):
    """One outer step of MAML: the gradient of the query loss after adaptation, for the backbone and for the head's initial weights."""
    total = {}
    for part in chunks(config.episodes_per_step, config.micro_episodes):
        episodes = [training_episode(step, e) for e in range(part.start, part.stop)]
        loss, numbers = run_episodes(episodes, head, columns=multi_task)
        scaler.scale(loss * (len(episodes) / config.episodes_per_step)).backward()
        numbers["far_share"] = torch.tensor([episode.far_share for episode in episodes], device=device)
        for name, values in numbers.items():
            total[name] = total.get(name, 0) + values.sum() / config.episodes_per_step
    return total


def cost_of(kind):
    """Tokens and FLOPs of one step: the one place where the two kinds of step are accounted. Padding is computed on, so it counts."""
    if kind == "lm":
        tokens = config.batch_size * config.block_size
        return {"lm_tokens": tokens, "flops": tokens * model.flops_per_token(config.block_size, backward=True, unembedding=True)}
    windows = config.episodes_per_step * config.n_way  # for one shot
    support, query = (windows * shots * config.episode_len for shots in (config.k_shot, config.q_query))
    forward, both = (model.flops_per_token(config.episode_len, backward=backward, unembedding=False) for backward in (False, True))
    backbone = support * (both if config.second_order else forward) + query * both
    if config.target != "head":  # an inner step goes forward and back, at second order all of that back once more; then come the numbers to log
        backbone = support * (config.inner_steps * both * (3 if config.second_order else 1) + 2 * forward) + query * (both + forward)
    adapting = sum(p.numel() for p in maml.init_head(config.d_model, config.n_way, config.head_layers, config.head_hidden).values())
    inner = windows * (config.k_shot * config.inner_steps + config.q_query) * 6 * adapting
    return {"support_tokens": support, "query_tokens": query, "episode_tokens": support + query, "flops": backbone + inner}


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Schedule


def objective(step):
    """"meta" with probability meta_ratio, else "lm". With on_collapse, meta steps end, or begin, after the evaluation that saw the collapse."""
    episodes = {"vanilla": not collapsed, "meta": collapsed}.get(config.on_collapse, True)
    return "meta" if episodes and draw(COIN, step).random() < config.meta_ratio else "lm"


def over():
    """Whether the run has come to its end: the last step, or the collapse that it was to stop at."""
    return step >= config.max_steps or (config.on_collapse == "stop" and collapsed)


def lr_at(step):
    """Learning rate of a step, counted from 1: linear warm-up, then down to zero just after max_steps, or constant."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    left = (config.max_steps + 1 - step) / (config.max_steps + 1 - config.warmup_steps)  # 1 at the peak, 0 after the last step
    return config.lr * {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[config.schedule]


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Evaluation, the same for every run: it draws nothing and changes nothing


def loss_on(first, last):
    """Mean loss on rows spread evenly over the tokens from first to last of the validation text."""
    n_rows = min(config.eval_steps * config.batch_size, (last - first) // (config.block_size + 1))
    starts = np.linspace(first, last - config.block_size - 1, n_rows).astype(np.int64)
    total = torch.zeros((), device=device)
    for part in chunks(n_rows, config.micro_batch_size or config.batch_size):
        with autocast, torch.enable_grad():  # as in training, whose kernels then serve: those without gradients would be compiled besides
            total += model(*rows(corpus.val, starts[part])).detach() * (part.stop - part.start)
    return over_all(total).item() / n_rows


@torch.no_grad()
def evaluate(n_episodes):
    """Loss on the validation text and on each source of it, and query accuracy on n_episodes of its words, seen and held out, from a fresh head."""
    loss, of_source = loss_on(0, len(corpus.val)), {f"val_loss/{name}": loss_on(*part) for name, part in parts.items() if name not in short}
    numbers = {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) * corpus.val_tokens_per_byte, **of_source}
    if val_sampler is None:
        return numbers
    fresh = maml.init_head(config.d_model, config.n_way, config.head_layers, config.head_hidden)  # its last layer is zero
    fresh = {name: p.to(device) if name.startswith(f"{maml.last_layer(fresh)}.") else head[name].detach() for name, p in fresh.items()}
    for key, heldout in (("val_query_acc", False), ("heldout_query_acc", True)):
        acc = torch.zeros(2, n_episodes, device=device)  # before and after
        for e in range(rank, n_episodes, world):
            _, of_episode = run_episodes([val_sampler.episode(e, heldout)], fresh, steps=config.inner_steps or 10)
            acc[:, e] = torch.cat((of_episode["query_acc_before"], of_episode["query_acc"]))
        before, after = over_all(acc)
        numbers |= {key: after.mean().item(), f"{key}_before": before.mean().item(), f"{key}_se": after.std().item() / math.sqrt(n_episodes)}
    return numbers


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Saving


def save(step):
    """Write the checkpoint of a step whole or not at all, then take the optimizer out of the third newest: two are enough to go on from."""
    if not all(p.isfinite().all() for p in parameters):
        end(1, f"step {step}: weights are not finite; nothing of this step was saved. Try a lower lr or weight_decay")
    if rank:
        return
    os.fsync(log_file.fileno())  # a checkpoint never knows of steps that the log has lost
    state = {
        "model": model.state_dict(), "head": {name: p.detach() for name, p in head.items()}, "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "step": step, "progress": progress, "config": dataclasses.asdict(config) | {"vocab_size": corpus.vocab_size},
    }  # fmt: skip
    measured = spectra.measure(model, *map(to_device, spectra.probe(corpus.val, config.block_size)), complain=say)
    write_atomic(os.path.join(config.out_dir, f"spectra_{step:06d}.npz"), lambda file: np.savez(file, **measured))
    write_atomic(os.path.join(config.out_dir, f"ckpt_{step:06d}.pt"), lambda file: torch.save(state, file))
    for path in list(checkpoints(config.out_dir).values())[-3:-2]:
        older = {}
        with contextlib.suppress(SystemExit):  # one that was damaged since: it is said, and no reason to end a run
            older = load_checkpoint(path) | {"optimizer": {}, "scaler": {}}
        if older:
            write_atomic(path, lambda file, older=older: torch.save(older, file))


def plot():
    """Draw curves.png from log.jsonl: loss of the language model above, query accuracy of the episodes below."""
    lines, path = read_log(config.out_dir), os.path.join(config.out_dir, "curves.png")
    label = f"{config.out_dir}: validation loss {numbers['val_loss']:.3f} after {step:,} steps"
    drawn = spectra.figure([spectra.Arm(label, [lines], dataclasses.asdict(config))], inside=False)
    write_atomic(path, lambda file: drawn.savefig(file, dpi=150, format="png"))
    return path


def git_commit():
    """The commit of this code, with a + where files differ from it; empty outside a git checkout."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=HERE, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def start_wandb():
    """A run on Weights & Biases with the same names as log.jsonl. A resumed run goes on under the same id; steps it knows are not shown twice."""
    import wandb

    run_id = f"{os.path.basename(os.path.abspath(config.out_dir))}-{zlib.crc32(os.path.abspath(config.out_dir).encode()):08x}"
    try:
        return wandb.init(project=config.wandb_project, id=run_id, resume="allow", dir=config.out_dir, config=dataclasses.asdict(config) | made,
                          settings=wandb.Settings(init_timeout=30, silent=True))  # fmt: skip
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        fail(f"wandb = True, but {reason}; WANDB_MODE=offline keeps the records in {config.out_dir}/wandb for later")


# What a resumed run may do otherwise; a change of anything else would make it another run under the same name.
MAY_CHANGE = {"out_dir", "data_dir", "device", "dtype", "compile", "resume", "expected", "micro_batch_size", "micro_episodes", "max_steps", "lr",
              "eval_interval", "eval_steps", "ckpt_interval", "log_interval", "wandb", "wandb_project"}  # fmt: skip
kept, step, progress = [], 0, dict.fromkeys("lm_tokens episode_tokens support_tokens query_tokens flops seconds".split(), 0)
if config.resume:
    begun = read_json(config_path)
    for key, now in (dataclasses.asdict(config) | {"corpus_hash": corpus.meta["corpus_hash"]}).items():
        before = begun.get(key, getattr(Config, key, None))  # a run from before there was such a setting had its default
        watched = key == "eval_interval" and config.on_collapse != "off"  # other evaluations would see the collapse elsewhere
        if (key not in MAY_CHANGE or watched) and before != now:
            fail(f"cannot resume {config.out_dir} with {key} = {now}: the run was begun with {key} = {before}")
    found = checkpoints(config.out_dir)
    if found:
        checkpoint = load_checkpoint(found[max(found)], device)
        if checkpoint["step"] > config.max_steps:
            fail(f"max_steps = {config.max_steps}, but {config.out_dir} is at step {checkpoint['step']} already: raise max_steps")
        if not checkpoint["optimizer"]:
            fail(f"{found[max(found)]} has no optimizer any more (only the newest two keep it): it can be evaluated but not gone on from")
        try:
            model.load_state_dict(checkpoint["model"])
            with torch.no_grad():
                for name, p in head.items():
                    p.copy_(checkpoint["head"][name])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # a run may change its dtype
            if any(optimizer.state[p][moment].shape != p.shape for p in optimizer.state for moment in ("exp_avg", "exp_avg_sq")):
                raise ValueError("moments of another shape")
            if set(checkpoint["progress"]) != set(progress) or not all(math.isfinite(value) for value in checkpoint["progress"].values()):
                raise ValueError("its progress is not what train.py saves")
        except Exception as error:
            reason = (str(error).strip() or repr(error)).splitlines()[-1].strip()
            fail(f"{found[max(found)]} does not fit the run in {config_path} ({reason}): delete it to use the one before")
        step, progress = checkpoint["step"], checkpoint["progress"]
        if checkpoint["config"].get("max_steps") != config.max_steps:
            say(f"resume  max_steps was {checkpoint['config'].get('max_steps')} and is now {config.max_steps}: from here on the learning rate "
                  f"follows the {config.schedule} schedule of {config.max_steps} steps, {lr_at(step + 1):.2e} at the next step")
    if begun.get("lr") != config.lr:
        say(f"resume  lr was {begun.get('lr')} and is now {config.lr}: from here on this is no longer the run that was begun")
    kept = read_log(config.out_dir, up_to=step if found else -1)  # what was logged after the checkpoint is done again
    logged = [line["step"] for line in kept if line["kind"] in ("lm", "meta")]
    if logged and logged != [*range(logged[0], step + 1)]:
        fail(f"{log_path} does not have each step up to {step}, the newest checkpoint's, once: copy it again, or delete it to do without its lines")
    say(f"resume  {config.out_dir} after step {step}")
if not rank:
    wait()  # until here: the others find no mistake any more

evals = [line for line in kept if line["kind"] == "eval"]  # what on_collapse is decided from: logged values and nothing else
collapsed = next((line for line in kept if line["kind"] == "collapse"), None)

made = {
    "vocab_size": corpus.vocab_size, "corpus_hash": corpus.meta["corpus_hash"], "git": git_commit(), "argv": sys.argv[1:],
    "system": {"processes": world, "device": str(device), "dtype": str(dtype), "threads": torch.get_num_threads(), "platform": platform.platform()},
    "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")},
}  # fmt: skip
log_file = None
if not rank:
    if config.wandb:
        tracker = start_wandb()  # before anything is written: without a login there is no run yet
    for name in os.listdir(config.out_dir):
        if re.fullmatch(r"(ckpt_\d+\.pt|spectra_\d+\.npz|log\.jsonl|config\.json|meta\.json|tokenizer\.tiktoken|curves\.png)\.\d+\.tmp", name):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(config.out_dir, name))  # of a process that was killed while saving
    for name in ("tokenizer.tiktoken", "meta.json"):
        with open(os.path.join(corpus_dir, name), "rb") as file:
            write_atomic(os.path.join(config.out_dir, name), lambda copy, file=file: shutil.copyfileobj(file, copy))
    write_atomic(log_path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in kept).encode()))
    write_atomic(config_path, lambda file: file.write(json.dumps(dataclasses.asdict(config) | made, indent=2).encode()))
    log_file = open(log_path, "ab", buffering=0)


def log(line):
    """One object a line, handed to the system before the next step begins."""
    text = f"{json.dumps(line)}\n".encode() if log_file else b""
    try:
        while text:  # a disk that fills up takes a part first
            text = text[log_file.write(text) :]
    except OSError as error:
        cannot_write(log_path, error)
    if tracker:
        tracker.log(line, step=line["step"])


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The loop


def look():
    """Evaluate, log and print. The last evaluation takes more episodes, for a smaller standard error."""
    global collapsed
    numbers = evaluate(n_episodes=64 if step == config.max_steps else 8)
    if not math.isfinite(numbers["val_loss"]):
        end(1, f"step {step}: validation loss {numbers['val_loss']}; nothing of this step was saved. Try a lower lr or a longer warm-up")
    inside = {} if rank else spectra.summary(spectra.measure(model, to_device(spectra.probe(corpus.val, config.block_size)[0]), complain=say))
    level = over_all(torch.tensor(inside.get(spectra.SIGNAL, 0.0), dtype=torch.float64, device=device)).item()  # the first process's, for all
    tick()
    line = {"step": step, "kind": "eval", **numbers, **inside, **progress}
    log(line)
    evals.append(line | {spectra.SIGNAL: level})
    found = spectra.change_point(evals, spectra.SIGNAL, config.warmup_steps) if config.on_collapse != "off" and not collapsed else None
    if found:
        collapsed = {"step": step, "kind": "collapse", **found, "action": config.on_collapse, **progress}
        log(collapsed)
        say(f"collapse  {spectra.SIGNAL} fell by {found['size']:.1%} at step {found['at']}, seen at step {step}: {config.on_collapse}")
    shown = f"val_loss {numbers['val_loss']:.4f}  bits/byte {numbers['val_bits_per_byte']:.4f}"
    shown += "".join(f"  {key.partition('/')[2]} {value:.4f}" for key, value in numbers.items() if key.startswith("val_loss/"))
    for key in ("heldout_query_acc", "val_query_acc"):
        shown += f"  {key} {numbers[key]:.3f}±{numbers[key + '_se']:.3f}" if key in numbers else ""
    say(f"eval {step:6d}/{config.max_steps}  {shown}")
    return numbers


def tick():
    """Seconds since the last tick; progress["seconds"] adds them up, over interruptions too."""
    global clock
    now = time.perf_counter()
    seconds, clock = now - clock, now
    progress["seconds"] += seconds
    return seconds


def read(step, kind, lr, names, values):
    """Wait for the numbers of a step, then check, count, log and print them."""
    global skipped, stopping, steady
    *values, stopping, norm, size = values.tolist()
    seconds, line, cost = tick(), dict(zip(names, values, strict=True)), cost_of(kind)
    loss = line["lm_loss"] if kind == "lm" else line["meta_loss"]
    finite = math.isfinite(loss + norm + size)
    skipped = 0 if finite else skipped + 1
    if skipped == (20 if scaler.is_enabled() else 1) or not math.isfinite(size):
        last = max(checkpoints(config.out_dir), default=None)
        so_far = ", the 20th in a row" if skipped > 1 else ""
        end(1, f"step {step}: loss {loss}, gradient norm {norm}, norm of weights {size}{so_far}. Nothing of it was saved; the last checkpoint is "
               f"{'none' if last is None else f'of step {last}'}. Try a lower {'lr' if kind == 'lm' else 'lr, inner_lr'} or a longer warm-up")
    for key, value in cost.items():
        progress[key] += value
    speed = (cost.get("lm_tokens", 0) + cost.get("episode_tokens", 0)) / seconds
    line |= {"lr": lr, "grad_norm": norm} if finite else {"lr": lr, "skipped": skipped, "loss_scale": scaler.get_scale()}
    log({"step": step, "kind": kind, **line, **progress, "tokens_per_second": speed})
    steady = steady or time.perf_counter()
    left = round((time.perf_counter() - steady) / max(1, step - first_step - 1) * (config.max_steps - step))
    if step % config.log_interval == 0 or step == config.max_steps or not finite:
        shown = f"lm_loss {loss:.4f}" if kind == "lm" else f"meta_loss {loss:.4f}  query_acc {line['query_acc_before']:.3f}->{line['query_acc']:.3f}"
        shown += f"  lr {lr:.2e}  norm {norm:.2f}" if finite else f"  skipped: float16 overflow, loss scale now {scaler.get_scale():g}"
        eta = f"left {left // 60}m{left % 60:02d}s" if step > first_step + 1 else ""
        say(f"step {step:6d}/{config.max_steps}  {shown}  {speed / 1e3:.1f}k tok/s  {eta}")


for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, stop)
clock = time.perf_counter()
first_step, steady = step, None  # the first step compiles and says nothing about how long the others take
skipped, stopping = 0, False  # steps in a row that overflowed float16; whether any process was asked to stop
late, unread = int(device.type == "cuda" and not scaler.is_enabled()), []  # a GPU works on a step while the numbers of the one before are read
numbers = next((line for line in kept if line["kind"] == "eval" and line["step"] == step), None)  # a run that was over already was looked at then
if numbers is None and (step % config.eval_interval == 0 or step == config.max_steps):  # or its line was torn
    numbers = look()
while not over() and not stopping:
    # ------------------------------------------------------------------------------------------------------------------------------------------------
    step += 1
    kind, lr = objective(step), lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    tick()
    shares = lm_step(step) if kind == "lm" else meta_step(step)
    for p in parameters:
        if p.grad is not None:
            over_all(p.grad)
    scaler.unscale_(optimizer)
    norm, size = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip), torch.nn.utils.get_total_norm(parameters)
    sums = over_all(torch.stack([*shares.values(), torch.full((), float(bool(stopped_by)), device=device)]))
    unread.append((step, kind, lr, list(shares), torch.cat((sums, torch.stack((norm, size))))))
    scaler.step(optimizer)  # leaves the weights alone if a scaled gradient overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # ------------------------------------------------------------------------------------------------------------------------------------------------
    looks = step % config.eval_interval == 0 or step == config.max_steps
    while len(unread) > late or (unread and (looks or stopping or over() or step % config.ckpt_interval == 0)):
        read(*unread.pop(0))
    if looks:
        numbers = look()
    if step % config.ckpt_interval == 0 or over() or stopping:
        save(step)

if world > 1:
    wait()  # none leaves while another still speaks
    dist.destroy_process_group()
if stopping and not over():
    words = [*sys.argv[1:]] + ([] if config.resume else ["--resume=True"])
    say(f"stopped after step {step}. To go on: python train.py {shlex.join(words)}")
    end(128 + (stopped_by or signal.SIGTERM))
if rank:
    end(0)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# What came of it

generator = torch.Generator(device).manual_seed(config.seed)
with autocast, torch.compiler.set_stance("force_eager"):  # a text grows by a token a time: not worth a kernel for each length
    ids = model.generate(torch.tensor([[corpus.eot]], device=device), 160, temperature=0.8, top_k=50, generator=generator)[0, 1:].tolist()
peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
say(f"\n{decode(corpus.encoding, ids[: ids.index(corpus.eot)] if corpus.eot in ids else ids).strip()}\n")
say(f"result  val_loss {numbers['val_loss']:.4f}, {numbers['val_bits_per_byte']:.4f} bits per byte, after {step:,} steps, "
      f"{progress['lm_tokens']:,} LM tokens, {progress['episode_tokens']:,} episode tokens, {progress['flops']:.2e} FLOPs, "
      f"{time.perf_counter() - started:.0f} s, peak memory {peak / 2**30:.2f} GiB")
if "heldout_query_acc" in numbers:
    say(f"result  held-out words: query accuracy {numbers['heldout_query_acc']:.3f} ± {numbers['heldout_query_acc_se']:.3f} after adaptation, "
          f"{numbers['heldout_query_acc_before']:.3f} before, chance {1 / config.n_way:.3f}")
corpus_hash = corpus.meta["corpus_hash"]
if config.expected and (config.dataset == Config.dataset or corpus_hash in config.expected):  # of another text it says nothing
    other = "" if corpus_hash in config.expected else f"; this corpus is {corpus_hash} (other package versions), so expect a slightly other number"
    say(f"expect  {config.expected}{other}")
curves = plot()
say(f"curves  {curves}\nrun     {config.out_dir}")
if tracker:
    import wandb

    tracker.log({"curves": wandb.Image(curves)}, step=step)
end(0)
