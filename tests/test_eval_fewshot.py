"""eval_fewshot.py as a user runs it: its numbers against the training log, slow classifiers, Newton's method and a loop of plain gradient descent."""
import importlib
import inspect
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_many

import smlmt
from model import Llama, ModelConfig
from runs import load_corpus, load_model

N, K, Q, LENGTH, INNER_LR = 6, 3, 2, 20, 4.0
SHAPE = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24, block_size=16)
BASE = SHAPE | dict(
    batch_size=4, max_steps=30, lr=0.01, warmup_steps=5, meta_ratio=0.5, n_way=N, k_shot=K, q_query=Q, episode_len=LENGTH, inner_lr=INNER_LR,
    inner_steps=3, eval_steps=2, eval_interval=10, ckpt_interval=10, log_interval=1000, compile=False, dtype="float32", device="cpu",
)  # fmt: skip
RUNS = {
    "maml": {},
    "vanilla": {"meta_ratio": 0, "max_steps": 11},
    "deep head": {"head_layers": 3, "head_hidden": 8, "d_model": 32, "max_steps": 11},
    "fixed outputs": {"inner_steps": 0, "max_steps": 11, "inner_lr": 30, "readout": "last"},
    "mask": {"readout": "mask", "max_steps": 3, "ckpt_interval": 3},
}
CLASSIFIERS = ["adapt", "logistic", "prototype"]
SEED, DRAWS = 3, 8


def words(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def here(data_dir, tmp_path_factory):
    """A folder with the run folders of RUNS."""
    here = tmp_path_factory.mktemp("fewshot")
    (here / "empty").mkdir()
    for done in run_many("train.py", [words(**BASE | {"data_dir": data_dir, "out_dir": here / name} | changes) for name, changes in RUNS.items()]):
        assert done.returncode == 0, done.stderr
    return here


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Sentences: which module of the standard library is it from?


def sentences(*modules):
    """[(text, label)] of the documentation of some modules, in a fixed order that mixes labels, every fifth for the test."""
    texts = {name: [text for _, value in inspect.getmembers(importlib.import_module(name)) if (text := inspect.getdoc(value))] for name in modules}
    rows = [(text.split("\n\n")[0], name) for i, (name, found) in enumerate(texts.items()) for text in sorted(set(found))[: 30 - 6 * i]]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    return [row for i, row in enumerate(rows) if i % 5], rows[::5]


TASKS = {"three": sentences("shutil", "statistics", "ftplib"), "two": sentences("random", "smtplib")}
TASKS["two"][1].append(("", "random"))  # an empty sentence


@pytest.fixture(scope="module")
def data(here):
    """Folders of tasks, good and bad."""

    def write(folder, name, rows, columns=("text", "label")):
        (here / folder).mkdir(exist_ok=True)
        (here / folder / f"{name}.jsonl").write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))

    for name, (train, test) in TASKS.items():
        for split, rows in (("train", train), ("test", test)):
            write("data", f"{name}_{split}", rows)
    train, test = TASKS["two"]
    for split, rows in (("train", train), ("validation", test)):
        write("hub", split, [(text, int(label == "random")) for text, label in rows], ("sentence", "kind"))
    write("hub", "test", [(text, -1) for text, _ in test], ("sentence", "kind"))  # as where the answers are kept secret
    (here / "hub" / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {part}\n  data_files:\n" + "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
        for part, splits in (("c", ["train", "validation"]), ("secret", ["train", "validation", "test"]))) + "---\n")  # fmt: skip
    for folder, rows in {"other labels": [*test, ("a", "smptlib")], "one class": [("a", "random")], "no label": [("a", None)], "few": test}.items():
        write(folder, "two_test", rows)
        write(folder, "two_train", train if folder == "other labels" else rows)
    write("no test", "two_train", train)
    write("other columns", "two_train", train, ("sentence", "label"))
    write("other columns", "two_test", test, ("sentence", "label"))
    write("nothing", "notes", train)
    return here


