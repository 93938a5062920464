"""
Turns text into a corpus on disk: data/NAME/ with train.bin, val.bin, tokenizer.tiktoken and meta.json.

$ python data/prepare.py docstrings                               # the default corpus: documentation of installed packages, no download
$ python data/prepare.py books --source=novels/,more.jsonl.gz     # your own .json, .jsonl, .txt (one document a file) and .parquet files
$ python data/prepare.py films --source='films/*.parquet' --column=review --tokenizer=data/books
$ python data/prepare.py fineweb --source=hf:HuggingFaceFW/fineweb-edu,sample-10BT,train,text --tokenizer=gpt2 --val_fraction=0.001
$ python data/prepare.py mixed --source=english=novels/ --source=danish=da.jsonl --weights=8,1 --max_tokens=100_000_000

train.bin and val.bin are flat little-endian uint16 token ids (2 bytes a token); every document ends with <|endoftext|>. The hash of its name
or text sends a document to train or val, so it stays there when others come and go. tokenizer.tiktoken holds the byte-pair ranks: rustbpe
trains them on training documents, or they are GPT-2's; tiktoken encodes. meta.json says the rest and is written last: without it a corpus
does not exist. Text streams through in batches, so a corpus may be larger than memory (but one document, or a .json file that is one long
list, may not), and only tokens reach the disk.

Sources follow one another; with --weights they are interleaved by document, the next one coming from the source that is furthest behind its
share of the training tokens. One that runs out leaves the mix, for no document is ever repeated. (In the sample that a vocabulary is trained
on a short source counts several times, up to its share.) In val.bin each source has a range of its own, which meta.json gives. What is done
is saved every half minute: after Ctrl-C, a lost connection or kill -9 the same command goes on from there, to the same bytes.
"""
import argparse
import ast
import base64
import errno
import gc
import glob
import hashlib
import inspect
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
import unicodedata
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken
from tqdm import tqdm

PACKAGES = "stdlib,torch,numpy,sympy,pandas,networkx,matplotlib"    # of the docstrings corpus; stdlib is the whole standard library
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}
READERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}    # file suffix -> reader of the datasets library
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"    # GPT-2's: pieces of text that BPE never joins
LONG_SPACE = re.compile(r"(\s{10000})")    # \s+(?!\S) overflows the stack of either regex engine on a million spaces, so they come in pieces
FILES = ("train.bin", "val.bin", "tokenizer.tiktoken", "meta.json")    # in the order in which they get their final names
SAMPLE = 64_000_000    # characters that a vocabulary is trained on, at most
BATCH = 4_000_000      # characters that are encoded at a time, unless one document has more
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)    # exit codes
SAVE = 30              # seconds from one saved state to the next
PACKED = 2.5           # bytes of text in a byte of a compressed file, roughly: for the time left on the progress bar


def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Documents of installed packages. Source is parsed, never imported: nothing runs, and the order is always the same.

def modules_of(package):
    """Lists (module name, path) of a package, or of the standard library for "stdlib", without test modules."""
    if package == "stdlib":
        folder = root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = PathFinder.find_spec(package)    # unlike importlib.util's, looks past frozen and built-in modules
        if spec is None or not (spec.origin or "").endswith(".py"):
            fail(f"no Python source of {package!r} is installed: pip install -r requirements.txt, or choose others with --packages=a,b")
        if not spec.submodule_search_locations:
            return [(package, Path(spec.origin))]
        folder = Path(spec.origin).parent
        root = folder.parent
    paths = {path: path.relative_to(root).with_suffix("").parts for path in folder.rglob("*.py")}
    return [(".".join(parts).removesuffix(".__init__"), path) for path, parts in paths.items()
            if not SKIPPED_FOLDERS.intersection(parts) and not parts[-1].startswith("test_")]


