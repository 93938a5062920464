"""Effective rank and attention entropy during training, and a detector of rank collapse.

    python spectra.py out/maml out/vanilla --x=lm_tokens     # tables, figures, and times to equal loss
    python spectra.py FOLDER --corpus=data/llama             # the numbers of anybody's Llama

The effective rank of a matrix (Roy and Vetterli 2007) is exp(H(p)), where p are its singular values divided
by their sum: in how many directions the matrix acts. Divided by the number n of singular values it is the
proportional effective rank, PER: 1 if all are equal, 1/n at rank one. It falls and rises again in plain
language modelling, too (arXiv 2509.23024), mostly during warm-up. So compare a run with its vanilla twin.

In shapes: B rows, T positions, C width, L layers, H heads, K key/value heads, D = C / H, n singular values.
"""
import math
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

# ----------------------------------------------------------------------------------------------------
# Effective rank and attention entropy

def in_float64(tensor):
    """A tensor as float64 on its own device, or on the CPU where that has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()

def or_nan(solve, matrix):
    """solve(matrix), eigenvalues or singular values (..., n). NaN where LAPACK fails, so that no run ends."""
    try:
        return solve(matrix)
    except torch.linalg.LinAlgError:
        return matrix.new_full((*matrix.shape[:-2], min(matrix.shape[-2:])), math.nan)

def singular_values(matrix):
    """The singular values of an (m, n) matrix, descending: (min(m, n),) in float64. NaN if it is not finite.

    They come from the smaller Gram matrix, ten times faster for 1536 x 6144, unless its rounding matters.
    """
    matrix = in_float64(torch.as_tensor(matrix))
    matrix = matrix if matrix.size(0) <= matrix.size(1) else matrix.mT  # (n, long side)
    if not matrix.isfinite().all():
        return np.full(len(matrix), np.nan)
    largest = matrix.abs().max().item() or 1.0  # as the unit, so that no square overflows or vanishes
    matrix = matrix / largest
    squares = or_nan(torch.linalg.eigvalsh, matrix @ matrix.mT).clamp(min=0)  # (n,), ascending
    values = squares.sqrt().flip(0)
    error = len(squares) * torch.finfo(torch.float64).eps * squares[-1]  # bound on an eigenvalue's rounding
    if not (squares + error).sqrt().sum() - values.sum() <= 1e-7 * values.sum():  # too large, or NaN
        values = or_nan(torch.linalg.svdvals, matrix.cpu())
    return values.cpu().numpy() * largest

def rank_of(values):
    """Effective rank (...) of singular values (..., n): from 1 to n, or 0 where all are 0."""
    total = values.sum(-1, keepdims=True)  # (..., 1)
    p = values / np.where(total == 0, 1, total)
    entropy = -(p * np.log(np.where(p == 0, 1, p))).sum(-1)  # in nats; 0 log 0 = 0
    return np.exp(entropy) * (total[..., 0] != 0)

def effective_rank(matrix):
    """exp(H(p)) of an (m, n) matrix, where p are its singular values over their sum."""
    return float(rank_of(singular_values(matrix)))

def proportional_effective_rank(matrix):
    """The effective rank as a share of the largest possible, min(m, n)."""
    return effective_rank(matrix) / min(matrix.shape)

def ov_values(attention):
    """Singular values (H, D) of each head's W_O W_V: from what it reads to what it writes. The rest are 0."""
    H, K, D = attention.n_heads, attention.n_kv_heads, attention.head_dim
    o = in_float64(attention.o_proj.weight).unflatten(1, (H, D)).transpose(0, 1)  # (H, C, D)
    v = in_float64(attention.v_proj.weight).unflatten(0, (K, D)).mT  # (K, C, D)
    v = v.repeat_interleave(H // K, dim=0)  # (H, C, D): head h reads h // (H / K)
    if not (o.isfinite().all() and v.isfinite().all()):
        return np.full((H, D), np.nan)
    product = torch.linalg.qr(o).R @ torch.linalg.qr(v).R.mT  # an orthogonal factor changes no singular value
    return or_nan(torch.linalg.svdvals, product.cpu()).numpy()

def head_entropy(q, k):
    """Mean entropy (H,) of the causal attention of q (B, H, T, D) on k (B, K, T, D): 1 is uniform."""
    B, H, T, D = q.shape
    k = k.float().repeat_interleave(H // k.size(1), dim=1).mT  # (B, H, D, T)
    total = torch.zeros(H, dtype=torch.float64)
    chunk = max(1, 2**22 // (B * H * T))  # query rows at a time: about four million scores
    for first in range(1, T, chunk):
        end = min(first + chunk, T)
        length = torch.arange(first + 1, end + 1, device=q.device)  # (chunk,) positions that each row sees
        score = q[:, :, first:end].float() @ k[..., :end] / math.sqrt(D)  # (B, H, chunk, end)
        later = torch.arange(end, device=q.device) >= length[:, None]  # (chunk, end)
        log_p = score.masked_fill_(later, -1e30).log_softmax(-1)  # finite, so that 0 times it is 0
        entropy = -(log_p.exp() * log_p).sum(-1)  # (B, H, chunk)
        total += (entropy / length.log()).sum((0, 2)).cpu()  # shares of the largest; the first row has none
    return total / (B * max(1, T - 1))

@torch.no_grad()
def attention_entropy(model, idx):
    """Entropy of each head's attention on token ids idx (B, T), as a share of the largest: (L, H)."""
    entropy = []
    def watch(attention, inputs):
        x, cos, sin, _ = inputs
        q, k, _ = attention.qkv(x, cos, sin)
        entropy.append(head_entropy(q, k).numpy())
    with torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.attention.register_forward_pre_hook(watch))
        model.features(idx)
    return np.stack(entropy)

ROLES = {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj",
         "gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"}

def probe(tokens, T, n_tokens=2048):
    """Inputs and targets (B, T) of about n_tokens: rows spread evenly over a text, always the same."""
    starts = np.linspace(0, len(tokens) - T - 1, max(1, n_tokens // T)).astype(np.int64)
    rows = torch.from_numpy(np.stack([tokens[i : i + T + 1] for i in starts]).astype(np.int64))  # (B, T + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

def measure(model, idx, targets=None, complain=print):
    """Singular values of a Llama and attention entropies on token ids idx (B, T), as arrays by name.

    It leaves no gradient, no hook and no compiled kernel behind. In the result are
    "weights/down" (L, n), "weights/ov" (L, H, D), "activations" (L, n) after each block, "entropy" (L, H);
    with targets (B, T) also "weights/<role>" and "gradients/<role>" of all matrices, and "loss" ().
    """
    weights = {role: [block.get_submodule(path).weight for block in model.blocks]
               for role, path in ROLES.items()}
    weights |= {"embedding": [model.embedding.weight], "unembedding": [model.unembedding.weight]}
    chosen = ["down"] if targets is None else weights
    measured = {f"weights/{role}": np.stack([singular_values(w) for w in weights[role]]) for role in chosen}
    measured["weights/ov"] = np.stack([ov_values(block.attention) for block in model.blocks])
    activations = []  # (n,) of each layer
    def watch(block, inputs, x):
        activations.append(singular_values(x.flatten(0, 1)))
    with torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.register_forward_hook(watch))
        loss = model.features(idx) if targets is None else model(idx, targets)
    measured |= {"activations": np.stack(activations), "entropy": attention_entropy(model, idx)}
    if targets is not None:
        gradients = iter(torch.autograd.grad(loss, sum(weights.values(), [])))  # leaves no .grad
        for role, of_role in weights.items():
            measured[f"gradients/{role}"] = np.stack([singular_values(next(gradients)) for _ in of_role])
        measured["loss"] = loss.detach().cpu().double().numpy()
    if damaged := [name for name, values in measured.items() if not np.isfinite(values).all()]:
        complain(f"not finite in some layer, left out: {', '.join(damaged)}")
    return measured

def summary(measured):
    """The metrics for a log, where finite: PER by role, of activations and attention entropy by layer."""
    metrics = {}
    for name, values in measured.items():
        if name == "entropy":
            metrics |= {f"entropy/{layer}": heads for layer, heads in enumerate(values)}
        elif name != "loss":
            shares = rank_of(values) / values.shape[-1]  # (L,) or (L, H)
            by_layer = {f"per/activations/{layer}": shares[[layer]] for layer in range(len(shares))}
            metrics |= by_layer if name == "activations" else {f"per/{name}": shares}
    finite = {name: shares[np.isfinite(shares)] for name, shares in metrics.items()}
    return {name: float(shares.mean()) for name, shares in finite.items() if shares.size}

# ----------------------------------------------------------------------------------------------------
# The collapse detector

SIGNAL = "per/weights/down"  # depends on no batch, and scatters little
WIDTH, BEFORE, AFTER = 10, slice(0, 4), slice(6, 10)  # evaluations of a window; those before and after a drop
# STEP_WEIGHTS @ window is the height of its step, by least squares; the gap has no weight. SPREAD is the
# standard deviation of that height in a random walk of unit increments: one shifts all later values.
places = np.r_[BEFORE, AFTER]
design = np.stack([places**0, places, places >= 6], axis=1)  # (8, 3): level, slope, step
STEP_WEIGHTS = np.insert(np.linalg.pinv(design)[2], 4, [0, 0])  # (10,)
SPREAD = math.sqrt((STEP_WEIGHTS[::-1].cumsum()[:-1] ** 2).sum())

def collapse(values):
    """The first sustained drop in a sequence: (index after it, its size over the level before), or None.

    A window of ten values is fitted by a line plus a step between its first four and its last four. It counts
    if each of the last four lies below each of the first, and the step exceeds 5% of their level and 3.5
    times its standard deviation in a random walk with the increments so far. Of simulated curves without a
    drop at most 5% have an alarm. A drop of 20% is found in 9 of 10 curves of 24 values that scatter by 1%,
    one of 10% in 8 of 10 that scatter by 0.2%.
    """
    values = np.asarray(values, np.float64)
    for end in range(WIDTH + 2, len(values) + 1):
        increments, window = np.diff(values[:end]), values[end - WIDTH : end]
        noise = 1.4826 * np.median(np.abs(increments - np.median(increments)))  # a robust deviation
        before, size = window[BEFORE], -(STEP_WEIGHTS @ window)
        least = max(0.05 * before.mean(), 3.5 * SPREAD * noise)
        if window[AFTER].max() < before.min() and size > least:
            return end - WIDTH + 1 + int(np.diff(window).argmin()), float(size / before.mean())

def change_point(log, key, after):
    """The first drop of `key` in a log after warm-up: {"curve": key, "at": step, "size": share}, or None."""
    evals = [line for line in log if line["kind"] == "eval" and line["step"] >= after and key in line]
    drop = collapse([line[key] for line in evals])
    return drop and {"curve": key, "at": evals[drop[0]]["step"], "size": drop[1]}

# ----------------------------------------------------------------------------------------------------
# The command line

BUDGETS = "step lm_tokens flops seconds".split()  # in which one arm may be sooner

@dataclass
class Config:
    x: Literal["step", "lm_tokens", "flops", "seconds"] = "step"  # axis of the figures
    out: str = ""  # folder of the figures and the table; empty takes the first run's
    corpus: str = ""  # folder of a prepared corpus in the model's tokens; empty takes the run's own

INCIDENTAL = """out_dir data_dir seed device dtype compile resume micro_batch_size micro_episodes log_interval
eval_interval ckpt_interval wandb wandb_project wandb_id git argv system versions""".split()  # no new arm

def full_log(path, config):
    """A run's log, with spectra of its checkpoints if it has none. A model without a log has one line."""
    from tqdm import tqdm  # here, so that this file can be copied alone
    from plumbing import checkpoint, corpus, files, run
    log = run.read_log(path)
    evals = {line["step"]: line for line in log if line["kind"] == "eval"}
    if not any(SIGNAL in line for line in log):
        for folder in tqdm(list(checkpoint.checkpoints(path).values()) or [path], path, disable=None):
            loaded = checkpoint.load_model(folder)
            made = loaded.settings or {"data_dir": "", "dataset": "of its own", "block_size": 2048}
            text = config.corpus or os.path.join(made["data_dir"], made["dataset"])
            if problem := checkpoint.corpus_problem(loaded, text):
                files.fail(problem)
            tokens = corpus.load_corpus(text).val
            batch = probe(tokens, min(made["block_size"], loaded.model.config.block_size, len(tokens) - 1))
            measured = measure(loaded.model, *batch, partial(print, folder, file=sys.stderr))
            loss = {} if log else {"val_loss": float(measured["loss"])}  # a log's is over other rows: keep it
            line = {"step": loaded.step, "kind": "eval", **loaded.progress, **loss}
            evals[loaded.step] = line | evals.get(loaded.step, {}) | summary(measured)
    if os.path.exists(f"{path}/eval_lm.json"):
        for step, domains in files.read_json(f"{path}/eval_lm.json").get("steps", {}).items():
            if int(step) in evals:
                evals[int(step)]["bits_per_byte/all"] = domains["all"]["bits_per_byte"]
    return [line for line in log if line["kind"] != "eval"] + [evals[step] for step in sorted(evals)]

def table(logs):
    """The evaluations of {model: log} as CSV, a column for each number that any of them has."""
    from pandas import DataFrame
    evals = [{"model": model} | line for model, log in logs.items() for line in log if line["kind"] == "eval"]
    return DataFrame(evals, dtype=object).drop(columns="kind").to_csv(index=False)

def mean_evals(logs):
    """The evaluations that all logs have, with the means of what `sooner` compares."""
    evals = [{line["step"]: line for line in log if "val_loss" in line} for log in logs]
    return [{key: np.mean([of_log[step][key] for of_log in evals]) for key in ("val_loss", *BUDGETS)}
            for step in sorted(set.intersection(*map(set, evals)))]

def reached(evals, loss):
    """Where the validation loss first came down to `loss`, on straight lines between evaluations."""
    first = next(i for i, line in enumerate(evals) if line["val_loss"] <= loss)
    below, above = evals[first], evals[max(0, first - 1)]
    losses = below["val_loss"], above["val_loss"]
    return {x: np.interp(loss, losses, (below[x], above[x])) for x in BUDGETS}

def sooner(*arms):
    """In words: when the better of two arms, over its seeds, reached the final loss of the other."""
    evals = {arm.label: mean_evals(arm.runs) for arm in arms}
    first, second = sorted(evals, key=lambda label: evals[label][-1]["val_loss"])
    end = evals[second][-1]
    start = reached(evals[first], end["val_loss"])
    times = ", ".join(f"{end[x] / start[x]:.2f} in {x}" for x in start if start[x])
    return (f"{second} ended with validation loss {end['val_loss']:.4f}, which {first} reached at "
            f"step {start['step']:,.0f}. Speed-up: {times}")

def main():
    from plumbing import checkpoint, figures, files, settings
    config, paths = settings.load(Config, __doc__)
    if not paths:
        files.fail("name run folders, out/<run>, single checkpoints, or models of others")
    paths = list(dict.fromkeys(map(os.path.normpath, paths)))  # a run that is named twice is one seed
    logs, out = {path: full_log(path, config) for path in paths}, config.out or paths[0]
    trained = {path: files.read_json(f"{path}/config.json") for path in paths
               if os.path.exists(f"{path}/log.jsonl") or checkpoint.checkpoints(path)}
    if trained or config.out:
        files.write_atomic(f"{out}/spectra.csv", table(logs))
    if not trained:
        return print(table(logs), end="")
    different = [key for key in next(iter(trained.values())) if key not in INCIDENTAL
                 and len({str(made.get(key)) for made in trained.values()}) > 1]
    arms = {}  # runs that differ in nothing that matters are one arm
    for run, made in trained.items():
        label = ", ".join(f"{key}={made.get(key)}" for key in different) or paths[0]
        arms.setdefault(label, figures.Arm(label, [], made)).runs.append(logs[run])
        if drop := change_point(logs[run], SIGNAL, made["warmup_steps"]):
            print(f"{run}: {SIGNAL} fell by {drop['size']:.1%} at step {drop['at']}")
    first, *others = arms.values()
    for arm in others:
        print(sooner(first, arm))
    figures.save(figures.phase([first, *others], config.x, change_point), f"{out}/phase.png")
    figures.save(figures.heat_maps([first, *others], config.x), f"{out}/heat.png")
    print(f"written {out}/spectra.csv, phase.png and heat.png")

if __name__ == "__main__":
    main()
