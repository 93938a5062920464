"""Can a model learn to classify from a few examples? Few-shot accuracy, beside baselines without training.

    python eval_fewshot.py out/11m out/11m-vanilla              # words: which one is masked?
    python eval_fewshot.py out/11m out/11m-vanilla --data=DIR   # also DIR/<task>_train.jsonl and _test.jsonl
    python eval_fewshot.py out/11m --data=hf:SetFit/subj        # also a Hugging Face dataset

A row of these files (json, jsonl, csv, tsv, also .gz, or parquet) has a sentence and its class.

Three classifiers see K examples of each class (the support) and answer for others (the query):
adapt      training's inner loop, `maml.adapt`, from a head with a zero last layer; only the head adapts
logistic   scikit-learn's LogisticRegression with C = 1, on features of length sqrt(d)
prototype  the class with the nearest mean (Snell et al. 2017, arxiv.org/abs/1703.05175)
Words are masked in the validation text. A sentence is read at its last token, or at a <|mask|> after it. All
models get the same draws. Intervals are 1.96 standard errors, clustered by word or, for sentences, by draw;
they leave out the spread between seeds of training, which is larger.
"""
import json
from dataclasses import asdict, dataclass, field
from itertools import product

from plumbing import settings  # before torch: Ctrl-C prints no traceback from here on
from plumbing.files import attempt, fail, write_atomic
from plumbing.settings import Count, Whole

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import maml
import smlmt
from config.defaults import Config as TrainConfig
from model import Llama
from plumbing import figures
from plumbing.checkpoint import corpus_problem, load_models
from plumbing.corpus import datasets_library, hub_rows, load_corpus, read_columns, read_files, text_files
from plumbing.machine import choose_device

@dataclass
class Config:
    data: str = ""  # sentences: a folder, as above, or hf:NAME or hf:NAME,CONFIG
    text_column: str = "text"  # column of the sentences
    label_column: str = "label"  # column of their classes
    split: str = ""  # split of a Hugging Face dataset to test on; empty: test, or else validation
    shots: str = "1,4,16"  # K, the examples of each class
    n_episodes: Count = 64  # episodes for each K; training's last evaluation has 64
    corpus: str = ""  # folder of a prepared corpus in the models' tokens; empty takes the first run's own
    out: str = ""  # folder of the results; empty takes the first run's
    step: int = -1  # step of the checkpoints; -1: the newest
    seed: Whole = 0  # of the episodes and of the random weights; training's evaluations use 0

RULES = [(lambda c: all(k.isdecimal() and int(k) for k in c.shots.split(",")),
          "shots takes numbers of examples, at least 1 each, with commas between, as 1,4,16")]
BATCH = 8192  # tokens that a model reads at once

# --------------------------------------------------------------------------------------------------
# Classifiers: support x (N*K, C), its labels y (N*K,), query z (M, C) -> answers (M,)

def adapted(x, y, z, head, lr, steps):
    """The answers (steps + 1, M) before the first inner step and after each."""
    def loss(params, _):
        return F.cross_entropy(maml.head_logits(params, x), y)

    heads = [head]
    for _ in range(steps):
        heads.append(maml.adapt(loss, heads[-1], None, lr, 1))
    return torch.stack([maml.head_logits(head, z).argmax(-1) for head in heads])

def logistic(x, y, z, *_):
    mean = x.mean(0)  # centring only moves the intercept, and makes the fit five times as fast
    x, z = ((part - mean).cpu().double().numpy() * part.shape[-1] ** 0.5 for part in (x, z))
    fit = LogisticRegression(solver="newton-cg", max_iter=1000).fit(x, y.cpu().numpy())  # twice lbfgs's speed
    return torch.from_numpy(fit.predict(z))

def nearest_mean(x, y, z, *_):
    """The nearest class mean: |z - mean|^2 is smallest where z.mean - |mean|^2 / 2 is largest."""
    means = torch.stack([x[y == c].mean(0) for c in y.unique()])  # (N, C)
    return (z @ means.T - means.square().sum(-1) / 2).argmax(-1)

CLASSIFIERS = {"adapt": adapted, "logistic": logistic, "prototype": nearest_mean}

