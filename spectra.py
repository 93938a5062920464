"""The inner life of a run: effective ranks and attention entropies over training, beside its losses; and a signal when a rank collapses.

    python spectra.py out/maml out/vanilla --x=lm_tokens        # a table for each run, the phase figure, heat maps, and who was sooner

The effective rank of a matrix (Roy and Vetterli 2007) is exp(H(p)), p its singular values divided by their sum: in how many directions it acts.
Divided by the number n of singular values it is the proportional effective rank, PER: 1 where all are equal, 1/n at rank one. Plain language
modelling, too, lets it fall and rise again (arXiv 2509.23024), mostly during warm-up: look at a run beside its vanilla twin.

Letters in shape comments: B rows, T positions, C = d_model, L layers, H query heads, K key/value heads, D = C / H, n singular values.
"""
import csv
import functools
import io
import json
import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Effective rank


@torch.no_grad()
def singular_values(matrix, name="the matrix"):
    """The singular values of an (m, n) matrix of any float type, descending, (min(m, n),) in float64. ValueError: `name` is not finite.

    They are the roots of the eigenvalues of the smaller Gram matrix: ten times sooner for 1536 x 6144. Squaring costs the small ones digits: an
    eigenvalue is off by as much as n eps times the largest. Where that leaves 1e-7 of their sum in doubt, the matrix itself is decomposed.
    """
    matrix = torch.as_tensor(matrix).double()
    if not matrix.isfinite().all():
        raise ValueError(f"{name} is not finite: {int((~matrix.isfinite()).sum()):,} of its {matrix.numel():,} numbers")
    matrix = matrix if matrix.size(0) <= matrix.size(1) else matrix.mT  # (n, long side)
    largest = matrix.abs().max().item() or 1.0  # as the unit, so that no square overflows or vanishes
    matrix = matrix / largest
    squares = torch.linalg.eigvalsh(matrix @ matrix.mT).clamp(min=0)  # (n,), ascending
    values = squares.sqrt().flip(0)
    blur = len(squares) * torch.finfo(torch.float64).eps * squares[-1]
    if ((squares + blur).sqrt().sum() - values.sum()) > 1e-7 * values.sum():
        values = torch.linalg.svdvals(matrix)
    return values.cpu().numpy() * largest


def rank_of(values):
    """Effective rank (...) of singular values (..., n): between 1 and n, and 0 where all are 0."""
    total = values.sum(-1, keepdims=True)  # (..., 1)
    p = values / np.where(total == 0, 1, total)
    entropy = -(p * np.log(np.where(p == 0, 1, p))).sum(-1)  # nats; 0 log 0 = 0
    return np.exp(entropy) * (total[..., 0] != 0)


def effective_rank(matrix):
    """exp(H(p)) of an (m, n) matrix, p = its singular values over their sum; 0 for the zero matrix. ValueError: it is not finite."""
    return float(rank_of(singular_values(matrix)))


def proportional_effective_rank(matrix):
    """The effective rank as a share of the largest possible, min(m, n)."""
    return effective_rank(matrix) / min(matrix.shape)


