"""Can a model learn to classify from a few examples? Few-shot accuracy of runs, beside what needs no training.

    python eval_fewshot.py out/11m out/11m-vanilla               # words that no training episode asked about, and the others
    python eval_fewshot.py out/11m out/11m-vanilla --data=DIR    # sentences too, of DIR/<task>_train.jsonl and DIR/<task>_test.jsonl
    python eval_fewshot.py out/11m --data=hf:SetFit/subj         # or of a Hugging Face dataset

A draw shows a classifier K examples of each class (the support) and grades it on others (the query). Three classifiers read the same features:
adapt      a fresh head, whose last layer is zero and whose hidden layers, if any, are the learnt ones, after the run's own inner loop, `maml.adapt`;
           of a run with another target the head alone
logistic   logistic regression, its weights with a Gaussian prior, of features of length sqrt(d), to the end: with three or more classes that
           of scikit-learn's defaults
prototype  the class with the nearest mean (Snell et al. 2017, https://arxiv.org/abs/1703.05175)

`adapt` keeps the inner learning rate of training, which suits the number of classes there: steps of gradient descent on features of length 1 and a
bias are stable while 2 lr / N stays below 2 or so. A rate of 10, right for 16 words, overshoots with two classes or six.

Words are blanks in the validation text, in episodes made by the settings of the first run. A sentence is read after an end-of-text, and its features
are those of its last token; or of a <|mask|> after it, if readout=mask, where such a run was trained to be read. The support comes from the training
file, and each draw is graded on the whole test file. All runs get the same draws, so that their differences are paired. The rows that any run has to
beat: the commonest class, prototypes on bigram statistics (for words), and the same architecture with random weights.

Intervals are 1.96 standard errors over draws: another draw of examples, not another seed of training, nor, for sentences, another test file.
"""
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch.func import vmap
from tqdm import tqdm

import configurator
import maml
import smlmt
from model import Llama
from runs import datasets_library, fail, load_corpus, load_model, other_corpus, read_columns, read_files, text_files, write_atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)


@dataclass
class Config:
    data: str = ""  # sentences: a folder of <task>_train and <task>_test files, or hf:NAME or hf:NAME,CONFIGURATION; empty takes words only
    text_column: str = "text"  # column of the sentences
    label_column: str = "label"  # column of their classes
    split: str = ""  # of a Hugging Face dataset, to be graded on; empty takes test or else validation
    shots: str = "1,4,16"  # K, the examples of a class
    n_episodes: int = 64  # draws of each K; 64 are those that training ends with
    data_dir: str = ""  # where the corpora are; empty takes the first run's
    step: int = -1  # of the checkpoints; -1 takes the newest
    seed: int = 0  # of the draws and of the random weights; training's own evaluations use 0


BATCH = 8192  # tokens that a model reads at once

config, folders = configurator.load(Config, sys.argv[1:], __doc__)
for folder in folders or [""]:
    if not os.path.isdir(folder):
        fail(f"{folder or 'nothing'} is not a run folder: python eval_fewshot.py out/<run> ...")
if len({os.path.realpath(folder) for folder in folders}) < len(folders):
    fail("a run folder is named twice: its numbers would be compared with themselves")
if config.n_episodes < 2 or config.seed < 0:
    fail("n_episodes must be at least 2, seed must not be negative")
if not all(k.isdecimal() and int(k) for k in config.shots.split(",")):
    fail(f"shots = {config.shots}: write the numbers of examples, at least 1 each, with commas between, as 1,4,16")
shots = sorted({int(k) for k in config.shots.split(",")})
if config.data and not (config.data.startswith("hf:") or os.path.isdir(config.data)):
    fail(f"data = {config.data}: no such folder; a Hugging Face dataset is --data=hf:NAME")

device = "cuda" if torch.cuda.is_available() else "cpu"
loaded = {folder: load_model(folder, None if config.step == -1 else config.step, device) for folder in folders}
settings = loaded[folders[0]][2]["config"]
E = config.n_episodes


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Draws:
    """E draws of one K. Numbers of rows of the task, and their labels 0..N-1: support (E, N*K), query (E, Q), or (1, Q) if it is always the same."""

    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray


