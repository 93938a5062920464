"""eval_fewshot.py as a user runs it: its numbers against the training log, a slow nearest-prototype classifier and a loop of plain autograd."""
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import run_many

import smlmt
from model import Llama, ModelConfig
from runs import load_corpus

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
}
ROWS = ["chance", "bigram prototypes", "random weights"]


def words(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def here(data_dir, tmp_path_factory):
    """A folder with the run folders of RUNS."""
    here = tmp_path_factory.mktemp("fewshot")
    for done in run_many("train.py", [words(**BASE | {"data_dir": data_dir, "out_dir": here / name} | changes) for name, changes in RUNS.items()]):
        assert done.returncode == 0, done.stderr
    return here


MISTAKES = {  # the words, and what the one line says; {here} is the folder of the runs
    "no folder": ([], ["nothing is not a run folder", "python eval_fewshot.py out/"]),
    "missing folder": (["{here}/mamba"], ["mamba is not a run folder"]),
    "empty folder": (["{here}/empty"], ["empty holds no checkpoint", "train.py"]),
    "one episode": (["{here}/maml", "--n_episodes=1"], ["n_episodes must be at least 2"]),
    "seed below zero": (["{here}/maml", "--seed=-1"], ["seed must not be negative"]),
    "no such step": (["{here}/maml", "--step=7"], ["no checkpoint of step 7", "10, 20, 30"]),
    "no such setting": (["{here}/maml", "--episodes=7"], ["'episodes'", "'n_episodes'"]),
    "no corpus": (["{here}/maml", "--data_dir={here}/empty"], ["meta.json"]),
    "few words": (["{here}/few words"], ["no episodes", "n_way=1000"]),
    "another corpus": (["{here}/maml", "{here}/another corpus"], ["another corpus was trained on corpus 0123456789ab", "one corpus"]),
}


CASES = {  # the words of the good ones; each has a first folder of its own, where the numbers are written
    "three runs": ["{here}/maml", "{here}/vanilla", "{here}/deep head", "--step=10", "--n_episodes=8"],
    "newest": ["{here}/maml newest"],
    "other seed": ["{here}/maml other seed", "--step=10", "--n_episodes=8", "--seed=3"],
    "once more": ["{here}/maml once more", "--step=10", "--n_episodes=8", "--seed=3"],
    "other heads": ["{here}/deep head", "{here}/maml", "--n_episodes=2"],
    "fixed outputs": ["{here}/fixed outputs", "--step=10", "--n_episodes=8"],
}


@pytest.fixture(scope="module")
def results(here):
    """What became of the commands, by name."""
    (here / "empty").mkdir()
    for name in ("maml newest", "maml other seed", "maml once more", "few words", "another corpus"):
        shutil.copytree(here / "maml", here / name)
    newest, meta = here / "few words" / "ckpt_000030.pt", here / "another corpus" / "meta.json"
    state = torch.load(newest, weights_only=True)
    torch.save(state | {"config": state["config"] | {"n_way": 1000}}, newest)
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"corpus_hash": "0123456789ab"}))
    cases = CASES | {name: given for name, (given, _) in MISTAKES.items()}
    done = run_many("eval_fewshot.py", [[word.format(here=here) for word in given] for given in cases.values()])
    return dict(zip(cases, done, strict=True))


def written(here, name):
    return json.loads((here / CASES[name][0].removeprefix("{here}/") / "fewshot.json").read_text())


def logged(folder, step):
    line = next(line for line in map(json.loads, open(folder / "log.jsonl")) if (line["kind"], line["step"]) == ("eval", step))
    return {kind: (line[key], line[f"{key}_se"]) for kind, key in (("held-out", "heldout_query_acc"), ("seen", "val_query_acc"))}


@pytest.mark.parametrize("name", CASES)
def test_table(here, results, name):
    """A head line, one row for each baseline and run with both kinds of words, the file; and the file says the same."""
    done, numbers = results[name], written(here, name)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines, folders = done.stdout.splitlines(), [word.format(here=here) for word in CASES[name] if "{here}" in word]
    step = {"newest": {"maml newest": 30}, "other heads": {"maml": 30, "deep head": 11}}.get(name, {})
    names = ROWS + [f"{folder}, step {step.get(folder.split('/')[-1], 10)}" for folder in folders]
    assert numbers.keys() == {"settings", *names} and lines[-1] == f"written {folders[0]}/fewshot.json"
    assert f"{numbers['settings']['n_way']}-way" in lines[0] and f" {numbers['settings']['n_episodes']} episodes of each kind" in lines[0]
    assert lines[1].split("  ")[-1].strip() == "seen words" and "held-out words" in lines[1]
    assert [line.split("  ")[0].rstrip() for line in lines[2:-1]] == names and lines[2].split()[-1] == f"{1 / numbers['settings']['n_way']:.4f}"
    for row, line in zip(names[1:], lines[3:-1], strict=True):
        assert line.split(f"{row} ")[1].split() == " ".join(f"{cell['mean']:.4f} ± {cell['se']:.4f}" for cell in numbers[row].values()).split()
        assert list(numbers[row]) == ["held-out", "seen"] and all(0 <= cell["mean"] <= 1 and cell["se"] >= 0 for cell in numbers[row].values())


