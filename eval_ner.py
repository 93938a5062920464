"""Universal NER: does a pretrained backbone adapt better to named entities? (Mayhew et al. 2024, https://arxiv.org/abs/2311.09122)

    python eval_ner.py out/11m out/11m-vanilla --train=da_ddt --test=all
    python eval_ner.py out/11m config/ner_paper.py --uner_dir=folder/of/iob2/files --seeds=3 --mode=head

Each run is tuned to tag the words of the training sets, head-only (a linear layer on frozen features) and in full, and tested on every set found:
the sets that it was not tuned on are zero-shot transfer. Beside the runs stand all O, and the shape of the first run with random weights, tuned
alike. One seed is one head, one order of the sentences and, with `shots`, one draw of them. With `shots` the dev set stays whole: it only says when
to stop. What is finished is kept in `out/<run>/ner/`, so the same command goes on after an interruption.

Departures from the usual: a causal model has read a word only at its last subword, so that is where it is labelled (`label_at`), or in a second copy
of the sentence (`twice`). Tags other than PER, ORG and LOC count as O, as in the published loader.
"""
import copy
import difflib
import functools
import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2, Entities
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import configurator
from model import Llama
from runs import fail, load_model, read_json, write_atomic


@dataclass
class Config:
    # Data
    train: str = "da_ddt"  # sets to tune on, together: one, several with commas between, or all
    test: str = "all"  # sets to test on, each by itself, with commas between; all takes every set found
    uner_dir: str = ""  # folder of <set>-ud-<split>.iob2; empty takes data/uner, and fetches what is missing there
    uner_url: str = "https://raw.githubusercontent.com/UniversalNER"  # where that is fetched: a repository a set
    shots: int = 0  # tune on this many sentences for each type of entity; 0 takes all
    # Reading
    label_at: str = "last"  # the subword of a word whose features are tagged: first or last
    twice: bool = False  # show each window twice and tag the second copy: it has read what follows
    length: int = 128  # most tokens in a window; longer sentences are read in several
    # Tuning
    mode: str = "both"  # head (backbone frozen), full, or both
    lr: float = 1e-3  # of AdamW for the backbone, falling to zero over all epochs
    head_lr: float = 1e-2  # of AdamW for the head, in both modes
    batch_size: int = 16  # windows in a step
    epochs: int = 5  # at most, in full tuning
    head_epochs: int = 20  # at most, head-only
    patience: int = 5  # epochs that F1 on dev may stay below its best, whose weights are kept; 0 never stops and keeps the last
    seeds: int = 0  # how often to tune: 0 takes 1, or 5 with shots
    # Looking
    step: int = -1  # of the checkpoints; -1 takes the newest
    device: str = "auto"  # auto, cpu or cuda


def check(config):
    """End the program with one line that names the setting, if a value makes no sense."""
    least = {"length": 16, "shots": 0, "patience": 0, "seeds": 0, "step": -1}
    for name, value in asdict(config).items():
        if type(value) is int and value < least.get(name, 1):
            fail(f"{name} = {value}: {name} must be at least {least.get(name, 1)}")
        if type(value) is float and not 0 < value < 1:
            fail(f"{name} = {value}: {name} must lie between 0 and 1 (3e-5 is the paper's)")
    for name, words in {"mode": "head full both", "label_at": "first last", "device": "auto cpu cuda"}.items():
        if getattr(config, name) not in words.split():
            fail(f"{name} = {getattr(config, name)!r}: {name} is one of {', '.join(words.split())}")
    if config.device == "cuda" and not torch.cuda.is_available():
        fail("device = cuda, but torch finds no CUDA GPU here; take --device=cpu, or install a CUDA build of torch")
    for setting, known in {"train": TUNED, "test": SETS}.items():
        for name in names(getattr(config, setting), known):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                fail(f"--{setting}: {name!r} is no set to {setting} on; the nearest is {near}, and all are {', '.join(known)}")


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Data

