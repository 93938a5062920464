"""Text in files and on the Hugging Face hub, and corpora: text as token ids, made by data/prepare.py."""
import contextlib
import glob
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile
from tqdm import tqdm

from plumbing.files import attempt, fail, read_json, reason
from plumbing.tokenizer import load_tokenizer

# --------------------------------------------------------------------------------------------------
# Text

def open_text(path):
    """A file of text, here or on the hub, perhaps with .gz, without its byte order mark."""
    return fsspec.open(path, "rt", encoding="utf-8-sig", compression="infer").open()

def json_rows(path, columns):
    """One JSON object per line, or one list of them. Columns that nobody asked for may hold anything."""
    with open_text(path) as file:
        first = file.read(100).lstrip()[:1]
        file.seek(0)
        if first == "[":
            return (yield from json.load(file))
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg}") from error

def csv_rows(path, columns, sep=","):
    """Every cell is a str, also 1, NA and null."""
    options = {"encoding": "utf-8-sig", "dtype": str, "keep_default_na": False}
    for table in pd.read_csv(path, sep=sep, chunksize=1000, **options):
        yield from table.to_dict("records")

def parquet_rows(path, columns):
    file = ParquetFile(path)
    for batch in file.iter_batches(columns=columns if set(columns) <= set(file.schema_arrow.names) else None):
        yield from batch.to_pylist()

READERS = {  # by suffix
    ".json": json_rows, ".jsonl": json_rows, ".csv": csv_rows, ".tsv": partial(csv_rows, sep="\t"),
    ".txt": lambda path, columns: [open_text(path).read()], ".parquet": parquet_rows}

def suffix_of(path):
    """The suffix that says what is in a file: .jsonl for A.JSONL.GZ."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix

def matches(path):
    """The files and folders that a path means, or a glob pattern."""
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))

def inside(path, above=()):
    """Yield the files in a folder, sorted, or a file itself. Links are followed, but not in a circle."""
    if path.is_dir() and (real := path.resolve()) not in above:
        for child in sorted(path.iterdir()):
            yield from inside(child, (*above, real))
    else:
        yield path

def list_files(path):
    """The text files at a path or glob pattern, each once. Hidden and other files are left out."""
    files, others = {}, []
    if not matches(path):
        fail(f"there is no file or folder {path}")
    for match in map(Path, matches(path)):
        for file in inside(match):
            hidden = any(part.startswith(".") for part in file.relative_to(match).parts)
            if hidden or suffix_of(file) not in READERS:
                others.append(file)
            elif file.is_file():
                files.setdefault(file.resolve(), file)
    if others and files:
        print(f"left out, hidden or no text: {others[0]}, {len(others)} in all", file=sys.stderr)
    return list(files.values()) or fail(f"no file {path} ends in {' '.join(READERS)} (or these with .gz)")

def text_files(path):
    """The files of text behind `path`, by name: {"news": ["<path>/news.jsonl.gz"]}.

    A name is the path inside the folder, without suffix; the .txt files of a folder are one, "news/*.txt".
    """
    named = {}
    for file in list_files(path):
        place = file.relative_to(path) if os.path.isdir(path) else Path(file.name)
        name = re.sub(r"\.\w+(\.gz)?$", "", str(place), flags=re.IGNORECASE)
        if suffix_of(file) == ".txt" and not os.path.isfile(path):
            name = str(place.parent / "*.txt")
        named.setdefault(name, []).append(str(file))
    return named

def file_rows(path, columns):
    """Yield a file's rows: dicts that have `columns` and perhaps others. A .txt file is one row, a str."""
    with attempt(f"read {path}", "mend it or leave it out"):
        yield from READERS[suffix_of(path)](path, columns)

@contextlib.contextmanager
def datasets_library(name):
    """The library `datasets`, for reading `name`. What it raises inside ends the program with one line."""
    import datasets  # here, because it takes two seconds

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or reading a local file would go online to report it
    try:
        yield datasets
    except Exception as error:  # each reader has exceptions of its own
        fail(f"cannot read {name}: {reason(error)}")

