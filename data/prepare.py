"""Turn text into a corpus: data/NAME/ with train.bin, val.bin (uint16 token ids), tokenizer and meta.json.

    python data/prepare.py docstrings                             # the default corpus, without a download
    python data/prepare.py books --source=novels/,more.jsonl.gz   # json, jsonl, csv, tsv, txt, parquet
    python data/prepare.py films --source='films/*.parquet' --column=review --tokenizer=data/books
    python data/prepare.py bard --source=input.txt --paragraphs=True     # one file, cut at blank lines
    python data/prepare.py web --source=hf:HuggingFaceFW/fineweb-edu,sample-10BT --tokenizer=gpt2
    python data/prepare.py mixed --source=english=novels/ --source=danish=da.jsonl --weights=8,1

--source=[NAME=]PATHS takes files, folders and glob patterns; a .txt file is a document, elsewhere a row is
one. --source=[NAME=]hf:DATASET[,config][,split][,column] streams a dataset of the Hugging Face hub. Sources
follow one another. With --weights the next document comes from the source furthest behind its share of the
training tokens; none is repeated. The hash of a text (in docstrings, of its name) sends it to train or val.
After Ctrl-C or kill -9 the same command continues, to the same bytes: it reads (or downloads) the text from
the start, but encodes only what came after the last save, one every 30 seconds.
"""
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import distributions
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # plumbing, from any working directory

from plumbing import settings  # first: an old Python and Ctrl-C end in one line from here on

import numpy as np
import rustbpe
import tiktoken
from docstrings import read_packages
from tqdm import tqdm

from plumbing.corpus import file_rows, hub_rows, list_files, matches, stream
from plumbing.files import ROOT, attempt, fail, lock, read_json, sha256_of, write_atomic
from plumbing.settings import Count, Share, Whole
from plumbing.tokenizer import EOT, HUB_FILES, LONG_SPACE, MASK, HubTokenizer, Tokenizer, load_tokenizer

Vocabulary = Annotated[int, lambda n: 258 <= n <= 65_536, "258 (bytes, special tokens) to 65536 (uint16)"]

@dataclass
class Config:
    source: list[str] = field(default_factory=list)  # [NAME=]PATHS or [NAME=]hf:DATASET; may be given again
    weights: str = ""  # share of each source in the training tokens, as 8,1,1; interleaves them
    max_tokens: Whole = 0  # end after so many training tokens; 0 takes all there are
    column: str = "text"  # that holds the text
    paragraphs: bool = False  # cut texts at blank lines into documents, as for one input.txt
    packages: str = "stdlib,torch,numpy,sympy,pandas,networkx,matplotlib"  # that docstrings is made of
    vocab_size: Vocabulary = 4096  # ids of the vocabulary that is trained on the corpus
    tokenizer: str = ""  # instead of that: folder of a corpus, run or model; or gpt2, a download
    val_fraction: Share = 0.05  # share of the documents for validation
    val_tokens: Count = 10_000_000  # of a source, at most; further documents of that share are left out
    data_dir: str = str(ROOT / "data")  # parent of the folder NAME
    workers: Count = os.cpu_count() or 1  # processes or threads; changes no byte

def weights(config):
    """The weight of each source, or None."""
    if not config.weights:
        return [None] * len(config.source)
    return list(map(float, config.weights.split(",")))

RULES = [  # (what must hold, the sentence that says so); an error shows the settings that the sentence names
    (lambda c: re.fullmatch(r"((?=[\d.]*[1-9])\d*\.?\d+(,(?!$)|$))*", c.weights)
     and len(weights(c)) == len(c.source),
     "weights must be numbers above 0, one for each source, as 8,1,1"),
    (lambda c: not c.max_tokens or len(c.source) < 2 or c.weights,
     "max_tokens of several sources needs weights, or the first source would take all"),
]
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's cuts of a text
SPLITS, COUNTS = ("train", "val"), ("documents", "tokens", "bytes")
SAMPLE = 64_000_000  # characters that a vocabulary is trained on, at most
BATCH = 32  # documents that are encoded at a time
ONE_DOCUMENT = "a .txt file is one document, --paragraphs=True cuts it at blank lines"
SAVE = 30  # seconds from one saved state to the next