CASES = {  # the words of the good ones; each runs in copies of its folders, where the numbers are written
    "three runs": ["maml", "vanilla", "deep head", "--step=10", "--n_episodes=8", "--shots=3"],
    "newest": ["maml", "--shots=3"],
    "other seed": ["maml", "--step=10", "--n_episodes=8", "--seed=3", "--shots=3,1,1"],
    "once more": ["maml", "--step=10", "--n_episodes=8", "--seed=3", "--shots=1,3"],
    "fixed outputs": ["fixed outputs", "--step=10", "--n_episodes=8", "--shots=3"],
    "sentences": ["maml", "deep head", "--step=10", "--n_episodes=8", "--seed=3", "--shots=1,4", "--data={here}/data"],
    "mask": ["mask", "--n_episodes=8", "--seed=3", "--shots=2", "--data={here}/data", "--data_dir={here}/empty"],
    "hub": ["maml", "--n_episodes=2", "--shots=2", "--data=hf:{here}/hub,c", "--text_column=sentence", "--label_column=kind", "--data_dir=none"],
    "split": ["maml", "--n_episodes=2", "--shots=2", "--data=hf:{here}/hub,secret", "--split=validation", "--text_column=sentence",
              "--label_column=kind", "--data_dir=none"],
    "many shots": ["maml", "--n_episodes=2", "--shots=1,60"],
}
MISTAKES = {  # the words, and what the one line says; {here} is the folder of the runs
    "no folder": ([], ["nothing is not a run folder", "python eval_fewshot.py out/"]),
    "missing folder": (["{here}/mamba"], ["mamba is not a run folder"]),
    "empty folder": (["{here}/empty"], ["empty holds no checkpoint", "train.py"]),
    "twice": (["{here}/maml", "{here}/vanilla/../maml"], ["named twice"]),
    "one episode": (["{here}/maml", "--n_episodes=1"], ["n_episodes must be at least 2"]),
    "seed below zero": (["{here}/maml", "--seed=-1"], ["seed must not be negative"]),
    "no such step": (["{here}/maml", "--step=7"], ["no checkpoint of step 7", "10, 20, 30"]),
    "no such setting": (["{here}/maml", "--episodes=7"], ["'episodes'", "'n_episodes'"]),
    "shots": (["{here}/maml", "--shots=1,0"], ["shots = 1,0"]),
    "shots by word": (["{here}/maml", "--shots=few"], ["shots = few"]),
    "no corpus": (["{here}/maml", "--data_dir={here}/empty"], ["there is no corpus", "empty/docstrings", "--data_dir="]),
    "few words": (["{here}/few words"], ["no episodes", "n_way=1000"]),
    "another corpus": (["{here}/maml", "{here}/another corpus"], ["another corpus was trained on corpus 0123456789ab", "one corpus"]),
    "no data": (["{here}/maml", "--data={here}/mamba"], ["mamba: no such folder", "hf:NAME"]),
    "other labels": (["{here}/maml", "--data={here}/other labels"], ["two: training and test data have different labels", "in test 'smptlib'"]),
    "wrong column": (["{here}/maml", "--data={here}/data", "--label_column=text"], ["different labels", "', ...; only in test '", "--label_column"]),
    "secret labels": (["{here}/maml", "--data=hf:{here}/hub,secret", "--text_column=sentence", "--label_column=kind"],
                      ["only in training '0', '1'; only in test '-1'; see", "--split"]),
    "no split": (["{here}/maml", "--data=hf:{here}/hub,c", "--split=test"], ["splits train, validation: it takes train, and test;", "--split"]),
    "few examples": (["{here}/maml", "--data={here}/few"], ["training examples of class", "--shots up to"]),
    "one class": (["{here}/maml", "--data={here}/one class"], ["two: only one class, random"]),
    "no label": (["{here}/maml", "--data={here}/no label"], ["two: the training data has rows without text or label", "--label_column"]),
    "no test": (["{here}/maml", "--data={here}/no test"], ["two_train.jsonl and two_test.jsonl"]),
    "no task": (["{here}/maml", "--data={here}/nothing"], ["needs both <task>_train and <task>_test", "notes"]),
    "no column": (["{here}/maml", "--data={here}/other columns"], ["no column 'text'", "'sentence'"]),
    "no dataset": (["{here}/maml", "--data=hf:no/such-dataset"], ["cannot read no/such-dataset"]),
}


