"""Universal NER: does a pretrained model learn to tag named entities better? (Mayhew et al. 2024)

    python eval_ner.py out/11m out/11m-vanilla --train=da_ddt --test=all
    python eval_ner.py out/11m config/ner_paper.py --uner_dir=folder/of/iob2/files --seeds=3 --mode=head

Each model is tuned on the training sets, head-only (a linear layer on frozen features) and in full, then
tested on every set, beside all O, and random weights in the first model's shape. A seed sets the head's
start, the order of the sentences and the choice of `shots`. A model's folder ner/ keeps results and tuned
heads: a new test set then needs new tuning in full mode only. Unlike in the paper (arxiv.org/abs/2311.09122)
a word is tagged at its last subword (`label_at`), where a causal model has read it, or in a second copy of
the text (`twice`).
"""
import copy
import json
import re
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Literal
from urllib.request import urlopen

from plumbing import figures, settings  # before torch: Ctrl-C prints no traceback from here on
from plumbing.files import ROOT, attempt, fail, read_json, write_atomic
from plumbing.settings import Count, Positive, Whole

import numpy as np
import pandas as pd
import torch
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2, Entities
from torch.optim import AdamW
from tqdm import tqdm

from model import Llama
from plumbing.checkpoint import load_models
from plumbing.machine import choose_device

SETS = dict(pair.split("=") for pair in """ceb_gja=Cebuano-GJA da_ddt=Danish-DDT de_pud=German-PUD
    en_ewt=English-EWT en_pud=English-PUD hr_set=Croatian-SET pt_bosque=Portuguese-Bosque
    pt_pud=Portuguese-PUD ru_pud=Russian-PUD sk_snk=Slovak-SNK sr_set=Serbian-SET sv_pud=Swedish-PUD
    sv_talbanken=Swedish-Talbanken tl_trg=Tagalog-TRG tl_ugnayan=Tagalog-Ugnayan zh_gsd=Chinese-GSD
    zh_gsdsimp=Chinese-GSDSIMP zh_pud=Chinese-PUD""".split())  # name: repository
TUNED = "da_ddt en_ewt hr_set pt_bosque sk_snk sr_set sv_talbanken zh_gsd zh_gsdsimp".split()  # not only test
TYPES = ("PER", "ORG", "LOC")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI"))
OUR_TAG = {tag: tag for tag in TAGS} | {"B-OTH": "O", "I-OTH": "O", "B-O": "O"}  # as in the published loader
Sentence = namedtuple("Sentence", "words tags text")  # tags: one of TAGS a word. text: as written, or ""
Row = namedtuple("Row", "ids at tags")  # tuples: end-of-text and tokens, columns that are tagged, their tags

@dataclass
class Config:
    train: str = "da_ddt"  # sets to tune on, together: one, several with commas between, or all
    test: str = "all"  # sets to test on, each by itself, with commas between; all takes every set at hand
    uner_dir: str = ""  # folder of <set>-ud-<split>.iob2; empty takes data/uner, and fetches what is missing
    shots: Whole = 0  # tune on this many sentences for each type of entity; 0 takes all. dev stays whole
    label_at: Literal["first", "last"] = "last"  # the subword of a word whose features are tagged
    twice: bool = False  # show each window twice and tag the second copy, which has read what follows
    length: Count = 128  # most tokens in a window; longer sentences are read in several
    mode: Literal["head", "full", "both"] = "both"  # head: the model is frozen
    lr: Positive = 1e-3  # of AdamW for the model, falling to zero over all epochs
    head_lr: Positive = 1e-2  # of AdamW for the head, in both modes
    batch_size: Count = 16  # windows in a step
    epochs: Count = 5  # at most, in full tuning
    head_epochs: Count = 20  # at most, head-only
    patience: Whole = 5  # stop this many epochs after the best F1 on dev, and keep the best; 0 keeps the last
    out: str = ""  # folder of the results; empty takes each model's own
    seeds: Whole = 0  # how often to tune: 0 takes 1, or 5 with shots
    step: int = -1  # of the checkpoints; -1 takes the newest
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute

RULES = [(lambda c: c.length > 1 + c.twice, "length must be at least 2, or 3 with twice=True")]

def read_iob2(path):
    """The sentences of a file that has a line for each word and a blank line after each sentence."""
    sentences = []
    remedy = "the line of a word holds index, word, tag, - and annotator, with tabs between"
    with attempt(f"read {path}", remedy):
        for block in re.split(r"\n *\n", Path(path).read_text("utf-8-sig")):
            rows = [line.split("\t") for line in block.split("\n") if line.strip(" ") and line[0] != "#"]
            if rows:
                _, words, tags, _, _ = map(list, zip(*rows, strict=True))
                text = "".join(re.findall("^# text =(.*)", block, re.MULTILINE)).strip()
                sentences.append(Sentence(words, [OUR_TAG[tag] for tag in tags], text))
    return sentences or fail(f"{path} holds no words; delete it and fetch it again")

def read_sets(config, wanted, known, splits):
    """{set: the sentences of each split} of the sets wanted, fetched if need be; "all" is those at hand."""
    folder, sets = Path(config.uner_dir or ROOT / "data/uner"), {}
    if not config.uner_dir:
        folder.mkdir(parents=True, exist_ok=True)
    known = {*known, *(path.name.split("-ud-")[0] for path in folder.glob(f"*-ud-{splits[0]}.iob2"))}
    for name in sorted(known) if wanted == "all" else wanted.split(","):
        paths = [folder / f"{name}-ud-{split}.iob2" for split in splits]
        for path in [path for path in paths if name in SETS and not (path.exists() or config.uner_dir)]:
            url = f"https://raw.githubusercontent.com/UniversalNER/UNER_{SETS[name]}/HEAD/{path.name}"
            remedy = f"put it into {folder} yourself, or take what is there: --uner_dir={folder}"
            with attempt(f"fetch {url}", remedy):
                write_atomic(path, urlopen(url, timeout=30).read())
        if all(path.exists() for path in paths):
            sets[name] = list(map(read_iob2, paths))
        elif wanted != "all":
            fail(f"{folder} has no {' and '.join(splits)} file of {name}; sets: {', '.join(sorted(known))}")
    return sets or fail(f"{folder} has no set's {' and '.join(splits)} file")

def load_sets(config):
    """Sentences to tune on, sentences to stop by, and {set: sentences} to test on."""
    tests = read_sets(config, config.test, SETS, ["test"])
    tuned = read_sets(config, config.train, TUNED, ["train", "dev"])
    print(f"tuning on {', '.join(tuned)}, testing on {', '.join(tests)}", file=sys.stderr)
    train, dev = (sum(parts, []) for parts in zip(*tuned.values(), strict=True))
    return train, dev, {name: sentences for name, [sentences] in tests.items()}

def few(sentences, shots, seed):
    """For each type of entity `shots` sentences with one, or all there are, drawn at random, none twice."""
    rng, chosen = np.random.default_rng([seed, shots]), []
    for kind in TYPES:
        holding = [i for i, s in enumerate(sentences) if f"B-{kind}" in s.tags and i not in chosen]
        chosen += rng.choice(holding, min(shots, len(holding)), replace=False).tolist()
    return [sentences[i] for i in chosen]

def pieces_of(tokenizer, sentence):
    """The tokens of each word, with a space before it unless the text has none there, as before commas."""
    pieces, at = [], 0
    for word in sentence.words:  # one by one, so that no token holds parts of two
        start = sentence.text.find(word, at)
        pieces.append(tokenizer.encode_ordinary(word if start == at > 0 else " " + word))
        at = start + len(word) if start >= 0 else at
    return pieces

