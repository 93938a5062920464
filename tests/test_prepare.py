"""data/prepare.py against other readings of what it writes: inspect, pkgutil, rustbpe's own encoder, a tiktoken Encoding built here."""
import base64
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import rustbpe
import tiktoken

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
PACKAGES = "json,email,logging,collections,concurrent,unittest,importlib,xml"


def load_script():
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load_script()


def command(*args):
    return [sys.executable, str(SCRIPT), *map(str, args)]


def build(*args):
    """Runs the script in this process, which spares each test the seconds that importing datasets takes. Returns the output lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(*args)[1:])
        prepare.main(prepare.arguments())


class Corpus:
    """A prepared folder, read without the script's help."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = json.loads((self.folder / "meta.json").read_text())
        lines = (self.folder / "tokenizer.tiktoken").read_bytes().splitlines()
        self.ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
        self.tokens = {split: np.fromfile(self.folder / f"{split}.bin", "<u2") for split in ("train", "val")}
        self.end = self.meta["special_tokens"]["<|endoftext|>"]

    def encoding(self):
        meta = self.meta
        return tiktoken.Encoding("test", pat_str=meta["pattern"], mergeable_ranks=self.ranks, special_tokens=meta["special_tokens"])

    def documents(self, split, start=0, stop=None):
        """Decodes by joining the bytes of the tokens, which needs no library."""
        bytes_of = {rank: token for token, rank in self.ranks.items()}
        documents, current = [], []
        for token in self.tokens[split][start:stop].tolist():
            if token == self.end:
                documents.append(b"".join(current).decode())
                current = []
            else:
                current.append(bytes_of[token])
        assert not current, "the file must end with the end of a document"
        return documents

    def contents(self):
        return {name: (self.folder / name).read_bytes() for name in ("train.bin", "val.bin", "tokenizer.tiktoken")}


def in_val(key, fraction=0.05):
    return int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 2**64 < fraction


