"""eval_fewshot.py against the training log, and its classifiers and baselines against their definitions."""
import importlib
import inspect
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import log_of, one_line, run_many
from scipy.stats.contingency import expected_freq
from sklearn.preprocessing import normalize

import eval_fewshot
import smlmt
from eval_fewshot import sentence_task
from model import Llama, ModelConfig
from plumbing.checkpoint import load_model
from plumbing.corpus import load_corpus

N, K, Q, LENGTH, LR, SEED, DRAWS = 6, 3, 2, 20, 0.75, 3, 8
SHAPE = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24, block_size=16)
BASE = SHAPE | dict(
    batch_size=4, max_steps=20, lr=0.01, warmup_steps=5, meta_ratio=0.5, n_way=N, k_shot=K, q_query=Q,
    episode_len=LENGTH, inner_lr=LR, inner_steps=3, eval_steps=2, eval_interval=20, ckpt_interval=10,
    log_interval=1000, micro_episodes=64, compile=False, dtype="float32", device="cpu")
RUNS = {"maml": {}, "deep": {"head_layers": 3, "head_hidden": 8, "d_model": 32, "max_steps": 10},
        "mask": {"readout": "mask", "max_steps": 10}}
SOME = f"--step=10 --n_episodes={DRAWS} --seed={SEED}"
COLUMNS = "--text_column=a --label_column=b"
CASES = {  # {runs} has copies of the runs
    "training": "{runs}/maml --shots=3",
    "words": f"{{runs}}/maml --shots=3,1,1 {SOME}",
    "sentences": f"{{runs}}/maml {{runs}}/deep --shots=4,1 --data={{here}}/data --corpus=none {SOME}",
    "mask": f"{{runs}}/mask --shots=4 --data={{here}}/data --corpus={{here}}/none {SOME}",
    "hub": f"{{runs}}/maml --shots=1,60 --data=hf:{{here}}/hub --split=validation {SOME} {COLUMNS} "
           "--out={here}/out",
}
MISTAKES = {  # of {runs}/maml, and what the one line says
    "shots": ("--shots=1,0", "shots = 1,0"),
    "few rows": ("--data={here}/data --shots=1,99 --corpus=none", "training rows, but --shots asks for 99"),
    "no corpus": ("--corpus=none", "there is no corpus none; name one with --corpus="),
    "secret labels": (f"--data=hf:{{here}}/hub --shots=1 {COLUMNS}", "or -1 no training class"),
    "numbers": (f"--data=hf:{{here}}/hub --shots=1 {COLUMNS} --text_column=b", "training row 1: "),
    "no test": ("--data={here}/hub/test.jsonl", "it lacks '<task>_train'; a task is two files"),
}

def sentences(*modules):
    """Two lists of (text, label): which module of the standard library is the documentation from?"""
    rows = []
    for i, name in enumerate(modules):
        members = [member for _, member in inspect.getmembers(importlib.import_module(name))]
        texts = {text for member in members if (text := inspect.getdoc(member))}
        rows += [(text.split("\n\n")[0], name) for text in sorted(texts)[: 30 - 6 * i]]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    return [row for i, row in enumerate(rows) if i % 5], [*rows[::5], ("", modules[0])]

TASKS = {"three": sentences("shutil", "statistics", "ftplib"), "two": sentences("random", "smtplib")}

def write(path, rows, columns):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))

@pytest.fixture(scope="module")
def here(data_dir, tmp_path_factory):
    """A folder of sentences, and of a folder with the runs for each case."""
    here = tmp_path_factory.mktemp("fewshot")
    runs = [BASE | {"data_dir": data_dir, "out_dir": here / "runs" / name} | RUNS[name] for name in RUNS]
    runs = [[f"--{key}={x}" for key, x in run.items()] for run in runs]
    for done in run_many("train.py", runs, report=False):
        assert done.returncode == 0, done.stderr
    for name in CASES:
        shutil.copytree(here / "runs", here / name)
    for name, splits in TASKS.items():
        for split, rows in zip(("train", "test"), splits, strict=True):
            write(here / "data" / f"{name}_{split}.jsonl", rows, ("text", "label"))
    train, test = ([(text, int(label == "random")) for text, label in rows * 4] for rows in TASKS["two"])
    for split, rows in {"train": train, "validation": test, "test": [(text, -1) for text, _ in test]}.items():
        write(here / "hub" / f"{split}.jsonl", rows, ("a", "b"))
    return here