# --------------------------------------------------------------------------------------------------
# Sources

def documents_of(name, config, column, rows, *where):
    """Yield the documents (key, text) of a file or dataset. A text is its own key."""
    column = column or config.column
    for (text,) in stream([column], rows, name, *where):
        if not isinstance(text, str | None):
            fail(f"column {column!r} of {name} holds {type(text).__name__}, not text: see --column")
        for part in re.split(r"\n\s*\n", text or "") if config.paragraphs else [text or ""]:
            if part.strip():
                yield part, part

class Source:
    """A named part of the corpus: functions that yield documents (key, text), its weight, what is done."""

    def __init__(self, name, parts, weight=None):
        self.name, self.parts, self.weight = name, parts, weight
        self.done = {"train": dict.fromkeys(COUNTS, 0), "val": dict.fromkeys(COUNTS, 0), "left_out": 0}

    def encoded(self, tokenizer, workers):
        """Yield (key, text, ids) of the documents that are not done yet."""
        done = self.done["train"]["documents"] + self.done["val"]["documents"] + self.done["left_out"]
        documents = islice(chain.from_iterable(part() for part in self.parts), done, None)
        while batch := list(islice(documents, BATCH)):
            keys, texts = zip(*batch, strict=True)
            yield from zip(keys, texts, tokenizer.encode_ordinary_batch(texts, workers), strict=True)

def make_source(item, weight, config):
    """The Source that an item of --source means. A path may hold = and commas itself."""
    name, what = re.fullmatch(r"(?:(\w+)=)?(.*)", item, re.DOTALL).groups()
    name, what = (None, item) if matches(item) else (name, what)
    if what.startswith("hf:"):
        dataset, part, split, column = f"{what[3:]},,,".split(",")[:4]
        where = dataset, config, column, hub_rows, part or None, split or "train"
        paths, parts = [dataset], [partial(documents_of, *where)]
    else:
        paths = [what] if matches(what) else what.split(",")
        files = dict.fromkeys(str(file) for path in paths for file in list_files(path))
        parts = [partial(documents_of, file, config, "", file_rows) for file in files]
    return Source(name or ",".join(Path(path).name for path in paths), parts, weight)

def total(sources, split, count):
    return sum(source.done[split][count] for source in sources)

def belongs_to_val(key, val_fraction):
    """Decided by the document's key alone, so that no other document can move it to the other split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < val_fraction * 2**64

def interleave(sources, config, tokenizer):
    """Yield (source, key, text, ids): of the source furthest behind its share; without weights, the first."""
    live = {source: source.encoded(tokenizer, config.workers) for source in sources}
    while live and (not config.max_tokens or total(sources, "train", "tokens") < config.max_tokens):
        source = min(live, key=lambda source: source.done["train"]["tokens"] / (source.weight or math.inf))
        if document := next(live[source], None):
            yield source, *document
        else:
            del live[source]

def train_tokenizer(sources, config):
    """A Tokenizer, trained on training documents from the head of each part.

    Sources with weights get their shares of the sample: what is too short for its share counts several times.
    """
    shares, samples = [source.weight or len(source.parts) for source in sources], []
    for source, share in zip(sources, shares, strict=True):
        samples.append([])
        for part in tqdm(source.parts, f"sampling {source.name}", unit=" files", disable=None):
            left = int(SAMPLE * share / sum(shares) / len(source.parts))
            for key, text in part():
                if left <= 0:
                    break
                if not belongs_to_val(key, config.val_fraction):
                    samples[-1] += LONG_SPACE.split(text[:left])
                    left -= len(text)
    needs = [share / max(sum(map(len, sample)), 1) for share, sample in zip(shares, samples, strict=True)]
    texts = []
    for source, sample, need in zip(sources, samples, needs, strict=True):
        texts += sample * (round(need / min(needs)) if source.weight else 1)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), config.vocab_size - 2, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < config.vocab_size - 2:
        fail("the training documents are too short for "
             f"--vocab_size={config.vocab_size}: {len(ranks) + 2} at most ({ONE_DOCUMENT})")
    return Tokenizer(ranks, PATTERN, {EOT: len(ranks), MASK: len(ranks) + 1})

def open_tokenizer(folder):
    """The tokenizer in a folder, of a run the newest step's; or gpt2 with one id more, for a mask."""
    if folder == "gpt2":
        with attempt("fetch the vocabulary gpt2", "go online, or train one with --vocab_size=N"):
            gpt2 = tiktoken.get_encoding("gpt2")
        specials = {EOT: gpt2.eot_token, MASK: gpt2.eot_token + 1}
        return Tokenizer(gpt2._mergeable_ranks, gpt2._pat_str, specials)
    tokenizer = load_tokenizer(max(Path(folder).glob("step_*[0-9]"), default=folder))
    if tokenizer.n_vocab > 65_536:
        fail(f"--tokenizer={folder} has {tokenizer.n_vocab:,} ids, but uint16 holds 65,536")
    return tokenizer

