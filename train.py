"""Pretrain a small Llama: next-token prediction interleaved with first-order MAML on few-shot tasks.

    python train.py config/train_11m.py                # the quick start: corpus, training, curves, a sample
    python train.py config/train_11m.py --meta_ratio=0 --out_dir=out/11m-vanilla        # the baseline
    python train.py config/train_11m.py --resume=True  # after Ctrl-C, SIGTERM, kill -9 or a power cut

At each step a coin chooses between the two objectives (Africa et al. 2025, arXiv 2508.02189), or both losses
are added up (--mix). All that is drawn is a function of (seed, stream, step): a resumed run equals the run
that was never stopped, bit for bit on a CPU. Settings: config/defaults.py. Files, processes: plumbing/run.py.
"""
import dataclasses
import math
from contextlib import nullcontext
from functools import partial

from plumbing.files import reading  # first: errors and Ctrl-C end in one line from here on
from plumbing.run import Run
from plumbing.settings import load

import numpy as np
import torch

import maml
import smlmt
import spectra
from config.defaults import RULES, Config
from model import Llama, ModelConfig

config, _ = load(Config, __doc__, RULES, allow_words=False)  # defaults < config files < --key=value
run = Run(config)
corpus = run.load_corpus()  # builds the default corpus on first use
device = run.device

# --------------------------------------------------------------------------------------------------
# Model, head, optimizer, schedule

torch.manual_seed(config.seed)
shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig) if hasattr(config, f.name)}
model = Llama(ModelConfig(**shape, vocab_size=corpus.vocab_size)).to(device)
if run.compile:
    model.compile_parts()
# The multi-task control (inner_steps=0) does not adapt in training: its head has an output for each id.
outputs = config.n_way if config.inner_steps else corpus.vocab_size
head = maml.init_head(config.d_model, outputs, config.head_layers, config.head_hidden,
                      torch.Generator().manual_seed(config.seed))
head = {name: p.to(device).requires_grad_(config.meta_ratio > 0) for name, p in head.items()}
head_lr = config.inner_lr * config.n_way  # rates below n_way are stable: a zero head's curvature is 2 / n_way
reader, adapting = maml.inner_target(model, config.target, config.target_layers)
params = [p for p in [*model.parameters(), *head.values()] if p.requires_grad]
optimizer = torch.optim.AdamW(
    [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
     {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}],
    lr=config.lr, betas=(0.9, 0.95), fused=True)
autocast = torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32)
scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
inner_autocast = torch.autocast(device.type, run.dtype, enabled=run.dtype == torch.bfloat16)  # no scaler

def lr_at(step):
    """Learning rate of a step, counted from 1: linear warm-up, then constant or falling to 0."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    left = (config.max_steps + 1 - step) / (config.max_steps + 1 - config.warmup_steps)  # between 1 and 0
    shares = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return config.lr * shares[config.schedule]

# --------------------------------------------------------------------------------------------------
# Batches and episodes. Drawing from one stream of random numbers never moves another.

ROWS, COIN, EPISODES, POOL, SHUFFLE = range(5)

def rng(stream, *index):
    return np.random.default_rng((config.seed, stream, *index))

def to_device(array, dtype=np.int64):
    """An array, cast to dtype, as a tensor on the device; copied without waiting for the GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

def get_batch(tokens, starts):
    """Inputs and targets, each (B, T): the T tokens from each start, and the same shifted by one."""
    rows = to_device(np.stack([tokens[i : i + config.block_size + 1] for i in starts]))  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]

names = "pool_tokens n_way k_shot q_query episode_len readout word_min_count word_max_count".split()
make_pools = partial(smlmt.Pools, token_bytes=corpus.token_bytes, eot=corpus.eot, mask=corpus.mask,
                     **{name: getattr(config, name) for name in names})
train_pools = make_pools(corpus.train, pool_seed=(config.seed, POOL), seed=(config.seed, EPISODES))
val_pools = make_pools(corpus.val, pool_seed=0, seed=0)  # the same episodes for every run and seed
vocabulary = smlmt.Vocabulary(corpus.token_bytes, corpus.vocab_size)  # for mix=inline

def training_episode(step, number):
    with reading(f"episodes from {config.dataset}", "see --help for these settings"):
        episode = train_pools.sampler(step).episode((step, number))
    if config.shuffle_labels:
        labels = rng(SHUFFLE, step, number).permutation(episode.support_labels)
        episode = dataclasses.replace(episode, support_labels=labels)
    return episode

if config.meta_ratio and config.mix != "inline":
    training_episode(1, 0)  # a text without episodes is reported before the run begins