@pytest.fixture(scope="module")
def texts():
    """Docstrings of the standard library, and what a careless encoder would trip over."""
    names = "argparse", "textwrap", "random", "statistics", "fractions", "inspect", "csv", "decimal", "locale"
    members = [member for name in names for member in vars(importlib.import_module(name)).values()]
    found = {inspect.getdoc(member) for member in members if inspect.isroutine(member) or inspect.isclass(member)}
    found = sorted(filter(None, found))
    assert len(found) > 200
    special = "<|endoftext|> ends nothing here, <|mask|> masks nothing <|endoftext|>"
    return found + ["  leading and trailing \n\n", "héllo wörld, 你好 🙂\ttab", special]


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory):
    """The default corpus, small, by the command itself and from another working directory."""
    data_dir = tmp_path_factory.mktemp("data")
    args = [f"--packages={PACKAGES}", "--vocab_size=1000", f"--data_dir={data_dir}", "--val_fraction=0.1", "--workers=2"]
    done = subprocess.run(command("docstrings", *args), cwd=data_dir, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    corpus = Corpus(data_dir / "docstrings")
    assert corpus.meta["corpus_hash"] in done.stdout and f"--dataset=docstrings --data_dir={data_dir}" in done.stdout
    return corpus


@pytest.fixture(scope="module")
def jsonl(texts, tmp_path_factory):
    """The texts as a file and as the corpus prepared from it."""
    folder = tmp_path_factory.mktemp("jsonl")
    write_jsonl(folder / "texts.jsonl", texts)
    build("corpus", f"--source={folder / 'texts.jsonl'}", "--vocab_size=700", f"--data_dir={folder}")
    return Corpus(folder / "corpus")


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": number, column: text}) + "\n" for number, text in enumerate(texts)))


# ----------------------------------------------------------------------------------------------------------------------
# What is on disk

@pytest.mark.parametrize("name", ["docstrings", "jsonl"])
def test_meta_describes_the_files(name, request):
    corpus = request.getfixturevalue(name)
    meta, hashes = corpus.meta, {file: hashlib.sha256(content).hexdigest() for file, content in corpus.contents().items()}
    assert sorted(file.name for file in corpus.folder.iterdir()) == ["meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
    assert meta["sha256"] == hashes
    three = hashes["train.bin"] + hashes["val.bin"] + hashes["tokenizer.tiktoken"]
    assert meta["corpus_hash"] == hashlib.sha256(three.encode()).hexdigest()[:12]
    asked = {"docstrings": 1000, "jsonl": 700}[name]
    assert meta["special_tokens"] == {"<|endoftext|>": asked - 2, "<|mask|>": asked - 1}
    assert meta["vocab_size"] == {1000: 1024, 700: 704}[asked]
    assert sorted(corpus.ranks.values()) == list(range(asked - 2))
    for split in ("train", "val"):
        documents = corpus.documents(split)
        size = sum(len(text.encode()) for text in documents)
        assert meta["splits"][split] == {"documents": len(documents), "tokens": len(corpus.tokens[split]), "bytes": size}
    for field in ("tokens", "documents"):
        assert sum(source[field] for source in meta["sources"]) == sum(split[field] for split in meta["splits"].values())


def test_round_trip_and_split(jsonl, texts):
    """Every document comes back, byte for byte and in order, in the split that the hash of its text says."""
    assert jsonl.documents("train") == [text for text in texts if not in_val(text)]
    assert jsonl.documents("val") == [text for text in texts if in_val(text)]


def test_ids_are_those_of_tiktoken_and_rustbpe(jsonl, texts):
    trainer = rustbpe.Tokenizer()    # the vocabulary is that of the training documents alone
    trainer.train_from_iterator(iter([text for text in texts if not in_val(text)]), 698, pattern=jsonl.meta["pattern"])
    for encode in (jsonl.encoding().encode_ordinary, trainer.encode):
        expected = [token for text in texts if not in_val(text) for token in (*encode(text), jsonl.end)]
        assert jsonl.tokens["train"].tolist() == expected


def test_special_text_is_ordinary_text(jsonl, texts):
    assert any("<|endoftext|>" in text for text in jsonl.documents("train") + jsonl.documents("val"))
    both = np.concatenate(list(jsonl.tokens.values()))
    assert (both == jsonl.end).sum() == len(texts) and jsonl.meta["special_tokens"]["<|mask|>"] not in both


def test_other_documents_do_not_move_a_document(jsonl, texts, tmp_path):
    write_jsonl(tmp_path / "more.jsonl", ["A new first one."] + texts[::-1] + [f"Number {n} is new." for n in range(100)])
    build("more", f"--source={tmp_path / 'more.jsonl'}", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}")
    more = Corpus(tmp_path / "more")
    for split in ("train", "val"):
        old, new = jsonl.documents(split), set(more.documents(split))
        assert new.issuperset(old) and len(new) > len(old)


# ----------------------------------------------------------------------------------------------------------------------
# Files

def test_all_kinds_of_files_give_the_same_corpus(texts, tmp_path):
    texts = texts[::5] + texts[-3:]
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), tmp_path / "d.parquet")
    (tmp_path / "e[1]*").mkdir()    # looks like a glob pattern, is a name
    for number, text in enumerate(texts):
        (tmp_path / "e[1]*" / f"{number:04}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "e[1]*" / "README.md").write_text("not a document")
    for name, source in {"a": "a.jsonl", "b": "b.json", "c": "c.*l.gz", "d": "d.parquet", "e": "e[1]*"}.items():
        build(name, f"--source={tmp_path / source}", "--vocab_size=400", "--val_fraction=0.2", f"--data_dir={tmp_path}")
        assert Corpus(tmp_path / name).contents() == Corpus(tmp_path / "a").contents(), source
    assert Corpus(tmp_path / "a").documents("train") == [text for text in texts if not in_val(text, 0.2)]


def test_sources_columns_and_blank_documents(jsonl, texts, tmp_path):
    """Two sources in the order given, each with its range of val.bin; a document without text is none."""
    write_jsonl(tmp_path / "b.jsonl", [*texts[:150], None, "", " \n"], column="body")
    write_jsonl(tmp_path / "a.jsonl", texts[150:], column="body")
    paths = f"{tmp_path / 'b.jsonl'},{tmp_path / 'a.jsonl'}"
    build("two", f"--source={paths}", "--column=body", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}", "--val_fraction=0.2")
    two = Corpus(tmp_path / "two")
    assert [source["name"] for source in two.meta["sources"]] == ["b.jsonl", "a.jsonl"]
    for source, part in zip(two.meta["sources"], (texts[:150], texts[150:]), strict=True):
        assert source["documents"] == len(part)
        assert two.documents("val", *source["val_range"]) == [text for text in part if in_val(text, 0.2)]


def test_reused_tokenizer_gives_the_same_ids(jsonl, tmp_path):
    build("again", f"--source={jsonl.folder.parent / 'texts.jsonl'}", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}")
    again = Corpus(tmp_path / "again")
    assert again.contents() == jsonl.contents()
    assert all(again.meta[key] == jsonl.meta[key] for key in ("special_tokens", "pattern", "vocab_size", "corpus_hash"))


def test_batches_bound_memory_and_change_nothing(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 1000)
    endless = prepare.batches(("key", "x" * 300) for _ in itertools.count())
    assert [len(batch) for batch in itertools.islice(endless, 3)] == [4, 4, 4]
    build("small", f"--source={jsonl.folder.parent / 'texts.jsonl'}", "--vocab_size=700", f"--data_dir={tmp_path}")
    assert Corpus(tmp_path / "small").contents() == jsonl.contents()


def test_vocabulary_is_trained_on_a_bounded_sample_of_each_shard(monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE", 20_000)
    quixotic, zymurgy = (itertools.repeat(("key", word)) for word in ("quixotic ", "zymurgy "))    # shards without end
    tokenizer = prepare.train_tokenizer([("one", [quixotic]), ("two", [zymurgy])], 271, 0.05)    # 256 + 7 + 6 merges + 2
    assert b"quixotic" in tokenizer.ranks and b"zymurgy" in tokenizer.ranks


# ----------------------------------------------------------------------------------------------------------------------
# Docstrings of packages

def test_documentation_of_a_module():
    source = '''
    """Module
       and its second line."""
    import os
    x = """not documentation
    """
    if os.name:
        class A:
            "A class."
            async def f(self):
                """f"""
                def g(): """g"""
                return """not a docstring
                """
    else:
        def h(): "h"
    add_docstr(os.open, r"""open(file)

        Opens.""")
    shared_docs["name"] = """shared
    """
    raise_doc("short string without a line break")
    '''
    expected = ["Module\nand its second line.", "A class.", "f", "g", "h", "open(file)\n\nOpens.", "shared"]
    assert list(filter(None, prepare.documentation(prepare.ast.parse(inspect.cleandoc(source))))) == expected


def test_paragraphs_are_not_repeated():
    long = "A paragraph of more than eighty characters, which documentation likes to repeat, is kept once."
    text = f"{long}\n\n{long}\n \nshort\n\n\nshort\n\n  >>> a doctest\n  1"
    seen = set()
    assert list(prepare.unseen_prose(text, seen)) == [long, "short", "short"]
    assert list(prepare.unseen_prose(f"{'x' * 80}\n\n{'y' * 81}\n\n{long}", seen)) == ["x" * 80, "y" * 81]
    assert list(prepare.unseen_prose(f"{'x' * 80}\n\n{'y' * 81}\n\n{long}", seen)) == ["x" * 80]


def test_docstrings_are_what_the_modules_say(docstrings):
    """Names from pkgutil, docstrings from inspect: a document a module, sorted, split by the hash of its name, nothing lost but copies."""
    names = []
    for package in PACKAGES.split(","):
        path = importlib.import_module(package).__path__
        names += [package, *(found.name for found in pkgutil.walk_packages(path, package + ".", onerror=lambda name: None))]
    names = [name for name in sorted(names) if not re.search(r"(^|\.)tests?(\.|$)|__main__", name)]
    documents = {split: docstrings.documents(split) for split in ("train", "val")}
    everything = "\n\n".join(documents["train"] + documents["val"])
    position, compared = {"train": -1, "val": -1}, 0
    for name in names:
        doc = inspect.getdoc(importlib.import_module(name))
        if doc and len(doc) > 40 and ">>>" not in doc:
            split = "val" if in_val(name, 0.1) else "train"
            first = re.split(r"\n\s*\n", doc)[0]
            index = next(i for i, text in enumerate(documents[split]) if text.startswith(first))
            assert index > position[split], f"{name} is out of order"
            position[split], compared = index, compared + 1
    assert compared > 40 and position["val"] >= 0
    for name in ("json.decoder", "email.message", "unittest.mock", "logging.handlers", "xml.etree.ElementTree"):
        module = importlib.import_module(name)
        for member in vars(module).values():
            if inspect.isclass(member) and member.__module__ == name and member.__doc__:
                for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(member.__doc__)):
                    assert paragraph.strip() in everything or paragraph.lstrip().startswith(">>>")
    paragraphs = [paragraph for paragraph in everything.split("\n\n") if len(paragraph) > 80]
    assert len(paragraphs) == len(set(paragraphs)) > 500


def test_number_of_workers_changes_no_byte(docstrings, tmp_path):
    args = [f"--packages={PACKAGES}", "--vocab_size=1000", f"--data_dir={tmp_path}", "--val_fraction=0.1", "--workers=1"]
    subprocess.run(command("docstrings", *args), check=True, capture_output=True, timeout=60, env={**os.environ, "PYTHONHASHSEED": "7"})
    one = Corpus(tmp_path / "docstrings")
    assert one.contents() == docstrings.contents() and one.meta == docstrings.meta


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted(number, tmp_path):
    """No meta.json, no worker left alive (each holds the pipe, so its end means theirs), one line where there is time for one."""
    args = command("docstrings", "--packages=stdlib", f"--data_dir={tmp_path}", "--workers=2")
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    started = time.time()
    while len(children.read_text().split()) < 2 if children.exists() else time.time() < started + 2:    # until the workers are there
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)    # a terminal sends Ctrl-C to the whole group
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=15)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert not (tmp_path / "docstrings" / "meta.json").exists()
    if number != signal.SIGKILL:
        assert output.strip() == "stopped, the unfinished corpus is removed"
        assert not (tmp_path / "docstrings").exists()


