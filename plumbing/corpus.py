"""Text in files and on the Hugging Face hub, and corpora: text as token ids, made by data/prepare.py."""
import contextlib
import glob
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from plumbing.files import fail, read_json, reading, reason
from plumbing.tokenizer import load_tokenizer

# --------------------------------------------------------------------------------------------------
# Text

CSV = {"keep_default_na": False}  # a cell that says NA or null is text too
READERS = {  # suffix of a file -> reader of the library `datasets`, and the reader's options
    ".json": ("json", {}), ".jsonl": ("json", {}), ".csv": ("csv", CSV), ".tsv": ("csv", CSV | {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "document"}), ".parquet": ("parquet", {})}  # a .txt file is one document

def suffix_of(path):
    """The suffix that says what is in a file: .jsonl for A.JSONL.GZ."""
    return Path(path.name.lower().removesuffix(".gz")).suffix

def list_files(path):
    """The files of text that a file, a folder or a glob pattern means, sorted. A folder may hold others."""
    matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    inside = [sorted(Path(match).rglob("*")) or [Path(match)] for match in matches]  # a file has none inside
    files = [file for files in inside for file in files if suffix_of(file) in READERS and file.is_file()]
    return files or fail(f"no file {path} ends in {' '.join(READERS)} (or these with .gz)")

def text_files(path):
    """The files of text behind `path`, by name: {"news": ["<path>/news.jsonl.gz"]}.

    A name is the path inside the folder, without suffix; the .txt files of a folder share the folder's name.
    """
    named = {}
    for file in list_files(path):
        inside = file.relative_to(path) if os.path.isdir(path) else Path(file.name)
        stem = re.sub(r"\.\w+(\.gz)?$", "", str(inside), flags=re.IGNORECASE)
        name = inside.parent if suffix_of(file) == ".txt" else Path(stem)
        named.setdefault(Path(path).resolve().name if name == Path() else str(name), []).append(str(file))
    return named

def file_options(path):
    """What datasets.load_dataset needs to read a file."""
    reader, options = READERS[suffix_of(Path(path))]
    return {"path": reader, "data_files": glob.escape(str(path)), "split": "train", **options}

@contextlib.contextmanager
def datasets_library(name):
    """The library `datasets`, for reading `name`. What it raises inside ends the program with one line."""
    import datasets  # here, because it takes two seconds
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or reading a local file would go online to report it
    try:
        yield datasets
    except Exception as error:  # each reader has exceptions of its own
        offline = "; is this machine online?" if isinstance(error, ConnectionError) else ""
        fail(f"cannot read {name}: {reason(error)}{offline}")

def stream(name, columns, *where, **options):
    """Yield rows of a file or dataset as tuples of columns. name: for messages; the rest: for `datasets`."""
    with (datasets_library(name) as datasets,
          TemporaryDirectory() as cache,  # local files leave lock files in it, and nothing else
          contextlib.suppress(StopIteration)):  # what datasets raises for an empty .json file
        for row in datasets.load_dataset(*where, streaming=True, cache_dir=cache, **options):
            if missing := [column for column in columns if column not in row]:
                fail(f"{name} has no column {missing[0]!r}, but {', '.join(row)} (see --help)")
            yield tuple(row[column] for column in columns)

def read_columns(name, columns, *where, **options):
    """All rows of a dataset: a list of tuples of the wanted columns."""
    rows = stream(name, columns, *where, **options)
    return list(tqdm(rows, f"reading {name}", unit=" rows", disable=None))

def read_files(paths, columns):
    """All rows of some files: a list of tuples of the wanted columns. The column of a .txt file is `text`."""
    return [row for path in paths for row in read_columns(path, columns, **file_options(path))]

# --------------------------------------------------------------------------------------------------
# Corpora

@dataclass
class Corpus:
    """A prepared corpus. train and val are flat arrays of token ids on disk; each document ends with eot."""
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
        return Corpus(train, val, tokenizer, tokenizer.eot, tokenizer.mask, meta["vocab_size"],
                      tokenizer.token_bytes, meta["corpus_hash"], sources, per_byte)