# --------------------------------------------------------------------------------------------------
# The two objectives. A language-model step predicts the next token. A meta step takes few-shot tasks: which
# of N words was masked here? On a task's support set a small head adapts by gradient descent: the inner loop.
# The adapted head's loss on the query set is the meta loss. Its gradient trains the model, and the head's
# start, to be easy to adapt: the outer loop. At first order (Finn et al. 2017, section 5.2) the support
# features are constants, so the model learns from the query set alone.

def lm_step(step, inline=False):
    """Next-token prediction. Leaves gradients in `params`; returns this process's share of the numbers."""
    starts = rng(ROWS, step).integers(len(corpus.train) - config.block_size, size=config.batch_size)
    total = {"lm_loss": 0.0}
    for part in run.micro_batches(config.batch_size, "lm"):
        idx, targets = get_batch(corpus.train, starts[part])
        with autocast:
            features = model.features(idx)
            loss = model.loss(features, targets) * (len(idx) / config.batch_size)
        total["lm_loss"] += loss.detach()
        if inline:
            meta_loss, numbers = inline_loss(step, starts, features, part.start * config.block_size)
            loss = loss + config.meta_weight * meta_loss
            # There is one part then: tasks need all of a process's rows.
            total |= {name: values.mean() / run.world for name, values in numbers.items()}
        scaler.scale(loss).backward()
    return total

def meta_step(step):
    """The meta loss of a step. Leaves gradients in `params`; returns this process's share of the numbers."""
    total, weight = {}, config.meta_weight if config.mix == "joint" else 1
    for part in run.micro_batches(config.episodes_per_step, "meta"):
        episodes = [training_episode(step, number) for number in range(part.start, part.stop)]
        loss, numbers = run_episodes(episodes, head)
        share = len(episodes) / config.episodes_per_step
        scaler.scale(weight * loss * share).backward()
        numbers["far_share"] = to_device([episode.far_share for episode in episodes], np.float32)
        total = {name: total.get(name, 0) + values.mean() * share for name, values in numbers.items()}
    return total

def inline_loss(step, starts, features, first):
    """The meta loss of tasks inside the rows of a language-model step, and numbers to log.

    features (B, T, C): of this process's rows. Their first token is place `first` of the step (smlmt.inline).
    """
    rows = np.stack([corpus.train[i : i + config.block_size + 1] for i in starts])
    found, tasks = smlmt.inline(vocabulary, rows, rng(EPISODES, step), config.episodes_per_step,
                                n_way=config.n_way, k_shot=config.k_shot, q_query=config.q_query)
    numbers = {"inline_words": torch.full((), float(found), device=device)}
    if tasks is None:  # a plain language-model step
        return 0.0, numbers
    if config.shuffle_labels:
        for number, labels in enumerate(tasks["support_labels"]):
            labels[:] = rng(SHUFFLE, step, number).permutation(labels)
    e = {name: to_device(array) for name, array in tasks.items()}

    def read(places):  # (E, M) places of the step -> features (E, M, C), those of other processes constants
        own = features.flatten(0, 1)
        mine = (places >= first) & (places < first + len(own))
        own = own[(places - first).clamp(0, len(own) - 1)] * mine[..., None]
        everyone = run.all_reduce(own.detach().clone())
        return everyone + run.world * (own - own.detach())  # adds 0, and the gradient; `world` as below

    # All processes have this same loss; each gives the gradient of its own features and a part of the head's.
    loss, of_episodes = head_loss(head, e, read(e["support"]), read(e["query"]))
    return loss / run.world, numbers | of_episodes

def head_loss(head, e, support, query, steps=config.inner_steps):
    """Mean query loss of E episodes after adaptation of the head, given features, and numbers to log."""
    start = head if steps else maml.word_heads(head, e["words"])
    return maml.episode_loss(start, support, e["support_labels"], query, e["query_labels"],
                             lr=head_lr, steps=steps, first_order=not config.second_order)

def run_episodes(episodes, head, steps=config.inner_steps):
    """Mean query loss of E episodes after adaptation, and numbers to log: see maml.adapted_loss."""
    names = [field.name for field in dataclasses.fields(smlmt.Episode) if field.name != "far_share"]
    e = {name: to_device(np.stack([getattr(one, name) for one in episodes])) for name in names}  # (E, ...)
    if config.target != "head":
        return maml.episode_loss_through(
            reader, adapting, head, e, head_lr=head_lr, target_lr=config.target_lr, steps=steps,
            first_order=not config.second_order, autocast=inner_autocast)

    def features(tokens, positions):  # (E, M, L) tokens, read at (E, M) positions -> (E, M, C)
        return model.features_at(tokens.flatten(0, 1), positions.flatten()).unflatten(0, positions.shape)

    with autocast, nullcontext() if config.second_order else torch.no_grad():
        support = features(e["support"], e["support_pos"])
    with autocast:
        query = features(e["query"], e["query_pos"])
    return head_loss(head, e, support, query, steps)