def last_name(node):
    """Returns `docs` for the expression `pandas.docs["merge"]` and `add_docstr` for `add_docstr(x, "...")`, "" where there is no name."""
    while isinstance(node, (ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "attr", getattr(node, "id", ""))


def documentation(node):
    """Yields the docstrings of a syntax tree in source order, also those of compiled code: the texts in add_docstr(...), __doc__ = ..."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield ast.get_docstring(node) or ""
    elif isinstance(node, (ast.Assign, ast.Expr)):
        names = map(last_name, [node.value, *getattr(node, "targets", ())])
        if any("doc" in name or name == "topics" for name in names):    # topics: the language reference, in pydoc_data
            for text in ast.walk(node.value):
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and "\n" in text.value:
                    yield inspect.cleandoc(text.value)
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            yield from documentation(child)


def read_module(path):
    """Returns the documentation in a source file, "" where there is none or the file is not for this version of Python."""
    try:
        text = "\n\n".join(filter(None, documentation(ast.parse(path.read_bytes()))))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    return text.encode("utf-8", "replace").decode()    # half a surrogate pair may stand in a literal but is no text


def unseen_prose(text, seen):
    """Yields the paragraphs of text that are no doctest (>>>) and, if longer than 80 characters, not yet in the set seen, which grows."""
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.lstrip().startswith(">>>") and (len(paragraph) <= 80 or paragraph not in seen):
            seen.add(paragraph)
            yield paragraph


def start_worker():
    """Sets up a process that reads modules. Ctrl-C is the parent's business, and a worker never outlives it, not even after kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    warnings.simplefilter("ignore")    # about escapes in other people's strings
    gc.disable()                       # syntax trees have no cycles; looking for some takes a third of the time


def read_packages(packages, workers):
    """
    Returns the documents [(module name, text)] of packages, one a module, sorted by name. Documentation is full of copies: a paragraph of
    more than 80 characters stays only where it comes first.
    """
    modules = sorted({module for package in packages for module in modules_of(package)})
    seen, documents = set(), []
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        texts = pool.map(read_module, [path for _, path in modules], chunksize=4)
        try:
            for (name, _), text in zip(modules, tqdm(texts, "reading", len(modules), unit=" modules", disable=None), strict=True):
                if text := "\n\n".join(unseen_prose(text, seen)):
                    documents.append((name, text))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)    # or leaving the `with` would first read all the rest
            raise
    return documents


# ----------------------------------------------------------------------------------------------------------------------
# Documents of files

def reader_of(path):
    """Returns the name of the datasets reader for a file, None for other suffixes."""
    return READERS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def files_of(item):
    """Lists the files behind one item of --source, sorted: a file, a glob pattern or a folder (other kinds of files in it are ignored)."""
    files = []
    for path in [Path(item)] if Path(item).exists() else sorted(map(Path, glob.glob(item, recursive=True))):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if reader_of(file) and file.is_file())
        elif reader_of(path):
            files.append(path)
        else:
            fail(f"{path}: unknown kind of file, not one of {' '.join(READERS)} (or these with .gz)")
    return files or fail(f"no file {' '.join(READERS)} (or these with .gz) matches --source={item}")


class Stream:
    """
    Documents (key, text) of one file or one Hugging Face dataset, streamed; a text is its own key. Blank ones are left out.
    read() starts anew, or from what state() gave earlier: where the stream is now, in plain values.
    """

    def __init__(self, name, column, reader, options, size=None):
        self.name, self.column, self.reader, self.options = name, column, reader, options    # the last two for datasets.load_dataset
        self.size = size    # bytes of text, roughly; None where that is not known

    def read(self, state=None):
        import datasets    # here, because it takes two seconds
        import huggingface_hub
        for library in (datasets, huggingface_hub):
            library.logging.set_verbosity(library.logging.CRITICAL)
        try:
            with TemporaryDirectory() as cache:    # it leaves a lock file in its cache for each file it opens
                self.rows = datasets.load_dataset(self.reader, streaming=True, cache_dir=cache, **self.options)
                if state:
                    self.rows.load_state_dict(state)
                for row in self.rows:
                    text = row.get(self.column)
                    if self.column not in row:
                        fail(f"{self.name}: no column {self.column!r}, but {', '.join(row)}: choose one with --column=NAME")
                    if not isinstance(text, str | None):
                        fail(f"{self.name}: column {self.column!r} holds {type(text).__name__}, not text: choose one with --column=NAME")
                    if text and not text.isspace():
                        yield text, text
        except StopIteration:    # says datasets of an empty .json file
            return
        except Exception as error:    # each reader has its own ways to complain
            hint = " (is this machine online, and is the name right?)" if isinstance(error, ConnectionError) else ""
            reason = " ".join(str(error).split()) or type(error).__name__
            fail(f"{self.name}: {'cannot be streamed' if self.size is None else f'not readable as {self.reader}'}: {reason}{hint}")

    def state(self):
        return self.rows.state_dict()