def ov_values(attention, name="the OV circuit"):
    """Singular values (H, D) of each head's W_O W_V: what it writes for what it reads. All other of the C are 0, so n is D here."""
    H, K, D = attention.n_heads, attention.n_kv_heads, attention.head_dim
    o = attention.o_proj.weight.detach().double().unflatten(1, (H, D)).transpose(0, 1)  # (H, C, D)
    v = attention.v_proj.weight.detach().double().unflatten(0, (K, D)).mT.repeat_interleave(H // K, dim=0)  # (H, C, D): head h reads h // (H / K)
    if not (o.isfinite().all() and v.isfinite().all()):
        raise ValueError(f"{name} is not finite")
    return torch.linalg.svdvals(torch.linalg.qr(o).R @ torch.linalg.qr(v).R.mT).cpu().numpy()  # an orthogonal factor changes no singular value


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Attention entropy


@torch.no_grad()
def head_entropy(q, k):
    """Mean entropy (H,) of the causal attention rows of q (B, H, T, D) on k (B, K, T, D), each over the log of its length: 1 is uniform.

    The first row, of length one, has no say. Query rows come in chunks, so that no more than about four million scores are held at once.
    """
    B, H, T, D = q.shape
    k = k.float().repeat_interleave(H // k.size(1), dim=1).mT  # (B, H, D, T)
    total, chunk = torch.zeros(H, dtype=torch.float64, device=q.device), max(1, 2**22 // (B * H * T))
    for first in range(1, T, chunk):
        end = min(first + chunk, T)
        length = torch.arange(first + 1, end + 1, device=q.device)  # (chunk,) positions that each row sees
        score = q[:, :, first:end].float() @ k[..., :end] / math.sqrt(D)  # (B, H, chunk, end)
        later = torch.arange(end, device=q.device) >= length[:, None]  # (chunk, end)
        log_p = score.masked_fill_(later, -1e30).log_softmax(-1)  # finite, so that 0 times it is 0; half the time of special.entr
        entropy = -(log_p.exp() * log_p).sum(-1)  # (B, H, chunk) nats
        total += (entropy / length.log()).sum((0, 2))
    return total / (B * max(1, T - 1))


class Attentions(TorchFunctionMode):
    """Sees the queries and keys of each attention call as the model itself made them, rotary positions and all."""

    def __init__(self):
        super().__init__()
        self.entropy = []  # (H,) of each layer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.entropy.append(head_entropy(*args[:2]).cpu().numpy())
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def attention_entropy(model, idx):
    """Entropy of each head's attention on token ids idx (B, T), as a share of the largest possible: (L, H)."""
    with torch.compiler.set_stance("force_eager"), Attentions() as attentions:
        model.features(idx)
    return np.stack(attentions.entropy)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# A model, measured on a fixed batch. It draws nothing and leaves nothing: no gradient, no hook, no kernel compiled for the shape of the batch.

ROLES = {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj",
         "gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"}  # fmt: skip


def probe(tokens, T, n_tokens=2048):
    """Inputs and targets (B, T) of about n_tokens: rows spread evenly over a text, the same every time."""
    starts = np.linspace(0, len(tokens) - T - 1, max(1, n_tokens // T)).astype(np.int64)
    rows = torch.from_numpy(np.stack([tokens[start : start + T + 1] for start in starts]).astype(np.int64))  # (B, T + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def measure(model, idx, targets=None, complain=None):
    """Singular values of a Llama and its attention entropies on token ids idx (B, T), as float64 arrays by name.

        "weights/down" (L, n), "weights/ov" (L, H, D)      the cheap ones, which are all that is measured without targets
        "activations" (L, n)                               of the residual stream after each block, (B*T, C), uncentred
        "entropy" (L, H)
        "weights/q", ..., "weights/embedding" (1, n), ...  with targets (B, T): all roles,
        "gradients/q", ..., "loss" ()                      and the gradients of the language-model loss

    A matrix that is not finite is a ValueError; with complain(text), it is told there, its values are NaN, and the others are still measured.
    What a damaged weight does to activations and gradients is not told again.
    """
    damaged = []

    def values(name, of, matrix, *shape):
        try:
            return of(matrix, name)
        except ValueError as error:
            if complain is None:
                raise
            if name.startswith("weights") or not damaged:
                complain(str(error))
            damaged.append(name)
            return np.full(shape or min(matrix.shape), np.nan)

    matrices = {role: [block.get_submodule(path).weight for block in model.blocks] for role, path in ROLES.items()}
    matrices |= {"embedding": [model.embedding.weight], "unembedding": [model.unembedding.weight]}
    measured = {f"weights/{role}": np.stack([values(f"weights/{role}/{i}", singular_values, w) for i, w in enumerate(matrices[role])])
                for role in (matrices if targets is not None else ["down"])}  # fmt: skip
    measured["weights/ov"] = np.stack([values(f"weights/ov/{layer}", ov_values, a, a.n_heads, a.head_dim)
                                       for layer, a in enumerate(block.attention for block in model.blocks)])  # fmt: skip
    activations, hooks = [], []
    for layer, block in enumerate(model.blocks):
        hooks.append(block.register_forward_hook(lambda block, inputs, x, layer=layer: activations.append(
            values(f"activations/{layer}", singular_values, x.detach().flatten(0, 1)))))  # fmt: skip
    try:
        with torch.compiler.set_stance("force_eager"), Attentions() as attentions, torch.set_grad_enabled(targets is not None):
            loss = model.features(idx) if targets is None else model(idx, targets)
    finally:
        for hook in hooks:
            hook.remove()
    measured |= {"activations": np.stack(activations), "entropy": np.stack(attentions.entropy)}
    if targets is not None:
        gradients = iter(torch.autograd.grad(loss, [w for group in matrices.values() for w in group]))  # unlike backward(), leaves no .grad
        for role, group in matrices.items():
            measured[f"gradients/{role}"] = np.stack([values(f"gradients/{role}/{i}", singular_values, next(gradients)) for i in range(len(group))])
        measured["loss"] = loss.detach().double().cpu().numpy()
    return measured


def summary(measured):
    """What `measure` found as numbers for a log: PER by role (mean over layers, and over heads), PER of activations and entropy by layer."""
    numbers = {}
    for name, values in measured.items():
        if name == "loss":
            continue
        shares = values if name == "entropy" else rank_of(values) / values.shape[-1]
        if name.startswith(("weights", "gradients")):
            numbers[f"per/{name}"] = shares[np.isfinite(shares)]
        else:
            prefix = "entropy" if name == "entropy" else "per/activations"
            numbers |= {f"{prefix}/{layer}": share[np.isfinite(share)] for layer, share in enumerate(shares.reshape(len(shares), -1))}
    return {name: float(shares.mean()) for name, shares in numbers.items() if shares.size}  # what is not finite is left out


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The signal

SIGNAL = "per/weights/down"  # depends on no batch, and scatters little
BEFORE, GAP, AFTER = 4, 2, 4  # evaluations before a drop, while it happens, and after it
LEAST_VALUES, LEAST_SIZE, LEAST_SCORE = 12, 0.05, 3.5


def collapse(values):
    """The first sustained drop in a sequence: (index of the first value after its steepest fall, size as a share of the level before), or None.

    A window of ten values is fitted by a line plus a step between its first four and its last four. A bend in the curve cannot pass for a step: the
    window is symmetric, and a parabola in it is at right angles to the step. The step counts if all of the last four lie below all of the first four,
    if it is at least 5% of the level before, and 3.5 times the scatter that a random walk would give it with the increments seen so far (their median
    absolute deviation, which trend and drop leave alone). A decision takes the values up to the end of its window only: later ones never change it.

    On simulated curves of up to 100 values, white noise, random walk or drift, at most 5% have a false alarm. Of 24 values, a drop of 20% within two
    evaluations is found in 9 of 10 curves that scatter by 1%, and one of 10% in 8 of 10 that scatter by 0.2%, as per/weights/down does.
    """
    values, width = np.asarray(values, np.float64), BEFORE + GAP + AFTER
    weights, spread = _step_weights()
    for end in range(LEAST_VALUES, len(values) + 1):
        rises, window = np.diff(values[:end]), values[end - width : end]
        noise = 1.4826 * np.median(np.abs(rises - np.median(rises)))  # standard deviation of an increment
        before, after, size = window[:BEFORE], window[-AFTER:], -(weights @ window)
        if after.max() < before.min() and size > max(LEAST_SIZE * before.mean(), LEAST_SCORE * spread * noise):
            return end - width + 1 + int(np.diff(window).argmin()), float(size / before.mean())
    return None


@functools.cache
def _step_weights():
    """The weights (10,) whose product with a window is the step's height, by least squares; and its deviation in a random walk of unit increments."""
    t = np.arange(BEFORE + GAP + AFTER)
    seen = (t < BEFORE) | (t >= BEFORE + GAP)
    weights = np.zeros(len(t))
    weights[seen] = np.linalg.pinv(np.stack([t**0, t, t >= BEFORE + GAP], axis=1)[seen])[2]
    return weights, math.sqrt((weights[::-1].cumsum()[:-1] ** 2).sum())  # an increment moves all that follows it


def change_point(lines, key, after):
    """The first sustained drop of `key` in the evaluations of a log from step `after`, where warm-up ends: {"curve", "at": step, "size"} or None."""
    seen = [(line["step"], line[key]) for line in lines if line["kind"] == "eval" and line["step"] >= after and key in line]
    found = collapse([value for _, value in seen])
    return found and {"curve": key, "at": seen[found[0]][0], "size": found[1]}


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Figures

COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000".split()  # Okabe and Ito's: told apart by the colour-blind too
AXES = {"step": "optimizer step", "lm_tokens": "language-model tokens", "flops": "training FLOPs", "seconds": "training time (s)"}


@dataclass
class Arm:
    """Runs that differ in nothing but their seed: a line and a band in a figure."""

    label: str
    runs: list  # for each seed the lines of its log
    config: dict  # n_layers, n_way, k_shot, warmup_steps


def curve(lines, key, x="step", kind="eval"):
    """Where the lines of a kind that have `key` stand on the axis x, and its values, (2, n). "entropy/*" is the mean of all keys that begin so."""
    found = []
    for line in lines:
        keys = [name for name in line if name.startswith(key[:-1])] if key.endswith("*") else [key] if key in line else []
        if line["kind"] == kind and keys:
            found.append((line[x], np.mean([line[name] for name in keys])))
    return np.array(found, np.float64).reshape(-1, 2).T


def place(lines, step, x):
    """Where a step stands on the axis x."""
    known = [(line["step"], line[x]) for line in lines if x in line]
    return float(np.interp(step, *zip(*known, strict=True)))


def figure(arms, x="step", inside=True):
    """The phase figure: what is known of arms over training, stacked on one axis. Without `inside`, the losses and accuracies only."""
    plt = _pyplot()
    config, lines = arms[0].config, [line for arm in arms for run in arm.runs for line in run if line["kind"] == "eval"]
    last = config["n_layers"] - 1
    sources = sorted({key for line in lines for key in line if key.startswith("val_loss/")})
    panels = {
        "PER of weights": {"per/weights/down": "MLP down", "per/weights/ov": "OV circuits"},
        "PER of activations": {f"per/activations/{last}": "after the last block", f"per/activations/{last // 2}": f"after block {last // 2}"},
        "attention entropy\n(share of uniform)": {"entropy/*": "mean of all heads"},
        "LM loss\n(nats per token)": {"val_loss": "validation"} | {key: key.removeprefix("val_loss/") for key in sources if len(sources) > 1},
        "bits per byte\nof other texts": {"bits_per_byte/all": "all domains (eval_lm.py --step=all)"},
        f"query accuracy\n({config['n_way']}-way, {config['k_shot']}-shot)": {
            "heldout_query_acc": "held-out words, after adaptation", "heldout_query_acc_before": "before"},
    }  # fmt: skip
    panels = {label: keys for label, keys in panels.items() if any(curve(lines, key).size for key in keys)}
    panels = {label: keys for label, keys in panels.items() if inside or "val_loss" in keys or "heldout_query_acc" in keys}
    height = 0.8 + (2.1 if inside else 3.0) * len(panels)
    drawn, axes = plt.subplots(len(panels), figsize=(9, height), sharex=True, squeeze=False, layout="constrained")
    single = len(arms) == 1 and len(arms[0].runs) == 1
    for ax, (label, keys) in zip(axes[:, 0], panels.items(), strict=True):
        if single:
            _each_step(ax, arms[0].runs[0], keys, x)
        for i, arm in enumerate(arms):
            for j, (key, note) in enumerate(keys.items()):
                _line(ax, arm, key, x, color=COLORS[j if len(arms) == 1 else i], linestyle=["-", "--", ":", "-."][j % 4], label=note)
            for at in {place(run, arm.config["warmup_steps"], x) for run in arm.runs}:
                ax.axvline(at, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)))
            for line in (line for run in arm.runs for line in run if line["kind"] == "collapse"):
                ax.axvline(line[x], color=COLORS[i], linewidth=1)
        if "heldout_query_acc" in keys:
            ax.axhline(1 / config["n_way"], color="black", linewidth=0.8, linestyle=(0, (5, 5)), label=f"chance, 1/{config['n_way']}")
            ax.set_ylim(0)
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        handles, notes = ax.get_legend_handles_labels()
        first = [notes.index(note) for note in dict.fromkeys(notes)]  # of each kind of line one
        shown = ax.legend([handles[k] for k in first], [notes[k] for k in first], frameon=False, fontsize="small", loc="best")
        for handle in shown.legend_handles if len(arms) > 1 else []:
            handle.set_color("0.2")
    axes[-1, 0].set_xlabel(AXES[x])
    drawn.align_ylabels()
    mark = place(arms[0].runs[0], arms[0].config["warmup_steps"], x)
    axes[0, 0].annotate("warm-up ends", (mark, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
                        color="0.45", size=8)  # fmt: skip
    names = [arm.label + (f" ({len(arm.runs)} seeds: mean and range)" if len(arm.runs) > 1 else "") for arm in arms]
    if len(arms) == 1:
        drawn.suptitle(names[0], fontsize="medium")
    else:
        keys = [plt.Line2D([], [], color=COLORS[i], linewidth=2) for i in range(len(arms))]
        drawn.legend(keys, names, loc="outside upper center", ncols=min(3, len(arms)), frameon=False)
    return drawn


def _line(ax, arm, key, x, **style):
    """The mean of an arm's runs at the steps that all have, with their range, or a single run's standard error; change points of a PER are marked."""
    tables = [dict(zip(curve(run, key)[0], zip(*curve(run, key, x), strict=True), strict=True)) for run in arm.runs]  # step -> (place, value)
    steps = sorted(set.intersection(*map(set, tables)))
    if not steps:
        return
    both = np.array([[table[step] for step in steps] for table in tables])  # (runs, n, 2)
    at, mean = both.mean(0).T
    low, high = both[..., 1].min(0), both[..., 1].max(0)
    if len(arm.runs) == 1 and len(error := curve(arm.runs[0], key + "_se")[1]) == len(mean):
        low, high = mean - error, mean + error
    ax.plot(at, mean, linewidth=1.5, marker="o", markersize=2.5 if len(at) < 40 else 0, **style)
    ax.fill_between(at, low, high, color=style["color"], alpha=0.18, linewidth=0)
    for run in arm.runs if key.startswith("per/") else []:
        if found := change_point(run, key, arm.config["warmup_steps"]):
            spot = place(run, found["at"], x), np.interp(found["at"], *curve(run, key))
            ax.plot(*spot, marker="v", markersize=9, color=style["color"], markeredgecolor="black")
            ax.annotate(f"drop of {found['size']:.0%}", spot, xytext=(7, 5), textcoords="offset points", size=8)


def _each_step(ax, lines, keys, x, window=25):
    """Behind a single run's evaluations, what each training step gave: the loss, and query accuracies as the mean of the steps so far, at most 25."""
    if "val_loss" in keys:
        ax.plot(*curve(lines, "lm_loss", x, "lm"), color="0.8", linewidth=0.7, label="training, each step")
    if "heldout_query_acc" in keys:
        for key, color in (("query_acc", "#e69f00"), ("query_acc_before", "0.6")):
            at, acc = curve(lines, key, x, "meta")
            sums, i = np.concatenate([[0], acc.cumsum()]), np.arange(len(acc))
            mean = (sums[i + 1] - sums[np.maximum(i + 1 - window, 0)]) / np.minimum(i + 1, window)
            note = f"training words, {'after adaptation' if key == 'query_acc' else 'before'} (mean of {window} steps)"
            if len(at):
                ax.plot(at, mean, color=color, linewidth=0.9, label=note)


def heat_maps(arms, x="step"):
    """PER of activations and attention entropy, layer by layer over training: a column for each arm (its first run), colours alike in a row."""
    plt = _pyplot()
    rows = {"per/activations": "PER of activations", "entropy": "attention entropy\n(share of uniform)"}
    drawn, axes = plt.subplots(len(rows), len(arms), figsize=(max(6, 1.5 + 4 * len(arms)), 6), sharex="col", sharey=True, squeeze=False,
                               layout="constrained")  # fmt: skip
    for line_of_axes, (prefix, label) in zip(axes, rows.items(), strict=True):
        maps = []  # for each arm: where (n,), values (L, n)
        for arm in arms:
            keys = [f"{prefix}/{layer}" for layer in range(arm.config["n_layers"])]
            evals = [line for line in arm.runs[0] if line["kind"] == "eval"]
            lines = [line for line in evals if any(key in line for key in keys)] or evals  # without any, a blank map
            maps.append(([line[x] for line in lines], np.array([[line.get(key, np.nan) for line in lines] for key in keys])))
        low, high = (f.reduce([f.reduce(values, axis=None) for _, values in maps]) for f in (np.fmin, np.fmax))  # NaN if all are
        for ax, (at, values), arm in zip(line_of_axes, maps, arms, strict=True):
            mesh = ax.pcolormesh(at, range(len(values)), values, vmin=low, vmax=high, cmap="cividis", shading="nearest")
            ax.axvline(place(arm.runs[0], arm.config["warmup_steps"], x), color="white", linewidth=1, linestyle=":")
            ax.set_title(arm.label if prefix == "per/activations" else "", fontsize="medium")
        line_of_axes[0].set_ylabel("layer")
        line_of_axes[0].locator_params(axis="y", integer=True)
        drawn.colorbar(mesh, ax=line_of_axes.tolist(), label=label)
    for ax in axes[-1]:
        ax.set_xlabel(AXES[x])
    return drawn


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # draws to files, on machines without a screen too
    import matplotlib.pyplot as plt

    plt.close("all")
    plt.rcParams["axes.formatter.useoffset"] = False  # 0.9999, not 0.1 of 1e-3 above 0.999
    return plt


def reached(lines, loss):
    """Step, LM tokens, FLOPs and seconds at which the validation loss first came down to `loss`, on straight lines between evaluations; or None."""
    steps, losses = curve(lines, "val_loss")
    below = np.flatnonzero(losses <= loss)
    if not below.size:
        return None
    i = below[0]
    share = 1.0 if i == 0 else (losses[i - 1] - loss) / (losses[i - 1] - losses[i])  # of the way from the evaluation before
    return {x: float(at[i] if i == 0 else at[i - 1] + share * (at[i] - at[i - 1])) for x in AXES for at in [curve(lines, "val_loss", x)[0]]}


def sooner(names, runs):
    """In words: when the first of two runs' logs reached the final validation loss of the second, and how many times sooner than that one."""
    final, end = curve(runs[1], "val_loss")[1][-1], {x: curve(runs[1], "val_loss", x)[0][-1] for x in AXES}
    if not math.isfinite(final):
        return f"{names[1]} ended without a finite validation loss: nothing to compare"
    text = f"{names[1]} ended with validation loss {final:.4f}: {_budget(end)}\n"
    start = reached(runs[0], final)
    if start is None:
        never = f"{text}{names[0]} never came down to it: its lowest is {curve(runs[0], 'val_loss')[1].min():.4f}"
        return f"{never}\nthe other way round: {sooner(names[::-1], runs[::-1])}"  # which has an answer: that one did come lower
    times = ", ".join(f"{end[x] / start[x]:.2f}x in {AXES[x]}" for x in AXES if start[x] > 0)
    return f"{text}{names[0]} reached it after {_budget(start)}\ntimes sooner: {times}"


def _budget(at):
    return f"{at['step']:,.0f} steps, {at['lm_tokens']:,.0f} LM tokens, {at['flops']:.3g} FLOPs, {at['seconds']:,.0f} s"


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Config:
    x: str = "step"  # axis of the figures: step, lm_tokens, flops or seconds
    out: str = ""  # folder of the figures; empty takes the first run's
    from_checkpoints: bool = False  # measure the checkpoints, even where the log has the numbers; a log without them is always helped so
    data_dir: str = ""  # where the corpora are; empty takes the run's


def settings_of(folder):
    """The settings of a run, from its config.json or else from its newest checkpoint."""
    from runs import checkpoints, fail, load_checkpoint, read_json, read_log

    path, found = os.path.join(folder, "config.json"), checkpoints(folder)
    if not (found or any(line["kind"] == "eval" for line in read_log(folder))):
        fail(f"{folder} holds neither checkpoints nor a log with evaluations; train one with train.py --out_dir={folder}")
    settings = load_checkpoint(found[max(found)])["config"] if found and not os.path.exists(path) else read_json(path)
    for key in ("d_model", "n_layers", "block_size", "n_way", "k_shot", "warmup_steps"):
        if type(settings.get(key)) is not int:
            fail(f"{path} has {key} = {settings.get(key)}, not a whole number: it is not what train.py writes; copy the run again")
    return settings


def with_spectra(folder, lines, block_size, corpus_dir):
    """The log with the spectra of the checkpoints in its evaluations; an evaluation is made up where there is none."""
    from tqdm import tqdm

    from runs import checkpoints, fail, load_corpus, load_model, other_corpus, write_atomic

    found = checkpoints(folder)
    if not found:
        fail(f"{folder} holds no checkpoint (ckpt_*.pt), and its log no spectra: there is nothing to measure")
    if why := other_corpus(folder, corpus_dir):
        fail(why)
    tokens = load_corpus(corpus_dir).val
    evals = {line["step"]: {key: value for key, value in line.items() if not key.startswith(("per/", "entropy/"))}
             for line in lines if line["kind"] == "eval"}  # fmt: skip
    with_loss = any("val_loss" in line for line in evals.values())
    for step in tqdm(found, desc=folder, unit=" checkpoints", disable=None):
        model, _, checkpoint = load_model(folder, step)
        measured = measure(model, *probe(tokens, block_size),
                           complain=lambda text, step=step: tqdm.write(f"{folder}, step {step}: {text}; left out", file=sys.stderr))  # fmt: skip
        write_atomic(os.path.join(folder, f"spectra_{step:06d}.npz"), lambda file, measured=measured: np.savez(file, **measured))
        if step not in evals:  # of a loss on other rows there would be no curve
            evals[step] = {"step": step, "kind": "eval", **checkpoint["progress"]} | ({} if with_loss else {"val_loss": float(measured["loss"])})
        evals[step] |= summary(measured)
    return [line for line in lines if line["kind"] != "eval"] + [evals[step] for step in sorted(evals)]


def with_domains(folder, lines):
    """The log with what eval_lm.py found at the steps of checkpoints, where it has looked."""
    from runs import fail, read_json

    path = os.path.join(folder, "eval_lm.json")
    if not os.path.exists(path):
        return lines
    try:
        found = {int(step): float(groups["all"]["bits_per_byte"]) for step, groups in read_json(path)["steps"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        fail(f"{path} is not what eval_lm.py writes; delete it, or run eval_lm.py {folder} --step=all again")
    evals = {line["step"]: line for line in lines if line["kind"] == "eval"}
    for step, value in found.items():
        evals.setdefault(step, {"step": step, "kind": "eval", **{x: place(lines, step, x) for x in AXES}})["bits_per_byte/all"] = value
    return [line for line in lines if line["kind"] != "eval"] + [evals[step] for step in sorted(evals)]


# In what the runs of an arm may differ.
INCIDENTAL = ("out_dir data_dir seed device dtype compile resume expected micro_batch_size micro_episodes log_interval "
              "git argv system versions").split()  # fmt: skip


def arms_of(logs, settings):
    """Runs that differ in nothing but the seed, and in where and how they were computed, are one arm. Both arguments are by folder."""
    groups, arms = {}, []  # the settings that matter -> folders
    for folder in logs:
        matters = {key: value for key, value in settings[folder].items() if key not in INCIDENTAL}
        groups.setdefault(json.dumps(matters, sort_keys=True), []).append(folder)
    for group in groups.values():
        name = os.path.commonprefix(group).rstrip("-_0123456789") if len(group) > 1 else group[0]
        arms.append(Arm(name.rstrip("/") or group[0], [logs[folder] for folder in group], settings[group[0]]))
    return arms


def table(lines):
    """The evaluations of a log as the bytes of a CSV file, a column for each number that any of them has."""
    evals = [line for line in lines if line["kind"] == "eval"]
    text, columns = io.StringIO(), dict.fromkeys(key for line in evals for key in line if key != "kind")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(evals)
    return text.getvalue().encode()


def main():
    import configurator
    from runs import fail, read_log, write_atomic

    config, folders = configurator.load(Config, sys.argv[1:], __doc__)
    if config.x not in AXES:
        fail(f"x = {config.x!r}: x is one of {', '.join(AXES)}")
    for folder in folders or [""]:
        if not os.path.isdir(folder):
            fail(f"{folder or 'nothing'} is not a run folder: python spectra.py out/<run> ...")
    folders = list(dict.fromkeys(map(os.path.normpath, folders)))  # a run given twice is one seed
    settings, logs = {folder: settings_of(folder) for folder in folders}, {}
    for folder in folders[1:]:
        for key in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "corpus_hash"):
            one, other = settings[folders[0]].get(key), settings[folder].get(key)
            if one != other and None not in (one, other):
                fail(f"{folder} has {key} = {other}, but {folders[0]} has {one}: compare runs of one model on one corpus")
    for folder in folders:
        lines, made = read_log(folder), settings[folder]
        if config.from_checkpoints or not curve(lines, SIGNAL).size:
            lines = with_spectra(folder, lines, made["block_size"], os.path.join(config.data_dir or made["data_dir"], made["dataset"]))
        logs[folder] = with_domains(folder, lines)

    def write(path, content):
        write_atomic(path, content)
        print(f"written {path}")

    for folder in folders:
        write(os.path.join(folder, "spectra.csv"), lambda file, lines=logs[folder]: file.write(table(lines)))
        if found := change_point(logs[folder], SIGNAL, settings[folder]["warmup_steps"]):
            print(f"{folder}: {SIGNAL} fell by {found['size']:.1%} at step {found['at']}")
    if len(folders) > 1:
        print(sooner((folders[0], folders[-1]), (logs[folders[0]], logs[folders[-1]])))
    out, arms = config.out or folders[0], arms_of(logs, settings)
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        fail(f"out = {config.out}: cannot make this folder ({error.strerror}); name another with --out")
    for name, drawn in (("phase.png", figure(arms, config.x)), ("heat.png", heat_maps(arms, config.x))):
        write(os.path.join(out, name), lambda file, drawn=drawn: drawn.savefig(file, dpi=110, format="png"))


if __name__ == "__main__":
    main()
