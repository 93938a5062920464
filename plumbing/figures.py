"""All figures. Each function takes plain data and returns a matplotlib figure; `save` writes it.

A log is a list of lines (dicts with "step", "kind" and numbers), as plumbing.run.read_log gives them.
"""
from collections import namedtuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no screen is needed, and no state is kept
from matplotlib.lines import Line2D

from plumbing.files import write_atomic

# The name of a run is no formula, even with a $ in it; and an axis says 0.9999, not 0.9e-3 above 0.999.
matplotlib.rcParams.update({
    "text.parse_math": False, "axes.formatter.useoffset": False, "figure.constrained_layout.use": True,
    "axes.titlesize": "medium", "legend.fontsize": "small", "legend.frameon": False, "grid.alpha": 0.3})
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000".split()  # Okabe and Ito's: for all eyes
AXES = {"step": "optimizer step", "lm_tokens": "language-model tokens",
        "flops": "training FLOPs", "seconds": "training time (s)"}
EACH_STEP = [  # what is drawn of a run's steps: panel, kind, key, colour, label, steps in a running mean
    ("val_loss", "lm", "lm_loss", "0.8", "training, each step", 1),
    ("heldout_query_acc", "meta", "query_acc", "#e69f00", "training words, after (mean of 25 steps)", 25),
    ("heldout_query_acc", "meta", "query_acc_before", "0.6", "training words, before (mean of 25 steps)", 25)]

# Runs that differ in nothing but their seed, drawn as one curve: the log of each, and train.py's settings.
Arm = namedtuple("Arm", "label runs settings")

def save(figure, path):
    """Write a figure as a PNG file, large enough for long names."""
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=150, bbox_inches="tight"))

# --------------------------------------------------------------------------------------------------
# Curves over training

def curve(log, key, x="step", kind="eval"):
    """{step: (place on the axis x, number)} of the lines of a kind that have `key`."""
    return {line["step"]: (line[x], line[key]) for line in log if line["kind"] == kind and key in line}

def place(log, step, x):
    """Where a step stands on the axis x."""
    points = sorted((line["step"], line[x]) for line in log if x in line)
    return float(np.interp(step, *zip(*points, strict=True)))

def curves(log, settings, title):
    """Losses and accuracies of one run: its phase figure without what spectra.py measures."""
    log = [{key: line[key] for key in line if not key.startswith(("per/", "entropy/"))} for line in log]
    return phase([Arm(title, [log], settings)], "step")

