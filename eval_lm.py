"""How well runs predict text of other kinds: perplexity and bits per byte, domain by domain.

    python eval_lm.py out/11m --data=DIR                       # each file is a domain; the .txt files of a folder are one
    python eval_lm.py out/11m out/11m-vanilla --data=DIR       # side by side, with paired differences
    python eval_lm.py out/11m --data=DIR --step=all            # every checkpoint, for the phase figure
    python eval_lm.py out/11m --data=hf:allenai/paloma         # each configuration is a domain; gated, so accept its conditions and log in first

A document is scored token by token, given an end-of-text before it, so that its first token counts too. The end-of-text after it is not scored: what
is scored are the bytes of the text, no more and no fewer, however they were cut into documents. (The validation loss of training counts ends.) An
empty document has nothing to score. Perplexity is exp(nats / tokens), bits per byte is nats / ln 2 / bytes, over all tokens and bytes of a domain:
long documents weigh more. Perplexities of different vocabularies do not compare, bits per byte do. What is longer than the context is
read in overlapping windows (Press et al. 2021, https://arxiv.org/abs/2012.15832, appendix B), each scored from where the one before it ended, so
that every token but those near a document's start is predicted from context - stride + 1 to context tokens.

Intervals are 95% bootstrap intervals over documents: for how texts of this domain differ, not for how runs of another seed would.
"""
import json
import math
import os
import sys
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import configurator
from runs import checkpoints, datasets_library, fail, load_model, read_columns, read_files, text_files, write_atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)


@dataclass
class Config:
    data: str = ""  # folder or file of json, jsonl(.gz), txt, parquet; or a Hugging Face dataset, hf:NAME or hf:NAME,CONFIGURATION
    split: str = ""  # of a Hugging Face dataset; empty takes validation, val or test, the first that it has
    column: str = "text"  # that holds the text
    context: int = 0  # tokens that a prediction sees at most; 0 takes the first run's block_size
    stride: int = 0  # tokens from one window to the next; 0 takes half the context, 1 is slowest and shows every token the full context
    step: str = "newest"  # checkpoint: newest, a number, or all


DRAWS = 2000  # of the bootstrap
BATCH = 8192  # tokens in a batch of windows

config, folders = configurator.load(Config, sys.argv[1:], __doc__)
for folder in folders or [""]:
    if not os.path.isdir(folder):
        fail(f"{folder or 'nothing'} is not a run folder: python eval_lm.py out/<run> ... --data=DIR")
if len({os.path.realpath(folder) for folder in folders}) < len(folders):
    fail("a run folder is named twice: its numbers would be compared with themselves")
if config.step not in ("newest", "all") and not config.step.isdecimal():
    fail(f"step = {config.step}: step is newest, all, or the number of a checkpoint")
if config.context < 0 or config.stride < 0:
    fail(f"context = {config.context}, stride = {config.stride}: neither may be negative")
if not (config.data.startswith("hf:") or os.path.exists(config.data)):
    fail(f"data = {config.data or 'nothing'}: no such file or folder; --data=DIR, or for a Hugging Face dataset --data=hf:NAME")


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Documents


def read_domains():
    """{domain: list of texts}. A missing text (null) is an empty one."""
    if config.data.startswith("hf:"):
        name, *parts = config.data[3:].split(",")
        rows = {}
        with datasets_library(name) as datasets:
            parts = parts or datasets.get_dataset_config_names(name)
            splits = {part: datasets.get_dataset_split_names(name, part) for part in parts}
        for part in parts:
            split = next((split for split in ([config.split] if config.split else ["validation", "val", "test"]) if split in splits[part]), None)
            if split is None:
                fail(f"{name},{part} has no split {config.split or 'validation, val or test'}, but {', '.join(splits[part])}: choose with --split=")
            rows[part] = read_columns(name, [config.column], name, part, split=split)
    else:
        rows = {domain: read_files(paths, [config.column]) for domain, paths in text_files(config.data).items()}
    texts = {domain: [text or "" for (text,) in found] for domain, found in rows.items()}
    for domain in texts:
        if not all(isinstance(text, str) for text in texts[domain]):
            fail(f"column {config.column!r} of {domain} holds something else than text: choose another with --column=")
        if not any(texts[domain]):
            fail(f"the domain {domain} of {config.data} holds no text: take it away, or choose another column with --column=")
    return texts


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Scores


