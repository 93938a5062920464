"""
Turns text into a corpus on disk: data/NAME/ with train.bin, val.bin, tokenizer.tiktoken and meta.json.

$ python data/prepare.py docstrings                               # the default corpus: documentation of installed packages, no download
$ python data/prepare.py books --source=novels/,more.jsonl.gz     # your own .json, .jsonl, .txt (one document a file) and .parquet files
$ python data/prepare.py films --source='films/*.parquet' --column=review --tokenizer=data/books

train.bin and val.bin are flat little-endian uint16 token ids; every document ends with <|endoftext|>. The hash of its name or text sends
a document to train or val, so it stays there when others come and go. tokenizer.tiktoken holds the byte-pair ranks: rustbpe trains them on
training documents, tiktoken encodes. meta.json says the rest and is written last: without it a corpus does not exist. Text streams through
in batches, so a corpus may be larger than memory (but one document, or a .json file that is one long list, may not).
"""
import argparse
import ast
import base64
import gc
import glob
import hashlib
import inspect
import json
import os
import platform
import re
import shlex
import signal
import sys
import sysconfig
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
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
FILES = ("train.bin", "val.bin", "tokenizer.tiktoken", "meta.json")    # in the order in which they get their final names
SAMPLE = 64_000_000    # characters that a vocabulary is trained on, at most
BATCH = 4_000_000      # characters that are encoded at a time, unless one document has more


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


class FileDocuments:
    """Iterates over the documents (key, text) of one file, streamed anew each time; a text is its own key. Blank ones are left out."""

    def __init__(self, path, column):
        self.path, self.column = path, column

    def __iter__(self):
        os.environ["HF_HUB_OFFLINE"] = "1"    # read at the import, which stands here because it takes two seconds
        import datasets
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        reader = reader_of(self.path)
        options = {"sample_by": "document"} if reader == "text" else {}
        try:
            with TemporaryDirectory() as cache:    # it leaves a lock file in its cache for each file it opens
                file = glob.escape(str(self.path))
                for row in datasets.load_dataset(reader, data_files=file, split="train", streaming=True, cache_dir=cache, **options):
                    text = row.get(self.column)
                    if self.column not in row:
                        fail(f"{self.path}: no column {self.column!r}, but {', '.join(row)}: choose one with --column=NAME")
                    if not isinstance(text, str | None):
                        fail(f"{self.path}: column {self.column!r} holds {type(text).__name__}, not text: choose one with --column=NAME")
                    if text and not text.isspace():
                        yield text, text
        except StopIteration:    # says datasets of an empty .json file
            return
        except Exception as error:    # each reader has its own ways to complain
            fail(f"{self.path}: not readable as {reader}: {' '.join(str(error).split()) or type(error).__name__}")


def belongs_to_val(key, val_fraction):
    """Decides by the document's key alone, so that no other document can move it from one split to the other."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < val_fraction * 2**64


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

class Tokenizer(NamedTuple):
    ranks: dict             # bytes of a token -> its id
    pattern: str            # regular expression that cuts text into pieces, in tiktoken's dialect
    special_tokens: dict    # name -> id; the same characters in a document are ordinary text


def train_tokenizer(sources, vocab_size, val_fraction):
    """Trains byte-pair ranks on training documents from the head of each shard; the last two of vocab_size ids are special."""
    shards = [shard for _, shards in sources for shard in shards]

    def sample():
        for shard in tqdm(shards, "vocabulary", unit=" shards", disable=None):
            left = SAMPLE // len(shards)
            for key, text in shard:
                if left <= 0:
                    break
                if not belongs_to_val(key, val_fraction):
                    yield text[:left]
                    left -= len(text)

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(sample(), vocab_size - 2, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 2:
        fail(f"the training documents are too short for --vocab_size={vocab_size}: {len(ranks) + 2} at most, or take --tokenizer=DIR")
    return Tokenizer(ranks, PATTERN, {"<|endoftext|>": vocab_size - 2, "<|mask|>": vocab_size - 1})


def load_tokenizer(folder):
    """Reads the tokenizer of a prepared corpus."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        lines = (folder / "tokenizer.tiktoken").read_bytes()
    except FileNotFoundError as error:
        fail(f"--tokenizer={folder} is not the folder of a prepared corpus: it has no {Path(error.filename).name}")
    except ValueError as error:
        fail(f"{folder / 'meta.json'} is damaged ({error}): prepare that corpus again")
    if not {"sha256", "pattern", "special_tokens"} <= set(meta):
        fail(f"{folder / 'meta.json'} does not describe a corpus: prepare that corpus again")
    if hashlib.sha256(lines).hexdigest() != meta["sha256"]["tokenizer.tiktoken"]:
        fail(f"{folder / 'tokenizer.tiktoken'} is not the file that its meta.json describes: prepare that corpus again")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines.splitlines())}
    return Tokenizer(ranks, meta["pattern"], meta["special_tokens"])


