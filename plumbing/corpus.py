"""Text in files and on the Hugging Face hub, and corpora: text as token ids, made by data/prepare.py.

Preparation and evaluations read the same kinds of files by the same code.
"""
import contextlib
import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from plumbing.files import fail, read_json, reading, reason
from plumbing.tokenizer import load_tokenizer

# --------------------------------------------------------------------------------------------------
# Files

CSV = {"keep_default_na": False}  # a cell that says NA or null is text too
READERS = {  # suffix of a file -> reader of the library `datasets`, and the reader's options
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", CSV),
    ".tsv": ("csv", CSV | {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "document"}),  # a file is one document
    ".parquet": ("parquet", {}),
}

def suffix_of(path):
    """The suffix that says what is in a file: .jsonl for A.JSONL.GZ."""
    return Path(path.name.lower().removesuffix(".gz")).suffix

def list_files(path):
    """The files of text that a file, a folder or a glob pattern means, sorted. A folder may hold others."""
    matches = [Path(path)] if os.path.exists(path) else sorted(map(Path, glob.glob(path, recursive=True)))
    files = []
    for match in matches:
        if match.is_dir():
            inside = sorted(match.rglob("*"))
            files += [file for file in inside if suffix_of(file) in READERS and file.is_file()]
        elif suffix_of(match) in READERS:
            files.append(match)
    return files or fail(f"no file {path} ends in {' '.join(READERS)} (or these with .gz)")

def text_files(path):
    """The files of text behind `path`, by name: {"news": ["<path>/news.jsonl.gz"]}.

    A name is the path inside the folder, without suffix; the .txt files of a folder share the folder's name.
    """
    named = {}
    for file in list_files(path):
        inside = file.relative_to(path) if os.path.isdir(path) else Path(file.name)
        suffix = suffix_of(file)
        stem = inside.name[: inside.name.lower().rindex(suffix)]
        name = inside.parent if suffix == ".txt" else inside.parent / stem
        named.setdefault(Path(path).resolve().name if name == Path() else str(name), []).append(str(file))
    return named

def file_options(path):
    """What datasets.load_dataset needs to read a file."""
    reader, options = READERS[suffix_of(Path(path))]
    return {"path": reader, "data_files": glob.escape(str(path)), "split": "train", **options}

# --------------------------------------------------------------------------------------------------
# Rows of files and of datasets

@contextlib.contextmanager
def datasets_library(name):
    """The library `datasets`, for reading `name`. What it raises inside ends the program with one line."""
    import datasets  # here, because it takes two seconds
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    except Exception as error:  # each reader has exceptions of its own
        offline = "; is this machine online?" if isinstance(error, ConnectionError) else ""
        fail(f"cannot read {name}: {reason(error)}{offline}")

class Rows:
    """Rows of a file or dataset, streamed, as tuples of columns. name: for messages; where: for datasets."""

    def __init__(self, name, columns, *where, **options):
        self.name, self.columns, self.where, self.options = name, columns, where, options
        self.rows = None  # not open yet

    def read(self, state=None):
        """Yield rows, from the first or from where state() was. An empty .json file has none."""
        with (datasets_library(self.name) as datasets,
              TemporaryDirectory() as cache,  # local files leave lock files in it, and nothing else
              contextlib.suppress(StopIteration)):  # what datasets raises for an empty .json file
            self.rows = datasets.load_dataset(*self.where, streaming=True, cache_dir=cache, **self.options)
            if state:
                self.rows.load_state_dict(state)
            for row in self.rows:
                for column in self.columns:
                    if column not in row:
                        fail(f"{self.name} has no column {column!r}, but {', '.join(row)} (see --help)")
                yield tuple(row[column] for column in self.columns)

    def state(self):
        """Where the stream is, as plain values for JSON."""
        return self.rows.state_dict() if self.rows else None

def read_columns(name, columns, *where, **options):
    """All rows of a dataset: a list of tuples of the wanted columns."""
    rows = Rows(name, columns, *where, **options)
    return list(tqdm(rows.read(), f"reading {name}", unit=" rows", disable=None))

def read_files(paths, columns):
    """All rows of some files: a list of tuples of the wanted columns. The column of a .txt file is `text`."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported: local files need no hub
    return [row for path in paths for row in read_columns(path, columns, **file_options(path))]

# --------------------------------------------------------------------------------------------------
# Corpora

@dataclass
class Corpus:
    """A prepared corpus. train and val are flat arrays of token ids on disk; each document ends with eot."""

    name: str
    train: np.ndarray  # (tokens,) uint16, memory-mapped
    val: np.ndarray  # (tokens,) uint16, memory-mapped
    tokenizer: object  # see plumbing/tokenizer.py
    eot: int  # id of the end of text
    mask: int | None  # id that never occurs in the text; None: the tokenizer has none
    vocab_size: int  # ids that a model reserves, a multiple of 64
    token_bytes: list  # id -> its bytes, empty for special tokens
    hash: str  # of the token files and the tokenizer
    sources: dict  # name -> (first, last) of its tokens in val
    val_tokens_per_byte: float  # turns nats a token into nats a byte on the validation text

def load_corpus(folder):
    """Open a corpus. Sizes are always checked, hashes and ids below 1 GB; damage ends the program."""
    remedy = "prepare the corpus again with data/prepare.py"
    meta, tokenizer = read_json(os.path.join(folder, "meta.json"), remedy), load_tokenizer(folder)
    with reading(folder, remedy):
        if not tokenizer.n_vocab <= meta["vocab_size"] <= 65_536:
            raise ValueError(f"the tokenizer has {tokenizer.n_vocab} ids, meta.json {meta['vocab_size']}")
        train, val = (np.memmap(os.path.join(folder, name), "<u2", "r") for name in ("train.bin", "val.bin"))
        for split, tokens in (("train", train), ("val", val)):
            expected = meta["splits"][split]["tokens"]
            if len(tokens) != expected:
                raise ValueError(f"{split}.bin has {len(tokens):,} tokens, not the {expected:,} of meta.json")
            if tokens.nbytes < 1e9:
                if hashlib.sha256(tokens).hexdigest() != meta["sha256"][f"{split}.bin"]:
                    raise ValueError(f"{split}.bin does not match the sha256 in meta.json")
                if tokens.max() >= tokenizer.n_vocab:
                    raise ValueError(f"{split}.bin has ids that the tokenizer does not have")
        sources = {source["name"]: tuple(source["val_range"]) for source in meta["sources"]}
        per_byte = meta["splits"]["val"]["tokens"] / meta["splits"]["val"]["bytes"]
        return Corpus(meta["name"], train, val, tokenizer, tokenizer.eot, tokenizer.mask, meta["vocab_size"],
                      tokenizer.token_bytes, meta["corpus_hash"], sources, per_byte)