class Listed:
    """Documents (key, text) in memory, read like a Stream."""

    def __init__(self, documents):
        self.documents, self.size = documents, sum(len(text) for _, text in documents)

    def read(self, state=None):
        self.count = state or 0
        for document in self.documents[self.count :]:
            self.count += 1
            yield document

    def state(self):
        return self.count


class Source:
    """A named part of the corpus: its streams, its share of the mix (None: all of it, in its turn), and what has been done of it, as plain values."""

    def __init__(self, name, streams, weight=None):
        self.name, self.streams, self.weight = name, streams, weight
        none = {"documents": 0, "tokens": 0, "bytes": 0}
        self.done = {"position": [0, None], "taken": 0, "left_out": 0, "train": none.copy(), "val": none.copy()}


def source_of(item, column, weight):
    """Makes a Source of one --source=[NAME=]FILES or --source=[NAME=]hf:DATASET[,config][,split][,column]."""
    before, equals, after = item.partition("=")
    name, item = (before, after) if equals and before.isidentifier() else (None, item)
    if item.startswith("hf:"):
        dataset, config, split, own_column, *rest = (item[3:] + ",,,").split(",")
        if item.count(",") > 3 or not dataset:
            fail(f"--source={item} is not hf:DATASET[,config][,split][,column]")
        stream = Stream(f"hf:{dataset}", own_column or column, dataset, {"name": config or None, "split": split or "train"})
        return Source(name or Path(dataset).name, [stream], weight)
    streams, parts = [], [part for part in item.split(",") if part]
    for path in [path for part in parts for path in files_of(part)]:
        reader, packed = reader_of(path), path.name.lower().endswith((".gz", ".parquet"))
        options = {"split": "train", "data_files": glob.escape(str(path))} | ({"sample_by": "document"} if reader == "text" else {})
        streams.append(Stream(str(path), column, reader, options, path.stat().st_size * (PACKED if packed else 1)))
    return Source(name or ",".join(Path(part).name for part in parts), streams, weight)