@dataclass
class Task:
    name: str
    about: str  # what is told of it in the table
    n_way: int
    majority: float  # accuracy of the commonest answer
    draws: dict  # K -> Draws
    rows: Callable  # (encoding, settings) of a run -> the rows that it reads, arrays of ids, and where it reads their features, (n,)
    vectors: np.ndarray | None = None  # (V, V) bigram vectors of the corpus, if the task is one of words and the vocabulary not large
    mask: int = -1  # id of the blank in the rows of such a task


def word_tasks():
    """Which word was blanked? Episodes on held-out and on other words, as at the end of training. The second value: why some are left out, a list."""
    path = os.path.join(config.data_dir or settings["data_dir"], settings["dataset"])
    for folder in folders:
        if why := other_corpus(folder, path):
            return [], [why + " (words need one corpus for all runs)" * (len(folders) > 1)]
    corpus = load_corpus(path)
    wanted = {name: settings[name] for name in "n_way q_query episode_len readout word_min_count word_max_count".split()}
    vectors = bigram_vectors(corpus) if corpus.vocab_size <= 8192 else None
    tasks, why = [], []
    for heldout, name in ((True, "held-out words"), (False, "seen words")):
        rows, positions, draws = [], [], {}
        for k in shots:
            try:
                text = smlmt.pool(corpus.val, settings["pool_tokens"], 0, 0, eot=corpus.eot)  # as in training's evaluations, if seed is 0
                sampler = smlmt.Sampler(text, corpus.token_bytes, eot=corpus.eot, mask=corpus.mask, seed=config.seed, k_shot=k, **wanted)
                episodes = [sampler.episode(e, heldout) for e in range(E)]
            except ValueError as error:
                why.append(f"no episodes of {name} with K = {k} from {corpus.meta['name']}: {error}")
                continue
            numbers = {}  # part of an episode -> (E, M) numbers of rows
            for part in ("support", "query"):
                numbers[part] = len(rows) + np.arange(E * len(getattr(episodes[0], part))).reshape(E, -1)
                rows += [row for episode in episodes for row in getattr(episode, part)]
                positions += [at for episode in episodes for at in getattr(episode, f"{part}_pos")]
            labels = {part: np.stack([getattr(episode, f"{part}_labels") for episode in episodes]) for part in numbers}
            draws[k] = Draws(numbers["support"], labels["support"], numbers["query"], labels["query"])
        if draws:
            task_rows = rows, np.array(positions)
            about = f"{wanted['n_way']} words, {wanted['q_query']} questions each"
            tasks.append(Task(name, about, wanted["n_way"], 1 / wanted["n_way"], draws, lambda *_, found=task_rows: found, vectors, corpus.mask))
    return tasks, why