# ----------------------------------------------------------------------------------------------------------------------
# The four files

def batches(documents):
    """Groups documents into lists of BATCH characters or a little more."""
    batch, size = [], 0
    for key, text in documents:
        batch.append((key, text))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def write_tokens(folder, sources, tokenizer, val_fraction, workers):
    """
    Encodes sources [(name, shards)], a shard being an iterable of documents (key, text), into train.bin.tmp and val.bin.tmp.
    Returns what meta.json says of them: the counts of each split, and of each source with its token range in val.bin.
    """
    encoding = tiktoken.Encoding("corpus", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens={})
    end = tokenizer.special_tokens["<|endoftext|>"]
    splits = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    counted = []
    with (open(folder / "train.bin.tmp", "wb") as train, open(folder / "val.bin.tmp", "wb") as val,
          tqdm(desc="encoding", unit="B", unit_scale=True, disable=None) as progress):
        for name, shards in sources:
            source = {"name": name, "documents": 0, "tokens": 0, "val_range": [splits["val"]["tokens"]]}
            for batch in batches(document for shard in shards for document in shard):
                rows = encoding.encode_ordinary_batch([text for _, text in batch], num_threads=workers)
                for (key, text), row in zip(batch, rows, strict=True):
                    split, file = ("val", val) if belongs_to_val(key, val_fraction) else ("train", train)
                    np.array([*row, end], "<u2").tofile(file)
                    counts = {"documents": 1, "tokens": len(row) + 1, "bytes": len(text.encode())}
                    for field, count in counts.items():
                        splits[split][field] += count
                    source["documents"] += 1
                    source["tokens"] += counts["tokens"]
                    progress.update(counts["bytes"])
            source["val_range"].append(splits["val"]["tokens"])
            counted.append(source)
    return splits, counted