@pytest.fixture(scope="module")
def results(here, data):
    """What became of the commands, by name, and what each wrote."""
    for name in ("few words", "another corpus"):
        shutil.copytree(here / "maml", here / name)
    newest, meta = here / "few words" / "ckpt_000030.pt", here / "another corpus" / "meta.json"
    state = torch.load(newest, weights_only=True)
    torch.save(state | {"config": state["config"] | {"n_way": 1000}}, newest)
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"corpus_hash": "0123456789ab"}))
    cases = {name: [word.format(here=here) for word in given] for name, (given, _) in MISTAKES.items()}
    for name, given in CASES.items():
        runs = [word for word in given if not word.startswith("--")]
        for run in runs:
            shutil.copytree(here / run, here / "copies" / name / run)
        cases[name] = [here / "copies" / name / word if word in runs else word.format(here=here) for word in given]
    done = dict(zip(cases, run_many("eval_fewshot.py", cases.values()), strict=True))
    assert not [done[name].stderr for name in CASES if done[name].returncode]
    return done, {name: json.loads((here / "copies" / name / CASES[name][0] / "fewshot.json").read_text()) for name in CASES}


def cells(results, here, name, task, k, run=None, step=10):
    """The cells of a task at a K by classifier: those of a run, or of the random weights."""
    rows = results[1][name]["tasks"][task]["shots"][str(k)]
    prefix = "random weights" if run is None else f"{here / 'copies' / name / run}, step {step}"
    return {classifier: rows[f"{prefix}, {classifier}"] for classifier in CLASSIFIERS}


@pytest.mark.parametrize("name", CASES)
def test_table(here, results, name):
    """For each task a head line, a row for each baseline and each classifier of each run; and the file says the same. And a chart."""
    done, numbers = results[0][name], results[1][name]
    assert not done.stderr
    tables = {table.split(":")[0]: table.splitlines() for table in done.stdout.split("\n\n")[1:-1]}
    assert tables.keys() == numbers["tasks"].keys()
    n, runs = numbers["settings"]["n_episodes"], [word for word in CASES[name] if not word.startswith("--")]
    assert f"{n} draws of each K" in done.stdout.split("\n\n")[0]
    for task, (first, columns, *lines) in tables.items():
        rows, words = numbers["tasks"][task], task.endswith("words")
        assert rows["about"] in first and str(rows["n_way"]) in first
        assert columns.split("K = ")[1:] and [int(k) for k in columns.replace("K =", "").split()] == [int(k) for k in rows["shots"]]
        per_run = len(CLASSIFIERS)
        assert len(lines) == 1 + words + per_run * (1 + len(runs)) + per_run * (len(runs) - 1)
        for line, row in zip(lines, next(iter(rows["shots"].values())), strict=True):
            sign = "+" if "minus" in row else ""
            shown = [f"{cell['mean']:{sign}.4f} ± {cell['ci95']:.4f}" for cell in (found[row] for found in rows["shots"].values())]
            assert line.startswith(row + " ") and line[len(row) :].split() == " ".join(shown).split()
    assert open(here / "copies" / name / runs[0] / "fewshot.png", "rb").read(4) == b"\x89PNG"


def test_which_tasks(here, results):
    tasks = {name: {task: list(found["shots"]) for task, found in numbers["tasks"].items()} for name, numbers in results[1].items()}
    assert tasks["other seed"] == {"held-out words": ["1", "3"], "seen words": ["1", "3"]}
    assert tasks["sentences"] == dict.fromkeys(("held-out words", "seen words", "three", "two"), ["1", "4"])
    assert tasks["mask"] == {"three": ["2"], "two": ["2"]} and f"left out: there is no corpus {here}/empty/docstrings" in results[0]["mask"].stdout
    assert tasks["hub"] == tasks["split"] == {f"{here}/hub": ["2"]}
    assert tasks["many shots"] == {"held-out words": ["1"], "seen words": ["1"]}
    assert "left out: no episodes of seen words with K = 60" in results[0]["many shots"].stdout