SETS = {  # name -> its treebank, as the repository is called
    "ceb_gja": "Cebuano-GJA", "da_ddt": "Danish-DDT", "de_pud": "German-PUD", "en_ewt": "English-EWT", "en_pud": "English-PUD",
    "hr_set": "Croatian-SET", "pt_bosque": "Portuguese-Bosque", "pt_pud": "Portuguese-PUD", "ru_pud": "Russian-PUD", "sk_snk": "Slovak-SNK",
    "sr_set": "Serbian-SET", "sv_pud": "Swedish-PUD", "sv_talbanken": "Swedish-Talbanken", "tl_trg": "Tagalog-TRG", "tl_ugnayan": "Tagalog-Ugnayan",
    "zh_gsd": "Chinese-GSD", "zh_gsdsimp": "Chinese-GSDSIMP", "zh_pud": "Chinese-PUD",
}  # fmt: skip
TUNED = [name for name in SETS if not name.endswith("_pud") and name.split("_")[0] not in ("ceb", "tl")]  # the others are test sets only
TYPES = ("PER", "ORG", "LOC")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI"))


class Sentence(NamedTuple):
    words: list
    tags: list  # one of TAGS a word
    text: str  # as it was written, or "" where the file does not say


def names(setting, known):
    return list(known) if setting == "all" else list(dict.fromkeys(setting.split(",")))


def read_iob2(path):
    """The sentences of a file of tab-separated index, word, tag, "-", annotator; blank lines between sentences.

    Ends the program with file and line number where a line cannot be read. Tags that continue an entity without beginning one occur in the
    published files: they are reported, and left as they are. Strict scoring does not count them, conlleval does.
    """
    sentences, words, tags, text, loose = [], [], [], "", []
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate([*lines, b""], 1):
        try:
            line = line.decode("utf8").rstrip("\r")
        except UnicodeDecodeError as error:
            fail(f"{path}, line {number}: {error.reason} at byte {error.start}; the file must be UTF-8")
        columns = line.split("\t")
        if line.startswith("# text ="):
            text = line.removeprefix("# text =").strip()
        elif not line.strip(" "):
            if words:
                sentences.append(Sentence(words, tags, text))
            words, tags, text = [], [], ""
        elif not line.startswith("#"):
            if len(columns) != 5 or columns[0] != str(len(words) + 1) or not columns[1].strip():
                fail(f"{path}, line {number}: {line[:60]!r} should be 5 columns with tabs between, the index {len(words) + 1}, a word, its tag, ...")
            tag = "O" if columns[2] in ("B-OTH", "I-OTH", "B-O") else columns[2]  # as the published loader has it
            if tag not in TAGS:
                fail(f"{path}, line {number}: unknown tag {tag[:20]!r}; known are {', '.join(TAGS)} and OTH")
            if tag[0] == "I" and (not tags or tags[-1][1:] != tag[1:]):
                loose.append(f"{tag} on line {number}")
            words.append(columns[1])
            tags.append(tag)
    if not sentences:
        fail(f"{path}, line 1: the file holds no words; delete it and fetch it again")
    if loose:
        more = f" and {len(loose) - 6} more" if len(loose) > 6 else ""
        print(f"note: {path}: no B- before {', '.join(loose[:6])}{more}; left as they are", file=sys.stderr)
    return sentences


def find_files(config, wanted):
    """Paths {(set, split): path} of those wanted that are there, after those not there have been fetched, and one line on how to get the others."""
    folder = config.uner_dir or os.path.join(configurator.HERE, "data", "uner")
    paths = {(name, split): os.path.join(folder, f"{name}-ud-{split}.iob2") for name, split in wanted}
    absent, trouble = [key for key, path in paths.items() if not os.path.isfile(path)], ""
    for name, split in tqdm([] if config.uner_dir else absent, "fetching", unit=" files", leave=False, disable=None):
        url = f"{config.uner_url}/UNER_{SETS[name]}/HEAD/{name}-ud-{split}.iob2"
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "nanoMAML"})  # the host turns Python's own name away
            with urllib.request.urlopen(request, timeout=30) as reply:
                content = reply.read()
            os.makedirs(folder, exist_ok=True)
            write_atomic(paths[name, split], lambda file, content=content: file.write(content))
        except urllib.error.HTTPError as error:
            trouble = f" ({url}: {error})"
        except (OSError, ValueError, http.client.HTTPException) as error:
            trouble = f" ({url}: {getattr(error, 'reason', error)})"
            break  # no network: the others would not come either
    paths = {key: path for key, path in paths.items() if os.path.isfile(path)}
    return paths, f"download <set>-ud-<split>.iob2 from https://github.com/UniversalNER/<repository> and put it into {folder}{trouble}"