# --------------------------------------------------------------------------------------------------
# Writing, so that an interrupted command can continue

def make_recipe(name, config, sources, tokenizer):
    """The command and what else the corpus's bytes depend on, as plain values."""
    packages = ["numpy", "tiktoken", "tokenizers", "rustbpe", "datasets"]
    packages += [] if config.source else config.packages.split(",")
    versions = {package.name: package.version for package in distributions() if package.name in packages}
    versions["python"] = sys.version.split()[0]  # which is also stdlib's version
    paths = [part.args[0] for source in sources for part in source.parts if file_rows in part.args]
    files = [[path, os.path.getsize(path), os.path.getmtime(path)] for path in paths]
    own = {key: setting for key, setting in asdict(config).items() if key not in ("workers", "data_dir")}
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.files.items()}
    recipe = {"name": name, "versions": versions, "files": files, "settings": own, "sha256": sha256}
    if not isinstance(tokenizer, HubTokenizer):
        recipe |= {"pattern": tokenizer.pattern, "special_tokens": tokenizer.special_tokens}
    return recipe

def write_tokens(work, sources, tokenizer, config, save):
    """Encode what is not done yet into train.bin and val.bin. Calls save() every SAVE seconds."""
    paths = [work / "train.bin", *(work / f"val.{i}.bin" for i in range(len(sources)))]
    files = [open(path, "ab") for path in paths]
    train, *val = files
    train.truncate(2 * total(sources, "train", "tokens"))  # what came after the last save is made again
    for source, file in zip(sources, val, strict=True):
        file.truncate(2 * source.done["val"]["tokens"])
    saved = time.time()
    bar = tqdm(None, "encoding", config.max_tokens or None, unit=" training tokens", unit_scale=True,
               initial=total(sources, "train", "tokens"), disable=None)
    for source, key, text, ids in interleave(sources, config, tokenizer):
        split = "val" if belongs_to_val(key, config.val_fraction) else "train"
        done, ids = source.done[split], [*ids, tokenizer.eot]
        if split == "val" and done["tokens"] >= config.val_tokens:
            source.done["left_out"] += 1  # nor does it go to train.bin: val.bin may hold the same text
            continue
        (train if split == "train" else val[sources.index(source)]).write(np.array(ids, "<u2").tobytes())
        for count, more in zip(COUNTS, (1, len(ids), len(text.encode())), strict=True):
            done[count] += more
        bar.update(len(ids) if split == "train" else 0)
        if time.time() >= saved + SAVE:
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            save()
            saved = time.time()
    bar.close()
    for file in files:
        file.close()
    (work / "val.bin").write_bytes(b"".join(path.read_bytes() for path in paths[1:]))