def logged(folder, step):
    line = next(line for line in map(json.loads, open(folder / "log.jsonl")) if (line["kind"], line["step"]) == ("eval", step))
    return {kind: (line[key], line[f"{key}_se"]) for kind, key in (("held-out words", "heldout_query_acc"), ("seen words", "val_query_acc"))}


@pytest.mark.parametrize("name, run, step", [
    ("three runs", "maml", 10), ("three runs", "vanilla", 10), ("three runs", "deep head", 10), ("fixed outputs", "fixed outputs", 10),
    ("newest", "maml", 30),
])  # fmt: skip
def test_numbers_are_those_of_the_evaluations_in_training(here, results, name, run, step):
    """On the first episodes of seed 0: 8 during training, 64, the default, at its end."""
    answer = 1 / (results[1][name]["settings"]["n_episodes"] * N * Q)  # what one weighs; one may turn on a rounding error
    for kind, (mean, se) in logged(here / run, step).items():
        cell = cells(results, here, name, kind, K, run, step)["adapt"]
        assert (cell["mean"], cell["ci95"]) == pytest.approx((mean, 1.96 * se), abs=2.2 * answer)


def test_the_same_once_more(results):
    first, again = (list(map(list, (rows.values() for task in results[1][name]["tasks"].values() for rows in task["shots"].values())))
                    for name in ("other seed", "once more"))  # fmt: skip
    assert first == again
    rows = results[1]["three runs"]["tasks"]["held-out words"]["shots"]["3"]
    assert len({json.dumps(row) for row in rows.values()}) > len(rows) - 3  # the rows are not copies of each other


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The classifiers, on words and on sentences, from their definitions


@pytest.fixture(scope="module")
def episodes(data_dir):
    """The episodes of the case "other seed" by K and kind, and the corpus."""
    corpus = load_corpus(str(data_dir / "docstrings"))
    samplers = {k: smlmt.Sampler(np.array(corpus.val), corpus.token_bytes, eot=corpus.eot, mask=corpus.mask, seed=SEED,
                                 n_way=N, k_shot=k, q_query=Q, episode_len=LENGTH) for k in (1, K)}  # fmt: skip
    return {(k, kind): [sampler.episode(e, heldout=kind == "held-out words") for e in range(DRAWS)]
            for k, sampler in samplers.items() for kind in ("held-out words", "seen words")}, corpus  # fmt: skip


def mean_and_interval(accuracies):
    mean = sum(accuracies) / len(accuracies)
    return mean, 1.96 * math.sqrt(sum((a - mean) ** 2 for a in accuracies) / (len(accuracies) - 1) / len(accuracies))


@pytest.mark.parametrize("k", [1, K])
def test_bigram_prototypes(results, episodes, k):
    """Dictionaries instead of a table: cosine between rows of positive pointwise mutual information; a tie, common at K = 1, shares the point."""
    episodes, corpus = episodes
    text = np.array(corpus.train).tolist()
    pairs, left, right = Counter(zip(text, text[1:], strict=False)), Counter(text[:-1]), Counter(text[1:])
    rows, ties = {}, 0
    for (a, b), count in pairs.items():
        rows.setdefault(a, {})[b] = max(0, math.log(count * (len(text) - 1) / (left[a] * right[b])))

    def direction(row):
        length = math.sqrt(sum(x * x for x in row.values()))
        return {b: x / length for b, x in row.items()} if length else {}

    def before_blank(window):
        return direction(rows.get(window[window.index(corpus.mask) - 1], {}))

    for kind in ("held-out words", "seen words"):
        accuracies = []
        for episode in episodes[k, kind]:
            prototypes = [Counter() for _ in range(N)]
            for window, label in zip(episode.support.tolist(), episode.support_labels, strict=True):
                prototypes[label].update(before_blank(window))
            prototypes, points = [direction(p) for p in prototypes], []
            for window, label in zip(episode.query.tolist(), episode.query_labels, strict=True):
                scores = [sum(x * p.get(b, 0) for b, x in before_blank(window).items()) for p in prototypes]
                best = [c for c, score in enumerate(scores) if score > max(scores) - 1e-6]
                ties += len(best) > 1 and label in best
                points.append((label in best) / len(best))
            accuracies.append(sum(points) / len(points))
        cell = results[1]["other seed"]["tasks"][kind]["shots"][str(k)]["bigram prototypes"]
        assert (cell["mean"], cell["ci95"]) == pytest.approx(mean_and_interval(accuracies), abs=1e-6)
    assert ties or k > 1