def test_names_appear_in_order(jsonl, tmp_path, monkeypatch):
    """The old meta.json goes before any file changes, and the new one comes last, wherever the renaming is cut off."""
    rename = os.replace
    for cut in range(4):
        build("corpus", f"--source={jsonl.folder.parent / 'texts.jsonl'}", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}")
        calls = itertools.count()
        monkeypatch.setattr(os, "replace", lambda *names: rename(*names) if next(calls) < cut else sys.exit(9))    # noqa: B023
        with pytest.raises(SystemExit):
            build("corpus", f"--source={jsonl.folder.parent / 'texts.jsonl'}", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}")
        monkeypatch.setattr(os, "replace", rename)
        assert not (tmp_path / "corpus" / "meta.json").exists() and not list(tmp_path.glob("corpus/*.tmp"))


ERRORS = {
    "": "required: NAME",
    "corpus": "Give --source=PATHS",
    "../corpus --source=good.jsonl": "NAME becomes a folder",
    "corpus --sauce=good.jsonl": "unrecognized arguments: --sauce",
    "corpus --source=none.jsonl": "no file .json .jsonl .txt .parquet (or these with .gz) matches --source=none.jsonl",
    "corpus --source=empty": "matches --source=empty",
    "corpus --source=notes.pdf": "notes.pdf: unknown kind of file",
    "corpus --source=good.jsonl --column=body": "good.jsonl: no column 'body', but id, text: choose one with --column=NAME",
    "corpus --source=good.jsonl --column=id": "good.jsonl: column 'id' holds int, not text",
    "corpus --source=bad.jsonl": "bad.jsonl: not readable as json: ",
    "corpus --source=bad.parquet": "bad.parquet: not readable as parquet: ",
    "corpus --source=latin1.txt": "latin1.txt: not readable as text: ",
    "corpus --source=bad.jsonl.gz": "bad.jsonl.gz: not readable as json: ",
    "corpus --source=blank.jsonl": "no document with text in blank.jsonl",
    "corpus --source=nothing.jsonl": "no document with text in nothing.jsonl",
    "corpus --source=one.txt --vocab_size=260": "of 1 documents none fell to val",
    "corpus --source=good.jsonl --vocab_size=257": "--vocab_size=257 is not between 258",
    "corpus --source=good.jsonl --vocab_size=65537": "65536 (what uint16 holds)",
    "corpus --source=good.jsonl --vocab_size=many": "invalid int value: 'many'",
    "corpus --source=good.jsonl --vocab_size=60000": "too short for --vocab_size=60000",
    "corpus --source=good.jsonl --val_fraction=1": "--val_fraction=1.0 is not between 0 and 1",
    "corpus --source=good.jsonl --workers=0": "--workers=0",
    "corpus --source=good.jsonl --tokenizer=empty": "--tokenizer=empty is not the folder of a prepared corpus: it has no meta.json",
    "corpus --source=good.jsonl --tokenizer=empty --vocab_size=300": "leave --vocab_size out",
    "corpus --source=good.jsonl --packages=json": "--packages is for docstrings only",
    "docstrings --source=good.jsonl": "choose another NAME",
    "docstrings --packages=json,no_such_package": "no Python source of 'no_such_package' is installed",
}


