"""Can a model learn words that its training never asked about? Few-shot accuracy of runs, beside what needs no training.

    python eval_fewshot.py out/11m out/11m-vanilla

Each run adapts a fresh head to the support windows of an episode, with the `adapt` of training, and is graded on the query windows. The episodes are
cut from the validation text: on held-out words, which no training episode used, and on the others. All runs get the same episodes, by the settings of
the first. The rows that any run has to beat: chance, prototypes on bigram statistics, and the same architecture with random weights.
"""
import json
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch

import configurator
import maml
import smlmt
from model import Llama
from runs import fail, load_corpus, load_model, read_json, write_atomic


@dataclass
class Config:
    data_dir: str = ""  # where the corpora are; empty takes the first run's
    n_episodes: int = 64  # episodes of each kind; 64 are those that training ends with
    step: int = -1  # of the checkpoints; -1 takes the newest
    seed: int = 0  # of the episodes and of the random weights; training's own evaluations use 0


config, folders = configurator.load(Config, sys.argv[1:], __doc__)
for folder in folders or [""]:
    if not os.path.isdir(folder):
        fail(f"{folder or 'nothing'} is not a run folder: python eval_fewshot.py out/<run> ...")
if config.n_episodes < 2 or config.seed < 0:
    fail("n_episodes must be at least 2, seed must not be negative")

models = {folder: load_model(folder, None if config.step == -1 else config.step)[::2] for folder in folders}  # folder -> (model, checkpoint)
settings = models[folders[0]][1]["config"]
corpus = load_corpus(os.path.join(config.data_dir or settings["data_dir"], settings["dataset"]))
for folder in folders:
    trained_on = read_json(os.path.join(folder, "meta.json"))["corpus_hash"]
    if trained_on != corpus.meta["corpus_hash"]:
        fail(f"{folder} was trained on corpus {trained_on}, not on {corpus.meta['corpus_hash']}: compare runs of one corpus, with that corpus")
wanted = {name: settings[name] for name in "n_way k_shot q_query episode_len readout word_min_count word_max_count".split()}
try:
    text = smlmt.pool(corpus.val, settings["pool_tokens"], 0, 0, eot=corpus.eot)  # as in training's evaluations, if seed is 0
    sampler = smlmt.Sampler(text, corpus.token_bytes, eot=corpus.eot, mask=corpus.mask, seed=config.seed, **wanted)
    episodes = {kind: [sampler.episode(e, heldout=kind == "held-out") for e in range(config.n_episodes)] for kind in ("held-out", "seen")}
except ValueError as error:
    fail(f"no episodes from {corpus.meta['name']}: {error}")


@torch.no_grad()
def adapted_accuracy(model, head, episode):
    """Query accuracy of one episode, after `head` has adapted to its support set on the model's features."""

    def features(tokens, positions):  # (M, L), (M,) -> (1, M, C)
        return model.features_at(torch.from_numpy(tokens), torch.from_numpy(positions))[None]

    support, query = features(episode.support, episode.support_pos), features(episode.query, episode.query_pos)
    support_labels, query_labels = (torch.from_numpy(labels)[None] for labels in (episode.support_labels, episode.query_labels))
    _, numbers = maml.episode_loss(head, support, support_labels, query, query_labels, lr=settings["inner_lr"], steps=settings["inner_steps"] or 10)
    return numbers["query_acc"].item()


def fresh_head(model, trained, learnt=None):
    """A head whose last layer is zero, of the depth in the settings `trained`; its hidden layers are the learnt ones, where there are any."""
    head = maml.init_head(model.config.d_model, settings["n_way"], trained["head_layers"], trained["head_hidden"])
    last = f"{maml.last_layer(head)}."
    return {name: p if name.startswith(last) or learnt is None else learnt[name] for name, p in head.items()}


def bigram_vectors():
    """For each token id the direction of what follows it in the training text: its row of positive pointwise mutual information, (V, V)."""
    V = corpus.vocab_size
    pairs = corpus.train[:-1].astype(np.int64) * V + corpus.train[1:]
    p = np.bincount(pairs, minlength=V * V).reshape(V, V).astype(np.float32) / len(pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.nan_to_num(np.log(p / (p.sum(1, keepdims=True) * p.sum(0, keepdims=True))), nan=0, neginf=0)
    return unit(np.maximum(pmi, 0))


def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)


def prototype_accuracy(vectors, episode):
    """Nearest class mean, by the bigram vector of the token before the blank: what a word's left neighbour alone tells about it."""

    def before_blank(rows):
        return vectors[rows[np.arange(len(rows)), (rows == corpus.mask).argmax(1) - 1]]  # (M, V)

    prototypes = unit(before_blank(episode.support).reshape(settings["n_way"], -1, vectors.shape[1]).mean(1))  # (N, V)
    score = before_blank(episode.query) @ prototypes.T  # (M, N)
    best = score >= score.max(1, keepdims=True) - 1e-6  # a tie shares the point
    return float((best[np.arange(len(best)), episode.query_labels] / best.sum(1)).mean())


torch.manual_seed(config.seed)
random_model = Llama(models[folders[0]][0].config).eval()
vectors = bigram_vectors() if corpus.vocab_size <= 8192 else None  # a V x V table
rows = {} if vectors is None else {"bigram prototypes": lambda e: prototype_accuracy(vectors, e)}
rows["random weights"] = lambda e: adapted_accuracy(random_model, fresh_head(random_model, settings), e)
for folder, (model, checkpoint) in models.items():
    head = fresh_head(model, checkpoint["config"], checkpoint["head"])
    rows[f"{folder}, step {checkpoint['step']}"] = lambda e, model=model, head=head: adapted_accuracy(model, head, e)

width = max(map(len, rows))
print(f"{settings['n_way']}-way {settings['k_shot']}-shot, {config.n_episodes} episodes of each kind, query accuracy ± standard error")
print(f"{'':{width}}  {'held-out words':>15}  {'seen words':>15}")
print(f"{'chance':{width}}  {1 / settings['n_way']:>15.4f}  {1 / settings['n_way']:>15.4f}")
results = {"settings": asdict(config) | wanted, "chance": 1 / settings["n_way"]}
for name, accuracy in rows.items():
    cells = {kind: np.array([accuracy(episode) for episode in episodes[kind]]) for kind in episodes}
    results[name] = {kind: {"mean": acc.mean(), "se": acc.std(ddof=1) / len(acc) ** 0.5} for kind, acc in cells.items()}
    print(f"{name:{width}}  " + "  ".join(f"{cell['mean']:.4f} ± {cell['se']:.4f}" for cell in results[name].values()), flush=True)
path = os.path.join(folders[0], "fewshot.json")
write_atomic(path, lambda file: file.write(json.dumps(results, indent=2).encode()))
print(f"written {path}")