def sentence_task(name, train, test):
    """Which class is a sentence of? train, test: lists of (text, label)."""
    for split, found in (("training", train), ("test", test)):
        if not found or not all(isinstance(text, str) and label is not None for text, label in found):
            fail(f"{name}: the {split} data {'has rows without text or label' if found else 'holds no rows'}; see --text_column and --label_column")
    labels = [[str(label) for _, label in found] for found in (train, test)]
    if set(labels[0]) != set(labels[1]):
        only = [sorted(set(labels[i]) - set(labels[1 - i])) for i in (0, 1)]
        only = [(", ".join(map(repr, found[:5])) or "none") + ", ..." * (len(found) > 5) for found in only]  # of a wrong column all rows differ
        fail(f"{name}: training and test data have different labels: only in training {only[0]}; only in test {only[1]}; see --label_column, --split")
    count = Counter(labels[0])
    rare, least = min(count.items(), key=lambda item: item[1])
    if len(count) < 2 or least < shots[-1]:
        fail(f"{name}: " + (f"only one class, {rare}" if len(count) < 2 else f"{least} training examples of class {rare}: --shots up to {least}"))
    classes = sorted(count)
    train_labels, test_labels = (np.array([classes.index(label) for label in found]) for found in labels)
    support = {k: [] for k in shots}
    for k in shots:
        for e in range(E):
            rng = np.random.default_rng((config.seed, k, e))
            support[k].append(np.concatenate([rng.choice(np.flatnonzero(train_labels == c), k, replace=False) for c in range(len(classes))]))
    used = np.unique(np.concatenate([np.ravel(found) for found in support.values()]))  # only these are read
    query = len(used) + np.arange(len(test))[None]  # (1, Q)
    draws = {k: Draws(np.searchsorted(used, found), train_labels[np.array(found)], query, test_labels[None]) for k, found in support.items()}
    texts = [train[i][0] for i in used] + [text for text, _ in test]

    def rows(encoding, settings):
        eot, mask = (encoding.encode_single_token(token) for token in ("<|endoftext|>", "<|mask|>"))
        after = [mask] if settings["readout"] == "mask" else []
        found = [np.array(([eot, *encoding.encode_ordinary(text)])[-settings["block_size"] + len(after) :] + after) for text in texts]
        return found, np.array([len(row) - 1 for row in found])

    majority = (test_labels == np.bincount(train_labels).argmax()).mean()
    return Task(name, f"{len(classes)} classes, {len(test):,} test sentences", len(classes), majority, draws, rows)


def sentence_tasks():
    """The tasks in config.data."""
    columns = [config.text_column, config.label_column]
    if config.data.startswith("hf:"):
        name, *part = config.data[3:].split(",")
        with datasets_library(name) as datasets:
            splits = datasets.get_dataset_split_names(name, *part)
        last = config.split or ("test" if "test" in splits else "validation")
        if not {"train", last} <= set(splits):
            fail(f"{name} has the splits {', '.join(splits)}: it takes train, and {config.split or 'test or validation'}; see --split")
        return [sentence_task(name, *(read_columns(name, columns, name, *part, split=split) for split in ("train", last)))]
    files = text_files(config.data)
    names = sorted({name.removesuffix(end) for name in files for end in ("_train", "_test") if name.endswith(end)})
    for name in names or [config.data]:
        if not {f"{name}_train", f"{name}_test"} <= set(files):
            fail(f"{config.data} needs both <task>_train and <task>_test, such as {name if names else 'trec'}_train.jsonl and "
                 f"{name if names else 'trec'}_test.jsonl; it has {', '.join(files)}")  # fmt: skip
    return [sentence_task(name, *(read_files(files[f"{name}_{split}"], columns) for split in ("train", "test"))) for name in names]


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Features, and classifiers on them. All three give linear or deeper heads for `maml.head_logits`, a leading E on every tensor