def windows(n, context, stride):
    """Cut a document of n tokens: (start, end, scored) each. Tokens start..end-1 are read to predict start+1..end, of which the last `scored` count.

    Token 0 is the end-of-text before the document; tokens 1..n are scored, each once.
    """
    ends = [*range(min(context, n), n, stride), n] if n else []
    return [(max(0, end - context), end, end - before) for before, end in pairwise([0, *ends])]


@torch.no_grad()
def score(model, encoding, texts, context, stride, progress):
    """Nats, tokens and bytes of each of D texts: (D, 3) float64. Windows of about equal length are read together."""
    eot, device = encoding.encode_single_token("<|endoftext|>"), model.unembedding.weight.device
    ids = [encoding.encode_ordinary(text) for text in texts]
    totals = np.array([(0, len(row), len(encoding.decode_bytes(row))) for row in ids], np.float64)  # (D, 3)
    cut = [(doc, *window) for doc, row in enumerate(ids) for window in windows(len(row), context, stride)]
    cut.sort(key=lambda window: window[2] - window[1])
    rows = max(1, BATCH // context)
    for first in range(0, len(cut), rows):
        batch = cut[first : first + rows]
        T = max(end - start for _, start, end, _ in batch)
        idx, targets = np.full((2, len(batch), T), eot)  # padding stands after the text, where causality keeps it from mattering
        targets[:] = -1
        for row, (doc, start, end, scored) in enumerate(batch):
            text = [eot, *ids[doc][max(0, start - 1) : end]][-(end - start + 1) :]  # tokens start..end
            idx[row, : end - start], targets[row, end - start - scored : end - start] = text[:-1], text[-scored:]
        idx, targets = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)  # (B, T)
        counts = targets >= 0
        logits = model.unembedding(model.features(idx)[counts])  # (S, V): only where a token is scored
        nats = F.cross_entropy(logits.float(), targets[counts], reduction="none").double().cpu().numpy()  # (S,)
        np.add.at(totals[:, 0], np.repeat([doc for doc, *_ in batch], counts.sum(1).cpu()), nats)
        progress.update(int(counts.sum()))
    return totals


def rates(totals):
    """nats, tokens, bytes (..., 3) -> perplexity and bits per byte (..., 2)."""
    nats, tokens, size = np.moveaxis(totals, -1, 0)
    return np.stack([np.exp(nats / tokens), nats / math.log(2) / size], axis=-1)


def resampled(totals):
    """Sums (DRAWS, 3) of as many documents as there are, drawn with replacement: the same documents for every run."""
    counts = np.random.default_rng(0).multinomial(len(totals), np.full(len(totals), 1 / len(totals)), DRAWS)  # (DRAWS, D)
    return counts[(counts @ totals)[:, 2] > 0] @ totals  # a draw of empty documents alone says nothing


def interval(draws):
    """The middle 95% of draws (DRAWS, ...) as [low, high] (2, ...)."""
    return np.percentile(draws, (2.5, 97.5), axis=0)


def summary(totals):
    """What is written about documents (D, 3). One document alone gives no interval."""
    (perplexity, bits), (nats, tokens, size) = rates(totals.sum(0)), totals.sum(0)
    numbers = {"perplexity": perplexity, "bits_per_byte": bits, "documents": len(totals), "tokens": int(tokens), "bytes": int(size), "nats": nats}
    if len(totals) > 1:
        low_high = interval(rates(resampled(totals)))  # (2, 2)
        numbers |= {"perplexity_interval": low_high[:, 0].tolist(), "bits_per_byte_interval": low_high[:, 1].tolist()}
    return numbers


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# All of it

device = "cuda" if torch.cuda.is_available() else "cpu"
steps = {}  # folder -> the steps to look at
for folder in folders:
    found = list(checkpoints(folder)) or [None]  # load_model says what is wrong with None
    steps[folder] = found if config.step == "all" else found[-1:] if config.step == "newest" else [int(config.step)]
