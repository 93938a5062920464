"""Pretrain a small Llama: next-token prediction interleaved with first-order MAML on few-shot tasks.

    python train.py config/train_11m.py                # the quick start: corpus, training, curves, a sample
    python train.py config/train_11m.py --meta_ratio=0 --out_dir=out/11m-vanilla        # the baseline
    python train.py config/train_11m.py --resume=True  # after Ctrl-C, SIGTERM, kill -9 or a power cut

At each step a coin chooses between the two objectives (Africa et al. 2025, arXiv 2508.02189), or both losses
are added up (--mix). Every random choice is a function of (seed, stream, step): a resumed run equals the run
that was never stopped, bit for bit on a CPU. Settings: config/defaults.py. Files, processes: plumbing/run.py.
"""
import dataclasses
import math
from contextlib import nullcontext
from functools import partial

from plumbing.files import attempt  # first: errors and Ctrl-C end in one line from here on
from plumbing.run import Run
from plumbing.settings import load

import numpy as np
import torch

import maml
import smlmt
import spectra
from config.defaults import RULES, Config
from model import Llama, ModelConfig, compile_parts

config, _ = load(Config, __doc__, RULES, allow_words=False)  # defaults < config files < --key=value
run = Run(config)
corpus = run.load_corpus()  # builds the default corpus on first use
device = run.device

# --------------------------------------------------------------------------------------------------
# Model, head, optimizer, schedule

torch.manual_seed(config.seed)
names = "d_model n_layers n_heads n_kv_heads d_ff block_size".split()
shape = ModelConfig(**{name: getattr(config, name) for name in names}, vocab_size=corpus.vocab_size)
model = Llama(shape).to(device)
if run.compile:
    compile_parts(model)
# The multi-task control (inner_steps=0) does not adapt in training: its head has an output for each id.
outputs = config.n_way if config.inner_steps else corpus.vocab_size
head = maml.init_head(config.d_model, outputs, config.head_layers, config.head_hidden,
                      torch.Generator().manual_seed(config.seed))
head = {name: p.to(device).requires_grad_(config.meta_ratio > 0) for name, p in head.items()}
head_lr = maml.head_rates(head, config.inner_lr, config.n_way, config.k_shot)
reader, adapting = maml.inner_target(model, config.target, config.target_layers)
params = [p for p in [*model.parameters(), *head.values()] if p.requires_grad]
optimizer = torch.optim.AdamW(
    [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
     {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}],
    lr=config.lr, betas=(0.9, 0.95), fused=True)
autocast = torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32)
scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
# In float16 inner gradients would need a scaler of their own: float32 there.
inner_autocast = torch.autocast(device.type, run.dtype, enabled=run.dtype == torch.bfloat16)

def lr_at(step):
    """Learning rate of a step, counted from 1: linear warm-up, then constant or falling to 0."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    left = (config.max_steps + 1 - step) / (config.max_steps + 1 - config.warmup_steps)  # between 1 and 0
    shares = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return config.lr * shares[config.schedule]

# --------------------------------------------------------------------------------------------------
# Batches and episodes. Each stream of random numbers is independent of the others.

ROWS, COIN, EPISODES, POOL, SHUFFLE = range(5)

def make_rng(stream, *index):
    return np.random.default_rng((config.seed, stream, *index))

def to_device(array, dtype=np.int64):
    """An array, cast to dtype, as a tensor on the device; copied without waiting for the GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

def get_batch(tokens, starts):
    """Inputs and targets, each (B, T): the T tokens from each start, and the same shifted by one."""
    rows = to_device(np.stack([tokens[i : i + config.block_size + 1] for i in starts]))  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]

settings = "pool_tokens n_way k_shot q_query episode_len readout word_min_count word_max_count".split()
make_pools = partial(smlmt.Pools, token_bytes=corpus.token_bytes, eot=corpus.eot, mask=corpus.mask,
                     **{name: getattr(config, name) for name in settings})
train_pools = make_pools(corpus.train, pool_seed=(config.seed, POOL), seed=(config.seed, EPISODES))
val_pools = make_pools(corpus.val, pool_seed=0, seed=0)  # the same episodes for every run and seed
vocabulary = smlmt.Vocabulary(corpus.token_bytes, corpus.vocab_size)  # for mix=inline

def training_episode(step, number):
    with attempt(f"draw episodes from {config.dataset}", "see --help for these settings"):
        episode = train_pools.sampler(step).episode((step, number))
    if config.shuffle_labels:
        labels = make_rng(SHUFFLE, step, number).permutation(episode.support_labels)
        episode = dataclasses.replace(episode, support_labels=labels)
    return episode

if config.meta_ratio and config.mix != "inline":
    training_episode(1, 0)  # a text without episodes is reported before the run begins