def gradient_descent(head, x, y, z, lr, steps):
    """Answers for z after plain gradient descent from a head [(W, b), ...]."""
    params = [p.clone().requires_grad_() for layer in head for p in layer]

    def logits(x):
        for i in range(0, len(params), 2):
            x = (x if i == 0 else x.relu()) @ params[i].T + params[i + 1]
        return x

    for _ in range(steps):
        loss = -logits(x).log_softmax(1)[range(len(y)), y].mean()
        gradients = torch.autograd.grad(loss, params)
        params = [(p - lr * g).detach().requires_grad_() for p, g in zip(params, gradients, strict=True)]
    return logits(z).argmax(1)


def newton(x, y, z, n_way):
    """Answers for z of logistic regression with a unit prior on the weights: Newton's steps from zero, in float64."""
    x, z = (F.pad(part.double(), (0, 1), value=1.0) for part in (x, z))
    size = n_way, x.shape[1]
    prior = torch.ones(size, dtype=x.dtype)
    prior[:, -1] = 0  # the bias is free
    w = torch.zeros(n_way * size[1], dtype=x.dtype)
    for _ in range(40):
        p = (x @ w.view(size).T).softmax(1)
        gradient = ((p - F.one_hot(y, n_way)).T @ x + prior * w.view(size)).flatten()
        curvature = torch.einsum("mi,ij,ma,mb->iajb", p, torch.eye(n_way).double(), x, x) - torch.einsum("mi,mj,ma,mb->iajb", p, p, x, x)
        step = torch.linalg.pinv(curvature.reshape(len(w), -1) + prior.flatten().diag(), hermitian=True) @ gradient
        w = w - step / max(1, step.norm().item() / 2)
    assert gradient.abs().max() < 1e-6
    return (z @ w.view(size).T).argmax(1)


def nearest_mean(x, y, z, n_way):
    means = torch.stack([x[y == c].mean(0) for c in range(n_way)])
    return torch.tensor([min(range(n_way), key=lambda c: float(((row - means[c]) ** 2).sum())) for row in z])


def check(found, answers, label, right):
    """Mean and interval of the cells against answers [{classifier: (Q,)}] of the draws; a few may turn on a rounding error."""
    for classifier, cell in found.items():
        accuracies = [(given[classifier].numpy() == label_).mean() for given, label_ in zip(answers, label, strict=True)]
        assert (cell["mean"], cell["ci95"]) == pytest.approx(mean_and_interval(accuracies), abs=right), classifier


@pytest.mark.parametrize("run", [None, "maml"])
@torch.no_grad()
def test_words(here, results, episodes, run):
    """Random weights come from the seed, trained ones from the step asked for."""
    torch.manual_seed(SEED)
    model = Llama(ModelConfig(**SHAPE, vocab_size=1024))
    if run:
        model.load_state_dict(torch.load(here / "maml" / "ckpt_000010.pt", weights_only=True)["model"])
    for kind in ("held-out words", "seen words"):
        answers = []
        for episode in episodes[0][K, kind]:
            x, z = (model.features(torch.from_numpy(rows))[range(len(rows)), at] for rows, at in (
                (episode.support, episode.support_pos), (episode.query, episode.query_pos)))  # fmt: skip
            y = torch.from_numpy(episode.support_labels)
            with torch.enable_grad():
                adapted = gradient_descent([(torch.zeros(N, 16), torch.zeros(N))], x / 4, y, z / 4, INNER_LR, 3)
            answers.append({"adapt": adapted, "logistic": newton(x, y, z, N), "prototype": nearest_mean(x, y, z, N)})
        check(cells(results, here, "other seed", kind, K, run), answers, [e.query_labels for e in episodes[0][K, kind]], 0.015)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name, run, k", [("sentences", "maml", 1), ("sentences", "maml", 4), ("sentences", "deep head", 4), ("mask", "mask", 2)])