def belongs_to_val(key, val_fraction):
    """Decides by the document's key alone, so that no other document can move it from one split to the other."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < val_fraction * 2**64


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

class Tokenizer(NamedTuple):
    ranks: dict             # bytes of a token -> its id
    pattern: str            # regular expression that cuts text into pieces, in tiktoken's dialect
    special_tokens: dict    # name -> id; the same characters in a document are ordinary text
    normalizer: str | None = None    # NFC: characters are composed first, as some tokenizers that export_hf.py brought do

    def described(self):
        """What JSON files say of it, beside the ranks."""
        return {"pattern": self.pattern, "special_tokens": self.special_tokens, "normalizer": self.normalizer}


def train_tokenizer(sources, vocab_size, val_fraction):
    """
    Trains byte-pair ranks on training documents from the head of each stream; the last two of vocab_size ids are special. Sources with
    weights get their shares of the sample: what is too short for its share counts several times.
    """
    weights = [source.weight or len(source.streams) for source in sources]
    samples = [[] for _ in sources]
    with tqdm(desc="vocabulary", total=sum(len(source.streams) for source in sources), unit=" files", disable=None) as progress:
        for source, weight, sample in zip(sources, weights, samples, strict=True):
            for stream in source.streams:
                left = int(SAMPLE * weight / sum(weights) / len(source.streams))
                for key, text in stream.read():
                    if left <= 0:
                        break
                    if not belongs_to_val(key, val_fraction):
                        sample += LONG_SPACE.split(text[:left])
                        left -= len(text)
                progress.update()
    need = [weight / max(sum(map(len, sample)), 1) for weight, sample in zip(weights, samples, strict=True)]
    times = [round(each / min(need)) if source.weight else 1 for each, source in zip(need, sources, strict=True)]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator((text for sample, n in zip(samples, times, strict=True) for text in sample * n), vocab_size - 2, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 2:
        fail(f"the training documents are too short for --vocab_size={vocab_size}: {len(ranks) + 2} at most, or take --tokenizer=DIR")
    return Tokenizer(ranks, PATTERN, {"<|endoftext|>": vocab_size - 2, "<|mask|>": vocab_size - 1})


def gpt2_tokenizer():
    """GPT-2's 50,257 ids, its <|endoftext|> the last, and <|mask|> after them. tiktoken downloads the ranks once, into a cache of its own."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:    # whatever the network, a proxy or a full disk makes of it
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" (Caused by ")[0]
        fail("--tokenizer=gpt2 is downloaded by tiktoken on its first use, which did not work; go online, set TIKTOKEN_CACHE_DIR to a folder that "
             f"has it, or train a vocabulary with --vocab_size=N ({reason})")
    end = gpt2.eot_token
    return Tokenizer(gpt2._mergeable_ranks, gpt2._pat_str, {"<|endoftext|>": end, "<|mask|>": end + 1})


def load_tokenizer(folder, described_in="meta.json"):
    """Reads the tokenizer of a prepared corpus, or of one in the making."""
    try:
        meta = json.loads((folder / described_in).read_text())
        lines = (folder / "tokenizer.tiktoken").read_bytes()
    except FileNotFoundError as error:
        fail(f"--tokenizer={folder} is not the folder of a prepared corpus: it has no {Path(error.filename).name}")
    except (ValueError, RecursionError) as error:
        fail(f"{folder / 'meta.json'} is damaged ({error}): prepare that corpus again")
    try:
        if hashlib.sha256(lines).hexdigest() != meta["sha256"]["tokenizer.tiktoken"]:
            fail(f"{folder / 'tokenizer.tiktoken'} is not the file that its meta.json describes: prepare that corpus again")
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines.splitlines())}
        special = meta["special_tokens"]
        if sorted([*ranks.values(), *special.values()]) != list(range(len(ranks) + len(special))) or meta.get("normalizer") not in (None, "NFC"):
            raise ValueError("its ids are not 0, 1, 2, ..., or its normalizer is not NFC")
        if not {"<|endoftext|>", "<|mask|>"} <= set(special) or not meta["pattern"]:
            raise ValueError("it lacks <|endoftext|>, <|mask|> or the pattern")
        tiktoken.Encoding("corpus", pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=special)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"{folder / 'meta.json'} does not describe a tokenizer ({error!r}): prepare that corpus again")
    return Tokenizer(ranks, meta["pattern"], meta["special_tokens"], meta.get("normalizer"))


# ----------------------------------------------------------------------------------------------------------------------
# The four files

def batches(streams, position):
    """
    Yields (position, documents): BATCH characters of documents or a little more, and where they begin, which is also what to start from:
    [number of the stream, state in it].
    """
    first, state = position
    batch, size = [], 0
    for number, stream in enumerate(streams[first:], first):
        for document in stream.read(state):
            batch.append(document)
            size += len(document[1])
            if size >= BATCH:
                yield position, batch
                position, batch, size = [number, stream.state()], [], 0
        state = None
    yield position, batch


