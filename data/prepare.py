"""Turn text into a corpus: data/NAME/ with train.bin, val.bin (uint16 token ids), tokenizer and meta.json.

    python data/prepare.py docstrings                             # the default corpus, without a download
    python data/prepare.py books --source=novels/,more.jsonl.gz   # json, jsonl, csv, tsv, txt, parquet
    python data/prepare.py films --source='films/*.parquet' --column=review --tokenizer=data/books
    python data/prepare.py web --source=hf:HuggingFaceFW/fineweb-edu,sample-10BT --tokenizer=gpt2
    python data/prepare.py mixed --source=english=novels/ --source=danish=da.jsonl --weights=8,1

--source=[NAME=]PATHS takes files, folders and glob patterns; a .txt file is a document, elsewhere a row is
one. --source=[NAME=]hf:DATASET[,config][,split][,column] streams a dataset of the Hugging Face hub. Sources
follow one another. With --weights the next document comes from the source furthest behind its share of the
training tokens; none is repeated. The hash of a text (in docstrings, of its name) sends it to train or val.
Only tokens reach the disk. After Ctrl-C or kill -9 the same command continues, to the same bytes.
"""
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # plumbing, from any working directory

import numpy as np
import rustbpe
import tiktoken
from docstrings import read_packages
from tqdm import tqdm

from plumbing import settings
from plumbing.corpus import Rows, file_options, list_files
from plumbing.files import ROOT, fail, lock, on_signals, read_json, reading, write_atomic
from plumbing.settings import Count, Share, Whole
from plumbing.tokenizer import EOT, LONG_SPACE, MASK, HubTokenizer, Tokenizer, load_tokenizer, ranks_file

@dataclass
class Config:
    source: list[str] = field(default_factory=list)  # [NAME=]PATHS or [NAME=]hf:DATASET; may be given again
    weights: str = ""  # share of each source in the training tokens, as 8,1,1; interleaves them
    max_tokens: Whole = 0  # end after so many training tokens; 0 takes all there are
    column: str = "text"  # that holds the text
    packages: str = "stdlib,torch,numpy,sympy,pandas,networkx,matplotlib"  # that docstrings is made of
    vocab_size: Count = 4096  # ids of the vocabulary that is trained on the corpus
    tokenizer: str = ""  # instead of that: folder of a corpus, run or model; or gpt2, a download
    val_fraction: Share = 0.05  # share of the documents for validation
    val_tokens: Count = 10_000_000  # of a source, at most; further documents of that share are left out
    data_dir: str = str(ROOT / "data")  # parent of the folder NAME
    workers: Count = os.cpu_count() or 1  # processes or threads; changes no byte

def weights(config):
    """The weight of each source, or None."""
    return list(map(float, config.weights.split(","))) if config.weights else [None] * len(config.source)

RULES = [  # (what must hold, the sentence that says so); an error shows the settings that the sentence names
    (lambda c: not c.weights or (re.fullmatch(r"\d*\.?\d+(,\d*\.?\d+)*", c.weights) and min(weights(c)) > 0
                                 and len(weights(c)) == len(c.source)),
     "weights must be numbers above 0, one for each source, as 8,1,1"),
    (lambda c: not c.max_tokens or len(c.source) < 2 or c.weights,
     "max_tokens of several sources needs weights, or the first source would take all"),
    (lambda c: 258 <= c.vocab_size <= 65_536,
     "vocab_size must lie between 258 (bytes and special tokens) and 65536 (what uint16 holds)"),
    (lambda c: not c.tokenizer or c.vocab_size == 4096, "tokenizer brings its own vocab_size"),
    (lambda c: 0 < c.val_fraction < 1, "val_fraction must be above 0 and below 1"),
]
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's cuts of a text
COUNTS = ("documents", "tokens", "bytes")
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
SAMPLE = 64_000_000  # characters that a vocabulary is trained on, at most
BATCH = 4_000_000  # characters that are encoded at a time, unless one document has more
SAVE = 30  # seconds from one saved state to the next

# --------------------------------------------------------------------------------------------------
# Sources

class Stream(Rows):
    """Documents (key, text) of one file or dataset; a text is its own key. Blank documents are left out."""

    def read(self, state=None):
        for (text,) in super().read(state):
            if not isinstance(text, str | None):
                fail(f"column {self.columns[0]!r} of {self.name} holds {type(text).__name__}, not text: "
                     "choose another with --column=")
            if text and not text.isspace():
                yield text, text

class Listed:
    """Documents (key, text) in memory, read like a Stream."""

    def __init__(self, documents):
        self.documents = documents

    def read(self, state=None):
        for i in range(state or 0, len(self.documents)):
            self.count = i + 1
            yield self.documents[i]

    def state(self):
        return self.count