def make_meta(work, sources, tokenizer, recipe):
    """The content of meta.json."""
    of_sources, end = [], 0
    for source in sources:
        begin, end = end, end + source.done["val"]["tokens"]
        of_sources.append({"name": source.name, "weight": source.weight, **source.done,
                           "val_range": [begin, end]})
    sha256 = {name: sha256_of(work / name) for name in ("train.bin", "val.bin")} | recipe["sha256"]
    return recipe | {
        "splits": {split: {count: total(sources, split, count) for count in COUNTS} for split in SPLITS},
        "sources": of_sources, "sha256": sha256,
        "vocab_size": -(-tokenizer.n_vocab // 64) * 64,  # rounded up: matrix products like multiples of 64
        "corpus_hash": hashlib.sha256("".join(sha256.values()).encode()).hexdigest()[:12]}

def prepare(name, config, sources, tokenizer):
    """Make train.bin and val.bin in NAME/partial, and when they are whole a corpus of them in NAME."""
    folder = Path(config.data_dir, name)
    if (folder / "config.json").exists() and not (folder / "train.bin").exists():
        fail(f"{folder} holds a run or a model: take another NAME or --data_dir")
    work, state_file = folder / "partial", folder / "partial" / "state.json"
    work.mkdir(parents=True, exist_ok=True)
    lock(work)
    tokenizer = tokenizer or train_tokenizer(sources, config)
    recipe = make_recipe(name, config, sources, tokenizer)
    saved = read_json(state_file) if state_file.exists() else {}
    if saved.get("recipe") == recipe:
        for source, done in zip(sources, saved["done"], strict=True):
            source.done = done

    def save():
        write_atomic(state_file, json.dumps({"recipe": recipe, "done": [source.done for source in sources]}))
    save()  # before a token file changes: what an older state says of it holds no longer
    write_tokens(work, sources, tokenizer, config, save)
    for split in SPLITS:
        if not total(sources, split, "documents"):
            fail(f"no document went to {split}: give more ({ONE_DOCUMENT}), or another --val_fraction")
    meta = make_meta(work, sources, tokenizer, recipe)
    state_file.unlink()  # from here on there is nothing to resume
    for name in ("meta.json", "tokenizer.tiktoken", *HUB_FILES):  # until all is in place there is no corpus
        (folder / name).unlink(missing_ok=True)
    for name in ("train.bin", "val.bin"):
        os.replace(work / name, folder / name)
    for name, content in {**tokenizer.files, "meta.json": json.dumps(meta, indent=2) + "\n"}.items():
        write_atomic(folder / name, content)
    shutil.rmtree(work, ignore_errors=True)
    report(meta, folder)

def report(meta, folder):
    train, val = meta["splits"].values()
    documents, tokens, size = (train[count] + val[count] for count in COUNTS)
    for source in meta["sources"]:
        print(f"{source['name']}: {source['train']['tokens'] / train['tokens']:.1%} of the training tokens")
    print(f"{folder}: {documents:,} documents, {size / 1e6:.1f} MB of text, {tokens:,} tokens of "
          f"{size / tokens:.2f} bytes ({val['tokens']:,} for validation), corpus {meta['corpus_hash']}\n"
          f"next: python train.py config/train_11m.py --dataset={folder.name} --data_dir={folder.parent} "
          f"--out_dir=out/{folder.name}")

def main():
    config, words = settings.load(Config, __doc__, RULES)
    if len(words) != 1 or not re.fullmatch(r"\w[\w.-]*", words[0]):
        fail("give one NAME for the corpus and its folder, of letters, digits, _ . - (see --help)")
    if (words[0] == "docstrings") == bool(config.source):
        fail("docstrings is made of installed packages, any other NAME of --source=PATHS")
    os.environ["RAYON_NUM_THREADS"] = str(config.workers)  # rustbpe's
    tokenizer = open_tokenizer(config.tokenizer) if config.tokenizer else None
    sources = [make_source(*pair, config) for pair in zip(config.source, weights(config), strict=True)]
    if len({source.name for source in sources}) < len(sources):
        fail("two sources have one name: name them, as in --source=danish=da.jsonl")
    packages = partial(cache(read_packages), tuple(config.packages.split(",")), config.workers)
    prepare(words[0], config, sources or [Source(words[0], [packages])], tokenizer)

if __name__ == "__main__":
    main()