def encoded(source, encode):
    """Yields the documents of a source as (key, text, ids), from where source.done says on, which moves along. encode: texts -> their ids."""
    done, skip = source.done, source.done["taken"]
    for position, batch in batches(source.streams, done["position"]):
        done["position"], ids = position, encode([text for _, text in batch])
        for done["taken"], ((key, text), row) in enumerate(zip(batch, ids, strict=True), 1):
            if done["taken"] > skip:
                yield key, text, row
        skip = 0


def shares(sources):
    tokens = sum(source.done["train"]["tokens"] for source in sources)
    return ", ".join(f"{source.name} {source.done['train']['tokens'] / max(tokens, 1):.1%}" for source in sources)


def write_tokens(folder, sources, tokenizer, args, save):
    """
    Encodes sources into train.bin and val.0.bin, val.1.bin, ..., one a source, from where source.done says on, and in the end joins
    those as val.bin. Calls save() every SAVE seconds, when what source.done counts is on the disk.
    """
    encoding = tiktoken.Encoding("corpus", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens={})
    end = np.array([tokenizer.special_tokens["<|endoftext|>"]])

    def encode(text):
        if tokenizer.normalizer:
            text = unicodedata.normalize(tokenizer.normalizer, text)
        # encode_to_numpy is much faster than the list of Python ints that encode_ordinary makes
        pieces = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in LONG_SPACE.split(text)]
        return np.concatenate([*pieces, end]).astype("<u2")

    def open_at(name, tokens):
        file = stack.enter_context(open(folder / name, "ab"))
        file.truncate(2 * tokens)    # what came after the last save is made again
        return file

    def total(field, split="train"):
        return sum(source.done[split][field] for source in sources)

    sizes, saved = [stream.size for source in sources for stream in source.streams], time.time()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(args.workers))
        train = open_at("train.bin", total("tokens"))
        val = [open_at(f"val.{number}.bin", source.done["val"]["tokens"]) for number, source in enumerate(sources)]
        progress = stack.enter_context(tqdm(desc="encoding", unit=" tokens", unit_scale=True, disable=None,
                                            initial=total("tokens") + total("tokens", "val")))
        live = {number: encoded(source, lambda texts: pool.map(encode, texts)) for number, source in enumerate(sources)}
        while live and total("tokens") < (args.max_tokens or np.inf):
            number = min(live, key=lambda number: sources[number].done["train"]["tokens"] / sources[number].weight) if args.weights else min(live)
            source = sources[number]
            key, text, ids = next(live[number], (None, None, None))
            if key is None:
                del live[number]
                if args.weights and live:
                    tqdm.write(f"{source.name} has run out and leaves the mix; of the training tokens so far: {shares(sources)}", file=sys.stderr)
                continue
            split, file = ("val", val[number]) if belongs_to_val(key, args.val_fraction) else ("train", train)
            if split == "val" and source.done["val"]["tokens"] >= args.val_tokens:
                source.done["left_out"] += 1    # of both: in train.bin it might be the copy of a document in val.bin
                continue
            ids.tofile(file)
            for field, count in {"documents": 1, "tokens": len(ids), "bytes": len(text.encode())}.items():
                source.done[split][field] += count
            now, ends = progress.n + len(ids), []
            if args.max_tokens:
                ends.append(args.max_tokens + total("tokens", "val"))    # validation tokens come on top
            if None not in sizes:
                ends.append(int(sum(sizes) / (total("bytes") + total("bytes", "val")) * now))
            progress.total = max(now, min(ends)) if ends else None
            progress.update(len(ids))
            if time.time() >= saved + SAVE:
                for file in (train, *val):
                    file.flush()
                    os.fsync(file.fileno())
                save()
                saved = time.time()
        for file in val:
            file.flush()
        with open(folder / "val.bin", "wb") as joined:
            for file in val:
                with open(file.name, "rb") as part:
                    shutil.copyfileobj(part, joined)