models = {folder: load_model(folder, steps[folder][-1], device)[:2] for folder in folders}  # the last ones, to learn of trouble early
context = config.context or models[folders[0]][0].config.block_size
stride = config.stride or -(-context // 2)
if stride > context:
    fail(f"stride = {stride} is longer than context = {context}: tokens between two windows would not be read")
domains = read_domains()
if "all" in domains and len(domains) > 1:
    fail(f"a domain of {config.data} is named all, as the row of all domains together is: give it another name")
texts = sum(domains.values(), [])
where = np.repeat(np.arange(len(domains)), [len(found) for found in domains.values()])  # (D,) the domain of each document
groups = {domain: where == i for i, domain in enumerate(domains)} | {"all": where >= 0}

scores = {}  # (folder, step) -> (D, 3)
work = sum(sum(map(len, models[folder][1].encode_ordinary_batch(texts))) * len(steps[folder]) for folder in folders)
with tqdm(total=work, desc="scoring", unit=" tokens", unit_scale=True, disable=None) as progress:
    for folder in folders:
        for step in steps[folder]:
            model, encoding = models[folder] if step == steps[folder][-1] else load_model(folder, step, device)[:2]
            scores[folder, step] = score(model, encoding, texts, context, stride, progress)

last = {folder: scores[folder, steps[folder][-1]] for folder in folders}
results, differences = {}, {}
for folder in folders:
    results[folder] = {"data": config.data, "context": context, "stride": stride, "steps": {
        step: {group: summary(scores[folder, step][inside]) for group, inside in groups.items()} for step in steps[folder]}}  # fmt: skip
for folder in folders[1:]:
    differences[folder] = {}
    for group, inside in groups.items():
        mine, first = last[folder][inside], last[folders[0]][inside]
        differences[folder][group] = {"bits_per_byte": (rates(mine.sum(0)) - rates(first.sum(0)))[1]}
        if len(mine) > 1:
            low_high = interval((rates(resampled(mine)) - rates(resampled(first)))[:, 1])
            differences[folder][group]["bits_per_byte_interval"] = low_high.tolist()
    results[folder]["difference"] = {"from": folders[0], **differences[folder]}


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Table, files and chart


def cell(value, low_high, width, digits):
    """A value and its interval as text of a column."""
    around = "" if low_high is None else f" [{low_high[0]:{digits}f}, {low_high[1]:{digits}f}]"
    return f"{value:{digits}f}{around:{width}}"


print(f"{config.data}: at most {context} tokens of context, windows {stride} apart; [95% interval over documents]")
for number, folder in enumerate(folders):
    for step in steps[folder][:-1]:
        everything = results[folder]["steps"][step]["all"]
        print(f"{folder}, step {step}: perplexity {everything['perplexity']:.2f}, {everything['bits_per_byte']:.4f} bits per byte over all")
    width = max(map(len, groups))
    print(f"\n{folder}, step {steps[folder][-1]}\n{'':{width}}  {'documents':>9} {'bytes':>11}  {'perplexity':^31}  {'bits per byte':^22}", end="")
    print(f"  {f'minus {folders[0]}':^25}" if number else "")
    for group, numbers in results[folder]["steps"][steps[folder][-1]].items():
        line = f"{group:{width}}  {numbers['documents']:>9,} {numbers['bytes']:>11,}  "
        line += cell(numbers["perplexity"], numbers.get("perplexity_interval"), 20, "9.2") + "  "
        line += cell(numbers["bits_per_byte"], numbers.get("bits_per_byte_interval"), 17, "6.3")
        if number:
            difference = differences[folder][group]
            line += "  " + cell(difference["bits_per_byte"], difference.get("bits_per_byte_interval"), 17, "+7.3")
        print(line.rstrip())

height = 0.8 / len(folders)  # of a bar, in rows of the chart
figure, ax = plt.subplots(figsize=(8, 1.2 + len(groups) * (0.16 + 0.14 * len(folders))), layout="constrained")
colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]
for number, folder in enumerate(folders):
    found = list(results[folder]["steps"][steps[folder][-1]].values())
    values = np.array([numbers["bits_per_byte"] for numbers in found])
    low_high = np.array([numbers.get("bits_per_byte_interval", [numbers["bits_per_byte"]] * 2) for numbers in found])  # (groups, 2)
    ax.barh(np.arange(len(found)) + (number - (len(folders) - 1) / 2) * height, values, height * 0.9, color=colors[number % len(colors)],
            xerr=np.abs(low_high.T - values), error_kw={"elinewidth": 0.8}, label=f"{folder}, step {steps[folder][-1]}")  # fmt: skip
ax.set_yticks(range(len(groups)), list(groups))
ax.margins(y=0.01)
ax.invert_yaxis()
ax.set(xlabel="bits per byte (bars: 95% over documents)")
ax.grid(axis="x", alpha=0.3)
figure.legend(loc="outside upper center", frameon=False)
path = os.path.join(folders[0], "eval_lm.png")
write_atomic(path, lambda file: figure.savefig(file, dpi=150, format="png"))
for folder in folders:
    name = os.path.join(folder, "eval_lm.json")
    write_atomic(name, lambda file, folder=folder: file.write(json.dumps(results[folder], indent=2).encode()))
    print(f"written {name}")
print(f"written {path}")