class Source:
    """A named part of the corpus: its streams, its weight, and what is done of it, as values for JSON."""

    def __init__(self, name, streams, weight=None):
        self.name, self.streams, self.weight = name, streams, weight
        self.done = {"stream": 0, "state": None, "taken": 0,  # start of a batch, and documents done of it
                     "train": dict.fromkeys(COUNTS, 0), "val": dict.fromkeys(COUNTS, 0), "left_out": 0}

    def read(self):
        """Yield (key, text) of all streams, from where the batch begins."""
        state = self.done["state"]
        for number in range(self.done["stream"], len(self.streams)):
            self.stream = number
            yield from self.streams[number].read(state)
            state = None

    def encoded(self, encode_all):
        """Yield (key, text, ids) of the documents that are not done yet. encode_all: texts -> their ids."""
        done, documents = self.done, self.read()
        while batch := take(documents):
            batch = batch[done["taken"] :]
            ids = encode_all([text for _, text in batch])
            for (key, text), row in zip(batch, ids, strict=True):
                done["taken"] += 1
                yield key, text, row
            done |= {"stream": self.stream, "state": self.streams[self.stream].state(), "taken": 0}

def take(documents):
    """The next documents of an iterator: BATCH characters, or a little more."""
    batch, size = [], 0
    while size < BATCH and (document := next(documents, None)):
        batch.append(document)
        size += len(document[1])
    return batch

def make_source(item, column, weight):
    """The Source that an item of --source means."""
    name, what = re.fullmatch(r"(?:(\w+)=)?(.*)", item, re.DOTALL).groups()
    if what.startswith("hf:"):
        dataset, part, split, own_column = f"{what[3:]},,,".split(",")[:4]
        stream = Stream(dataset, [own_column or column], dataset, part or None, split=split or "train")
        return Source(name or Path(dataset).name, [stream], weight)
    paths = what.split(",")
    files = [file for path in paths for file in list_files(path)]
    streams = [Stream(str(file), [column], **file_options(file)) for file in files]
    return Source(name or ",".join(Path(path).name for path in paths), streams, weight)

def total(sources, split, count):
    return sum(source.done[split][count] for source in sources)