def halve(sentences):
    """Nine tenths to tune on and one to stop by, the same tenth of the same text everywhere."""
    tenth = [zlib.crc32(" ".join(s.words).encode()) % 10 == 0 for s in sentences]
    return tuple([s for s, out in zip(sentences, tenth, strict=True) if out == wanted] for wanted in (False, True))


def load_sets(config):
    """Sentences to tune on, sentences to stop by, and {set: sentences} to test on."""
    to_tune, to_test = names(config.train, TUNED), names(config.test, SETS)
    paths, remedy = find_files(config, [(n, split) for n in to_tune for split in ("train", "dev")] + [(n, "test") for n in to_test])
    have = {"train": [n for n in to_tune if (n, "train") in paths or (n, "dev") in paths], "test": [n for n in to_test if (n, "test") in paths]}
    for setting, asked in {"train": to_tune, "test": to_test}.items():
        missing = ", ".join(f"{name} (UNER_{SETS[name]})" for name in asked if name not in have[setting])
        if missing and (getattr(config, setting) != "all" or not have[setting]):
            fail(f"--{setting}={getattr(config, setting)}: no file for {missing}; {remedy}")
        if missing:
            print(f"note: left out for want of a file to {setting} on: {missing}; {remedy}", file=sys.stderr)
    train, dev = [], []
    for name in have["train"]:
        parts = [read_iob2(paths[name, split]) for split in ("train", "dev") if (name, split) in paths]
        if len(parts) == 1:
            print(f"note: {name} has only one of train and dev: tuning on that less a tenth, which serves as dev", file=sys.stderr)
            parts = halve(parts[0])
        train, dev = train + parts[0], dev + parts[1]
    for purpose, sentences in {"tune on": train, "stop by": dev}.items():
        if all(tag == "O" for s in sentences for tag in s.tags):
            fail(f"--train={config.train}: the sentences to {purpose} hold no entity; take more sets")
    return train, dev, {name: read_iob2(paths[name, "test"]) for name in have["test"]}


def few(sentences, shots, seed):
    """For each type of entity `shots` sentences that hold one, drawn at random, no sentence twice."""
    rng, chosen = np.random.default_rng([seed, shots]), []
    for kind in TYPES:
        holding = [i for i, s in enumerate(sentences) if f"B-{kind}" in s.tags and i not in chosen]
        if len(holding) < shots:
            fail(f"shots = {shots}: only {len(holding)} sentences left with {kind}; lower shots or take more sets")
        chosen += rng.choice(holding, shots, replace=False).tolist()
    return [sentences[i] for i in chosen]


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Alignment of words and subwords


@dataclass
class Rows:
    """Sentences as rows of token ids. The words of all rows, row after row, are those of all sentences, each just once and in their order."""

    ids: list  # per row: end-of-text, then tokens
    at: list  # per row: the columns where its words are read
    tags: list  # per row: their tags, as indices of TAGS


def pieces_of(encoding, sentence):
    """The tokens of each word, at least one. Words are encoded one by one, so that no token holds parts of two.

    A word has a space before it unless it follows the one before it without any in the text, as commas and Chinese words do.
    """
    pieces, at = [], 0
    for word in sentence.words:
        start = sentence.text.find(word, at)
        glued = start == at > 0
        at = start + len(word) if start >= 0 else at
        pieces.append(encoding.encode_ordinary(word if glued else " " + word))
    return pieces


