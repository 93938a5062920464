"""All figures. Each function takes plain data and returns a matplotlib figure; `save` writes it.

A log is a list of lines (dicts with "step", "kind" and numbers), as plumbing.run.read_log gives them.
"""
import os
import warnings
from collections import namedtuple

os.environ["MPLBACKEND"] = "agg"  # that of a notebook may be missing here, and figures go to files

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure  # without pyplot: no screen is needed, and no state is kept
from matplotlib.lines import Line2D
from scipy import stats

from plumbing.files import write_atomic

# The name of a run is no formula, even with a $ in it; and an axis says 0.9999, not 0.9e-3 above 0.999.
# Okabe and Ito's colours are for all eyes; "C0" is the first of them. More follow, unlike ones first.
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 k".split()
COLORS += [matplotlib.colormaps["tab20b"].colors[i * 4 % 19] for i in range(19)]
DASHES = ["-", "--", ":", "-."]
DASHES += [(0, (length, 2) + (1, 2) * dots) for dots in (2, 3, 0, 4) for length in (4, 8, 14, 20)]
warnings.filterwarnings("ignore", "Glyph")  # no line for each character that the font lacks
matplotlib.rcParams.update({
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "text.parse_math": False, "axes.formatter.useoffset": False, "figure.constrained_layout.use": True,
    "axes.titlesize": "medium", "legend.fontsize": "small", "legend.frameon": False, "grid.alpha": 0.3})
AXES = {"step": "optimizer step", "lm_tokens": "language-model tokens",
        "flops": "training FLOPs", "seconds": "training time (s)"}
EACH_STEP = [  # what is drawn of a run's steps: panel, key, colour, label, steps in a running mean
    ("val_loss", "lm_loss", "0.8", "training, each step", 1),
    ("heldout_query_acc", "query_acc", "C4", "training words, after (mean of 25 steps)", 25),
    ("heldout_query_acc", "query_acc_before", "0.6", "training words, before (mean of 25 steps)", 25)]
Arm = namedtuple("Arm", "label runs settings")  # runs: logs that differ in the seed alone, for one curve

def save(figure, path):
    """Write a figure as a PNG file, large enough for long names."""
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=150, bbox_inches="tight"))

def points_of(log, key, x="step"):
    """{step: (place on the axis x, number)} of the lines that have `key`."""
    return {line["step"]: (line[x], line[key]) for line in log if key in line}

def mark_warmup(ax, arm, x, color):
    """A dotted line where the learning rate has warmed up."""
    steps, places = zip(*sorted((line["step"], line[x]) for line in arm.runs[0] if x in line), strict=True)
    if steps[0] <= arm.settings["warmup_steps"] <= steps[-1]:  # a lone checkpoint says nothing of it
        ax.axvline(np.interp(arm.settings["warmup_steps"], steps, places), color=color, linestyle=":")

def curves(log, settings, title):
    """Losses and accuracies of one run: its phase figure without what spectra.py measures."""
    log = [{key: line[key] for key in line if not key.startswith(("per/", "entropy/"))} for line in log]
    return phase([Arm(title, [log], settings)], "step")

