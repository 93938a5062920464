"""Can a model learn to classify from a few examples? Few-shot accuracy, beside baselines without training.

    python eval_fewshot.py out/11m out/11m-vanilla              # words: which one is masked?
    python eval_fewshot.py out/11m out/11m-vanilla --data=DIR   # also DIR/<task>_train.jsonl and _test.jsonl
    python eval_fewshot.py out/11m --data=hf:SetFit/subj        # also a Hugging Face dataset

Three classifiers see K examples of each class (the support) and answer for others (the query):
adapt      training's inner loop, `maml.adapt`, from a fresh head; only the head adapts. The inner learning
           rate stays that of training: one of 10 is right for 16 words and too high for two classes
logistic   scikit-learn's LogisticRegression with C = 1, on features of length sqrt(d)
prototype  the class with the nearest mean (Snell et al. 2017, arxiv.org/abs/1703.05175)

Words are masked in the validation text. A sentence is read at its last token, or at a <|mask|> after it. All
models get the same draws. Intervals are 1.96 standard errors over draws, not over seeds of training.
"""
import json
from dataclasses import asdict, dataclass

from plumbing import settings  # before torch: Ctrl-C is quiet soon
from plumbing.files import fail, reading, write_atomic
from plumbing.settings import Count, Whole

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import maml
import smlmt
from config.defaults import Config as TrainConfig
from model import Llama
from plumbing import figures
from plumbing.checkpoint import corpus_problem, load_models
from plumbing.corpus import datasets_library, load_corpus, read_columns, read_files, text_files

@dataclass
class Config:
    data: str = ""  # sentences: a folder of <task>_train and <task>_test files, or hf:NAME or hf:NAME,CONFIG
    text_column: str = "text"  # column of the sentences
    label_column: str = "label"  # column of their classes
    split: str = ""  # of a Hugging Face dataset, to grade on; empty takes test or else validation
    shots: str = "1,4,16"  # K, the examples of each class
    n_episodes: Count = 64  # draws of each K; training ends with 64
    corpus: str = ""  # folder of a prepared corpus in the models' tokens; empty takes the first run's own
    step: int = -1  # of the checkpoints; -1 takes the newest
    seed: Whole = 0  # of the draws and of the random weights; training's own evaluations use 0

RULES = [
    (lambda c: c.n_episodes >= 2, "n_episodes must be at least 2"),
    (lambda c: all(k.isdecimal() and int(k) for k in c.shots.split(",")),
     "shots takes numbers of examples, at least 1 each, with commas between, as 1,4,16"),
]
BATCH = 8192  # tokens that a model reads at once

# --------------------------------------------------------------------------------------------------
# Classifiers: support (E, M, C), its labels (E, M) and query (E, Q, C) of E draws -> answers (E, Q)

def adapted(support, labels, query, head, lr, steps):
    """The inner loop of training, from the same head in each draw."""
    def loss(head, batch):
        return F.cross_entropy(maml.head_logits(head, batch[0]), batch[1])

    heads = vmap(lambda *batch: maml.adapt(loss, head, batch, lr, steps))(support, labels)
    return answers(heads, query)

def logistic(support, labels, query):
    """scikit-learn's logistic regression, a fit for each draw."""
    chosen = []
    for x, y, asked in zip(support, labels, query, strict=True):
        x, asked = (part.double().cpu().numpy() * part.shape[-1] ** 0.5 for part in (x, asked))
        fit = LogisticRegression(max_iter=1000).fit(x, y.cpu().numpy())  # 100 are too few to converge
        chosen.append(torch.from_numpy(fit.predict(asked)))
    return torch.stack(chosen)

def nearest_mean(support, labels, query):
    """|x - mean|^2 is smallest where x.mean - |mean|^2 / 2 is largest: a linear head."""
    members = F.one_hot(labels).to(support.dtype)  # (E, M, N)
    means = members.mT @ support / members.sum(1)[..., None]  # (E, N, C)
    return answers({"0.weight": means, "0.bias": -means.square().sum(-1) / 2}, query)