@torch.no_grad()
def features(model, rows):
    """Features (n, C) at the ends of n rows of ids, scaled. Rows of similar length share a batch."""
    device = model.unembedding.weight.device
    x = torch.empty(len(rows), model.config.d_model, device=device)
    order, size = np.argsort([len(row) for row in rows], kind="stable"), max(1, BATCH // max(map(len, rows)))
    for batch in np.split(order, range(size, len(order), size)):
        idx = pad_sequence([torch.as_tensor(rows[i]) for i in batch], batch_first=True)  # (B, T)
        at = torch.tensor([len(rows[i]) - 1 for i in batch], device=device)
        x[batch] = maml.scaled(model.features_at(idx.to(device), at))
    return x

def bigram_vectors(corpus):
    """For each id the direction of what follows it in the training text, as positive PMI: (V, V)."""
    V = corpus.vocab_size
    pairs = corpus.train[:-1].astype(np.int64) * V + corpus.train[1:]
    p = np.bincount(pairs, minlength=V * V).reshape(V, V).astype(np.float32) / len(pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(p / (p.sum(1, keepdims=True) * p.sum(0, keepdims=True)))
    return normalize(np.maximum(np.nan_to_num(pmi, nan=0, neginf=0), 0))

def bigram_answers(vectors, episode, mask):
    """(N*Q,) 1 where the nearest class mean is right. A window has the vector of the token before it."""
    support, query = (vectors[rows[np.arange(len(rows)), (rows == mask).argmax(1) - 1]]
                      for rows in (episode.support, episode.query))  # (N*K, V), (N*Q, V)
    means = [support[episode.support_labels == c].mean(0) for c in range(len(episode.words))]
    score = query @ normalize(np.stack(means)).T  # (N*Q, N)
    best = score >= score.max(1, keepdims=True) - 1e-6  # a tie shares the point
    return best[np.arange(len(best)), episode.query_labels] / best.sum(1)

# --------------------------------------------------------------------------------------------------
# Tasks and evaluation

@dataclass
class Task:
    """A benchmark: examples, and E episodes (draws) for each K, with supports in the order of the classes."""
    name: str
    about: str  # a few words for the table
    n_way: int
    labels: np.ndarray  # (M,) classes 0..N-1 of the query, the same in all draws
    examples: list  # read at their ends: sentences, or windows of ids
    draws: dict = field(default_factory=dict)  # K -> E pairs of indices into examples: (N*K,) and (M,)
    table: dict = field(default_factory=dict)  # K -> {row of the table: score of each answer, 0 to 1 (E, M)}
    clusters: dict = field(default_factory=dict)  # K -> (E, M): answers of one cluster are alike
    curves: dict = field(default_factory=dict)  # K -> {model: mean accuracy before and after each inner step}

def word_tasks(config, made_with, corpus):
    """Tasks that ask which word is masked. With seed 0 and training's K they are those of its evaluations."""
    names = "pool_tokens n_way q_query episode_len readout word_min_count word_max_count".split()
    options = {name: made_with[name] for name in names}
    vectors = bigram_vectors(corpus) if corpus.vocab_size <= 8192 else None
    N, Q, E = made_with["n_way"], made_with["q_query"], config.n_episodes
    tasks = [Task(name, f"{N} words, {Q} questions each", N, np.arange(N).repeat(Q), [])
             for name in ("held-out words", "seen words")]
    index_of = {task.name: {} for task in tasks}  # a window's ids -> its index in task.examples
    for k in config.shots:
        pools = smlmt.Pools(corpus.val, corpus.token_bytes, k_shot=k, pool_seed=0, seed=config.seed,
                            eot=corpus.eot, mask=corpus.mask, **options)
        for task, heldout in zip(tasks, (True, False), strict=True):
            if problem := pools.problem(heldout):
                print(f"left out: no episodes of {task.name} with K = {k}: {problem}")
                continue
            episodes = [pools.sampler(0).episode(e, heldout) for e in range(E)]
            task.table[k], task.draws[k] = {"majority class": np.full((E, N * Q), 1 / N)}, []
            task.clusters[k] = np.stack([episode.words.repeat(Q) for episode in episodes])
            if vectors is not None:
                shares = [bigram_answers(vectors, episode, corpus.mask) for episode in episodes]
                task.table[k]["bigram prototypes"] = np.stack(shares)
            index = index_of[task.name]
            for episode in episodes:
                windows = np.concatenate([episode.support, episode.query])
                places = np.concatenate([episode.support_pos, episode.query_pos])
                # Attention is causal: what follows the place cannot matter. Equal windows are read once.
                rows = [tuple(row[: at + 1]) for row, at in zip(windows.tolist(), places, strict=True)]
                indices = np.array([index.setdefault(row, len(index)) for row in rows])
                task.draws[k].append((indices[: N * k], indices[N * k :]))
            task.examples = list(index)
    return [task for task in tasks if task.draws]

def sentence_tasks(config):
    """Which class is a sentence of? The tasks in config.data."""
    columns, tasks = [config.text_column, config.label_column], []
    if config.data.startswith("hf:"):
        name, _, part = config.data[3:].partition(",")
        with datasets_library(name) as datasets:
            splits = datasets.get_dataset_split_names(name, part or None)
        split = config.split or ("test" if "test" in splits else "validation")
        rows = {name: [read_columns(columns, hub_rows, name, part or None, s) for s in ("train", split)]}
    else:
        files, rows = text_files(config.data), {}
        names = sorted(name.removesuffix("_train") for name in files if name.endswith("_train"))
        for name in names or ["<task>"]:
            with attempt(f"read {config.data}", "a task is two files, <task>_train and <task>_test"):
                rows[name] = [read_files(files[f"{name}_{end}"], columns) for end in ("train", "test")]
    for name, splits in rows.items():
        with attempt(f"read {name}", "see --text_column, --label_column, --split and --shots"):
            tasks.append(sentence_task(config, name, *splits))
    return tasks

def sentence_task(config, name, train, test):
    """A task of two lists of (text, label)."""
    train_names, test_names = (np.array([str(label) for _, label in rows]) for rows in (train, test))
    classes, train_labels, counts = np.unique(train_names, return_inverse=True, return_counts=True)
    for split, rows in ("training", train), ("test", test):
        for number, (text, label) in enumerate(rows, 1):
            if not isinstance(text, str) or str(label) not in classes:
                problem = f"{text!r:.40} is no text, or {label} no training class"
                raise ValueError(f"{split} row {number}: {problem}")
    if counts.min() < config.shots[-1]:
        least, most = classes[counts.argmin()], config.shots[-1]
        raise ValueError(f"class {least} has {counts.min()} training rows, but --shots asks for {most}")
    labels, E = np.searchsorted(classes, test_names), config.n_episodes
    of_class = [np.flatnonzero(train_labels == c) for c in range(len(classes))]
    task = Task(name, f"{len(classes)} classes, {len(test):,} test sentences", len(classes), labels,
                [text for text, _ in train + test])
    for k in config.shots:
        task.draws[k] = []
        for e in range(E):
            rng = np.random.default_rng((config.seed, k, e))
            support = np.concatenate([rng.choice(rows, k, replace=False) for rows in of_class])
            task.draws[k].append((support, len(train) + np.arange(len(test))))
        task.table[k] = {"majority class": np.tile(1.0 * (labels == counts.argmax()), (E, 1))}
        task.clusters[k] = np.tile(np.arange(E)[:, None], len(labels))
    return task

def evaluate(task, name, loaded):
    """Add the accuracies of a model's classifiers to the table of a task."""
    made_with = asdict(TrainConfig()) | loaded.settings  # defaults, for a model that train.py did not make
    model, tokenizer = loaded.model, loaded.tokenizer
    labels = torch.from_numpy(task.labels)
    parts = [part for draws in task.draws.values() for draw in draws for part in draw]  # indices
    drawn = np.unique(np.concatenate(parts))
    rows = [task.examples[i] for i in drawn]  # only these are read
    if isinstance(rows[0], str):  # a sentence becomes ids: its last block_size
        after = [tokenizer.mask] if made_with["readout"] == "mask" else []
        rows = [[tokenizer.eot, *ids] for ids in tokenizer.encode_ordinary_batch(rows)]
        rows = [row[-model.config.block_size + len(after) :] + after for row in rows]
    x = features(model, rows)  # (n, C)
    shape = model.config.d_model, task.n_way, made_with["head_layers"], made_with["head_hidden"]
    head = maml.fresh_head(loaded.head, task.n_way) if loaded.head else maml.init_head(*shape)
    head = {key: p.to(x.device) for key, p in head.items()}
    if made_with["inner_lr"] >= 4:  # of an old run: it was not for each class then
        fail(f"inner_lr = {made_with['inner_lr']:g} in {loaded.path}/state.json: divide it by its n_way")
    for (k, draws), (classifier, answer) in product(task.draws.items(), CLASSIFIERS.items()):
        rates = maml.head_rates(head, made_with["inner_lr"], task.n_way, k)
        inner = head, rates, made_with["inner_steps"] or 10
        y, right = torch.arange(task.n_way, device=x.device).repeat_interleave(k), []
        for draw in draws:
            support, query = (x[np.searchsorted(drawn, of_part)] for of_part in draw)
            right.append((answer(support, y, query, *inner).cpu() == labels).double())
        right = torch.stack(right).numpy()  # (E, M)
        if classifier == "adapt":  # (E, steps + 1, M): all steps make the curve, the last one the table
            task.curves.setdefault(k, {})[name] = right.mean((0, 2)).tolist()
            right = right[:, -1]
        task.table[k][f"{name}, {classifier}"] = right

def summary(rows, clusters, first, *others):
    """{row: mean and interval} of a table; rows of the differences to the first model are added to it."""
    for name, key in product(others, CLASSIFIERS):
        rows[f"{name} minus first, {key}"] = rows[f"{name}, {key}"] - rows[f"{first}, {key}"]
    cells, clusters = {}, torch.from_numpy(clusters).flatten()
    for row, right in rows.items():
        error = maml.standard_error(torch.from_numpy(right).flatten(), clusters)
        cells[row] = {"mean": right.mean(), "ci95": 1.96 * error.item()}
    return cells

def main():
    config, paths = settings.load(Config, __doc__, RULES)
    config.shots = sorted({int(k) for k in config.shots.split(",")})
    device = choose_device("auto")
    models = load_models(paths, config.step, device)
    first = models[paths[0]]
    made_with = asdict(TrainConfig()) | first.settings
    folder = config.corpus or f"{made_with['data_dir']}/{made_with['dataset']}"
    problem = next(filter(None, [corpus_problem(loaded, folder) for loaded in models.values()]), "")
    if problem:
        print(f"left out: {problem}")
    tasks = [] if problem else word_tasks(config, made_with, load_corpus(folder))
    if config.data:
        tasks += sentence_tasks(config)
    if not tasks:
        fail(problem or "no episodes can be drawn, for the reasons above; change --shots or --corpus")
    torch.manual_seed(config.seed)
    systems = {"random weights": first._replace(model=Llama(first.model.config).to(device).eval(), head={})}
    systems |= {f"{path}, step {loaded.step}": loaded for path, loaded in models.items()}
    for name, loaded in tqdm(systems.items(), "reading and fitting", disable=None):
        for task in tasks:
            evaluate(task, name, loaded)
    print(f"accuracy ± 95% interval, {config.n_episodes} draws of each K, the same for all models")
    results = {"settings": asdict(config), "tasks": {}}
    _, *names = systems
    for task in tasks:
        shots = {k: summary(rows, task.clusters[k], *names) for k, rows in task.table.items()}
        results["tasks"][task.name] = {"about": task.about, "n_way": task.n_way, "shots": shots,
                                       "after_each_inner_step": task.curves}
        table = pd.DataFrame(shots).map("{0[mean]:.4f} ± {0[ci95]:.4f}".format)
        print(f"\n{task.name}: {task.about}\n{table.rename(columns='K = {}'.format).to_string()}")
    out = config.out or paths[0]
    write_atomic(f"{out}/fewshot.json", json.dumps(results, indent=2))
    figures.save(figures.few_shot(results, list(systems)), f"{out}/fewshot.png")
    print(f"\nwritten {out}/fewshot.json and .png")

if __name__ == "__main__":
    main()