def train_step(step):
    """The objective or both, as --mix says. Leaves gradients in `params`; returns this process's numbers."""
    meta_now = {"vanilla": not run.collapse, "meta": bool(run.collapse)}.get(config.on_collapse, True)
    if not (meta_now and config.meta_ratio):
        return lm_step(step)
    if config.mix == "joint":
        return lm_step(step) | meta_step(step)
    if config.mix == "inline":
        return lm_step(step, inline=True)
    return meta_step(step) if rng(COIN, step).random() < config.meta_ratio else lm_step(step)

# --------------------------------------------------------------------------------------------------
# Evaluation, on rows and episodes that do not change. It takes no random numbers from training.

no_val_episodes = val_pools.problem(heldout=True) or val_pools.problem()
if no_val_episodes:
    run.print(f"data    no episodes in evaluations: {no_val_episodes}")
probe = [part.to(device) for part in spectra.probe(corpus.val, config.block_size)]  # inputs, targets

def val_loss(first, last):
    """Mean loss on rows spread evenly over the validation tokens from first to last."""
    n_rows = min(config.eval_steps * config.batch_size, (last - first) // (config.block_size + 1))
    starts = np.linspace(first, last - config.block_size - 1, n_rows).astype(np.int64)
    total = torch.zeros((), device=device)
    for part in run.micro_batches(n_rows, "lm"):
        with autocast, torch.enable_grad():  # so that kernels compiled for training serve here too
            total += model(*get_batch(corpus.val, starts[part])).detach() * (part.stop - part.start)
    return run.all_reduce(total).item() / n_rows

def query_answers(n_episodes, heldout, head):
    """(3, episodes, N*Q): right before adaptation, right after it, the id of the word that is asked for."""
    answers = torch.zeros(3, n_episodes, config.n_way * config.q_query, device=device)
    for part in run.micro_batches(n_episodes, "meta"):
        episodes = [val_pools.sampler(0).episode(i, heldout) for i in range(part.start, part.stop)]
        _, of_part = run_episodes(episodes, head, steps=config.inner_steps or 10)
        answers[0, part], answers[1, part] = of_part["query_acc_before"], of_part["query_acc"]
        answers[2, part] = to_device([episode.words.repeat(config.q_query) for episode in episodes])
    return answers

@torch.no_grad()
def evaluate(n_episodes):
    """Validation loss; query accuracy of a fresh head, adapted, on training and held-out words; spectra."""
    run.read()  # so that no step is charged with the evaluation
    loss = run.within_memory(val_loss, 0, len(corpus.val))
    numbers = {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) * corpus.val_tokens_per_byte}
    for name, (first, last) in corpus.sources.items():
        if len(corpus.sources) > 1 and last - first > config.block_size:
            numbers[f"val_loss/{name}"] = val_loss(first, last)
    fresh = maml.fresh_head(head, config.n_way)
    for key, heldout in [] if no_val_episodes else [("val_query_acc", False), ("heldout_query_acc", True)]:
        answers = run.all_reduce(run.within_memory(query_answers, n_episodes, heldout, fresh))
        before, after, words = answers.flatten(1).cpu()
        numbers |= {key: after.mean().item(), f"{key}_before": before.mean().item(),
                    f"{key}_se": maml.standard_error(after, words).item()}  # by word: there are few
    return numbers | spectra.summary(spectra.measure(model, probe[0]))

# --------------------------------------------------------------------------------------------------
# The loop

began = step = run.start(model, head, optimizer, scaler)  # 0, or the step of the newest checkpoint
while True:
    last = step >= config.max_steps
    if (last or step % config.eval_interval == 0) and step not in run.evals:
        run.log_eval(step, evaluate(n_episodes=64 if last else 8))
        if config.on_collapse != "off" and not run.collapse:
            drop = spectra.change_point(run.evals.values(), spectra.SIGNAL, config.warmup_steps)
            run.log_collapse(step, drop)
    last = last or (config.on_collapse == "stop" and bool(run.collapse))
    if step > began and (last or run.stopping or step % config.ckpt_interval == 0):
        run.save(step, spectra.measure(model, *probe))
    if last or run.stopping:
        break

    step += 1
    lr = lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    numbers = run.within_memory(train_step, step)
    run.all_reduce_gradients(params)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
    scaler.step(optimizer)  # leaves the weights alone if a float16 gradient overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    run.log_step(step, numbers, norm, lr)  # ends the run if loss or norm is not finite

if last:
    run.report(autocast)
run.finish(done=last)