@pytest.fixture(scope="module")
def results(here):
    """What became of the commands, by name; and the tasks in the files that the good ones wrote."""
    cases = CASES | {name: "{runs}/maml " + words for name, (words, _) in MISTAKES.items()}
    commands = [words.format(here=here, runs=here / (name if name in CASES else "runs")).split()
                for name, words in cases.items()]
    done = dict(zip(cases, run_many("eval_fewshot.py", commands), strict=True))
    assert not "".join(done[name].stderr for name in CASES)
    firsts = {name: here / name / ("mask" if name == "mask" else "maml") for name in CASES}
    firsts["hub"] = here / "out"
    return done, {name: json.loads((firsts[name] / "fewshot.json").read_text())["tasks"] for name in CASES}

# ----------------------------------------------------------------------------------------------------
# The classifiers, from their definitions

def gradient_descent(head, x, y, z, steps=3):
    """Answers for z after plain gradient descent from a head [W, b, W, b, ...]."""
    def logits(params, x):
        for i in range(0, len(params), 2):
            x = (x if i == 0 else x.relu()) @ params[i].T + params[i + 1]
        return x

    for _ in range(steps):
        head = [p.detach().requires_grad_() for p in head]
        loss = -logits(head, x).log_softmax(1)[range(len(y)), y].mean()
        last = LR * len(head[-1]) / (1 if len(y) > len(head[-1]) else 2)  # for each class; one shot: half
        rates = [LR / 2] * (len(head) - 2) + [last] * 2
        head = [p - r * g for p, r, g in zip(head, rates, torch.autograd.grad(loss, head), strict=True)]
    return logits(head, z).argmax(1)

def regression(x, y, z, n_way):
    """Answers of logistic regression with a normal prior on the weights; the biases are free.

    With two classes scikit-learn has one vector w, the softmax rows w/2 and -w/2: a prior of 2 on each row.
    """
    x, z, prior = x.double(), z.double(), 2 if n_way == 2 else 1
    w, b = (torch.zeros(n_way, width).double().requires_grad_() for width in (x.shape[1], 1))
    optimizer = torch.optim.LBFGS([w, b], max_iter=2000, tolerance_grad=1e-8, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w.T + b.T, y, reduction="sum") + prior * w.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(loss)
    assert w.grad.abs().max() < 1e-5  # the only minimum
    return (z @ w.T + b.T).argmax(1)

def accuracies(head, x, y, z, labels):
    """Which answers (3, Q) of adapt, logistic and prototype are right: support (M, d), its labels, query."""
    n_way, root = len(head[-1]), x.shape[1] ** 0.5
    means = torch.stack([x[y == c].mean(0) for c in range(n_way)])
    nearest = (z[:, None] - means).square().sum(-1).argmin(1)
    answers = [gradient_descent(head, x / root, y, z / root), regression(x, y, z, n_way), nearest]
    return [(chosen.numpy() == labels).astype(float) for chosen in answers]

def check(cell, right, words, tolerance=0.015):  # a few answers turn on a rounding error
    """Mean and interval of right (E, Q); answers to one of words (E, Q), or in one draw, go together."""
    words = [[e] * len(row) for e, row in enumerate(right)] if words is None else words
    sums = pd.Series((right - np.mean(right)).ravel()).groupby(np.ravel(words)).sum()
    half = 1.96 * (len(sums) / (len(sums) - 1) * (sums**2).sum()) ** 0.5 / np.size(right)
    assert (cell["mean"], cell["ci95"]) == pytest.approx((np.mean(right), half), abs=tolerance)

def check_rows(rows, prefix, draws, words=None):
    """Rows of a table against the answers (E, 3, Q) of the classifiers in E draws."""
    for i, classifier in enumerate(("adapt", "logistic", "prototype")):
        check(rows[f"{prefix}, {classifier}"], np.array(draws)[:, i], words)

def words_of(episodes):
    return [episode.words[episode.query_labels] for episode in episodes]