@pytest.mark.parametrize("line", ERRORS)
def test_errors_are_one_line(line, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("good.jsonl"), [f"Document number {n} of a few." for n in range(60)])
    write_jsonl(Path("blank.jsonl"), ["", " "])
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"text": "cut o')
    Path("latin1.txt").write_bytes("café".encode("latin-1"))
    Path("one.txt").write_text("Only one document, and the hash of it says train.")
    for name in ("nothing.jsonl", "notes.pdf", "bad.parquet", "bad.jsonl.gz"):
        Path(name).write_text("" if name == "nothing.jsonl" else "something else")
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        build(*line.split(), "--data_dir=data")
    captured = capfd.readouterr()
    lines = [text for text in captured.err.splitlines() if text.startswith("error: ")]
    assert stop.value.code == 2 and captured.out == "" and "Traceback" not in captured.err
    assert len(lines) == 1 and ERRORS[line] in lines[0]
    assert not list(tmp_path.glob("data/*")), "a failed preparation leaves nothing"


def test_a_failed_rebuild_keeps_the_old_corpus(docstrings, tmp_path):
    shutil.copytree(docstrings.folder, tmp_path / "docstrings")
    args = command("docstrings", "--packages=json", "--vocab_size=60000", f"--data_dir={tmp_path}")
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(r"error: .* too short for --vocab_size=60000: .*\n", done.stderr)
    assert Corpus(tmp_path / "docstrings").contents() == docstrings.contents()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run(command("docstrings", f"--data_dir={tmp_path / 'file'}"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {tmp_path / 'file' / 'docstrings'}: Not a directory\n")


def test_changed_tokenizer_is_refused(jsonl, tmp_path, capfd):
    (tmp_path / "meta.json").write_bytes((jsonl.folder / "meta.json").read_bytes())
    (tmp_path / "tokenizer.tiktoken").write_bytes(jsonl.contents()["tokenizer.tiktoken"][:-10])
    with pytest.raises(SystemExit):
        build("corpus", f"--source={jsonl.folder.parent / 'texts.jsonl'}", f"--tokenizer={tmp_path}", f"--data_dir={tmp_path}")
    assert "is not the file that its meta.json describes" in capfd.readouterr().err


def test_help(capfd):
    with pytest.raises(SystemExit) as stop:
        build("--help")
    output = capfd.readouterr().out
    assert stop.value.code == 0 and "$ python data/prepare.py docstrings" in output
    assert all(f"--{key}" in output for key in ("source", "column", "packages", "vocab_size", "tokenizer", "val_fraction", "data_dir"))