@torch.no_grad()
def test_sentences(here, results, task, name, run, k):
    """One sentence at a time, its last tokens if it is long, with <|mask|> after it where the run was trained so; draws as the seed has them."""
    step = 3 if run == "mask" else 10
    model, encoding, checkpoint = load_model(str(here / run), step)
    eot, mask = (encoding.encode_single_token(token) for token in ("<|endoftext|>", "<|mask|>"))
    train, test = TASKS[task]
    longest = SHAPE["block_size"] - (run == "mask")
    assert max(len(encoding.encode_ordinary(text)) for text, _ in test) > longest

    def read(rows):
        ids = [([eot] + encoding.encode_ordinary(text))[-longest:] + [mask] * (run == "mask") for text, _ in rows]
        return torch.stack([model.features(torch.tensor([row]))[0, -1] for row in ids])

    names = sorted({label for _, label in train})
    train_labels, test_labels = (np.array([names.index(label) for _, label in rows]) for rows in (train, test))
    found, z, root = read(train), read(test), model.config.d_model**0.5
    layers = [(checkpoint["head"][f"{i}.weight"], checkpoint["head"][f"{i}.bias"]) for i in range(len(checkpoint["head"]) // 2)]
    head = layers[:-1] + [(torch.zeros(len(names), layers[-1][0].shape[1]), torch.zeros(len(names)))]
    answers = []
    for e in range(DRAWS):
        rng = np.random.default_rng((SEED, k, e))
        chosen = np.concatenate([rng.choice(np.flatnonzero(train_labels == c), k, replace=False) for c in range(len(names))])
        x, y = found[chosen], torch.from_numpy(train_labels[chosen])
        with torch.enable_grad():
            adapted = gradient_descent(head, x / root, y, z / root, INNER_LR, 3)
        answers.append({"adapt": adapted, "logistic": newton(x, y, z, len(names)), "prototype": nearest_mean(x, y, z, len(names))})
    check(cells(results, here, name, task, k, run, step), answers, [test_labels] * DRAWS, 0.015)
    majority = results[1][name]["tasks"][task]["shots"][str(k)]["majority class"]
    commonest = Counter(label for _, label in train).most_common(1)[0][0]
    assert (majority["mean"], majority["ci95"]) == (pytest.approx(np.mean([label == commonest for _, label in test])), 0)


def test_differences_are_paired(here, results):
    """The mean is that of the difference; the interval is that of draws in common, so between |a - b| and a + b."""
    for task, found in results[1]["sentences"]["tasks"].items():
        for k, rows in found["shots"].items():
            mine, other = (cells(results, here, "sentences", task, k, run) for run in ("maml", "deep head"))
            for classifier in CLASSIFIERS:
                difference = rows[f"{here / 'copies' / 'sentences' / 'deep head'}, step 10 minus first, {classifier}"]
                a, b = mine[classifier], other[classifier]
                assert difference["mean"] == pytest.approx(b["mean"] - a["mean"])
                assert abs(a["ci95"] - b["ci95"]) - 1e-9 <= difference["ci95"] <= a["ci95"] + b["ci95"] + 1e-9


def test_dataset_of_the_hub(here, results):
    """Numbers are good labels, and validation stands in for test: the same sentences with the same classes, in the other order."""
    assert results[1]["hub"]["tasks"][f"{here}/hub"]["about"] == f"2 classes, {len(TASKS['two'][1])} test sentences"
    count = Counter(label for _, label in TASKS["two"][0])
    commonest = np.mean([label == max(count, key=count.get) for _, label in TASKS["two"][1]])
    assert results[1]["hub"]["tasks"][f"{here}/hub"]["shots"]["2"]["majority class"]["mean"] == pytest.approx(commonest)
    assert results[1]["split"]["tasks"] == json.loads(json.dumps(results[1]["hub"]["tasks"]).replace("copies/hub/", "copies/split/"))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(results, name):
    done = results[0][name]
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (done.returncode, done.stderr)
    assert all(part in done.stderr for part in MISTAKES[name][1]), done.stderr
    assert "±" not in done.stdout