def episodes(corpus, k, task):
    sampler = smlmt.Sampler(np.array(corpus.val), corpus.token_bytes, eot=corpus.eot, mask=corpus.mask,
                            seed=SEED, n_way=N, k_shot=k, q_query=Q, episode_len=LENGTH)
    return [sampler.episode(e, heldout=task == "held-out words") for e in range(DRAWS)]

@pytest.mark.parametrize("k", [1, K])
def test_bigram_prototypes(data_dir, results, k):
    """Cosines of positive pointwise mutual information. A tie, common at K = 1, shares the point."""
    corpus = load_corpus(data_dir / "docstrings")
    counts = pd.crosstab(corpus.train[:-1], corpus.train[1:])
    ppmi = np.log(np.maximum(counts / expected_freq(counts), 1)).reindex(range(1024), fill_value=0).to_numpy()
    for task, of_task in results[1]["words"].items():
        shares = []
        for episode in episodes(corpus, k, task):
            support, query = (normalize(ppmi[[row[row.index(corpus.mask) - 1] for row in rows.tolist()]])
                              for rows in (episode.support, episode.query))
            scores = query @ normalize(support.reshape(N, k, -1).mean(1)).T  # (N*Q, N)
            best = scores > scores.max(1, keepdims=True) - 1e-6
            shares.append(best[range(N * Q), episode.query_labels] / best.sum(1))
        words = words_of(episodes(corpus, k, task))
        check(of_task["shots"][str(k)]["bigram prototypes"], np.array(shares), words, 1e-6)

@pytest.mark.parametrize("prefix", ["random weights", "{here}/words/maml, step 10"])
def test_words(here, data_dir, results, prefix):
    """Random weights come from the seed, trained ones from the step asked for. The curve ends in the row."""
    torch.manual_seed(SEED)
    model = Llama(ModelConfig(**SHAPE, vocab_size=1024))
    model = model if prefix == "random weights" else load_model(here / "runs/maml", 10).model
    corpus = load_corpus(data_dir / "docstrings")
    for task, of_task in results[1]["words"].items():
        draws, curves = [], []
        for e in episodes(corpus, K, task):
            x, z = (model.features(torch.from_numpy(rows))[range(len(rows)), at].detach()
                    for rows, at in ((e.support, e.support_pos), (e.query, e.query_pos)))
            head = [torch.zeros(N, 16), torch.zeros(N)]
            y, labels = torch.from_numpy(e.support_labels), torch.from_numpy(e.query_labels)
            draws.append(accuracies(head, x, y, z, e.query_labels))
            answers = [gradient_descent(head, x / 4, y, z / 4, steps) for steps in range(4)]
            curves.append([(answer == labels).double().mean() for answer in answers])
        prefix, cells = prefix.format(here=here), of_task["shots"][str(K)]
        check_rows(cells, prefix, draws, words_of(episodes(corpus, K, task)))
        curve = of_task["after_each_inner_step"][str(K)][prefix]
        assert curve == pytest.approx(np.mean(curves, 0), abs=0.015) and curve[0] == pytest.approx(1 / N)
        assert curve[-1] == pytest.approx(cells[f"{prefix}, adapt"]["mean"])

def sentence_draws(folder, task, k):
    """Accuracies (E, 3). One sentence at a time, the end of a long one; <|mask|> after it if trained so."""
    loaded = load_model(folder, 10)
    after = [loaded.tokenizer.mask] if folder.name == "mask" else []
    names, features, labels = sorted({label for _, label in TASKS[task][0]}), [], []
    for rows in TASKS[task]:
        ids = [[loaded.tokenizer.eot, *loaded.tokenizer.encode_ordinary(text)] for text, _ in rows]
        ids = [torch.tensor([row[-SHAPE["block_size"] + len(after) :] + after]) for row in ids]
        features.append(torch.stack([loaded.model.features(row)[0, -1].detach() for row in ids]))
        labels.append(np.array([names.index(label) for _, label in rows]))
    head = [loaded.head[f"{i // 2}.{'bias' if i % 2 else 'weight'}"] for i in range(len(loaded.head))]
    head[-2:] = torch.zeros(len(names), head[-2].shape[1]), torch.zeros(len(names))
    draws = []
    for e in range(DRAWS):
        rng = np.random.default_rng((SEED, k, e))
        rows = [rng.choice(np.flatnonzero(labels[0] == c), k, replace=False) for c in range(len(names))]
        rows = np.concatenate(rows)
        x, y = features[0][rows], torch.from_numpy(labels[0][rows])
        draws.append(accuracies(head, x, y, features[1], labels[1]))
    return np.array(draws)