@pytest.mark.parametrize("name, run, step", [
    ("three runs", "maml", 10), ("three runs", "vanilla", 10), ("three runs", "deep head", 10), ("fixed outputs", "fixed outputs", 10),
    ("newest", "maml newest", 30),
])  # fmt: skip
def test_numbers_are_those_of_the_evaluations_in_training(here, results, name, run, step):
    """On the first episodes of seed 0: 8 during training, 64, the default, at its end."""
    numbers, expected = written(here, name), logged(here / run, step)
    answer = 1 / (numbers["settings"]["n_episodes"] * numbers["settings"]["n_way"] * Q)  # what one weighs; one may turn on a rounding error
    for kind, cell in numbers[f"{here / run}, step {step}"].items():
        assert (cell["mean"], cell["se"]) == pytest.approx(expected[kind], abs=1.1 * answer)


def test_the_same_once_more(here, results):
    first, again = written(here, "other seed"), written(here, "once more")
    assert list(first.values()) == list(again.values())
    rows = written(here, "three runs")
    assert len({json.dumps(row) for row in rows.values()}) == len(rows)  # the rows are not copies of each other
    assert rows["bigram prototypes"] != first["bigram prototypes"]


@pytest.fixture(scope="module")
def episodes(data_dir):
    """The episodes of the case "other seed", and the training text and <|mask|> of the corpus."""
    corpus = load_corpus(str(data_dir / "docstrings"))
    sampler = smlmt.Sampler(np.array(corpus.val), corpus.token_bytes, eot=corpus.eot, mask=corpus.mask, seed=3,
                            n_way=N, k_shot=K, q_query=Q, episode_len=LENGTH)  # fmt: skip
    return {kind: [sampler.episode(e, heldout=kind == "held-out") for e in range(8)] for kind in ("held-out", "seen")}, corpus


def mean_and_error(accuracies):
    mean = sum(accuracies) / len(accuracies)
    return mean, math.sqrt(sum((a - mean) ** 2 for a in accuracies) / (len(accuracies) - 1) / len(accuracies))


def test_bigram_prototypes(here, results, episodes):
    """Dictionaries instead of a table: cosine between rows of positive pointwise mutual information; ties share the point."""
    episodes, corpus = episodes
    text = np.array(corpus.train).tolist()
    pairs, left, right = Counter(zip(text, text[1:], strict=False)), Counter(text[:-1]), Counter(text[1:])
    rows = {}
    for (a, b), count in pairs.items():
        rows.setdefault(a, {})[b] = max(0, math.log(count * (len(text) - 1) / (left[a] * right[b])))

    def direction(row):
        length = math.sqrt(sum(x * x for x in row.values()))
        return {b: x / length for b, x in row.items()} if length else {}

    def before_blank(window):
        return direction(rows.get(window[window.index(corpus.mask) - 1], {}))

    for kind, cell in written(here, "other seed")["bigram prototypes"].items():
        accuracies = []
        for episode in episodes[kind]:
            prototypes = [Counter() for _ in range(N)]
            for window, label in zip(episode.support.tolist(), episode.support_labels, strict=True):
                prototypes[label].update(before_blank(window))
            prototypes, points = [direction(p) for p in prototypes], []
            for window, label in zip(episode.query.tolist(), episode.query_labels, strict=True):
                scores = [sum(x * p.get(b, 0) for b, x in before_blank(window).items()) for p in prototypes]
                best = [c for c, score in enumerate(scores) if score > max(scores) - 1e-6]
                points.append((label in best) / len(best))
            accuracies.append(sum(points) / len(points))
        assert (cell["mean"], cell["se"]) == pytest.approx(mean_and_error(accuracies), abs=1e-6)


@pytest.mark.parametrize("row", ["random weights", "{here}/maml other seed, step 10"])
def test_adaptation_by_hand(here, results, episodes, row):
    """A fresh head of zeros after three steps of plain gradient descent; random weights come from the seed, trained ones from the step asked for."""
    torch.manual_seed(3)
    model = Llama(ModelConfig(**SHAPE, vocab_size=1024))
    if "step" in row:
        model.load_state_dict(torch.load(here / "maml" / "ckpt_000010.pt", weights_only=True)["model"])
    for kind, cell in written(here, "other seed")[row.format(here=here)].items():
        accuracies = []
        for episode in episodes[0][kind]:
            (x, z), y = ((model.features(torch.from_numpy(t))[range(len(t)), p].detach() / 4 for t, p in (
                (episode.support, episode.support_pos), (episode.query, episode.query_pos))), torch.eye(N)[episode.support_labels])  # fmt: skip
            W, b = torch.zeros(N, 16), torch.zeros(N)
            for _ in range(3):
                error = ((x @ W.T + b).softmax(1) - y) / len(x)  # the gradient of the mean cross-entropy in the logits
                W, b = W - INNER_LR * error.T @ x, b - INNER_LR * error.sum(0)
            accuracies.append(((z @ W.T + b).argmax(1).numpy() == episode.query_labels).mean())
        assert (cell["mean"], cell["se"]) == pytest.approx(mean_and_error(accuracies), abs=0.015)  # one answer is 1 / (8 * 12) of the mean


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(results, name):
    done = results[name]
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (done.returncode, done.stderr)
    assert all(part in done.stderr for part in MISTAKES[name][1]), done.stderr
    assert "±" not in done.stdout