def hub_rows(name, part, split, columns):
    """Yield the rows of a dataset of the Hugging Face hub, as they are downloaded.

    json is read by our reader: theirs stops where a column, wanted or not, changes its type.
    """
    with datasets_library(name) as datasets:
        builder = datasets.load_dataset_builder(name, part)
        files = (builder.config.data_files or {}).get(split, [])
        if files and all(READERS.get(suffix_of(file)) is json_rows for file in files):
            for file in files:
                yield from json_rows(file, columns)
        else:
            yield from builder.as_streaming_dataset(split)

def without_surrogates(cell):
    """A cell with U+FFFD for each half of a surrogate pair, which UTF-8 cannot encode."""
    if not isinstance(cell, str):
        return cell
    return cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def stream(columns, reader, name, *where):
    """Yield the wanted columns of reader(name, *where, columns) as tuples; what a row lacks is None."""
    rows = (row if isinstance(row, dict) else {"text": row} for row in reader(name, *where, columns))
    head = list(islice(rows, 100))  # one row of json may lack a column, but not all of these
    present = dict.fromkeys(chain(*head))
    if present and (missing := [column for column in columns if column not in present]):
        fail(f"{name} has no column {missing[0]!r}, but {', '.join(present)} (see --help)")
    for row in chain(head, rows):
        yield tuple(without_surrogates(row.get(column)) for column in columns)

def read_columns(columns, reader, name, *where):
    """All rows as a list; see `stream`."""
    rows = stream(columns, reader, name, *where)
    return list(tqdm(rows, f"reading {name}", unit=" rows", disable=None))

def read_files(paths, columns):
    """All rows of some files: a list of tuples of the wanted columns. The column of a .txt file is `text`."""
    return [row for path in paths for row in read_columns(columns, file_rows, path)]

# --------------------------------------------------------------------------------------------------
# Corpora

@dataclass
class Corpus:
    """A prepared corpus. train and val are flat arrays of token ids on disk; each document ends with eot."""
    train: np.ndarray  # (tokens,) uint16, memory-mapped
    val: np.ndarray  # (tokens,) uint16, memory-mapped
    tokenizer: object  # see plumbing/tokenizer.py
    eot: int  # id between documents
    mask: int | None  # id that never occurs in the text; None: the tokenizer has none
    vocab_size: int  # ids that a model reserves, a multiple of 64
    token_bytes: list  # id -> its bytes, empty for special tokens
    hash: str  # of the token files and the tokenizer
    sources: dict  # name -> (first, last) of its tokens in val
    val_tokens_per_byte: float  # turns nats per token into nats per byte on the validation text

def load_corpus(folder):
    """Open a corpus. Sizes are always checked, hashes and ids below 1 GB; damage ends the program."""
    remedy = "prepare this corpus with data/prepare.py"
    meta, tokenizer = read_json(f"{folder}/meta.json", remedy), load_tokenizer(folder)
    with attempt(f"read {folder}", remedy):
        if not tokenizer.n_vocab <= meta["vocab_size"] <= 65_536:
            raise ValueError(f"the tokenizer has {tokenizer.n_vocab} ids, meta.json {meta['vocab_size']}")
        splits = []
        for name in ("train", "val"):
            tokens, counts = np.memmap(f"{folder}/{name}.bin", "<u2", "r"), meta["splits"][name]
            intact = len(tokens) == counts["tokens"]
            if intact and tokens.nbytes < 1e9:
                intact = hashlib.sha256(tokens).hexdigest() == meta["sha256"][f"{name}.bin"]
                intact = intact and tokens.max() < tokenizer.n_vocab
            if not intact:
                raise ValueError(f"{name}.bin is not the one that meta.json describes")
            splits.append(tokens)
        sources = {source["name"]: tuple(source["val_range"]) for source in meta["sources"]}
        val = meta["splits"]["val"]
        return Corpus(*splits, tokenizer, tokenizer.eot, tokenizer.mask, meta["vocab_size"],
                      tokenizer.token_bytes, meta["corpus_hash"], sources, val["tokens"] / val["bytes"])