# --------------------------------------------------------------------------------------------------
# The two objectives. A language-model step predicts the next token. A meta step takes few-shot tasks: which
# of N words was masked here? On a task's support set a small head adapts by gradient descent: the inner loop.
# The adapted head's loss on the query set is the meta loss. Its gradient trains the model, and the head's
# start, to be easy to adapt: the outer loop. At first order (Finn et al. 2017, section 5.2) the support
# features are constants, so the model learns from the query set alone. The quick start's path through what
# follows is meta_step, run_episodes, head_loss, then maml.episode_loss; the rest are other settings.

def lm_step(step, inline=False):
    """Next-token prediction. Leaves gradients in `params`; returns this process's share of the metrics."""
    starts = make_rng(ROWS, step).integers(len(corpus.train) - config.block_size, size=config.batch_size)
    total = {"lm_loss": 0.0}
    for part in run.micro_batches(config.batch_size, "lm"):
        idx, targets = get_batch(corpus.train, starts[part])
        with autocast:
            features = model.features(idx)
            loss = model.loss(features, targets) * (len(idx) / config.batch_size)
        total["lm_loss"] += loss.detach()
        if inline:
            # All rows of this process are one part then (choose_micro_batches): tasks need them all.
            meta_loss, metrics = inline_loss(step, starts, features, first_row=part.start)
            loss = loss + config.meta_weight * meta_loss
            total |= {name: values.mean() / run.world for name, values in metrics.items()}
        scaler.scale(loss).backward()
    return total

def meta_step(step):
    """The meta loss of a step. Leaves gradients in `params`; returns this process's share of the metrics."""
    weight = config.meta_weight if config.mix == "joint" else 1
    total = {}
    for part in run.micro_batches(config.episodes_per_step, "meta"):
        episodes = [training_episode(step, number) for number in range(part.start, part.stop)]
        loss, metrics = run_episodes(episodes, head)
        share = len(episodes) / config.episodes_per_step
        scaler.scale(weight * loss * share).backward()
        metrics["far_share"] = to_device([episode.far_share for episode in episodes], np.float32)
        total = {name: total.get(name, 0) + values.mean() * share for name, values in metrics.items()}
    return total

def inline_loss(step, starts, features, first_row):
    """The meta loss of tasks inside the rows of a language-model step, and metrics.

    features (B, T, C): of this process's rows, the first of which is row `first_row` of the step.
    """
    rows = np.stack([corpus.train[i : i + config.block_size + 1] for i in starts])
    found, tasks = smlmt.inline(vocabulary, rows, make_rng(EPISODES, step), config.episodes_per_step,
                                n_way=config.n_way, k_shot=config.k_shot, q_query=config.q_query)
    metrics = {"inline_words": torch.full((), float(found), device=device)}
    if tasks is None:  # a plain language-model step
        return 0.0, metrics
    if config.shuffle_labels:
        for number, labels in enumerate(tasks["support_labels"]):
            labels[:] = make_rng(SHUFFLE, step, number).permutation(labels)
    e = {name: to_device(array) for name, array in tasks.items()}
    support, query = (run.gather(features, e[part], first_row) for part in ("support", "query"))  # (E, M, C)
    loss, of_episodes = head_loss(head, e, support, query)
    return loss / run.world, metrics | of_episodes  # processes have the same loss; gradients are summed

def head_loss(head, e, support, query, steps=config.inner_steps):
    """Mean query loss of E episodes after adaptation of the head, given features, and metrics."""
    start = head if steps else maml.word_heads(head, e["words"])
    return maml.episode_loss(start, support, e["support_labels"], query, e["query_labels"],
                             lr=head_lr, steps=steps, first_order=not config.second_order)

def run_episodes(episodes, head, steps=config.inner_steps):
    """Mean query loss of E episodes after adaptation, and metrics: see maml.adapted_loss."""
    names = [field.name for field in dataclasses.fields(smlmt.Episode) if field.name != "far_share"]
    e = {name: to_device(np.stack([getattr(one, name) for one in episodes])) for name in names}  # (E, ...)
    if config.target != "head":
        return maml.episode_loss_through_model(
            reader, adapting, head, e, head_lr=head_lr, target_lr=config.target_lr, steps=steps,
            first_order=not config.second_order, autocast=inner_autocast)

    def features(tokens, positions):  # (E, M, L) tokens, read at (E, M) positions -> (E, M, C)
        return model.features_at(tokens.flatten(0, 1), positions.flatten()).unflatten(0, positions.shape)

    no_graph = nullcontext() if config.second_order else torch.no_grad()  # at first order these are constants
    with autocast, no_graph:
        support = features(e["support"], e["support_pos"])
    with autocast:
        query = features(e["query"], e["query_pos"])
    return head_loss(head, e, support, query, steps)