def answers(heads, query):
    """What heads, a leading E on every tensor, answer to a query (E, Q, C): classes (E, Q)."""
    chosen = []
    for e, x in enumerate(query):
        chosen.append(maml.head_logits({name: p[e] for name, p in heads.items()}, x).argmax(-1))
    return torch.stack(chosen).cpu()

@torch.no_grad()
def features(model, rows, positions):
    """Features (n, C) of n rows of ids at `positions` (n,), scaled. Rows of like length go together."""
    device = model.unembedding.weight.device
    x = torch.empty(len(rows), model.config.d_model, device=device)
    order = np.argsort([len(row) for row in rows], kind="stable")
    while len(order):
        batch = order[-max(1, BATCH // len(rows[order[-1]])) :]  # the longest that are left
        order = order[: -len(batch)]
        idx = pad_sequence([torch.as_tensor(rows[i]) for i in batch], batch_first=True).to(device)  # (B, T)
        at = torch.as_tensor([positions[i] for i in batch], device=device)
        x[torch.as_tensor(batch, device=device)] = maml.scaled(model.features_at(idx, at))
    return x

# --------------------------------------------------------------------------------------------------
# A baseline for words: what a word's left neighbour tells about it

def bigram_vectors(corpus):
    """For each id the direction of what follows it in the training text, as positive PMI: (V, V)."""
    V = corpus.vocab_size
    pairs = corpus.train[:-1].astype(np.int64) * V + corpus.train[1:]
    p = np.bincount(pairs, minlength=V * V).reshape(V, V).astype(np.float32) / len(pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(p / (p.sum(1, keepdims=True) * p.sum(0, keepdims=True)))
    return normalize(np.maximum(np.nan_to_num(pmi, nan=0, neginf=0), 0))

def bigram_accuracy(vectors, episode, mask):
    """Accuracy of the class with the nearest mean vector of the token before the mask."""
    support, query = (vectors[rows[np.arange(len(rows)), (rows == mask).argmax(1) - 1]]
                      for rows in (episode.support, episode.query))  # (N*K, V), (N*Q, V)
    means = [support[episode.support_labels == c].mean(0) for c in range(len(episode.words))]
    score = query @ normalize(np.stack(means)).T  # (N*Q, N)
    best = score >= score.max(1, keepdims=True) - 1e-6  # a tie shares the point
    return (best[np.arange(len(best)), episode.query_labels] / best.sum(1)).mean()

# --------------------------------------------------------------------------------------------------
# Tasks and evaluation

@dataclass
class Task:
    """Examples, and E draws of them for each K. A support has K examples of class 0, then K of class 1 ..."""

    name: str
    about: str  # a few words for the table
    n_way: int
    labels: np.ndarray  # (Q,) classes 0..N-1 of the query, the same in all draws
    examples: list  # sentences, or windows (L,) of ids
    positions: list  # where each window is read; empty for sentences, which are read at their end
    draws: dict  # K -> numbers of examples: support (E, N*K), and query (E, Q), or (1, Q) for all draws
    table: dict  # K -> {row of the table: accuracies (E,)}; begins with the baselines

def word_tasks(config, trained, corpus):
    """Which word is masked? With seed 0, on the episodes of training's evaluations."""
    names = "pool_tokens n_way q_query episode_len readout word_min_count word_max_count".split()
    options = {name: trained[name] for name in names} | {"eot": corpus.eot, "mask": corpus.mask}
    options |= {"pool_seed": 0, "seed": config.seed}
    vectors = bigram_vectors(corpus) if corpus.vocab_size <= 8192 else None
    N, Q, E = trained["n_way"], trained["q_query"], config.n_episodes
    tasks = [Task(name, f"{N} words, {Q} questions each", N, np.arange(N).repeat(Q), [], [], {}, {})
             for name in ("held-out words", "seen words")]
    for k in config.shots:
        pools = smlmt.Pools(corpus.val, corpus.token_bytes, k_shot=k, **options)
        for task, heldout in zip(tasks, (True, False), strict=True):
            if problem := pools.problem(heldout):
                print(f"left out: no episodes of {task.name} with K = {k}: {problem}")
                continue
            episodes, task.draws[k] = [pools.sampler(0).episode(e, heldout) for e in range(E)], []
            for part in ("support", "query"):
                windows = np.concatenate([getattr(episode, part) for episode in episodes])  # (E*M, L)
                task.draws[k].append((len(task.examples) + np.arange(len(windows))).reshape(E, -1))
                task.examples += list(windows)
                task.positions += [at for episode in episodes for at in getattr(episode, f"{part}_pos")]
            task.table[k] = {"majority class": np.full(E, 1 / N)}
            if vectors is not None:
                task.table[k]["bigram prototypes"] = np.array(
                    [bigram_accuracy(vectors, episode, corpus.mask) for episode in episodes])
    return [task for task in tasks if task.draws]

def sentence_tasks(config):
    """The tasks in config.data."""
    columns = [config.text_column, config.label_column]
    if config.data.startswith("hf:"):
        name, *part = config.data[3:].split(",")
        with datasets_library(name) as datasets:
            splits = datasets.get_dataset_split_names(name, *part)
        split = config.split or ("test" if "test" in splits else "validation")
        rows = {name: [read_columns(name, columns, name, *part, split=s) for s in ("train", split)]}
    else:
        files, rows = text_files(config.data), {}
        for name in sorted(name[:-6] for name in files if name.endswith("_train")) or ["<task>"]:
            with reading(config.data, "a task is two files, <task>_train and <task>_test"):
                rows[name] = [read_files(files[f"{name}_{end}"], columns) for end in ("train", "test")]
    return [sentence_task(config, name, *splits) for name, splits in rows.items()]

def sentence_task(config, name, train, test):
    """Which class is a sentence of? train, test: lists of (text, label)."""
    if not all(isinstance(text, str) for text, _ in train + test):
        fail(f"{name}: not every row has a text; see --text_column")
    train_names, test_names = (np.array([str(label) for _, label in rows]) for rows in (train, test))
    classes, train_labels, counts = np.unique(train_names, return_inverse=True, return_counts=True)
    odd = np.setxor1d(train_names, test_names)
    if len(odd) or len(classes) < 2:
        fail(f"{name}: {len(classes)} classes in training, and only in training or only in test are "
             f"{', '.join(odd[:3]) or 'none'}; both need the same two or more; see --label_column, --split")
    if counts.min() < config.shots[-1]:
        fail(f"{name}: a class has only {counts.min()} training examples; lower --shots")
    of_class = [np.flatnonzero(train_labels == c) for c in range(len(classes))]
    support = {}
    for k in config.shots:
        rngs = [np.random.default_rng((config.seed, k, e)) for e in range(config.n_episodes)]
        chosen = [[rng.choice(rows, k, replace=False) for rows in of_class] for rng in rngs]  # (E, N, K)
        support[k] = np.reshape(chosen, (len(rngs), -1))
    used = np.unique(np.concatenate([rows.ravel() for rows in support.values()]))  # only these are read
    examples = [train[i][0] for i in used] + [text for text, _ in test]
    query = len(used) + np.arange(len(test))[None]  # (1, Q)
    draws = {k: (np.searchsorted(used, rows), query) for k, rows in support.items()}
    test_labels = np.searchsorted(classes, test_names)
    majority = np.full(config.n_episodes, (test_labels == counts.argmax()).mean())
    about = f"{len(classes)} classes, {len(test):,} test sentences"
    return Task(name, about, len(classes), test_labels, examples, [], draws,
                {k: {"majority class": majority} for k in config.shots})

def evaluate(task, name, loaded):
    """Add the accuracies of a model's classifiers to the table of a task."""
    trained, model, tokenizer = loaded.settings, loaded.model, loaded.tokenizer
    rows, positions = task.examples, task.positions
    if not positions:  # sentences: the ends of long ones
        after = [tokenizer.mask] if trained["readout"] == "mask" else []
        rows = [[tokenizer.eot, *ids] for ids in tokenizer.encode_ordinary_batch(rows)]
        rows = [row[-model.config.block_size + len(after) :] + after for row in rows]
        positions = [len(row) - 1 for row in rows]
    x = features(model, rows, positions)  # (n, C)
    shape = model.config.d_model, task.n_way, trained["head_layers"], trained["head_hidden"]
    head = maml.fresh_head(loaded.head, task.n_way) if loaded.head else maml.init_head(*shape)
    head = {key: p.to(x.device) for key, p in head.items()}
    for k, (support, query) in task.draws.items():
        support, query = x[support], x[query].expand(len(support), -1, -1)  # (E, N*K, C), (E, Q, C)
        labels = torch.arange(task.n_way, device=x.device).repeat_interleave(k).expand(len(support), -1)
        lr, steps = trained["inner_lr"], trained["inner_steps"] or 10
        chosen = {"adapt": adapted(support, labels, query, head, lr, steps),
                  "logistic": logistic(support, labels, query),
                  "prototype": nearest_mean(support, labels, query)}
        for classifier, classes in chosen.items():
            right = classes == torch.from_numpy(task.labels)  # (E, Q)
            task.table[k][f"{name}, {classifier}"] = right.float().mean(1).double().numpy()

def summary(rows, first, others):
    """Mean and interval of each row of a table; also of the differences of each model to the first."""
    for name in others:
        for classifier in ("adapt", "logistic", "prototype"):
            difference = rows[f"{name}, {classifier}"] - rows[f"{first}, {classifier}"]
            rows[f"{name} minus first, {classifier}"] = difference
    return {row: {"mean": x.mean(), "ci95": 1.96 * x.std(ddof=1) / len(x) ** 0.5} for row, x in rows.items()}

def main():
    config, words = settings.load(Config, __doc__, RULES)
    config.shots = sorted({int(k) for k in config.shots.split(",")})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = load_models(words, None if config.step == -1 else config.step, device)
    models = {word: loaded._replace(settings=asdict(TrainConfig()) | loaded.settings)  # others' have none
              for word, loaded in models.items()}
    first = models[words[0]]
    folder = config.corpus or f"{first.settings['data_dir']}/{first.settings['dataset']}"
    problem = next(filter(None, (corpus_problem(loaded, folder) for loaded in models.values())), "")
    if problem:
        print(f"left out: {problem}")
    tasks = [] if problem else word_tasks(config, first.settings, load_corpus(folder))
    tasks += sentence_tasks(config) if config.data else []
    if not tasks:
        fail(problem or "no episodes can be drawn, for the reasons above; change --shots or --corpus")

    torch.manual_seed(config.seed)
    systems = {"random weights": first._replace(model=Llama(first.model.config).to(device).eval(), head={})}
    systems |= {f"{word}, step {loaded.step}": loaded for word, loaded in models.items()}
    with tqdm(total=len(tasks) * len(systems), desc="reading and fitting", disable=None) as progress:
        for name, loaded in systems.items():
            for task in tasks:
                evaluate(task, name, loaded)
                progress.update()

    compared = f"; differences to {words[0]} are of the same draws" if len(words) > 1 else ""
    print(f"accuracy ± 95% interval, {config.n_episodes} draws of each K{compared}")
    results = {"settings": asdict(config), "tasks": {}}
    _, first, *others = systems
    for task in tasks:
        shots = {k: summary(rows, first, others) for k, rows in task.table.items()}
        results["tasks"][task.name] = {"about": task.about, "n_way": task.n_way, "shots": shots}
        table = pd.DataFrame(shots).rename(columns="K = {}".format)
        table = table.map(lambda cell: f"{cell['mean']:.4f} ± {cell['ci95']:.4f}").to_string()
        print(f"\n{task.name}: {task.about}\n{table}")
    write_atomic(f"{words[0]}/fewshot.json", json.dumps(results, indent=2))
    figures.save(figures.few_shot(results, list(systems)), f"{words[0]}/fewshot.png")
    print(f"\nwritten {words[0]}/fewshot.json\nwritten {words[0]}/fewshot.png")

if __name__ == "__main__":
    main()