@torch.no_grad()
def features(model, rows, positions):
    """Features (n, C) of n rows of ids, read at `positions` (n,), as the inner loop takes them. Rows of about equal length are read together."""
    order, found = np.argsort([len(row) for row in rows], kind="stable"), torch.empty(len(rows), model.config.d_model, device=device)
    while len(order):
        batch = order[-max(1, BATCH // len(rows[order[-1]])) :]  # the longest that are left
        order = order[: -len(batch)]
        idx = np.zeros((len(batch), len(rows[batch[-1]])), np.int64)  # (B, T); padding follows where the features are read
        for i, row in enumerate(batch):
            idx[i, : len(rows[row])] = rows[row]
        idx, at = torch.from_numpy(idx).to(device), torch.from_numpy(positions[batch]).to(device)
        found[torch.from_numpy(batch).to(device)] = maml.scaled(model.features_at(idx, at))
    return found


def adapted_heads(head, lr, steps, support, labels):
    """The inner loop of training from one initial head, for support (E, M, C) and labels (E, M)."""

    def loss(head, batch):
        return F.cross_entropy(maml.head_logits(head, batch[0]), batch[1])

    return vmap(lambda *batch: maml.adapt(loss, head, batch, lr, steps))(support, labels)


def logistic_heads(n_way, support, labels):
    """Where sum(cross-entropy) + |W|^2 / 2 is least, the bias being free, on features of length sqrt(C): all draws in one convex problem."""
    root = support.shape[-1] ** 0.5
    x = F.pad(support.double() * root, (0, 1), value=1.0)  # (E, M, C + 1): the last column is for the bias
    W = torch.zeros(len(x), n_way, x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=500, tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy((x @ W.mT).flatten(0, 1), labels.flatten(), reduction="sum") + W[..., :-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    W = W.detach().float()
    return {"0.weight": W[..., :-1] * root, "0.bias": W[..., -1]}


def prototype_heads(n_way, support, labels):
    """|x - mean|^2 is smallest where x.mean - |mean|^2 / 2 is largest."""
    chosen = F.one_hot(labels, n_way).to(support.dtype)  # (E, M, N)
    means = chosen.mT @ support / chosen.sum(1)[..., None]  # (E, N, C)
    return {"0.weight": means, "0.bias": -means.square().sum(-1) / 2}


def accuracies(heads, query, labels):
    """The share of right answers of each draw's head, (E,), on its query (E, Q, C) and labels (E, Q), or on one query (1, Q, C) for all."""
    return np.array([maml.accuracy(maml.head_logits({name: p[e] for name, p in heads.items()}, query[e % len(query)]), labels[e % len(labels)]).item()
                     for e in range(E)])  # fmt: skip


def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)


def bigram_vectors(corpus):
    """For each token id the direction of what follows it in the training text: its row of positive pointwise mutual information, (V, V)."""
    V = corpus.vocab_size
    pairs = corpus.train[:-1].astype(np.int64) * V + corpus.train[1:]
    p = np.bincount(pairs, minlength=V * V).reshape(V, V).astype(np.float32) / len(pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.nan_to_num(np.log(p / (p.sum(1, keepdims=True) * p.sum(0, keepdims=True))), nan=0, neginf=0)
    return unit(np.maximum(pmi, 0))


def bigram_accuracies(task, draws):
    """Nearest class mean, by the bigram vector of the token before the blank: what a word's left neighbour alone tells about it. (E,)"""
    rows = np.stack(task.rows()[0])  # (n, L)
    before = rows[np.arange(len(rows)), (rows == task.mask).argmax(1) - 1]  # (n,) ids
    support, query = before[draws.support], before[draws.query]  # (E, N*K), (E, N*Q)
    found = []
    for e in range(E):
        prototypes = unit(np.stack([task.vectors[support[e][draws.support_labels[e] == c]].mean(0) for c in range(task.n_way)]))  # (N, V)
        score = task.vectors[query[e]] @ prototypes.T  # (Q, N)
        best = score >= score.max(1, keepdims=True) - 1e-6  # a tie shares the point
        found.append((best[np.arange(len(best)), draws.query_labels[e]] / best.sum(1)).mean())
    return np.array(found)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# All of it


def fresh_head(model, trained, n_way, learnt=None):
    """A head whose last layer is zero, of the depth in the settings `trained`; its hidden layers are the learnt ones, where there are any."""
    head = maml.init_head(model.config.d_model, n_way, trained["head_layers"], trained["head_hidden"])
    last = f"{maml.last_layer(head)}."
    return {name: (p if name.startswith(last) or learnt is None else learnt[name]).to(device) for name, p in head.items()}


words, why = word_tasks()
if why and not (words or config.data):
    fail(why[0])
print("".join(f"left out: {reason}\n" for reason in why), end="")
tasks = words + (sentence_tasks() if config.data else [])

torch.manual_seed(config.seed)
model, encoding, checkpoint = loaded[folders[0]]
random_model = Llama(model.config).eval()
readers = {"random weights": (random_model.to(device), encoding, settings, None)}
for folder, (model, encoding, checkpoint) in loaded.items():
    readers[f"{folder}, step {checkpoint['step']}"] = (model, encoding, checkpoint["config"], checkpoint["head"])

found = {}  # (task, K) -> {row of the table: (E,) accuracies}
with tqdm(total=len(tasks) * len(readers), desc="reading and fitting", disable=None) as progress:
    for task in tasks:
        for k, draws in task.draws.items():
            found[task.name, k] = {"majority class": np.full(E, task.majority)}
            if task.vectors is not None:
                found[task.name, k]["bigram prototypes"] = bigram_accuracies(task, draws)
        for name, (model, encoding, trained, learnt) in readers.items():
            table = features(model, *task.rows(encoding, trained))  # (n, C)
            head = fresh_head(model, trained, task.n_way, learnt)
            for k, draws in task.draws.items():
                support, query = table[torch.from_numpy(draws.support)], table[torch.from_numpy(draws.query)]  # (E, M, C), (E or 1, Q, C)
                labels, answers = (torch.from_numpy(part).to(device) for part in (draws.support_labels, draws.query_labels))
                heads = {"adapt": adapted_heads(head, trained["inner_lr"], trained["inner_steps"] or 10, support, labels),
                         "logistic": logistic_heads(task.n_way, support, labels),
                         "prototype": prototype_heads(task.n_way, support, labels)}  # fmt: skip
                for classifier, fitted in heads.items():
                    found[task.name, k][f"{name}, {classifier}"] = accuracies(fitted, query, answers)
            progress.update()


def cell(values):
    return {"mean": values.mean(), "ci95": 1.96 * values.std(ddof=1) / E**0.5}


results = {"settings": asdict(config) | {"shots": shots}, "tasks": {}}
print(f"accuracy ± 95% interval, {E} draws of each K" + (f"; differences to {folders[0]} are of the same draws" if len(folders) > 1 else ""))
names = list(readers)[1:]
for task in tasks:
    results["tasks"][task.name] = {"about": task.about, "n_way": task.n_way, "shots": {}}
    for k in task.draws:
        rows = found[task.name, k]
        for name in names[1:]:
            for classifier in ("adapt", "logistic", "prototype"):
                rows[f"{name} minus first, {classifier}"] = rows[f"{name}, {classifier}"] - rows[f"{names[0]}, {classifier}"]
        results["tasks"][task.name]["shots"][k] = {row: cell(values) for row, values in rows.items()}
    shown = results["tasks"][task.name]["shots"]
    width = max(len(row) for rows in shown.values() for row in rows)
    print(f"\n{task.name}: {task.about}\n{'':{width}}" + "".join(f"  {f'K = {k}':>17}" for k in shown))
    for row in next(iter(shown.values())):
        sign = "+" if " minus first" in row else ""
        cells = [shown[k][row] for k in shown]
        print(f"{row:{width}}" + "".join(f"  {c['mean']:>{sign}8.4f} ± {c['ci95']:.4f}" for c in cells))

figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 3 * len(tasks), 4.5), squeeze=False, layout="constrained")
colors = dict(zip(readers, ["#999999", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"], strict=False))
for ax, task in zip(axes[0], tasks, strict=True):
    ks = list(task.draws)
    for name in readers:
        for classifier, line in (("adapt", "-"), ("logistic", "--"), ("prototype", ":")):
            cells = [results["tasks"][task.name]["shots"][k][f"{name}, {classifier}"] for k in ks]
            ax.errorbar(ks, [c["mean"] for c in cells], [c["ci95"] for c in cells], color=colors.get(name, "black"), linestyle=line, marker="o",
                        markersize=3, capsize=2, label=f"{name}, {classifier}")  # fmt: skip
    ax.axhline(task.majority, color="black", linewidth=0.8, label="majority class")
    if task.vectors is not None:
        ax.plot(ks, [results["tasks"][task.name]["shots"][k]["bigram prototypes"]["mean"] for k in ks], "k^", label="bigram prototypes")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, ks)
    ax.set(title=task.name, xlabel="examples of a class", ylim=(0, None))
    ax.grid(alpha=0.3)
axes[0, 0].set_ylabel("accuracy")
handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
path = os.path.join(folders[0], "fewshot")
write_atomic(f"{path}.json", lambda file: file.write(json.dumps(results, indent=2).encode()))
write_atomic(f"{path}.png", lambda file: figure.savefig(file, dpi=150, format="png"))
print(f"\nwritten {path}.json\nwritten {path}.png")