def belongs_to_val(key, val_fraction):
    """Decided by the document's key alone, so that no other document can move it to the other split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < val_fraction * 2**64

# --------------------------------------------------------------------------------------------------
# Tokenizer

def train_tokenizer(sources, vocab_size, val_fraction):
    """Train byte-pair ranks on training documents from the head of each stream; the last two ids are special.

    Sources with weights get their shares of the sample: what is too short for its share counts several times.
    """
    shares = [source.weight or len(source.streams) for source in sources]
    samples = [[] for _ in sources]
    for source, share, sample in zip(sources, shares, samples, strict=True):
        for stream in tqdm(source.streams, f"sampling {source.name}", unit=" files", disable=None):
            left = int(SAMPLE * share / sum(shares) / len(source.streams))
            for key, text in stream.read():
                if left <= 0:
                    break
                if not belongs_to_val(key, val_fraction):
                    sample += LONG_SPACE.split(text[:left])
                    left -= len(text)
    needs = [share / max(sum(map(len, sample)), 1) for share, sample in zip(shares, samples, strict=True)]
    texts = []
    for source, sample, need in zip(sources, samples, needs, strict=True):
        texts += sample * (round(need / min(needs)) if source.weight else 1)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 2, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 2:
        fail(f"the documents are too short for --vocab_size={vocab_size}: {len(ranks) + 2} at most")
    return Tokenizer(ranks, PATTERN, {EOT: vocab_size - 2, MASK: vocab_size - 1})

def open_tokenizer(folder):
    """The tokenizer in a folder; or gpt2: its 50,257 ids, the last of which ends a text, and a mask."""
    if folder != "gpt2":
        tokenizer = load_tokenizer(folder)
    else:
        with reading("the vocabulary gpt2", "go online, or train one with --vocab_size=N"):
            gpt2 = tiktoken.get_encoding("gpt2")
        specials = {EOT: gpt2.eot_token, MASK: gpt2.eot_token + 1}
        tokenizer = Tokenizer(gpt2._mergeable_ranks, gpt2._pat_str, specials)
    if tokenizer.n_vocab > 65_536:
        fail(f"--tokenizer={folder} has {tokenizer.n_vocab:,} ids, but uint16 holds 65,536")
    return tokenizer

def tokenizer_files(tokenizer, folder):
    """{name: content} of the files that load_tokenizer reads; folder: where a tokenizer.json came from."""
    if isinstance(tokenizer, HubTokenizer):
        return {name: Path(folder, name).read_bytes() for name in HUB_FILES if Path(folder, name).exists()}
    return {"tokenizer.tiktoken": ranks_file(tokenizer.ranks)}

# --------------------------------------------------------------------------------------------------
# Token files

def encode(tokenizer, text):
    """The ids of a text and of its end, as an array of little-endian uint16."""
    return np.array([*tokenizer.encode_ordinary(text), tokenizer.eot], "<u2")

def interleave(sources, config, encode_all):
    """Yield (source, key, text, ids), until the sources have run out or max_tokens are there."""
    live = {source: source.encoded(encode_all) for source in sources}
    while live and (not config.max_tokens or total(sources, "train", "tokens") < config.max_tokens):
        source = next(iter(live))
        if config.weights:
            source = min(live, key=lambda source: source.done["train"]["tokens"] / source.weight)
        document = next(live[source], None)
        if document:
            yield source, *document
        else:
            del live[source]

def write_tokens(partial, sources, tokenizer, config, save):
    """Encode what is not done yet into train.bin and val.bin. Calls save() every SAVE seconds."""
    begun, saved = total(sources, "train", "tokens"), time.time()
    paths = [partial / "train.bin", *(partial / f"val.{i}.bin" for i in range(len(sources)))]
    with (contextlib.ExitStack() as stack, ThreadPoolExecutor(config.workers) as pool,
          tqdm(None, "encoding", config.max_tokens or None, unit=" training tokens", unit_scale=True,
               initial=begun, disable=None) as bar):
        train, *val = [stack.enter_context(open(path, "ab")) for path in paths]
        documents = interleave(sources, config, lambda texts: pool.map(encode, repeat(tokenizer), texts))
        for source, key, text, ids in documents:
            split = "val" if belongs_to_val(key, config.val_fraction) else "train"
            done = source.done[split]
            if split == "val" and done["tokens"] >= config.val_tokens:
                source.done["left_out"] += 1  # of train.bin too: val.bin may hold a copy of it
                continue
            (train if split == "train" else val[sources.index(source)]).write(ids.tobytes())
            counts = dict(zip(COUNTS, (1, len(ids), len(text.encode())), strict=True))
            for count in COUNTS:
                done[count] += counts[count]
            bar.update(len(ids) if split == "train" else 0)
            if time.time() >= saved + SAVE:
                for file in (train, *val):
                    file.flush()
                    os.fsync(file.fileno())
                save()
                saved = time.time()
    with open(partial / "val.bin", "wb") as joined:
        for path in paths[1:]:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, joined)

def make_meta(partial, sources, tokenizer, asked):
    """The content of meta.json. In `partial` there is one already, which describes the tokenizer."""
    meta, sha256, of_sources, start = read_json(partial / "meta.json"), {}, [], 0
    for name in ("train.bin", "val.bin"):
        with open(partial / name, "rb") as file:
            sha256[name] = hashlib.file_digest(file, "sha256").hexdigest()
    sha256 |= meta["sha256"]
    for source in sources:
        counts = {key: source.done[key] for key in ("train", "val", "left_out")}
        end = start + counts["val"]["tokens"]
        of_sources.append({"name": source.name, "weight": source.weight, **counts, "val_range": [start, end]})
        start = end
    splits = {split: {count: total(sources, split, count) for count in COUNTS} for split in ("train", "val")}
    return meta | {
        "name": asked["name"], "splits": splits, "sources": of_sources, "settings": asked["settings"],
        "vocab_size": -(-tokenizer.n_vocab // 64) * 64,  # rounded up: matrix products like multiples of 64
        "versions": asked["versions"], "sha256": sha256,
        "corpus_hash": hashlib.sha256("".join(sha256.values()).encode()).hexdigest()[:12]}

# --------------------------------------------------------------------------------------------------
# Whole or not at all

def describe(name, config, sources, tokenizer):
    """The command and all that its bytes depend on, as plain values. tokenizer: None if it is to train."""
    versions = {"python": platform.python_version()}
    packages = [] if sources else config.packages.split(",")
    for package in ("numpy", "tiktoken", "tokenizers", "rustbpe", "datasets", *packages):
        with contextlib.suppress(PackageNotFoundError):  # stdlib is of Python's own version
            versions[package] = version(package)
    paths = [stream.name for source in sources for stream in source.streams if "data_files" in stream.options]
    files = [[path, os.path.getsize(path), os.path.getmtime(path)] for path in paths]
    content = tokenizer_files(tokenizer, config.tokenizer) if tokenizer else {}
    own = {key: setting for key, setting in asdict(config).items() if key not in ("workers", "data_dir")}
    return {"name": name, "versions": versions, "files": files, "settings": own,
            "tokenizer": [hashlib.sha256(file).hexdigest() for file in content.values()]}

def begin(partial, asked, config, sources, tokenizer):
    """Continue what the same command left there, or clear it and begin. Returns the tokenizer."""
    state = read_json(partial / "state.json") if (partial / "state.json").exists() else {}
    if state.get("asked") == asked:  # what came after its last save is made again
        for i, source in enumerate(sources):
            source.done = state["done"][i]
            os.truncate(partial / f"val.{i}.bin", 2 * source.done["val"]["tokens"])
        os.truncate(partial / "train.bin", 2 * total(sources, "train", "tokens"))
        return load_tokenizer(partial)
    for file in partial.glob("[!.]*"):  # all but the lock
        file.unlink()
    for source in sources:
        if not any(source.read()):
            fail(f"there is no document with text in {source.name}")
    tokenizer = tokenizer or train_tokenizer(sources, config.vocab_size, config.val_fraction)
    content = tokenizer_files(tokenizer, config.tokenizer)
    meta = {"sha256": {name: hashlib.sha256(file).hexdigest() for name, file in content.items()}}
    if not isinstance(tokenizer, HubTokenizer):
        meta |= {"pattern": tokenizer.pattern, "special_tokens": tokenizer.special_tokens}
    for name, file in {**content, "meta.json": json.dumps(meta)}.items():
        write_atomic(partial / name, file)
    return tokenizer

def prepare(folder, asked, config, sources, tokenizer):
    """Make the files in folder/partial, move them to the folder, and return the content of meta.json."""
    partial, state_file = folder / "partial", folder / "partial" / "state.json"
    tokenizer = begin(partial, asked, config, sources, tokenizer)
    state = {"asked": asked, "done": [source.done for source in sources]}
    write_tokens(partial, sources, tokenizer, config, lambda: write_atomic(state_file, json.dumps(state)))
    for split in ("train", "val"):
        if not total(sources, split, "documents"):
            state_file.unlink(missing_ok=True)  # to continue would not help
            fail(f"no document fell to {split}: give more (a .txt file is one), or another --val_fraction")
    meta = make_meta(partial, sources, tokenizer, asked)
    write_atomic(partial / "meta.json", json.dumps(meta, indent=2) + "\n")
    state_file.unlink(missing_ok=True)
    for name in ("meta.json", "tokenizer.tiktoken", *HUB_FILES):  # now there is no corpus, old or new
        (folder / name).unlink(missing_ok=True)
    for name in (*meta["sha256"], "meta.json"):
        os.replace(partial / name, folder / name)
    return meta

def report(meta, folder, seconds):
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    documents, tokens, size = (train[count] + val[count] for count in COUNTS)
    for source in meta["sources"]:
        print(f"{source['name']}: {source['train']['tokens'] / train['tokens']:.1%} of the training tokens; "
              f"{source['left_out']:,} documents are in no file, for val.bin takes --val_tokens of it")
    print(f"{folder}: {documents:,} documents, {size / 1e6:.1f} MB of text, {tokens:,} tokens of "
          f"{size / tokens:.2f} bytes ({val['tokens']:,} for validation), corpus {meta['corpus_hash']}, "
          f"{seconds:.0f} s\nnext: python train.py config/train_11m.py --dataset={folder.name} "
          f"--data_dir={folder.parent}")

def stop(number, frame):
    print("\nstopped", file=sys.stderr)  # below the progress bar
    sys.exit(128 + number)

def main():
    started = time.time()
    config, words = settings.load(Config, __doc__, RULES)
    if len(words) != 1 or not re.fullmatch(r"\w[\w.-]*", words[0]):
        fail("give one NAME for the corpus and its folder, of letters, digits, _ . - (see --help)")
    name, folder = words[0], Path(config.data_dir, words[0])
    if (name == "docstrings") == bool(config.source):
        fail("docstrings is made of installed packages, any other NAME of --source=PATHS")
    on_signals(stop)
    os.environ["RAYON_NUM_THREADS"] = str(config.workers)  # rustbpe's
    if not any("hf:" in item for item in config.source):
        os.environ["HF_HUB_OFFLINE"] = "1"  # local files need no hub
    if config.tokenizer:  # of a run the newest step's
        config.tokenizer = str(max(Path(config.tokenizer).glob("step_*[0-9]"), default=config.tokenizer))
    tokenizer = open_tokenizer(config.tokenizer) if config.tokenizer else None
    sources = list(map(make_source, config.source, repeat(config.column), weights(config)))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        fail(f"two sources have one name ({', '.join(names)}): name them, as in --source=danish=da.jsonl")
    asked = describe(name, config, sources, tokenizer)
    partial = folder / "partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock(partial)
    try:
        if name == "docstrings":
            documents = read_packages(config.packages.split(","), config.workers)
            sources = [Source(name, [Listed(documents)])]
        meta = prepare(folder, asked, config, sources, tokenizer)
    finally:
        if (partial / "state.json").exists():
            print("the same command continues from here", file=sys.stderr)
        else:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # goes only if it is empty
                folder.rmdir()
    report(meta, folder, time.time() - started)

if __name__ == "__main__":
    main()
