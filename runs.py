"""Corpora and runs on disk: what the scripts share about files, and how they end when a file is not as it should be.

A corpus is a folder of four files written by data/prepare.py; a run is a folder `out/<run>/` written by train.py. Both are data: nothing read here is
ever executed, checkpoints are read with weights_only=True, and sizes and hashes are checked before use.
"""
import atexit
import base64
import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import re
import sys
import unicodedata
import zipfile
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
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)  # a name from a file may hold whatever moves a terminal
    tqdm.write(f"error: {line}", file=sys.stderr)  # on a line of its own, whatever bar is shown
    sys.exit(code)


def stopped(kind, error, trace):
    """Ctrl-C ends a script with a word and no traceback. Files are written whole or not at all, so there is nothing to clear away."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    elif not issubclass(kind, BrokenPipeError):  # then there is nobody to tell
        sys.__excepthook__(kind, error, trace)


@atexit.register
def last_words():
    """What is printed last, or nowhere if its reader went away (`| head`): without this Python complains of it when all is done."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


sys.excepthook = stopped


def cannot_write(path, error):
    """End the program with what an OSError of writing means."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    space = ": free space on its disk (the oldest ckpt_*.pt are the largest files of a run)" if full else ""
    fail(f"cannot write {path} ({error.strerror or error}); what was saved before is untouched{space}, then give the command again", code=1)


def write_atomic(path, write):
    """Call `write(file)` on a file beside `path`, flush it to the disk, rename it into place: `path` is the old file or the new one, never half."""
    beside = f"{path}.{os.getpid()}.tmp"  # of this process alone: another may write the same file at the same time
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)  # what a killed process of this number left; or a link, which opening would follow to who knows where
        with open(beside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save turns an OSError into a RuntimeError of its own
        if not isinstance(reason, OSError):
            raise
        with contextlib.suppress(OSError):
            os.unlink(beside)
        cannot_write(path, reason)


held = {}  # folders that this process keeps others out of


def lock(folder):
    """Keep other processes that ask for this folder out of it until this one ends, in whatever way: kill -9 frees it too."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return
    folder = os.path.realpath(folder)
    if folder not in held:
        try:
            held[folder] = os.open(folder, os.O_RDONLY)
            fcntl.flock(held[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is at work on {folder}: wait until it has ended, or take another --out_dir")
        except PermissionError:
            fail(f"{folder} may not be read: change its permissions, or take another --out_dir")
        except OSError:  # a file system without locks
            pass


def open_file(path):
    """A file for reading bytes. Not a pipe or a device, on which reading might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return open(path, "rb")


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


def read_json(path, repair="make it or copy it again"):
    """The object in a JSON file; a damaged file ends the program."""
    try:
        with open_file(path) as file:
            found = json.loads(file.read().decode())
        if not isinstance(found, dict):
            raise ValueError("an object is expected")
        return found
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        fail(f"{path} is not valid JSON ({error}): it is damaged; {repair}")


UTF8 = set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # the bytes that a text may have


class Encoding(tiktoken.Encoding):
    """tiktoken's, with two differences in what is encoded. A million spaces, on which the regex engine's stack would overflow, go in pieces, as in
    data/prepare.py. And some tokenizers that export_hf.py brought compose characters, e and an accent into é, before they read a text."""

    normalizer = None  # or NFC

    def encode_ordinary(self, text):
        text, encode = unicodedata.normalize(self.normalizer, text) if self.normalizer else text, super().encode_ordinary
        return [token for piece in re.split(r"(\s{10000})", text) for token in encode(piece)]


def load_tokenizer(folder):
    """The tiktoken.Encoding that tokenizer.tiktoken and meta.json of a corpus or a run folder describe; nothing is downloaded."""
    meta, path = read_json(os.path.join(folder, "meta.json")), os.path.join(folder, "tokenizer.tiktoken")
    try:
        with open_file(path) as file:  # by hand: tiktoken's own reader caches by path, so a rebuilt corpus would get the old vocabulary
            content = file.read()
        if hashlib.sha256(content).hexdigest() != meta["sha256"]["tokenizer.tiktoken"]:
            raise ValueError("it does not match the sha256 in meta.json")
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
        special = meta["special_tokens"]
        # What tiktoken takes on trust, and dies of.
        if sorted([*ranks.values(), *special.values()]) != list(range(len(ranks) + len(special))):
            raise ValueError("its ids and those of the special tokens are not 0, 1, 2, ...")
        if not {"<|endoftext|>", "<|mask|>"} <= set(special) or not {bytes([byte]) for byte in UTF8} <= set(ranks) or not meta["pattern"]:
            raise ValueError("it lacks a byte, <|endoftext|>, <|mask|> or the pattern")
        encoding = Encoding(meta["name"], pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=special)
        encoding.normalizer = "NFC" if meta.get("normalizer") == "NFC" else None
        return encoding
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"cannot read the tokenizer {path} ({error!r}); prepare the corpus again with data/prepare.py, or copy the run again")


def decode(encoding, ids):
    """The text of a list of ids; ids that only pad the vocabulary stand for none."""
    return encoding.decode([i for i in ids if i < encoding.n_vocab])


def load_corpus(folder):
    """Read a corpus, checking it against its meta.json: sizes always, hashes of files below 1 GB. A mismatch ends the program."""
    meta, repair = read_json(os.path.join(folder, "meta.json")), "prepare it again with data/prepare.py"
    try:
        for split in ("train", "val"):
            path, tokens = os.path.join(folder, f"{split}.bin"), meta["splits"][split]["tokens"]
            size = os.path.getsize(path)
            if size != 2 * tokens:
                fail(f"{path} holds {size // 2:,} tokens, but meta.json says {tokens:,}: it was cut short or mixed up; {repair}")
            if size < 1e9 and _sha256(path) != meta["sha256"][f"{split}.bin"]:
                fail(f"{path} does not match the sha256 in meta.json: it was changed or damaged; {repair}")
        encoding = load_tokenizer(folder)
        train, val = (np.memmap(os.path.join(folder, f"{split}.bin"), dtype="<u2", mode="r") for split in ("train", "val"))
        eot, mask = (meta["special_tokens"][name] for name in ("<|endoftext|>", "<|mask|>"))
        special = set(meta["special_tokens"].values())
        token_bytes = [b"" if i in special else encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
        ranges = [source["val_range"] for source in meta["sources"] if type(source["name"]) is str]
        fit = encoding.n_vocab <= meta["vocab_size"] <= 65_536 and meta["splits"]["val"]["bytes"] > 0 and type(meta["corpus_hash"]) is str
        if not fit or type(meta["vocab_size"]) is not int or not all(0 <= first <= last <= len(val) for first, last in ranges) or \
                len(ranges) < len(meta["sources"]) or any(type(at) is not int for both in ranges for at in both):
            raise ValueError("its numbers do not fit each other")
        if any(tokens.nbytes < 1e9 and tokens.max() >= encoding.n_vocab for tokens in (train, val)):
            raise ValueError("the text has ids that the tokenizer does not have")
        return Corpus(train, val, encoding, eot, mask, meta["vocab_size"], token_bytes, meta)
    except OSError as error:
        fail(f"cannot read the corpus {folder}: {error}; {repair}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"{folder}/meta.json lacks what a corpus needs ({error!r}); {repair}")


def _sha256(path):
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Runs


def checkpoints(out_dir):
    """The steps of the checkpoints in a run folder, ascending, each with its path: {600: "out/11m/ckpt_000600.pt", ...}."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    steps = {int(m[1]): os.path.join(out_dir, m[0]) for m in (re.fullmatch(r"ckpt_(\d{6,})\.pt", name) for name in names) if m}
    return dict(sorted(steps.items()))


def load_checkpoint(path, map_location="cpu"):
    """The dict of tensors and plain values that a checkpoint holds. Never runs code from the file; a damaged file ends the program.

    torch.save writes a zip with a checksum of each record, but torch.load does not look at them: a flipped bit would pass for a weight. zipfile does.
    """
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            # torch stores and never compresses, so that a file cannot unpack to more than itself; nor has a record attributes, which make it a folder
            size = os.fstat(file.fileno()).st_size
            if sum(record.file_size for record in records) > size or any(r.compress_type or r.external_attr for r in records):
                raise ValueError("its records are not as torch.save writes them")
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
            file.seek(0)  # the same file: a run at work may have put another in its place
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        kinds = {"model": dict, "head": dict, "optimizer": dict, "step": int, "progress": dict, "config": dict}
        lacking = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        if sum(p.nbytes for p in [*checkpoint["model"].values(), *checkpoint["head"].values()]) > size:
            raise ValueError("it holds fewer numbers than its shapes say")
        return checkpoint
    except Exception as error:  # there are many ways to be damaged; none of them is a reason for more than a line
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
    try:
        if config.n_layers > len(checkpoint["model"]):
            raise ValueError(f"{config.n_layers} blocks")
        with torch.device("meta"):  # shapes without memory: a config may say anything
            expected = Llama(config).state_dict()
        for name in {**expected, **checkpoint["model"]}:
            if name not in expected or name not in checkpoint["model"] or expected[name].shape != checkpoint["model"][name].shape:
                raise ValueError(name)
        model = Llama(config).to(device)
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        fail(f"the weights in {out_dir} do not fit the shape in their config: {reason}")
    return model.eval(), load_tokenizer(out_dir), checkpoint


LOGGED = {"lm": {"lm_loss"}, "meta": {"meta_loss"}, "eval": {"val_loss", "val_bits_per_byte"}}  # kind of a line of numbers -> what each has


def read_log(out_dir, up_to=math.inf):
    """The lines of log.jsonl as dicts, up to and including step `up_to`. A last line torn by a crash is left out; other damage ends the program."""
    path, lines = os.path.join(out_dir, "log.jsonl"), []
    try:
        file = open_file(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        fail(f"cannot read {path} ({error.strerror}): copy the log again")
    with file:
        for number, data in enumerate(file, 1):
            text = data.decode(errors="replace")
            try:
                line = json.loads(text)
                if not (isinstance(line, dict) and type(line.get("step")) is int and LOGGED.get(line.get("kind"), set()) <= set(line)):
                    raise ValueError
                if any(type(value) not in (int, float) for key, value in line.items() if line["kind"] in LOGGED and key != "kind"):
                    raise ValueError
                if any({f"{key}_before", f"{key}_se"} - set(line) for key in ("val_query_acc", "heldout_query_acc") if key in line):
                    raise ValueError
                lines.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
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
