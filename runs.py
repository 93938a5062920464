"""Corpora and runs on disk: what the scripts share about files, and how they end when a file is not as it should be.

A corpus is a folder of four files written by data/prepare.py; a run is a folder `out/<run>/` written by train.py. Both are data: nothing read here is
ever executed, checkpoints are read with weights_only=True, and sizes and hashes are checked before use.
"""
import base64
import contextlib
import ctypes
import glob
import hashlib
import json
import math
import os
import pickle
import re
import sys
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from model import Llama, ModelConfig


def fail(message, code=2):
    """End the program with one line. Code 2: the user can mend it before anything starts; code 1: it happened while working."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is shown
    sys.exit(code)


def write_atomic(path, write):
    """Call `write(file)` on a file beside `path`, flush it to the disk, rename it into place: `path` is the old file or the new one, never half."""
    with open(path + ".tmp", "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def keep_freed_memory():
    """Have glibc keep what is freed: one arena, no mmap a tensor, no trimming. A fresh page of memory costs more than the arithmetic on it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # elsewhere than on Linux
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Corpora


@dataclass
class Corpus:
    """A prepared corpus. `train` and `val` are flat arrays of token ids on disk; each document ends with the id `eot`."""

    train: np.ndarray  # (tokens,) uint16, memory-mapped
    val: np.ndarray  # (tokens,) uint16, memory-mapped
    encoding: tiktoken.Encoding
    eot: int  # id of <|endoftext|>
    mask: int  # id of <|mask|>, which never occurs in the text
    vocab_size: int  # ids the model reserves, padded to a multiple of 64
    token_bytes: list  # id -> the bytes it stands for, none for special tokens
    meta: dict  # meta.json

    @property
    def val_tokens_per_byte(self):
        """Turns nats a token into nats a byte on the validation text."""
        return self.meta["splits"]["val"]["tokens"] / self.meta["splits"]["val"]["bytes"]


def read_json(path, repair="prepare or copy it again"):
    try:
        with open(path, encoding="utf8") as file:
            if isinstance(found := json.load(file), dict):
                return found
            raise ValueError("an object is expected")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        fail(f"{path} is not valid JSON ({error}): it is damaged; {repair}")


class Composing(tiktoken.Encoding):
    """Some tokenizers that export_hf.py brought compose characters (NFC), e and an accent into é, before they read a text."""

    def encode_ordinary(self, text):
        return super().encode_ordinary(unicodedata.normalize("NFC", text))


def load_tokenizer(folder):
    """The tiktoken.Encoding that tokenizer.tiktoken and meta.json of a corpus or a run folder describe; nothing is downloaded."""
    meta, path = read_json(os.path.join(folder, "meta.json")), os.path.join(folder, "tokenizer.tiktoken")
    try:
        with open(path, "rb") as file:  # by hand: tiktoken's own reader caches by path, so a rebuilt corpus would get the old vocabulary
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file)}
        kind = Composing if meta.get("normalizer") == "NFC" else tiktoken.Encoding
        return kind(meta["name"], pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=meta["special_tokens"])
    except (OSError, ValueError, KeyError) as error:
        fail(f"cannot read the tokenizer {path} ({error!r}); prepare the corpus again")


def decode(encoding, ids):
    """The text of a list of ids; ids that only pad the vocabulary stand for none."""
    return encoding.decode([i for i in ids if i < encoding.n_vocab])