def train_step(step):
    """One objective or both, as --mix says. Leaves gradients in `params`; returns shares of metrics."""
    waiting = config.on_collapse == "meta" and not run.collapse  # meta steps begin at a collapse
    over = config.on_collapse == "vanilla" and run.collapse  # or end there
    if waiting or over or not config.meta_ratio:
        return lm_step(step)
    if config.mix == "joint":
        return lm_step(step) | meta_step(step)
    if config.mix == "inline":
        return lm_step(step, inline=True)
    return meta_step(step) if make_rng(COIN, step).random() < config.meta_ratio else lm_step(step)

# --------------------------------------------------------------------------------------------------
# Evaluation, on rows and episodes that do not change. It takes no random numbers from training.

no_val_episodes = val_pools.problem(heldout=True) or val_pools.problem()
if no_val_episodes:
    run.print(f"data    no episodes in evaluations: {no_val_episodes}")
probe = [part.to(device) for part in spectra.probe(corpus.val, config.block_size)]  # inputs, targets

def val_loss(begin, end):
    """Mean loss on rows spread evenly over the validation tokens from begin to end."""
    n_rows = min(config.eval_steps * config.batch_size, (end - begin) // (config.block_size + 1))
    starts = np.linspace(begin, end - config.block_size - 1, n_rows).astype(np.int64)
    total = torch.zeros((), device=device)
    for part in run.micro_batches(n_rows, "lm"):
        with autocast, torch.enable_grad():  # so that kernels compiled for training serve here too
            total += model(*get_batch(corpus.val, starts[part])).detach() * (part.stop - part.start)
    return run.all_reduce(total).item() / n_rows

def grade_queries(n_episodes, heldout, head):
    """(3, episodes, N*Q): correct before and after adaptation, the word's id. Other processes' rows: 0."""
    graded = torch.zeros(3, n_episodes, config.n_way * config.q_query, device=device)
    for part in run.micro_batches(n_episodes, "meta"):
        episodes = [val_pools.sampler(0).episode(i, heldout) for i in range(part.start, part.stop)]
        # The multi-task control adapts here alone, in 10 steps.
        _, metrics = run_episodes(episodes, head, steps=config.inner_steps or 10)
        graded[0, part], graded[1, part] = metrics["query_acc_before"], metrics["query_acc"]
        graded[2, part] = to_device([episode.words.repeat(config.q_query) for episode in episodes])
    return graded

@torch.no_grad()
def evaluate(n_episodes):
    """Validation loss; query accuracy of a fresh head, adapted, on training and held-out words; spectra."""
    run.flush_log()  # so that no step is charged with the evaluation
    loss = run.within_memory(val_loss, 0, len(corpus.val))
    metrics = {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) * corpus.val_tokens_per_byte}
    for name, (begin, end) in corpus.sources.items():
        if len(corpus.sources) > 1 and end - begin > config.block_size:
            metrics[f"val_loss/{name}"] = val_loss(begin, end)
    fresh = maml.fresh_head(head, config.n_way)
    for key, heldout in [] if no_val_episodes else [("val_query_acc", False), ("heldout_query_acc", True)]:
        graded = run.all_reduce(run.within_memory(grade_queries, n_episodes, heldout, fresh))
        before, after, words = graded.flatten(1).cpu()
        metrics |= {key: after.mean().item(), f"{key}_before": before.mean().item(),
                    f"{key}_se": maml.standard_error(after, words).item()}  # by word: there are few
    return metrics | spectra.summary(spectra.measure(model, probe[0]))

# --------------------------------------------------------------------------------------------------
# The loop

began = step = run.start(model, head, optimizer, scaler)  # 0, or the step of the newest checkpoint
while True:
    last_step = step >= config.max_steps
    # A resumed run may have evaluated the step that it resumes from.
    if (last_step or step % config.eval_interval == 0) and step not in run.evals:
        run.log_eval(step, evaluate(n_episodes=64 if last_step else 8))
        if config.on_collapse != "off" and not run.collapse:
            drop = spectra.change_point(run.evals.values(), spectra.SIGNAL, config.warmup_steps)
            run.log_collapse(step, drop)
    last_step = last_step or (config.on_collapse == "stop" and bool(run.collapse))
    if step > began and (last_step or run.stopping or step % config.ckpt_interval == 0):
        run.save(step, spectra.measure(model, *probe))
    if last_step or run.stopping:
        break

    step += 1
    lr = lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    metrics = run.within_memory(train_step, step)
    run.all_reduce_gradients(params)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
    scaler.step(optimizer)  # leaves the weights alone if a float16 gradient overflowed
    scaler.update()
    optimizer.zero_grad()  # to None: AdamW skips what the next step does not use (head, unembedding)
    run.log_step(step, metrics, norm, lr)  # ends the run if loss or norm is not finite

if last_step:
    run.report(autocast)
run.finish(done=last_step)