def phase(arms, x, change_point=None):
    """Ranks, entropies, losses and accuracies of arms, one below the other, on one axis x.

    change_point(log, key, warmup_steps) gives a drop to be marked, {"at": step, "size": share}, or None.
    """
    logs, settings = [log for arm in arms for log in arm.runs], arms[0].settings
    last, found = settings["n_layers"] - 1, {key for log in logs for line in log for key in line}
    blocks = {last: "last block", last // 2: f"block {last // 2}"}
    # A legend drops a label that begins with _, so names of others begin with a space.
    sources = sorted(key for key in found if key.startswith("val_loss/"))
    sources = {key: key.replace("val_loss/", " ") for key in sources}
    panels = {  # label: {key in a log: its label in the legend}
        "PER of weights": {"per/weights/down": "MLP down", "per/weights/ov": "OV circuits"},
        "PER of activations\n(after a block)": {f"per/activations/{i}": block for i, block in blocks.items()},
        "attention entropy\n(share of uniform)": {f"entropy/{i}": block for i, block in blocks.items()},
        "LM loss\n(nats per token)": {"val_loss": "validation", **sources},
        "bits per byte\nof other texts": {"bits_per_byte/all": "all domains (eval_lm.py --step=all)"},
        "query accuracy\n({n_way}-way, {k_shot}-shot)".format_map(settings): {
            "heldout_query_acc": "held-out words, after adaptation", "heldout_query_acc_before": "before"}}
    panels = {label: keys for label, keys in panels.items() if found.intersection(keys)}
    figure = Figure((9, 0.8 + (2.1 if len(panels) > 3 else 3) * len(panels)))
    axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for ax, (label, keys) in zip(axes, panels.items(), strict=True):
        draw_panel(ax, arms, keys, x, change_point)
        ax.set_ylabel(label)
    axes[-1].set_xlabel(f"{AXES[x]} (dotted: end of warm-up)")
    names = [arm.label + f" ({len(arm.runs)} seeds, 95%)" * (len(arm.runs) > 1) for arm in arms]
    handles = [Line2D([], [], color=f"C{i}", visible=len(arms) > 1) for i in range(len(arms))]  # one: a title
    figure.legend(handles, names, loc="outside upper center", fontsize="medium", ncols=1 + (len(arms) > 5))
    return figure

def draw_panel(ax, arms, keys, x, change_point):
    """The curves of all arms. Arms differ in colour, keys in dashes; the keys of a single arm in both."""
    single = len(arms) == 1
    for panel, key, color, label, n in EACH_STEP if single and len(arms[0].runs) == 1 else []:
        if panel in keys and (points := points_of(arms[0].runs[0], key, x)):
            places, numbers = zip(*points.values(), strict=True)
            mean = pd.Series(numbers).rolling(n, min_periods=1).mean()
            ax.plot(places, mean, color=color, linewidth=0.8, label=label)
    for i, arm in enumerate(arms):
        for j, (key, label) in enumerate(keys.items()):
            draw_arm(ax, arm, key, x, change_point, color=f"C{j if single else i}",
                     linestyle=DASHES[j % len(DASHES)], label=label if i == 0 else None)
        mark_warmup(ax, arm, x, "0.6")
        for line in [line for log in arm.runs for line in log if line["kind"] == "collapse"]:
            ax.axvline(line[x], color=f"C{i}", linewidth=1)
    if "heldout_query_acc" in keys:
        chance = 1 / arms[0].settings["n_way"]
        ax.axhline(chance, color="black", linewidth=0.8, linestyle="--", label=f"chance, 1/{1 / chance:.0f}")
        ax.set_ylim(0)
    ax.grid()
    for handle in ax.legend().legend_handles:
        handle.set_color(handle.get_color() if single else "0.2")

def draw_arm(ax, arm, key, x, change_point, color, **style):
    """The mean of an arm's runs at the steps they share, and its 95% interval; of one its standard error."""
    runs = [points_of(log, key, x) for log in arm.runs]
    steps = sorted(set.intersection(*map(set, runs)))
    points = np.array([[run[step] for step in steps] for run in runs]).reshape(len(runs), len(steps), 2)
    places, mean = points.mean(0).T
    if len(runs) > 1:  # Student's t over seeds
        error = stats.t.ppf(0.975, len(runs) - 1) * stats.sem(points[..., 1], axis=0)
    else:
        errors = points_of(arm.runs[0], f"{key}_se")
        error = np.array([errors.get(step, (0, 0))[1] for step in steps])
    ax.plot(places, mean, color=color, marker="o", markersize=2.5 if len(steps) < 40 else 0, **style)
    ax.fill_between(places, mean - error, mean + error, color=color, alpha=0.18, linewidth=0)
    for log, run in zip(arm.runs, runs, strict=True) if change_point and key.startswith("per/") else []:
        if drop := change_point(log, key, arm.settings["warmup_steps"]):
            ax.annotate(f"drop of {drop['size']:.0%}", run[drop["at"]], (9, 9), textcoords="offset points",
                        size=8, arrowprops={"arrowstyle": "-|>", "color": color})

def heat_maps(arms, x):
    """PER of activations and attention entropy by layer, over training, of each arm's first run."""
    figure, layers = Figure((max(6, 1.5 + 4 * len(arms)), 6)), range(arms[0].settings["n_layers"])
    axes = figure.subplots(2, len(arms), squeeze=False, sharex="col", sharey=True)
    logs = [pd.DataFrame(arm.runs[0]).query("kind == 'eval'").set_index(x) for arm in arms]
    rows = {"per/activations": "PER of activations", "entropy": "attention entropy\n(share of uniform)"}
    for row, (prefix, label) in zip(axes, rows.items(), strict=True):
        maps = [log.reindex(columns=[f"{prefix}/{layer}" for layer in layers]) for log in logs]
        low, high = pd.concat(maps).min(axis=None), pd.concat(maps).max(axis=None)
        for ax, arm, numbers in zip(row, arms, maps, strict=True):  # numbers (n, L)
            numbers = numbers.dropna(how="all") if numbers.any(axis=None) else numbers
            if len(numbers) == 1:  # a lone checkpoint: a column has no width of its own
                numbers = pd.concat([numbers, numbers.set_axis(numbers.index + 1)])
            mesh = ax.pcolormesh(numbers.index, layers, numbers.T, cmap="cividis", vmin=low, vmax=high)
            mark_warmup(ax, arm, x, "white")
            ax.locator_params(nbins=5, integer=True)
            ax.set(title=arm.label if ax in axes[0] else "", xlabel=AXES[x] if ax in axes[1] else "")
        row[0].set_ylabel("layer")
        figure.colorbar(mesh, ax=row.tolist(), label=label)
    return figure

def few_shot(results, readers):
    """Accuracy over K, and below over inner steps at the middle K, of fewshot.json: a column for each task.

    readers: the models, random weights first.
    """
    dashes = {"logistic": "--", "prototype": ":", "bigram prototypes": "-."}  # else a solid line
    colors = {reader: f"C{i - 1}" if i else "0.6" for i, reader in enumerate(readers)} | {"": "black"}
    figure = Figure((max(7, 1 + 3 * len(results["tasks"])), 7.5))
    axes = figure.subplots(2, len(results["tasks"]), squeeze=False, sharey="col")
    for (ax, below), (task, of_task) in zip(axes.T, results["tasks"].items(), strict=True):
        shots = of_task["shots"]
        middle = list(shots)[len(shots) // 2]
        for row in shots[min(shots)]:
            reader, _, classifier = row.rpartition(", ")  # a baseline has no reader
            if reader in colors:  # else a difference
                means, intervals = ([rows[row][key] for rows in shots.values()] for key in ("mean", "ci95"))
                ax.errorbar(list(shots), means, intervals, color=colors[reader], marker="o", markersize=3,
                            linestyle=dashes.get(classifier, "-"), capsize=2, label=f" {row}")
        for reader, accuracies in of_task["after_each_inner_step"][middle].items():
            below.plot(accuracies, color=colors[reader], marker="o", markersize=3)
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(shots), list(shots))
        ax.set(title=task, xlabel="K, examples of a class", ylim=(0, None))
        below.set(xlabel=f"inner steps, K = {middle}")
        ax.grid(), below.grid()
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure

def lm_bars(results):
    """Bits per byte at the last step, domain by domain. results: {model: what its eval_lm.json holds}."""
    figure, height = Figure(), 0.8 / len(results)  # of a bar, in rows of the chart
    ax = figure.subplots()
    for i, (model, of_model) in enumerate(results.items()):
        step, domains = list(of_model["steps"].items())[-1]
        bits = np.array([numbers["bits_per_byte"] for numbers in domains.values()])
        ends = [numbers.get("bits_per_byte_interval", [np.nan, np.nan]) for numbers in domains.values()]
        rows = np.arange(len(bits)) + (i - (len(results) - 1) / 2) * height
        error = np.abs(np.transpose(ends) - bits)
        ax.barh(rows, bits, 0.9 * height, xerr=error, label=f" {model}, step {step}")
    ax.set(yticks=range(len(bits)), yticklabels=domains, xlabel="bits per byte (bars: 95% over documents)")
    ax.invert_yaxis()
    ax.grid(axis="x")
    figure.set_size_inches(8, 1.2 + len(bits) * (0.16 + 0.14 * len(results)))
    figure.legend(loc="outside upper center")
    return figure

def ner_heat_map(rows, title):
    """Strict F1, systems down, test sets across. rows: the table of ner_*.json."""
    frame = pd.DataFrame([row for row in rows if "p" not in row and row["system"] != "all O"])
    frame["name"] = frame["system"] + ", " + frame["mode"]
    frame["set"] += frame["entities"].map(" ({})".format)
    f1 = 100 * frame.pivot_table("f1", "name", "set", sort=False)
    figure = Figure((3 + 0.08 * f1.index.str.len().max() + 0.6 * len(f1.columns), 2.5 + 0.4 * len(f1)))
    ax = figure.subplots()
    image = ax.imshow(f1, vmin=0, vmax=max(f1.values.max(), 1), aspect="auto")
    ax.set_xticks(range(len(f1.columns)), f1.columns, rotation=45, ha="right")
    ax.set_yticks(range(len(f1)), f1.index)
    for (y, x), percent in np.ndenumerate(f1):
        color = "black" if percent > 0.6 * image.norm.vmax else "white"
        ax.text(x, y, f"{percent:.1f}", ha="center", va="center", fontsize=8, color=color)
    ax.set_title(f"{title} (in brackets: entities)")
    figure.colorbar(image, label="strict F1, %")
    return figure

def forest(rows, labels, metrics, baseline):
    """A sweep's paired differences of arms from a baseline, with intervals; a panel for each metric."""
    rows = rows[rows["difference"].notna()]
    metrics = [metric for metric in metrics if metric in set(rows["metric"])]
    figure = Figure((3 + 3 * len(metrics), 1.2 + 0.3 * rows["arm"].nunique()))
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for ax, metric in zip(axes, metrics, strict=True):
        of = rows[rows["metric"] == metric]
        ax.errorbar(of["difference"], of["arm"], xerr=of["difference_interval"], fmt="o", capsize=3)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set(xlabel=f"{labels[metric]}:\ndifference from {baseline}")
        ax.margins(y=0.1)
        ax.grid(axis="x")
    axes[0].invert_yaxis()
    return figure