def windows(sizes, room):
    """Spans (start, first, stop) of words, for words of so many tokens: start:stop are shown, at most `room` tokens, and first:stop tagged there.

    A sentence that fits is one window. Of a longer one each word is tagged in one window, behind up to half a window of what precedes it.
    """
    first = 0
    while first < len(sizes):
        start = stop = first
        used = sizes[first]
        while start > 0 and used + sizes[start - 1] <= max(room // 2, sizes[first]):
            start -= 1
            used += sizes[start]
        while stop + 1 < len(sizes) and used + sizes[stop + 1] <= room:
            stop += 1
            used += sizes[stop]
        yield start, first, stop + 1
        first = stop + 1


def rows_of(encoding, sentences, config):
    """Rows (see there) of at most config.length tokens."""
    rows, eot = Rows([], [], []), encoding.encode_single_token("<|endoftext|>")
    copies, last = 2 if config.twice else 1, config.label_at == "last"
    room = (config.length - 1) // copies
    for sentence in sentences:
        # a word that fills more than a window is shown by the end that is read
        pieces = [piece[-room:] if last else piece[:room] for piece in pieces_of(encoding, sentence)]
        for start, first, stop in windows([len(piece) for piece in pieces], room):
            shown = [token for piece in pieces[start:stop] for token in piece]
            ends = 1 + (copies - 1) * len(shown) + np.cumsum([0] + [len(piece) for piece in pieces[start:stop]])  # (words + 1,)
            rows.ids.append([eot] + copies * shown)
            rows.at.append((ends[1:] - 1 if last else ends[:-1])[first - start :].tolist())
            rows.tags.append([TAGS.index(tag) for tag in sentence.tags[first:stop]])
    return rows


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Features and tuning


def word_features(model, rows, which):
    """Features (words, C), float32, of the words in the rows numbered `which`."""
    device = next(model.parameters()).device
    idx = pad_sequence([torch.tensor(rows.ids[i]) for i in which], batch_first=True).to(device)  # (B, T): padding follows the text, unseen by it
    x = model.features(idx)  # (B, T, C)
    row = [b for b, i in enumerate(which) for _ in rows.at[i]]
    return x[row, [t for i in which for t in rows.at[i]]].float()


def frozen(model):
    """What word_features gives, for a model that does not change: the features of a set are computed once, when they are first asked for."""
    cache = {}  # id of the rows -> (the rows, which must live as long as their id; their features, a list of (words, C))

    @torch.no_grad()
    def read(rows, which):
        if id(rows) not in cache:
            cache[id(rows)] = rows, for_each_row(lambda some: word_features(model, rows, some), rows, "features")
        return torch.cat([cache[id(rows)][1][i] for i in which])

    return read


def for_each_row(f, rows, doing):
    """f(which) -> (words, ...) of all rows, computed in batches: a list of one tensor for each row."""
    found = [None] * len(rows.ids)
    for which in tqdm(batches(rows, 32), doing, unit=" batches", leave=False, disable=None):
        for i, x in zip(which, f(which).split([len(rows.at[i]) for i in which]), strict=True):
            found[i] = x
    return found


def batches(rows, size, rng=None):
    """All row numbers in lists of `size`, rows of like length together so that there is little padding; with `rng` in random order otherwise."""
    length = np.array([len(ids) for ids in rows.ids])
    order = np.argsort(length if rng is None else length * rng.uniform(0.8, 1.25, len(length)), kind="stable")
    parts = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    return parts if rng is None else [parts[i] for i in rng.permutation(len(parts))]


def tune(config, read, backbone, d_model, train, dev, gold, seed):
    """A linear head on read(rows, which) -> (words, d_model), tuned on the rows `train` together with the parameters `backbone`, if any.

    `gold` are the sentences of the rows `dev`. Returns the head, the best strict F1 on dev (or the last, with patience = 0) and its epoch.
    """
    rng, epochs = np.random.default_rng(seed), config.epochs if backbone else config.head_epochs
    head = torch.nn.Linear(d_model, len(TAGS)).to(config.device)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(rng.normal(0, 0.02, head.weight.shape)))
        head.bias.zero_()
    tuned = [*backbone, *head.parameters()]
    optimizer = torch.optim.AdamW([{"params": head.parameters(), "lr": config.head_lr}] + [{"params": backbone, "lr": config.lr}] * bool(backbone))
    steps = epochs * -(-len(train.ids) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best, best_epoch, kept = -1.0, 0, None
    with tqdm(total=steps, desc="tuning", unit=" steps", leave=False, disable=None) as bar:
        for epoch in range(1, epochs + 1):
            for which in batches(train, config.batch_size, rng):
                labels = torch.tensor([tag for i in which for tag in train.tags[i]], device=config.device)
                loss = F.cross_entropy(head(read(train, which)), labels)  # mean over the words, in nats
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(tuned, 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            f1 = score(gold, predict(read, head, dev, gold))["strict"]["f1"]
            bar.set_postfix(epoch=epoch, dev_f1=f"{f1:.3f}")
            if f1 >= best or not config.patience:
                best, best_epoch, kept = f1, epoch, [p.detach().clone() for p in tuned]
            if config.patience and epoch - best_epoch >= config.patience:
                break
    with torch.no_grad():
        for p, value in zip(tuned, kept, strict=True):
            p.copy_(value)
    return head, best, best_epoch


@torch.no_grad()
def predict(read, head, rows, sentences):
    """The tags of each of the sentences that the rows were made of: one a word."""
    found = for_each_row(lambda which: head(read(rows, which)).argmax(-1), rows, "tagging")
    flat = iter([TAGS[tag] for row in found for tag in row.tolist()])
    tagged = [[tag for _, tag in zip(sentence.words, flat, strict=False)] for sentence in sentences]
    assert [len(tags) for tags in tagged] == [len(s.words) for s in sentences] and next(flat, None) is None, "words and tags do not match in number"
    return tagged


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Scores


def spans(tags, strict):
    """The entities {(type, first word, word)} of a sentence, as seqeval has them: strict IOB2 (end exclusive), or conlleval's (end inclusive)."""
    return {e.to_tuple()[1:] for e in Entities([tags], IOB2).entities[0]} if strict else set(get_entities(tags))


def ratios(counts):
    """F1, precision and recall of counts (..., 3): entities found, predicted, true. 0 where nothing was predicted or is true, as in seqeval."""
    found, predicted, true = np.moveaxis(np.asarray(counts, float), -1, 0)
    return 2 * found / np.maximum(predicted + true, 1), found / np.maximum(predicted, 1), found / np.maximum(true, 1)


def score(sentences, tagged):
    """Micro F1, precision and recall over entities, and F1 per type, in both schemes; the strict counts of each sentence, for resampling."""
    result = {}
    for scheme in ("strict", "conlleval"):
        counts = np.zeros((len(sentences), len(TYPES), 3), int)  # found, predicted, true
        for i, (sentence, tags) in enumerate(zip(sentences, tagged, strict=True)):
            true, predicted = spans(sentence.tags, scheme == "strict"), spans(tags, scheme == "strict")
            for column, entities in enumerate((true & predicted, predicted, true)):
                for entity in entities:
                    counts[i, TYPES.index(entity[0]), column] += 1
        f1, precision, recall = (float(x) for x in ratios(counts.sum((0, 1))))
        result[scheme] = {"f1": f1, "precision": precision, "recall": recall} | dict(zip(TYPES, ratios(counts.sum(0))[0].tolist(), strict=True))
        if scheme == "strict":
            result["entities"], result["sentences"] = int(counts[..., 2].sum()), counts.sum(1).tolist()
    return result


def resampled(results, n=1000):
    """Strict F1, mean over `results` of one set (seeds), in each of n bootstrap samples of its sentences: (n,), the same samples at every call."""
    counts = np.array([result["sentences"] for result in results])  # (seeds, sentences, 3)
    times = np.random.default_rng(0).multinomial(counts.shape[1], np.full(counts.shape[1], 1 / counts.shape[1]), size=n)  # (n, sentences)
    return ratios(np.einsum("ns,ksc->nkc", times, counts))[0].mean(1)


def p_value(difference):
    """Two-sided p of no difference, from the differences (n,) in paired bootstrap samples (Efron and Tibshirani 1993)."""
    return min(1.0, 2 * (1 + min((difference <= 0).sum(), (difference >= 0).sum())) / (1 + len(difference)))


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Results


def digest(*parts):
    """Twelve hex digits that change when any part does."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.cpu().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return sha.hexdigest()[:12]


def evaluate(config, folder, label, model, encoding, data, modes, seeds):
    """Results of one model, {(mode, seed): {..., "sets": {name: score}}}: read from `folder`/ner where they are there, else made and kept there."""
    os.makedirs(os.path.join(folder, "ner"), exist_ok=True)  # first, for a folder that cannot be written should say so before the work
    train, dev, tests = data
    dev_rows, test_rows = rows_of(encoding, dev, config), {name: rows_of(encoding, sentences, config) for name, sentences in tests.items()}
    all_rows, frozen_read, results = None if config.shots else rows_of(encoding, train, config), frozen(model), {}
    weights = digest(*model.state_dict().values())
    settings = {name: value for name, value in asdict(config).items() if name in "lr head_lr batch_size epochs head_epochs patience".split()}
    for mode in modes:
        for seed in range(seeds):
            train_rows = all_rows or rows_of(encoding, few(train, config.shots, seed), config)
            key = digest(settings, mode, seed, weights, train_rows, dev_rows, test_rows, TAGS)
            path = os.path.join(folder, "ner", f"{config.train.replace(',', '+')}-{mode}-{label}-seed{seed}-{key}.json")
            if os.path.islink(os.path.dirname(path)):  # we make none: what is kept here is to stay here
                fail(f"{os.path.dirname(path)} is a link to another folder: delete it")
            if os.path.exists(path):
                results[mode, seed] = read_json(path, "delete it and give the command again")
                continue
            started, tuned = time.perf_counter(), model if mode == "head" else copy.deepcopy(model)
            read, backbone = frozen_read, []
            if mode == "full":
                tuned.unembedding.requires_grad_(False)  # it takes no part
                read, backbone = functools.partial(word_features, tuned), [p for p in tuned.parameters() if p.requires_grad]
            head, dev_f1, epoch = tune(config, read, backbone, model.config.d_model, train_rows, dev_rows, dev, seed)
            sets = {name: score(sentences, predict(read, head, test_rows[name], sentences)) for name, sentences in tests.items()}
            result = {"settings": asdict(config), "mode": mode, "seed": seed, "dev_f1": dev_f1, "epoch": epoch,
                      "seconds": round(time.perf_counter() - started, 1), "sets": sets}  # fmt: skip
            write_atomic(path, lambda file, result=result: file.write(json.dumps(result).encode()))
            print(f"{folder} {label}, {mode}, seed {seed}: dev F1 {dev_f1:.3f} after epoch {epoch}, {result['seconds']:.0f} s", file=sys.stderr)
            results[mode, seed] = result
    return results


def table(systems, modes, seeds, tests):
    """A list of dicts, one for each mode, test set and system, and for the differences of the first run to each other one.

    systems: {name: what `evaluate` gives}; the first is a baseline, the others are runs.
    """
    rows = []
    for mode in modes:
        for name, sentences in tests.items():
            nothing = score(sentences, [["O"] * len(s.words) for s in sentences])
            cells = {"all O": [nothing]}
            cells |= {system: [results[mode, seed]["sets"][name] for seed in range(seeds)] for system, results in systems.items()}
            samples = {system: resampled(cell) for system, cell in cells.items()}
            for system, cell in cells.items():
                f1 = np.array([result["strict"]["f1"] for result in cell])
                mean = {f"{scheme} {key}": float(np.mean([result[scheme][key] for result in cell])) for scheme in ("strict", "conlleval")
                        for key in nothing["strict"]}  # fmt: skip
                rows.append({"mode": mode, "set": name, "entities": nothing["entities"], "system": system, **mean, "f1": float(f1.mean()),
                             "deviation": float(f1.std(ddof=1)) if len(f1) > 1 else None,
                             "interval": np.quantile(samples[system], [0.025, 0.975]).tolist()})  # fmt: skip
            first, *others = list(systems)[1:]
            f1 = {row["system"]: row["f1"] for row in rows if (row["mode"], row["set"]) == (mode, name)}
            for other in others:
                difference = samples[first] - samples[other]
                rows.append({"mode": mode, "set": name, "entities": nothing["entities"], "system": f"{first} - {other}",
                             "f1": f1[first] - f1[other], "deviation": None, "interval": np.quantile(difference, [0.025, 0.975]).tolist(),
                             "p": p_value(difference)})  # fmt: skip
    return rows


def markdown(rows):
    """The rows of `table` as a Markdown table, in percent."""
    columns = ("strict precision", "strict recall", "conlleval f1", *(f"strict {kind}" for kind in TYPES))
    lines = ["| mode | test set | entities | system | F1 | 95% | P | R | conlleval F1 | PER | ORG | LOC |", "|---|---|--:|---|--:|--:|" + "--:|" * 6]
    for row in rows:
        f1 = f"{100 * row['f1']:.1f}" + (f" ± {100 * row['deviation']:.1f}" if row["deviation"] is not None else "")
        low, high = (f"{100 * x:.1f}" for x in row["interval"])
        rest = [f"p = {row['p']:.3f}"] + [""] * 5 if "p" in row else [f"{100 * row[column]:.1f}" for column in columns]
        mark = " ⚠" if row["entities"] < 200 else ""
        lines.append(f"| {' | '.join([row['mode'], row['set'] + mark, str(row['entities']), row['system'], f1, f'{low} to {high}', *rest])} |")
    notes = ["F1, P, R and the types are strict IOB2, micro over entities; 95% is over sentences drawn anew, ± over seeds."]
    if any(row["entities"] < 200 for row in rows):
        notes.append("⚠ fewer than 200 entities: a point or two of F1 is an entity or two, and no ground for a conclusion.")
    return "\n".join(lines + [""] + notes)


def draw(rows, path, title):
    """Heat map of strict F1: systems down, test sets across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "p" not in row and row["system"] != "all O"]
    systems, sets = (list(dict.fromkeys(keys)) for keys in zip(*((f"{r['system']}, {r['mode']}", r["set"]) for r in rows), strict=True))
    f1 = 100 * np.array([row["f1"] for row in sorted(rows, key=lambda r: systems.index(f"{r['system']}, {r['mode']}"))]).reshape(len(systems), -1)
    size = 3 + 0.08 * max(map(len, systems)) + 0.6 * len(sets), 2.5 + 0.4 * len(systems)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(f1, cmap="viridis", vmin=0, vmax=max(f1.max(), 1), aspect="auto")
    small = {row["set"] for row in rows if row["entities"] < 200}
    axes.set_xticks(range(len(sets)), [name + " *" * (name in small) for name in sets], rotation=45, ha="right")
    axes.set_yticks(range(len(systems)), systems)
    for (y, x), value in np.ndenumerate(f1):
        axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 * f1.max() else "white")
    axes.set_title(title + ("   (* fewer than 200 entities)" if small else ""), fontsize=10)
    figure.colorbar(image, label="strict F1, %")
    write_atomic(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------------------------------------


def main(argv):
    config, folders = configurator.load(Config, argv, __doc__)
    check(config)
    for folder in folders or [""]:
        if not os.path.isdir(folder):
            fail(f"{folder or 'nothing'} is not a run folder: python eval_ner.py out/<run> ...")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = [os.path.normpath(folder) for folder in dict.fromkeys(folders)]
    models = {folder: load_model(folder, None if config.step == -1 else config.step, config.device) for folder in folders}
    data, modes, seeds = load_sets(config), ["head", "full"] if config.mode == "both" else [config.mode], config.seeds or (5 if config.shots else 1)

    first, encoding, _ = models[folders[0]]
    torch.manual_seed(0)
    systems = {"random weights": evaluate(config, folders[0], "random", Llama(first.config).to(config.device), encoding, data, modes, seeds)}
    for folder, (model, encoding, checkpoint) in models.items():
        systems[folder] = evaluate(config, folder, f"step{checkpoint['step']}", model, encoding, data, modes, seeds)

    rows = table(systems, modes, seeds, data[2])
    print(markdown(rows))
    path = os.path.join(folders[0], f"ner_{config.train.replace(',', '+')}")
    write_atomic(f"{path}.json", lambda file: file.write(json.dumps({"settings": asdict(config), "table": rows}, indent=1).encode()))
    draw(rows, f"{path}.png", f"Universal NER, tuned on {config.train}")
    print(f"written {path}.json and .png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on with what is missing", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        fail(f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}; what is finished is kept")