def windows(sizes, room):
    """Spans (start, first, stop) of words of these sizes in tokens: start:stop shown, first:stop tagged."""
    ends, first = np.cumsum([0, *sizes]), 0
    while first < len(sizes):  # what precedes `first` is shown again, in up to half of the room
        start = np.searchsorted(ends, ends[first + 1] - max(room // 2, sizes[first]))
        stop = max(first + 1, np.searchsorted(ends, ends[start] + room, side="right") - 1)
        yield start, first, stop
        first = stop

def rows_of(tokenizer, sentences, config):
    """Rows of at most config.length tokens. Each word is tagged in one row; the words keep their order."""
    rows, copies, last = [], 1 + config.twice, config.label_at == "last"
    room = (config.length - 1) // copies
    for sentence in sentences:
        pieces = [piece[-room:] if last else piece[:room] for piece in pieces_of(tokenizer, sentence)]
        sizes = [len(piece) for piece in pieces]  # a word longer than `room` keeps the end that is tagged
        for start, first, stop in windows(sizes, room):
            shown = sum(pieces[start:stop], [])
            begin = 1 + (copies - 1) * len(shown) + np.cumsum([0] + sizes[start:stop])  # (words + 1,)
            at = (begin[1:] - 1 if last else begin[:-1])[first - start :].tolist()
            rows.append(Row((tokenizer.eot, *copies * shown), tuple(at), tuple(sentence.tags[first:stop])))
    return rows

def batches(rows, size, rng):
    """All rows in lists of `size`, otherwise shuffled: rows of about equal length stand together."""
    order = np.argsort([len(row.ids) * rng.uniform(0.8, 1.25) for row in rows], kind="stable")
    parts = np.split(order, range(size, len(order), size))
    for i in tqdm(rng.permutation(len(parts)), unit=" batches", leave=False, disable=None):
        yield [rows[j] for j in parts[i]]

def word_features(model, rows):
    """Features (words, C), float32, of the words that the rows tag."""
    idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    row, column = torch.tensor([(b, t) for b, row in enumerate(rows) for t in row.at]).T  # (words,) each
    return model.features(idx.to(next(model.parameters()).device))[row, column].float()

def frozen(model):
    """word_features of a model that does not change: those of a row are computed once."""
    known = {}

    @torch.no_grad()
    def read(rows):
        if new := [row for row in rows if row not in known]:
            known.update(zip(new, word_features(model, new).split([len(row.at) for row in new]), strict=True))
        return torch.cat([known[row] for row in rows])

    return read

def tune(config, read, backbone, d_model, train, dev, dev_sentences, seed):
    """Tune a linear head on features, read(rows) -> (words, d_model), and the parameters in `backbone`.

    Returns the head, its best F1 on dev, and the epoch of that.
    """
    rng, head = np.random.default_rng(seed), torch.nn.Linear(d_model, len(TAGS)).to(config.device)
    weight = torch.from_numpy(rng.normal(0, 0.02, head.weight.shape))
    head.load_state_dict({"weight": weight, "bias": torch.zeros(len(TAGS))})
    tuned, epochs = [*backbone, *head.parameters()], config.epochs if backbone else config.head_epochs
    optimizer = AdamW([{"params": backbone, "lr": config.lr}, {"params": head.parameters()}], config.head_lr)
    steps = epochs * -(-len(train) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best, best_epoch = -1.0, 0
    for epoch in range(1, epochs + 1):
        for rows in batches(train, config.batch_size, rng):
            labels = torch.tensor([TAGS.index(tag) for row in rows for tag in row.tags], device=config.device)
            loss = torch.nn.functional.cross_entropy(head(read(rows)), labels)  # mean over words
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned, 1.0)
            optimizer.step()
            schedule.step()
        f1 = score(dev_sentences, predict(read, head, dev, dev_sentences))["strict"]["f1"]
        if f1 >= best or not config.patience:
            best, best_epoch, kept = f1, epoch, torch.nn.utils.parameters_to_vector(tuned).detach()
        elif epoch - best_epoch >= config.patience:
            break
    torch.nn.utils.vector_to_parameters(kept, tuned)
    return head, best, best_epoch

@torch.no_grad()
def predict(read, head, rows, sentences):
    """The tags of each of the sentences that the rows were made of: one for each word."""
    tags = {}  # of each row
    for batch in batches(rows, 32, np.random.default_rng(0)):
        answers = head(read(batch)).argmax(-1).split([len(row.at) for row in batch])
        tags.update(zip(batch, answers, strict=True))
    parts = torch.cat([tags[row] for row in rows]).split([len(s.words) for s in sentences])
    return [[TAGS[tag] for tag in part.tolist()] for part in parts]

def score(sentences, tags):
    """seqeval's micro F1, precision, recall over entities and F1 by type: strict IOB2, and as conlleval."""
    gold, result = [s.tags for s in sentences], {}
    for scheme, mode in ("strict", "strict"), ("conlleval", None):
        report = classification_report(gold, tags, mode=mode, scheme=IOB2, zero_division=0, output_dict=True)
        micro = report["micro avg"]
        result[scheme] = {"f1": micro["f1-score"], "precision": micro["precision"], "recall": micro["recall"]}
        result[scheme] |= {kind: report.get(kind, {"f1-score": 0.0})["f1-score"] for kind in TYPES}
    pairs = zip(Entities(tags, IOB2).entities, Entities(gold, IOB2).entities, strict=True)
    result["sentences"] = [[len(set(guess) & set(true)), len(guess), len(true)] for guess, true in pairs]
    return result | {"entities": sum(true for _, _, true in result["sentences"])}

def resampled(results, n=1000):
    """Strict F1 (n,) of one set, mean over the results (seeds), in the same n bootstrap samples."""
    counts = np.array([result["sentences"] for result in results])  # (seeds, sentences, 3)
    S = counts.shape[1]
    times = np.random.default_rng(0).multinomial(S, np.full(S, 1 / S), n)  # (n, sentences)
    correct, predicted, true = np.einsum("ns,ksc->cnk", times, counts)  # (n, seeds) each
    return (2 * correct / np.maximum(predicted + true, 1)).mean(1)

def p_value(difference):
    """Two-sided p of no difference, from differences (n,) in paired samples (Efron and Tibshirani 1993)."""
    return min(1.0, 2 * (1 + min((difference <= 0).sum(), (difference >= 0).sum())) / (1 + len(difference)))

def digest(*values):
    return sha256(repr(values).encode()).hexdigest()[:12]

def evaluate(config, folder, label, loaded, data):
    """A model's results {mode: [{..., "sets": {set: score}} of each seed]}: in folder/ner, or made."""
    (train, dev, tests), tokenizer, model, results = data, loaded.tokenizer, loaded.model, {}
    folder, read_frozen = Path(config.out or folder) / "ner", frozen(model)
    folder.mkdir(parents=True, exist_ok=True)  # before the work: a folder that cannot be written ends it
    dev_rows = rows_of(tokenizer, dev, config)
    test_rows = {name: rows_of(tokenizer, sentences, config) for name, sentences in tests.items()}
    tuning = config.lr, config.head_lr, config.batch_size, config.epochs, config.head_epochs, config.patience
    weights = [torch.hash_tensor(weight.cpu()).item() for weight in model.state_dict().values()]
    modes = ["head", "full"] if config.mode == "both" else [config.mode]
    for mode, seed in product(modes, range(config.seeds or (5 if config.shots else 1))):
        rows = rows_of(tokenizer, few(train, config.shots, seed) if config.shots else train, config)
        key = digest(tuning, mode, seed, weights, rows, dev_rows)
        path = folder / f"{config.train.replace(',', '+')}-{mode}-{label}-seed{seed}-{key}.json"
        kept = read_json(path, "delete it and give the command again") if path.exists() else {"sets": {}}
        names = {f"{name} {digest(of_set)}": name for name, of_set in test_rows.items()}  # as they are kept
        if missing := names.keys() - kept["sets"]:
            read, backbone, d_model = read_frozen, [], model.config.d_model
            if mode == "full":  # too large to keep, and so tuned again for a new test set
                tuned = copy.deepcopy(model)
                read = partial(word_features, tuned)
                backbone = [p for p in tuned.parameters() if p is not tuned.unembedding.weight]
            if mode == "full" or "head" not in kept:
                head, kept["dev_f1"], kept["epoch"] = tune(
                    config, read, backbone, d_model, rows, dev_rows, dev, seed)
                kept["head"] = {name: p.tolist() for name, p in head.state_dict().items()}
            else:
                head = torch.nn.Linear(d_model, len(TAGS)).to(config.device)
                head.load_state_dict({name: torch.tensor(p) for name, p in kept["head"].items()})
            for kept_as, name in names.items():
                if kept_as in missing:
                    tags = predict(read, head, test_rows[name], tests[name])
                    kept["sets"][kept_as] = score(tests[name], tags)
            write_atomic(path, json.dumps(kept | {"settings": asdict(config)}))
        print(f"{path}: dev F1 {kept['dev_f1']:.3f}", file=sys.stderr)
        sets = {name: kept["sets"][kept_as] for kept_as, name in names.items()}
        results.setdefault(mode, []).append(kept | {"sets": sets})
    return results

def table(systems, tests):
    """A dict for each mode, test set and system, and for each difference of the first model, systems[1]."""
    rows, (_, first, *others), ends = [], systems, partial(np.quantile, q=[0.025, 0.975])
    for mode, (name, sentences) in product(systems[first], tests.items()):
        nothing = score(sentences, [["O"] * len(s.words) for s in sentences])
        cells = {"all O": [nothing]} | {
            system: [seed["sets"][name] for seed in of_mode[mode]] for system, of_mode in systems.items()}
        samples, f1 = {system: resampled(cell) for system, cell in cells.items()}, {}
        row = {"mode": mode, "set": name, "entities": nothing["entities"]}
        for system, cell in cells.items():
            scores = pd.json_normalize(cell, sep=" ").filter(like=" ")  # a row for each seed: strict f1, ...
            f1[system] = scores["strict f1"].mean()
            rows.append(row | {
                "system": system, "f1": f1[system], "interval": ends(samples[system]).tolist(),
                "deviation": scores["strict f1"].std() if len(cell) > 1 else None, **scores.mean()})
        for other in others:
            difference = samples[first] - samples[other]
            rows.append(row | {
                "system": f"{first} - {other}", "f1": f1[first] - f1[other], "deviation": None,
                "interval": ends(difference).tolist(), "p": p_value(difference)})
    return rows

def main(argv=None):
    config, paths = settings.load(Config, __doc__, RULES, argv)
    config.device = choose_device(config.device).type
    models = load_models(paths, config.step, config.device)
    first, data = models[paths[0]], load_sets(config)
    torch.manual_seed(0)
    untrained = first._replace(model=Llama(first.model.config).to(config.device))
    systems = {"random weights": evaluate(config, paths[0], "random", untrained, data)}
    systems |= {path: evaluate(config, path, f"step{loaded.step}", loaded, data)
                for path, loaded in models.items()}
    name = f"ner_{config.train.replace(',', '+')}_{config.mode}"
    rows, path = table(systems, data[2]), f"{config.out or paths[0]}/{name}"
    write_atomic(f"{path}.json", json.dumps({"settings": asdict(config), "table": rows}, indent=1))
    figures.save(figures.ner_heat_map(rows, f"Universal NER, tuned on {config.train}"), f"{path}.png")
    columns = "mode,set,entities,system,f1,deviation,interval,p,strict precision,strict recall,conlleval f1"
    shown = pd.DataFrame(rows, columns=[*columns.split(","), *(f"strict {kind}" for kind in TYPES)])
    shown["interval"] = shown["interval"].map("{0[0]:.3f} to {0[1]:.3f}".format)
    print(shown.to_string(index=False, na_rep="", float_format="{:.3f}".format))
    print("f1: strict IOB2, micro over entities; deviation: over seeds; interval: 95%, over sentences.\n"
          f"Where entities are few, a point or two is one entity or two.\nwritten {path}.json and .png")

if __name__ == "__main__":
    main()