def load_corpus(folder):
    """Read a corpus, checking it against its meta.json: sizes always, hashes of files below 1 GB. A mismatch ends the program."""
    meta, repair = read_json(os.path.join(folder, "meta.json")), "prepare it again with data/prepare.py"
    try:
        for name, sha256 in meta["sha256"].items():
            path = os.path.join(folder, os.path.basename(name))
            size = os.path.getsize(path)
            tokens = meta["splits"][name[:-4]]["tokens"] if name.endswith(".bin") else None
            if tokens is not None and size != 2 * tokens:
                fail(f"{path} holds {size // 2:,} tokens, but meta.json says {tokens:,}: it was cut short or mixed up; {repair}")
            if size < 1e9 and _sha256(path) != sha256:
                fail(f"{path} does not match the sha256 in meta.json: it was changed or damaged; {repair}")
        encoding = load_tokenizer(folder)
        train, val = (np.memmap(os.path.join(folder, f"{split}.bin"), dtype="<u2", mode="r") for split in ("train", "val"))
        eot, mask = (meta["special_tokens"][name] for name in ("<|endoftext|>", "<|mask|>"))
        special = set(meta["special_tokens"].values())
        token_bytes = [b"" if i in special else encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
        return Corpus(train, val, encoding, eot, mask, meta["vocab_size"], token_bytes, meta)
    except OSError as error:
        fail(f"cannot read the corpus {folder}: {error}; {repair}")
    except (KeyError, TypeError, AttributeError) as error:
        fail(f"{folder}/meta.json lacks what a corpus needs ({error!r}); {repair}")


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Runs


def checkpoints(out_dir):
    """The steps of the checkpoints in a run folder, ascending, each with its path: {600: "out/11m/ckpt_000600.pt", ...}."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    steps = {int(m[1]): os.path.join(out_dir, m[0]) for m in (re.fullmatch(r"ckpt_(\d{6,})\.pt", name) for name in names) if m}
    return dict(sorted(steps.items()))


def load_checkpoint(path, map_location="cpu"):
    """The dict of tensors and plain values that a checkpoint holds. Never runs code from the file; a damaged file ends the program."""
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        lacking = {"model", "head", "optimizer", "step", "progress", "config"} - set(checkpoint)
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        return checkpoint
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"cannot read the checkpoint {path} ({reason}): it is cut short, damaged or not a checkpoint; delete it to use the one before")


def load_model(out_dir, step=None, device="cpu"):
    """The model of a run at a step (None: the newest), in eval mode, with its tokenizer and the whole checkpoint.

    Returns (Llama, tiktoken.Encoding, dict). Ends the program with one line where the folder holds no such checkpoint.
    """
    found = checkpoints(out_dir)
    if not found:
        fail(f"{out_dir} holds no checkpoint (ckpt_*.pt); train one with train.py --out_dir={out_dir}")
    if step is not None and step not in found:
        fail(f"{out_dir} holds no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    checkpoint = load_checkpoint(found[max(found) if step is None else step], device)
    config = ModelConfig(**{field.name: checkpoint["config"][field.name] for field in fields(ModelConfig) if field.name in checkpoint["config"]})
    model = Llama(config).to(device)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        fail(f"the weights in {out_dir} do not fit the shape in their config: {str(error).splitlines()[-1].strip()}")
    return model.eval(), load_tokenizer(out_dir), checkpoint


def read_log(out_dir, up_to=math.inf):
    """The lines of log.jsonl as dicts, up to and including step `up_to`. A last line torn by a crash is left out; other damage ends the program."""
    path, lines = os.path.join(out_dir, "log.jsonl"), []
    if os.path.exists(path):
        with open(path, encoding="utf8", errors="replace") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                    if not (isinstance(line, dict) and type(line.get("step")) is int and "kind" in line):
                        raise ValueError
                    lines.append(line)
                except ValueError:
                    if text.endswith("\n"):
                        fail(f"{path}, line {number} is damaged: {text[:40]!r}; copy the log again, or delete the line")
    return [line for line in lines if line["step"] <= up_to]


def other_corpus(folder, path):
    """Why the corpus in the folder `path` is not that of a run; "" if it is. For a run that export_hf.py made, any corpus of its tokens will do."""
    run = read_json(os.path.join(folder, "meta.json"))
    parent, name = os.path.split(path)
    remedy = "name the parent of its corpus with --data_dir=" if run.get("corpus_hash") else \
             f"python data/prepare.py {name} --source=... --tokenizer={folder} --data_dir={parent} makes one"  # fmt: skip
    if not os.path.exists(os.path.join(path, "meta.json")):
        return f"there is no corpus {path}: {remedy}"
    corpus = read_json(os.path.join(path, "meta.json"))
    if run.get("corpus_hash"):
        one, other = run["corpus_hash"], corpus.get("corpus_hash")
        return "" if one == other else f"{folder} was trained on corpus {one}, but {path} is {other}: {remedy}"
    keys = ("pattern", "special_tokens", "normalizer")
    run, corpus = ([meta.get("sha256", {}).get("tokenizer.tiktoken"), *map(meta.get, keys)] for meta in (run, corpus))
    return "" if run == corpus else f"{path} has other tokens than {folder}: {remedy}"


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Text to evaluate on

READERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}  # suffix of a file -> reader of `datasets`


def text_files(folder):
    """The files of text in a folder, by name: {"news": ["<folder>/news.jsonl.gz"]}. A name is the path in the folder without its suffix.

    The .txt files of a folder hold one document each and go together, under the folder's name. A path of one file gives that file alone.
    """
    named = {}
    for path in sorted(Path(folder).rglob("*")) if os.path.isdir(folder) else [Path(folder)]:
        suffix = Path(path.name.removesuffix(".gz")).suffix
        if suffix in READERS and path.is_file():
            inside = path.relative_to(folder) if os.path.isdir(folder) else Path(path.name)
            whole = inside.parent if suffix == ".txt" else inside.parent / inside.name.removesuffix(".gz").removesuffix(suffix)
            named.setdefault(Path(folder).resolve().name if whole == Path() else str(whole), []).append(str(path))
    return named or fail(f"no text in {folder}: no file that ends in {', '.join(READERS)} (or these with .gz)")


@contextlib.contextmanager
def datasets_library(name):
    """The Hugging Face `datasets` module, for reading `name`: what it raises in the body ends the program with one line."""
    import datasets  # here, because it takes two seconds

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    except Exception as error:  # each reader has its own ways to complain
        if "gated" in str(error).lower():
            fail(f"{name} is gated: accept its conditions at https://huggingface.co/datasets/{name}, then log in: `hf auth login`, or set HF_TOKEN")
        fail(f"cannot read {name}: " + ("it is empty" if isinstance(error, StopIteration) else " ".join(str(error).split()) or type(error).__name__))


def read_columns(name, columns, *where, **options):
    """Rows of `columns`, as tuples, of the dataset that datasets.load_dataset(*where, **options) names, streamed; `name` is for messages."""
    rows = []
    with datasets_library(name) as datasets, TemporaryDirectory() as cache:  # files on the disk leave lock files in their cache, and no more
        for row in tqdm(datasets.load_dataset(*where, streaming=True, cache_dir=cache, **options), f"reading {name}", unit=" rows", disable=None):
            for column in columns:
                if column not in row:
                    fail(f"{name} has no column {column!r}, but {', '.join(map(repr, row))}: see --help for the setting that chooses one")
            rows.append(tuple(row[column] for column in columns))
    return rows


def read_files(paths, columns):
    """Rows of `columns`, as tuples, of files that `text_files` found; of a .txt file all is one text."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported: local files are nobody else's business
    rows = []
    for path in paths:
        reader = READERS[Path(path.removesuffix(".gz")).suffix]
        options = {"sample_by": "document"} if reader == "text" else {}
        rows += read_columns(path, columns, reader, data_files=glob.escape(path), split="train", **options)
    return rows