@pytest.mark.parametrize("task", TASKS)
def test_sentences(here, results, task):
    maml, deep, mask = (sentence_draws(here / "runs" / run, task, 4) for run in ("maml", "deep", "mask"))
    rows, masked = (results[1][case][task]["shots"]["4"] for case in ("sentences", "mask"))
    check_rows(masked, f"{here}/mask/mask, step 10", mask)
    check_rows(rows, f"{here}/sentences/maml, step 10", maml)
    check_rows(rows, f"{here}/sentences/deep, step 10", deep)
    check_rows(rows, f"{here}/sentences/deep, step 10 minus first", deep - maml)  # paired: the same draws
    train, test = ([label for _, label in part] for part in TASKS[task])
    share = test.count(Counter(train).most_common(1)[0][0]) / len(test)
    assert rows["majority class"] == {"mean": pytest.approx(share), "ci95": pytest.approx(0, abs=1e-9)}

def test_words_as_training_evaluates_them(here, results):
    """Seed 0 and 64 episodes are those of the evaluation at the end of training."""
    line = log_of(here / "runs/maml", "eval")[-1]
    for task, key in (("held-out words", "heldout_query_acc"), ("seen words", "val_query_acc")):
        cell = results[1]["training"][task]["shots"]["3"][f"{here}/training/maml, step 20, adapt"]
        expected = line[key], 1.96 * line[f"{key}_se"]
        assert (cell["mean"], cell["ci95"]) == pytest.approx(expected, abs=2.2 / (64 * N * Q))  # two answers

def test_each_number_of_shots_has_its_own_rate(here, results, monkeypatch):
    rates = {}
    def adapted(x, y, z, head, lr, steps):
        rates[len(y)] = lr
        return torch.zeros(steps + 1, len(z))
    monkeypatch.setitem(eval_fewshot.CLASSIFIERS, "adapt", adapted)
    task = sentence_task(SimpleNamespace(shots=[1, 4], n_episodes=1, seed=0), "two", *TASKS["two"])
    eval_fewshot.evaluate(task, "deep", load_model(here / "runs/deep"))
    assert [list(rates[m].values()) for m in (2, 8)] == [[LR / 2] * 4 + [rate] * 2 for rate in (LR, 2 * LR)]

def test_a_class_may_be_missing_in_the_test_rows():
    config = SimpleNamespace(shots=[1], n_episodes=2, seed=0)
    task = sentence_task(config, "q", [(letter, letter) for letter in "abcabc"], [("x", "c"), ("y", "a")])
    assert task.n_way == 3 and task.labels.tolist() == [2, 0]

def test_tables(here, results):
    """A row for each classifier with the numbers of the file; a chart; and what is left out."""
    table = results[0]["words"].stdout.split("\n\n")[-2].splitlines()
    numbers = results[1]["words"]["seen words"]["shots"]
    assert list(numbers) == ["1", "3"]
    for line, row in zip(table[2:], numbers["1"], strict=True):
        shown = [f"{of_k[row]['mean']:.4f} ± {of_k[row]['ci95']:.4f}" for of_k in numbers.values()]
        assert line.split() == f"{row} {' '.join(shown)}".split()
    assert (here / "words/maml/fewshot.png").read_bytes().startswith(b"\x89PNG")
    tasks = {case: {name: list(task["shots"]) for name, task in results[1][case].items()} for case in CASES}
    assert tasks["hub"] == {"held-out words": ["1"], "seen words": ["1"], f"{here}/hub": ["1", "60"]}
    assert tasks["mask"] == {"three": ["4"], "two": ["4"]}
    assert "left out: no episodes of seen words with K = 60" in results[0]["hub"].stdout
    assert f"left out: there is no corpus {here}/none" in results[0]["mask"].stdout

def test_mistakes_are_one_line(results):
    for name, (_, says) in MISTAKES.items():
        one_line(results[0][name], says)
        assert "±" not in results[0][name].stdout