def write_meta(folder, name, tokenizer, splits, sources, packages):
    """Writes meta.json.tmp, with the hashes of the other three files, and returns the hash of all."""
    sha256 = {}
    for file in FILES[:3]:
        with open(folder / f"{file}.tmp", "rb") as content:
            sha256[file] = hashlib.file_digest(content, "sha256").hexdigest()
    versions = {"python": platform.python_version()}
    for package in ("numpy", "tiktoken", "rustbpe", "datasets", *packages):
        with suppress(PackageNotFoundError):    # the standard library's modules are of Python's own version
            versions[package] = version(package)
    ids = len(tokenizer.ranks) + len(tokenizer.special_tokens)
    corpus_hash = hashlib.sha256("".join(sha256.values()).encode()).hexdigest()[:12]
    meta = {"format": 1, "name": name, "vocab_size": -(-ids // 64) * 64,    # rounded up: matrix products like multiples of 64
            "pattern": tokenizer.pattern, "special_tokens": tokenizer.special_tokens, "splits": splits, "sources": sources,
            "versions": versions, "sha256": sha256, "corpus_hash": corpus_hash}
    (folder / "meta.json.tmp").write_text(json.dumps(meta, indent=2) + "\n")
    return corpus_hash


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail    # one line, without argparse's usage
    add = parser.add_argument
    add("name", metavar="NAME", help="docstrings, or a name for the corpus made of --source")
    add("--source", metavar="PATHS", help="files, folders or glob patterns, comma separated; meta.json lists each as a source of its own")
    add("--column", metavar="NAME", help="column that holds the text (default: text)")
    add("--packages", metavar="NAMES", help=f"packages or modules that docstrings reads (default: {PACKAGES})")
    add("--vocab_size", metavar="N", type=int, help="train a vocabulary of N ids on the corpus (default: 4096)")
    add("--tokenizer", metavar="DIR", type=Path, help="take the vocabulary of the prepared corpus in DIR instead")
    add("--val_fraction", metavar="F", type=float, default=0.05, help="share of the documents for validation (default: 0.05)")
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
    if args.tokenizer and args.vocab_size is not None:
        fail("--tokenizer brings its own vocabulary: leave --vocab_size out")
    if args.vocab_size is not None and not 258 <= args.vocab_size <= 65_536:
        fail(f"--vocab_size={args.vocab_size} is not between 258 (bytes and special tokens) and 65536 (what uint16 holds)")
    if not 0 < args.val_fraction < 1:
        fail(f"--val_fraction={args.val_fraction} is not between 0 and 1")
    if args.workers < 1:
        fail(f"--workers={args.workers} is less than 1")
    return args


def main(args):
    start, folder = time.time(), args.data_dir / args.name
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)    # rustbpe's
    packages = (args.packages or PACKAGES).split(",") if args.name == "docstrings" else []
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    sources = [(Path(item).name, [FileDocuments(path, args.column or "text") for path in files_of(item)])
               for item in (args.source or "").split(",") if item]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "meta.json.tmp").touch()    # where nothing can be written, better to learn it before the work
        if packages:
            sources = [(args.name, [read_packages(packages, args.workers)])]
        if not any(True for _, shards in sources for shard in shards for _ in shard):
            fail(f"there is no document with text in {args.source or ','.join(packages)}")
        tokenizer = tokenizer or train_tokenizer(sources, args.vocab_size or 4096, args.val_fraction)
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in tokenizer.ranks.items()]
        (folder / "tokenizer.tiktoken.tmp").write_bytes(b"".join(lines))
        splits, counted = write_tokens(folder, sources, tokenizer, args.val_fraction, args.workers)
        documents, tokens, size = (splits["train"][field] + splits["val"][field] for field in ("documents", "tokens", "bytes"))
        for split in splits:
            if not splits[split]["documents"]:
                fail(f"of {documents} documents none fell to {split}: the hash sends a share of about {args.val_fraction} to val; "
                     "give more documents (in .txt files, one a file) or another --val_fraction")
        corpus_hash = write_meta(folder, args.name, tokenizer, splits, counted, packages)
        (folder / "meta.json").unlink(missing_ok=True)    # from here to the last rename there is neither the old corpus nor the new
        for name in FILES:
            os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in FILES:
            (folder / f"{name}.tmp").unlink(missing_ok=True)
        with suppress(OSError):    # goes only if empty
            folder.rmdir()
    print(f"{folder}: {documents:,} documents, {size / 1e6:.1f} MB of text, {tokens:,} tokens of {size / tokens:.2f} bytes "
          f"({splits['val']['tokens']:,} for validation), corpus {corpus_hash}, {time.time() - start:.0f} s")
    elsewhere = "" if args.data_dir.resolve() == Path(__file__).resolve().parent else f" --data_dir={shlex.quote(str(args.data_dir))}"
    print(f"next: python train.py config/train_11m.py --dataset={args.name}{elsewhere}")


def stop(signum, frame):
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)    # once is enough: let it clean up
    print("\nstopped, the unfinished corpus is removed", file=sys.stderr)
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        main(arguments())
    except OSError as error:
        fail(f"{error.filename or 'the corpus'}: {error.strerror or error}")
    except BrokenProcessPool:
        fail("a process that read modules was killed, perhaps for lack of memory: try --workers=1")