def write_meta(folder, sources, tokenizer, args, versions):
    """Writes meta.json, with the hashes of the other three files, and returns its content."""
    sha256, described, start = {}, [], 0
    for file in FILES[:3]:
        with open(folder / file, "rb") as content:
            sha256[file] = hashlib.file_digest(content, "sha256").hexdigest()
    for source in sources:
        train, val = source.done["train"], source.done["val"]
        described.append({"name": source.name, "documents": train["documents"] + val["documents"], "tokens": train["tokens"] + val["tokens"],
                          "train_tokens": train["tokens"], "val_range": [start, start + val["tokens"]], "val_bytes": val["bytes"],
                          "weight": source.weight, "left_out": source.done["left_out"]})
        start += val["tokens"]
    splits = {split: {field: sum(source.done[split][field] for source in sources) for field in ("documents", "tokens", "bytes")}
              for split in ("train", "val")}
    corpus_hash = hashlib.sha256("".join(sha256.values()).encode()).hexdigest()[:12]
    ids = len(tokenizer.ranks) + len(tokenizer.special_tokens)
    meta = {"format": 1, "name": args.name, "vocab_size": -(-ids // 64) * 64,    # rounded up: matrix products like multiples of 64
            **tokenizer.described(), "splits": splits, "sources": described,
            "val_fraction": args.val_fraction, "val_tokens": args.val_tokens, "max_tokens": args.max_tokens,
            "versions": versions, "sha256": sha256, "corpus_hash": corpus_hash}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def weights(text):
    numbers = [float(number) for number in text.split(",")]
    if not all(0 < number < float("inf") for number in numbers):
        raise ValueError
    return numbers


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail    # one line, without argparse's usage
    add = parser.add_argument
    add("name", metavar="NAME", help="docstrings, or a name for the corpus made of --source")
    add("--source", metavar="[NAME=]WHAT", action="append", default=[],
        help="files, folders or glob patterns, comma separated, or hf:DATASET[,config][,split][,column]: a Hugging Face dataset (or a local "
             "dataset folder), streamed, of which only tokens reach the disk; give it again for each further source")
    add("--weights", metavar="W,W,...", type=weights, help="share of each source in the training tokens, such as 8,1,1; interleaves them")
    add("--max_tokens", metavar="N", type=int, help="end after N training tokens (default: all there are)")
    add("--column", metavar="NAME", help="column that holds the text (default: text)")
    add("--packages", metavar="NAMES", help=f"packages or modules that docstrings reads (default: {PACKAGES})")
    add("--vocab_size", metavar="N", type=int, help="train a vocabulary of N ids on the corpus (default: 4096)")
    add("--tokenizer", metavar="DIR", help="take the vocabulary of the prepared corpus in DIR instead, or gpt2: 50,257 ids, downloaded once")
    add("--val_fraction", metavar="F", type=float, default=0.05, help="share of the documents for validation (default: 0.05)")
    add("--val_tokens", metavar="N", type=int, default=10_000_000,
        help="validation tokens of a source, at most (default: 10 million); further documents of that share are left out of both files")
    add("--data_dir", metavar="DIR", type=Path, default=Path(__file__).parent, help="parent of the folder NAME (default: this file's)")
    add("--workers", metavar="N", type=int, default=os.cpu_count(), help="processes or threads (default: one a core); changes no byte")
    args = parser.parse_args()
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        fail(f"NAME becomes a folder: letters, digits, _ . - only, not {args.name!r}")
    if args.name == "docstrings" and (args.source or args.column):
        fail("docstrings is made of installed packages: choose another NAME for --source and --column")
    if args.name != "docstrings" and args.packages:
        fail("--packages is for docstrings only")
    if args.name != "docstrings" and not args.source:
        fail(f"what is {args.name!r} made of? Give --source=PATHS, or prepare docstrings, which needs none")
    if args.weights and len(args.weights) != len(args.source):
        fail(f"--weights has {len(args.weights)} numbers for {len(args.source)} sources: give one for each --source")
    if args.max_tokens and len(args.source) > 1 and not args.weights:
        fail("--max_tokens with several sources needs --weights, or the first would take it all")
    if args.tokenizer and args.vocab_size is not None:
        fail("--tokenizer brings its own vocabulary: leave --vocab_size out")
    if args.vocab_size is not None and not 258 <= args.vocab_size <= 65_536:
        fail(f"--vocab_size={args.vocab_size} is not between 258 (bytes and special tokens) and 65536 (what uint16 holds)")
    if not 0 < args.val_fraction < 1:
        fail(f"--val_fraction={args.val_fraction} is not between 0 and 1")
    for setting in ("workers", "max_tokens", "val_tokens"):
        if (value := getattr(args, setting)) is not None and value < 1:
            fail(f"--{setting}={value} is less than 1")
    return args


@contextmanager
def locked(folder):
    """Keeps other processes out of a folder while the block runs, or until this process ends in whatever way."""
    try:
        import fcntl
    except ImportError:    # Windows has none
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        fail(f"another process is preparing {folder}: wait until it has ended")
    finally:
        os.close(opened)


def ranks_file(tokenizer):
    """The content of tokenizer.tiktoken."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tokenizer.ranks.items())


def saved_state(folder, command):
    """Returns the state that the same command saved in a folder and that its files bear out, else None."""
    try:
        state = json.loads((folder / "state.json").read_text())
        held = [(folder / "train.bin").stat().st_size, *((folder / f"val.{i}.bin").stat().st_size for i in range(len(state["done"])))]
        needed = [sum(done["train"]["tokens"] for done in state["done"]), *(done["val"]["tokens"] for done in state["done"])]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(path.is_symlink() for path in [folder, *folder.iterdir()]):    # we make none: what is written here is to stay here
        return None
    return state if state["command"] == command and all(size >= 2 * n for size, n in zip(held, needed, strict=True)) else None


def main(args):
    start, folder, partial = time.time(), args.data_dir / args.name, args.data_dir / args.name / "partial"
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)    # rustbpe's
    packages = (args.packages or PACKAGES).split(",") if args.name == "docstrings" else []
    tokenizer = gpt2_tokenizer() if args.tokenizer == "gpt2" else load_tokenizer(Path(args.tokenizer)) if args.tokenizer else None
    sources = [source_of(item, args.column or "text", weight)
               for item, weight in zip(args.source, args.weights or [None] * len(args.source), strict=True)]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        fail(f"two sources have one name ({', '.join(names)}): give names of your own, as in --source=danish=da.jsonl")
    if all(stream.size is not None or Path(stream.reader).exists() for source in sources for stream in source.streams):
        os.environ["HF_HUB_OFFLINE"] = "1"    # nothing of the hub's is asked for, so nothing of it is looked for
    versions = {"python": platform.python_version()}
    for package in ("numpy", "tiktoken", "rustbpe", "datasets", *packages):
        with suppress(PackageNotFoundError):    # the standard library's modules are of Python's own version
            versions[package] = version(package)

    # The command and all that its bytes depend on: what another one has begun is not continued.
    files = [[stream.name, *os.stat(stream.name)[6:9:2]] for source in sources for stream in source.streams if stream.size is not None]
    command = {key: value for key, value in vars(args).items() if key not in ("workers", "data_dir")} | {"versions": versions, "files": files}
    command = json.dumps([command, tokenizer and hashlib.sha256(ranks_file(tokenizer)).hexdigest()], default=str)

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            meta = prepare(args, folder, partial, sources, packages, tokenizer, versions, command)
        except BaseException as error:
            kept = (partial / "state.json").exists()
            stopped = isinstance(error, SystemExit) and error.code in STOPPED
            if kept or stopped:
                print(f"{'stopped, ' if stopped else ''}{'the same command goes on from here' if kept else 'the unfinished corpus is removed'}",
                      file=sys.stderr)
            raise
        finally:
            if not (partial / "state.json").exists():
                shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):    # goes only if empty
                folder.rmdir()
    documents, tokens, size = (sum(split[field] for split in meta["splits"].values()) for field in ("documents", "tokens", "bytes"))
    for source in meta["sources"]:
        if source["left_out"]:
            print(f"{source['name']}: {source['left_out']:,} documents are in neither file, for val.bin has {args.val_tokens:,} tokens of it: "
                  "a smaller --val_fraction leaves out fewer")
    if args.weights:
        print(f"shares of the training tokens: {shares(sources)}")
    print(f"{folder}: {documents:,} documents, {size / 1e6:.1f} MB of text, {tokens:,} tokens of {size / tokens:.2f} bytes "
          f"({meta['splits']['val']['tokens']:,} for validation), corpus {meta['corpus_hash']}, {time.time() - start:.0f} s")
    elsewhere = "" if args.data_dir.resolve() == Path(__file__).resolve().parent else f" --data_dir={shlex.quote(str(args.data_dir))}"
    print(f"next: python train.py config/train_11m.py --dataset={args.name}{elsewhere}")


def prepare(args, folder, partial, sources, packages, tokenizer, versions, command):
    """Makes the four files in the folder `partial`, moves them to their names in `folder`, and returns the content of meta.json."""
    state = saved_state(partial, command)
    if state is None:
        if partial.is_symlink():
            partial.unlink()
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(exist_ok=True)    # where nothing can be written, better to learn it before the work
    if packages:
        sources += [Source(args.name, [Listed(read_packages(packages, args.workers))])]
    for source in sources:
        if not any(True for stream in source.streams for _ in stream.read()):
            fail(f"there is no document with text in {source.name}")
    if state:
        tokenizer = load_tokenizer(partial, "state.json")
        for source, done in zip(sources, state["done"], strict=True):
            source.done = done
    else:
        tokenizer = tokenizer or train_tokenizer(sources, args.vocab_size or 4096, args.val_fraction)
        (partial / "tokenizer.tiktoken").write_bytes(ranks_file(tokenizer))
    if len(tokenizer.ranks) + len(tokenizer.special_tokens) > 65_536:
        fail(f"--tokenizer={args.tokenizer} has more than the 65536 ids that uint16 holds")
    state = {"command": command, "done": [source.done for source in sources], **tokenizer.described(),
             "sha256": {"tokenizer.tiktoken": hashlib.sha256(ranks_file(tokenizer)).hexdigest()}}

    def save():
        (partial / "state.tmp").write_text(json.dumps(state))
        os.replace(partial / "state.tmp", partial / "state.json")

    write_tokens(partial, sources, tokenizer, args, save)
    meta = write_meta(partial, sources, tokenizer, args, versions)
    for split, counts in meta["splits"].items():
        if not counts["documents"]:
            (partial / "state.json").unlink(missing_ok=True)    # to go on would not help
            fail(f"of {sum(source['documents'] for source in meta['sources'])} documents none fell to {split}: the hash sends a share of about "
                 f"{args.val_fraction} to val; give more documents (in .txt files, one a file) or another --val_fraction")
    (folder / "meta.json").unlink(missing_ok=True)    # from here to the last rename there is neither the old corpus nor the new
    (partial / "state.json").unlink(missing_ok=True)
    for name in FILES:
        os.replace(partial / name, folder / name)
    return meta


def stop(signum, frame):
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)    # once is enough: let it clean up
    print(file=sys.stderr)    # below the progress bar
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    args = arguments()
    try:
        main(args)
        sys.stdout.flush()
    except BrokenPipeError:    # the reader of what is printed went away (`| head`); a corpus that is there stands
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(not (args.data_dir / args.name / "meta.json").exists())
    except OSError as error:    # numpy's, of a full disk, has no number
        full = error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = ": free space on its disk, or choose another --data_dir" if full else ""
        fail(f"{error.filename or args.data_dir / args.name}: {error.strerror or error}{hint}")
    except BrokenProcessPool:
        fail("a process that read modules was killed, perhaps for lack of memory: try --workers=1")