def phase(arms, x, change_point=None):
    """Ranks, entropies, losses and accuracies of arms, one below the other, on one axis x.

    change_point(log, key, warmup_steps) gives a drop to be marked, {"at": step, "size": share}, or None.
    """
    logs, settings = [log for arm in arms for log in arm.runs], arms[0].settings
    last = settings["n_layers"] - 1
    blocks = {last: "last block", last // 2: f"block {last // 2}"}
    sources = sorted({key for log in logs for line in log for key in line if key.startswith("val_loss/")})
    panels = {  # label: {key in a log: its label in the legend}
        "PER of weights": {"per/weights/down": "MLP down", "per/weights/ov": "OV circuits"},
        "PER of activations\n(after a block)": {f"per/activations/{i}": block for i, block in blocks.items()},
        "attention entropy\n(share of uniform)": {f"entropy/{i}": block for i, block in blocks.items()},
        "LM loss\n(nats per token)": {"val_loss": "validation", **{key: key[9:] for key in sources}},
        "bits per byte\nof other texts": {"bits_per_byte/all": "all domains (eval_lm.py --step=all)"},
        "query accuracy\n({n_way}-way, {k_shot}-shot)".format_map(settings): {
            "heldout_query_acc": "held-out words, after adaptation", "heldout_query_acc_before": "before"}}
    panels = {label: keys for label, keys in panels.items()
              if any(curve(log, key) for log in logs for key in keys)}
    figure = Figure((9, 0.8 + (2.1 if len(panels) > 3 else 3) * len(panels)))
    axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for ax, (label, keys) in zip(axes, panels.items(), strict=True):
        draw_panel(ax, arms, keys, x, change_point)
        ax.set_ylabel(label)
    axes[-1].set_xlabel(AXES[x])
    figure.align_ylabels()
    axes[0].text(place(logs[0], settings["warmup_steps"], x), 0.02, " warm-up ends", color="0.45", size=8,
                 transform=axes[0].get_xaxis_transform())
    names = [arm.label + f" ({len(arm.runs)} seeds: mean and range)" * (len(arm.runs) > 1) for arm in arms]
    if len(arms) == 1:
        figure.suptitle(names[0], size="medium")
    else:
        handles = [Line2D([], [], color=COLORS[i % len(COLORS)]) for i in range(len(arms))]
        figure.legend(handles, names, loc="outside upper center", fontsize="medium")
    return figure

def draw_panel(ax, arms, keys, x, change_point):
    """The curves of all arms. Arms differ in colour, keys in dashes; the keys of a single arm in both."""
    single = len(arms) == 1
    for panel, kind, key, color, label, n in EACH_STEP if single and len(arms[0].runs) == 1 else []:
        points = curve(arms[0].runs[0], key, x, kind)
        if points and panel in keys:
            places, numbers = zip(*points.values(), strict=True)
            sums = np.convolve(numbers, np.ones(n))[: len(numbers)]
            mean = sums / np.arange(1, len(numbers) + 1).clip(max=n)
            ax.plot(places, mean, color=color, linewidth=0.8, label=label)
    for i, arm in enumerate(arms):
        for j, (key, label) in enumerate(keys.items()):
            color, dashes = COLORS[(j if single else i) % len(COLORS)], ["-", "--", ":", "-."][j % 4]
            draw_arm(ax, arm, key, x, change_point, color=color, linestyle=dashes, label=label)
        ax.axvline(place(arm.runs[0], arm.settings["warmup_steps"], x), color="0.6", linestyle=":")
        for line in [line for log in arm.runs for line in log if line["kind"] == "collapse"]:
            ax.axvline(line[x], color=COLORS[i % len(COLORS)], linewidth=1)
    if "heldout_query_acc" in keys:
        n_way = arms[0].settings["n_way"]
        ax.axhline(1 / n_way, color="black", linewidth=0.8, linestyle="--", label=f"chance, 1/{n_way}")
        ax.set_ylim(0)
    ax.grid()
    handles, labels = ax.get_legend_handles_labels()
    handle_of = dict(zip(labels, handles, strict=True))  # arms have the same labels
    for handle in ax.legend(handle_of.values(), handle_of).legend_handles:
        handle.set_color(handle.get_color() if single else "0.2")

def draw_arm(ax, arm, key, x, change_point, color, **style):
    """The mean and range of an arm's runs at the steps that all have; of one run its standard error."""
    runs = [curve(log, key, x) for log in arm.runs]
    steps = sorted(set.intersection(*map(set, runs)))
    points = np.array([[run[step] for step in steps] for run in runs]).reshape(len(runs), len(steps), 2)
    places, mean = points.mean(0).T
    low, high = points[..., 1].min(0), points[..., 1].max(0)
    error = np.array([number for _, number in curve(arm.runs[0], f"{key}_se").values()])
    if len(runs) == 1 and len(error) == len(mean):
        low, high = mean - error, mean + error
    ax.plot(places, mean, color=color, marker="o", markersize=2.5 if len(steps) < 40 else 0, **style)
    ax.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
    for log, run in zip(arm.runs, runs, strict=True) if change_point and key.startswith("per/") else []:
        drop = change_point(log, key, arm.settings["warmup_steps"])
        if drop:
            ax.annotate(f"drop of {drop['size']:.0%}", run[drop["at"]], (9, 9), textcoords="offset points",
                        size=8, arrowprops={"arrowstyle": "-|>", "color": color})

def heat_maps(arms, x):
    """PER of activations and attention entropy by layer, over training: a column for each arm's first run."""
    figure = Figure((max(6, 1.5 + 4 * len(arms)), 6))
    axes = figure.subplots(2, len(arms), squeeze=False, sharex="col", sharey=True)
    rows = {"per/activations": "PER of activations", "entropy": "attention entropy\n(share of uniform)"}
    for row, (prefix, label) in zip(axes, rows.items(), strict=True):
        keys = [f"{prefix}/{layer}" for layer in range(arms[0].settings["n_layers"])]
        numbers = [line[key] for arm in arms for line in arm.runs[0] for key in keys if key in line]
        for ax, arm in zip(row, arms, strict=True):
            evals = [line for line in arm.runs[0] if line["kind"] == "eval"]
            lines = [line for line in evals if set(keys) & set(line)] or evals  # without any, an empty map
            values = [[line.get(key, np.nan) for line in lines] for key in keys]  # (L, n)
            mesh = ax.pcolormesh([line[x] for line in lines], range(len(keys)), values, cmap="cividis",
                                 vmin=min(numbers, default=0), vmax=max(numbers, default=1))
            ax.axvline(place(arm.runs[0], arm.settings["warmup_steps"], x), color="white", linestyle=":")
            ax.locator_params(nbins=5, integer=True)
        row[0].set_ylabel("layer")
        figure.colorbar(mesh, ax=row.tolist(), label=label)
    for i, arm in enumerate(arms):
        axes[0, i].set_title(arm.label)
        axes[1, i].set_xlabel(AXES[x])
    return figure

# --------------------------------------------------------------------------------------------------
# Evaluations

def few_shot(results, readers):
    """Accuracy over K, a panel for each task, of fewshot.json. readers: the models, random weights first."""
    dashes = {"logistic": "--", "prototype": ":", "bigram prototypes": "-."}  # else a solid line
    colors = dict(zip(readers, ["0.6", *COLORS * len(readers)], strict=False)) | {"": "black"}
    tasks = results["tasks"]
    figure = Figure((max(7, 1 + 3 * len(tasks)), 4.5))
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for ax, (task, of_task) in zip(axes, tasks.items(), strict=True):
        shots = {int(k): rows for k, rows in of_task["shots"].items()}
        for row in shots[min(shots)]:
            reader, _, classifier = row.rpartition(", ")  # a baseline has no reader
            if reader in colors:
                means, intervals = ([rows[row][key] for rows in shots.values()] for key in ("mean", "ci95"))
                ax.errorbar(list(shots), means, intervals, color=colors[reader], marker="o", markersize=3,
                            linestyle=dashes.get(classifier, "-"), capsize=2, label=row)
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(shots), list(shots))
        ax.set(title=task, xlabel="examples of a class", ylim=(0, None))
        ax.grid()
    axes[0].set_ylabel("accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure

def lm_bars(results):
    """Bits per byte at the last step, domain by domain. results: {model: what its eval_lm.json holds}."""
    last = {model: list(of_model["steps"].items())[-1] for model, of_model in results.items()}
    domains = list(last[next(iter(last))][1])
    figure = Figure((8, 1.2 + len(domains) * (0.16 + 0.14 * len(last))))
    ax, height = figure.subplots(), 0.8 / len(last)  # of a bar, in rows of the chart
    for i, (model, (step, of_domain)) in enumerate(last.items()):
        bits = np.array([of_domain[domain]["bits_per_byte"] for domain in domains])
        ends = [of_domain[domain].get("bits_per_byte_interval", [np.nan, np.nan]) for domain in domains]
        rows = np.arange(len(domains)) + (i - (len(last) - 1) / 2) * height
        ax.barh(rows, bits, 0.9 * height, xerr=np.abs(np.transpose(ends) - bits),
                color=COLORS[i % len(COLORS)], label=f"{model}, step {step}")
    ax.set(yticks=range(len(domains)), yticklabels=domains, xlabel="bits per byte (bars: 95% over documents)")
    ax.invert_yaxis()
    ax.grid(axis="x")
    figure.legend(loc="outside upper center")
    return figure

def ner_heat_map(rows, title):
    """Strict F1, systems down, test sets across. rows: the table of ner_*.json."""
    rows = [row for row in rows if "p" not in row and row["system"] != "all O"]  # differences have a p
    cells = {(f"{row['system']}, {row['mode']}", row["set"]): 100 * row["f1"] for row in rows}
    systems, sets = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    f1 = np.array([[cells[system, test_set] for test_set in sets] for system in systems])
    figure = Figure((3 + 0.08 * max(map(len, systems)) + 0.6 * len(sets), 2.5 + 0.4 * len(systems)))
    ax = figure.subplots()
    image = ax.imshow(f1, vmin=0, vmax=max(f1.max(), 1), aspect="auto")
    small = {row["set"] for row in rows if row["entities"] < 200}
    ax.set_xticks(range(len(sets)), [name + " *" * (name in small) for name in sets], rotation=45, ha="right")
    ax.set_yticks(range(len(systems)), systems)
    for (y, x), percent in np.ndenumerate(f1):
        color = "black" if percent > 0.6 * f1.max() else "white"
        ax.text(x, y, f"{percent:.1f}", ha="center", va="center", fontsize=8, color=color)
    ax.set_title(title + "   (* fewer than 200 entities)" * bool(small))
    figure.colorbar(image, label="strict F1, %")
    return figure
