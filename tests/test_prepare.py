"""data/prepare.py, data/docstrings.py and plumbing/corpus.py against other readings of what they write."""
import base64
import gzip
import hashlib
import importlib
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pandas
import pytest
import rustbpe
import tiktoken
import tokenizers
from conftest import start

from plumbing import files
from plumbing.corpus import file_rows, hub_rows, load_corpus, stream, text_files

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))
docstrings, prepare = importlib.import_module("docstrings"), importlib.import_module("prepare")
FILES = ("train.bin", "val.bin", "tokenizer.tiktoken")

def build(folder, *words):
    """Prepare the corpus `folder` in this process, which saves the seconds of imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", folder.name, f"--data_dir={folder.parent}", *words])
        try:
            prepare.main()
        finally:
            for held in files.locks:  # as the end of a process would
                held.release()
    return Corpus(folder)

class Corpus:
    """A prepared folder, read without the script's help: ids become text by joining the bytes of tokens."""

    def __init__(self, folder):
        self.folder, self.meta = folder, json.loads((folder / "meta.json").read_text())
        self.bytes = {name: (folder / name).read_bytes() for name in self.meta["sha256"]}
        self.train, self.val = (np.fromfile(folder / name, "<u2") for name in FILES[:2])
        pairs = [line.split() for line in self.bytes.get("tokenizer.tiktoken", b"").splitlines()]
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        if self.ranks:
            specials = self.meta["special_tokens"]
            self.end, self.tokens = specials["<|endoftext|>"], [*self.ranks, b"\xff"]
            self.encode = tiktoken.Encoding("", pat_str=self.meta["pattern"], mergeable_ranks=self.ranks,
                                            special_tokens=specials).encode_ordinary

    def documents(self, ids):
        *documents, rest = b"".join(self.tokens[i] for i in ids.tolist()).split(b"\xff")
        assert not rest, "a split ends with the end of a document"
        return [document.decode() for document in documents]

def part(texts, split, fraction=0.05):
    """The texts of a split, by the hash of each."""
    hashes = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 for text in texts]
    return [text for text, x in zip(texts, hashes, strict=True) if (x < fraction) == (split == "val")]

def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    return f"--source={path}"

@pytest.fixture(scope="module")
def texts():
    """Docstrings of the standard library, and what a careless encoder would trip over."""
    names = "argparse textwrap random statistics fractions inspect csv decimal locale".split()
    members = [member for name in names for member in vars(importlib.import_module(name)).values()]
    docs = {inspect.getdoc(m) for m in members if inspect.isroutine(m) or inspect.isclass(m)} - {None, ""}
    special = "<|endoftext|> ends nothing here, <|mask|> masks nothing <|endoftext|>"
    return [*sorted(docs), "  leading and trailing \n\n", "héllo, 你好 🙂\ttab, \"quotes\",", "NA", special]

@pytest.fixture(scope="module")
def jsonl(texts, tmp_path_factory):
    """The corpus of the texts. `words` prepare the same texts again."""
    folder = tmp_path_factory.mktemp("jsonl")
    source = write_jsonl(folder / "texts.jsonl", texts)
    corpus = build(folder / "corpus", source, "--vocab_size=700")
    corpus.words = source, f"--tokenizer={folder / 'corpus'}"
    return corpus

def test_documents_ids_and_meta(jsonl, texts):
    """Every document in its order, in the split its hash says, with the ids of tiktoken and rustbpe."""
    trainer, meta = rustbpe.Tokenizer(), jsonl.meta
    trainer.train_from_iterator(iter(part(texts, "train")), 698, pattern=meta["pattern"])
    for split, ids in (("train", jsonl.train), ("val", jsonl.val)):
        documents = part(texts, split)
        assert jsonl.documents(ids) == documents
        for encode in (jsonl.encode, trainer.encode):
            assert ids.tolist() == [i for text in documents for i in (*encode(text), 698)]
        size = len("".join(documents).encode())
        assert meta["splits"][split] == {"documents": len(documents), "tokens": len(ids), "bytes": size}
    hashes = [hashlib.sha256((jsonl.folder / name).read_bytes()).hexdigest() for name in FILES]
    assert meta["sha256"] == dict(zip(FILES, hashes, strict=True)) and meta["vocab_size"] == 704
    assert meta["corpus_hash"] == hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]
    assert meta["special_tokens"] == {"<|endoftext|>": 698, "<|mask|>": 699}
    loaded = load_corpus(jsonl.folder)
    assert (loaded.train == jsonl.train).all() and (loaded.val == jsonl.val).all()
    assert (loaded.eot, loaded.mask, loaded.vocab_size) == (698, 699, 704)
    assert loaded.token_bytes == [*jsonl.ranks, b"", b""]
    assert loaded.val_tokens_per_byte == len(jsonl.val) / size

def test_kinds_of_files_give_the_same_corpus(texts, tmp_path):
    spaces = "x" + " " * 1_000_000 + "y"  # in one piece they make both regex engines panic
    texts = [*texts[::5], *texts[-4:], spaces]
    write_jsonl(tmp_path / "a.jsonl", texts)
    table = pandas.DataFrame({"id": range(len(texts)), "text": texts})
    (tmp_path / "b.json").write_text(table.to_json(orient="records"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    table.to_parquet(tmp_path / "d.parquet")
    table.to_csv(tmp_path / "e.csv", index=False)
    table.to_csv(tmp_path / "f.tsv.gz", index=False, sep="\t")
    (tmp_path / "g[1]*").mkdir()  # looks like a glob pattern, is a name
    for i, text in enumerate([*texts, "not a document"]):
        name = f"{i:04}.txt" if i < len(texts) else "README.md"
        (tmp_path / "g[1]*" / name).write_text(text, encoding="utf-8")
    for source in "a.jsonl b.json c.*l.gz d.parquet e.csv f.tsv.gz g[1]*".split():
        words = f"--source={tmp_path / source}", "--vocab_size=400", "--val_fraction=0.2"
        corpus = build(tmp_path / source[0], *words)
        assert corpus.bytes == Corpus(tmp_path / "a").bytes, source
    assert corpus.documents(corpus.train) == part(texts, "train", 0.2)

MARK = b"\xef\xbb\xbf"  # which Notepad puts before a text
ROWS = {  # name of a file: what is in it, and the texts that are read
    "mark.txt": (MARK + b"Return", ["Return"]),
    "mark.csv": (MARK + b'text,label\n"a, one",1\nNA,2\n', ["a, one", "NA"]),
    "MARK.JSON": (MARK + b'[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
    "mark.jsonl": (MARK + b'{"text": "a"}\n\n{"id": 1}\n{"text": null}', ["a", None, None]),
    "texts.json": (b'["a", "b"]', ["a", "b"]),
    "emoji.jsonl": (br'''{"text": "half \ud83d"}
        {"text": "whole \ud83d\ude00"}''', ["half \ufffd", "whole 😀"]),
    "late.jsonl": (b'''{"text": "a", "id": 1, "meta": {"year": 1, "pad": "%s"}}
        {"text": "b", "id": 0.5, "meta": {"url": "u"}, "licence": []}''' % (b"x" * 11_000_000), ["a", "b"])}

@pytest.mark.parametrize("name", ROWS)
def test_rows_of_odd_files(name, tmp_path):
    (tmp_path / name).write_bytes(ROWS[name][0])
    assert [text for (text,) in stream(["text"], file_rows, tmp_path / name)] == ROWS[name][1]
    if name in ("late.jsonl", "texts.json"):  # as a dataset of the hub
        assert [text for (text,) in stream(["text"], hub_rows, str(tmp_path), None, "train")] == ROWS[name][1]

def test_a_missing_column_is_told_soon(capfd):
    """Whether it is in no row or only in some, the first hundred say."""
    def rows(name, here, columns):
        return ({"a": 1} | ({"b": i} if i == here else {}) for i in itertools.count())

    assert list(itertools.islice(stream(["b"], rows, "x", 50), 49, 52)) == [(None,), (50,), (None,)]
    with pytest.raises(SystemExit):
        next(stream(["b"], rows, "x", None))
    assert "x has no column 'b', but a" in capfd.readouterr().err

def test_folders_with_links_and_hidden_files(jsonl, texts, tmp_path, monkeypatch, capfd):
    """Hidden files are no text, a linked folder is, and no file counts twice; so too in evaluations."""
    here, far = tmp_path / "lang=en,da", tmp_path / "far"
    far.mkdir(), (here / ".ipynb_checkpoints").mkdir(parents=True)
    write_jsonl(here / "A.JSONL", texts[:50])
    write_jsonl(far / "b.jsonl", texts[50:])
    (here / "far").symlink_to(far)
    (far / "again").symlink_to(here)  # round in a circle
    (here / "._A.JSONL").write_bytes(b"\0\5\26\7")
    shutil.copy(here / "A.JSONL", here / ".ipynb_checkpoints")
    monkeypatch.chdir(tmp_path)
    corpus = build(tmp_path / "corpus", f"--source={here.name}", jsonl.words[1])
    assert corpus.bytes == jsonl.bytes and corpus.meta["sources"][0]["name"] == here.name
    assert "left out, hidden or no text" in capfd.readouterr().err
    assert text_files(str(here)) == {"A": [f"{here}/A.JSONL"], "far/b": [f"{here}/far/b.jsonl"]}
    (here / "A.txt").touch()
    assert text_files(str(here))["*.txt"] == text_files(f"{here}/*.txt")["*.txt"] == [f"{here}/A.txt"]

def test_one_text_is_cut_at_blank_lines(jsonl, tmp_path):
    parts = [f"Line one of {i}.\nLine two." for i in range(60)]
    (tmp_path / "input.txt").write_text("\n \n\n".join(parts))
    words = f"--source={tmp_path / 'input.txt'}", "--paragraphs=True"
    corpus = build(tmp_path / "corpus", *words, jsonl.words[1])
    assert corpus.documents(corpus.train) == part(parts, "train")

def test_sources_columns_blank_documents_and_batches(jsonl, texts, tmp_path, monkeypatch):
    """Two sources follow one another, each with its range of val.bin; a document without text is none."""
    monkeypatch.setattr(prepare, "BATCH", 2)
    first = write_jsonl(tmp_path / "b.jsonl", [*texts[:150], None, "", " \n"], "body")
    second = write_jsonl(tmp_path / "a.jsonl", texts[150:], "body").replace("=", "=second=")
    two = build(tmp_path / "two", first, second, "--column=body", jsonl.words[1])
    assert two.bytes == jsonl.bytes
    for source, documents in zip(two.meta["sources"], (texts[:150], texts[150:]), strict=True):
        assert two.documents(two.val[slice(*source["val_range"])]) == part(documents, "val")
    assert [source["name"] for source in two.meta["sources"]] == ["b.jsonl", "second"]

@pytest.fixture(scope="module")
def mixed(texts, tmp_path_factory):
    """Three sources, 5 : 2 : 1, without a document in common, and the words that prepare them.

    The third is laid out like a dataset on the hub: configurations, parquet files, the text in `body`.
    """
    folder = tmp_path_factory.mktemp("mixed")
    sources = [[f"A {text}" for text in texts], [f"B {text}" for text in texts[:50]], texts]
    write_jsonl(folder / "a.jsonl", sources[0])
    write_jsonl(folder / "b.jsonl", sources[1])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    for i, documents in enumerate((texts[:90], texts[90:91], texts[91:])):
        pandas.DataFrame({"body": documents}).to_parquet(folder / f"train-{i}.parquet", row_group_size=7)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files: train-*.parquet\n"
                                      "- config_name: other\n  data_files: a.jsonl\n---\n")
    return sources, [f"--source=first={folder}/a.jsonl", f"--source=second={folder}/b.jsonl.gz",
                     f"--source=third=hf:{folder},main,,body", "--weights=5,2,1", "--val_fraction=0.2"]

def test_weights_and_max_tokens(mixed, jsonl, tmp_path, capfd):
    """The next document comes from the source that is furthest behind its share; nothing is repeated."""
    sources, words = mixed
    corpus = build(tmp_path / "mixed", *words, jsonl.words[1])
    queues, tokens, expected = [part(source, "train", 0.2) for source in sources], [0, 0, 0], []
    while any(queues):
        i = min([i for i in range(3) if queues[i]], key=lambda i: tokens[i] / (5, 2, 1)[i])
        expected.append(queues[i].pop(0))
        tokens[i] += len(corpus.encode(expected[-1])) + 1
    assert corpus.documents(corpus.train) == expected
    assert corpus.documents(corpus.val) == part(sum(sources, []), "val", 0.2)
    assert f"first: {tokens[0] / sum(tokens):.1%} of" in capfd.readouterr().out
    short = build(tmp_path / "short", *words, jsonl.words[1], "--max_tokens=4000").train
    assert (short == corpus.train[: len(short)]).all()
    assert len(short) >= 4000 and corpus.end not in short[3999:-1]  # ends with the document that reaches it

def test_val_tokens(jsonl, tmp_path):
    """What is above the bound is in neither file, so that no copy of it can be in train.bin."""
    few = build(tmp_path / "few", *jsonl.words, "--val_tokens=500")
    assert (few.train == jsonl.train).all() and (few.val == jsonl.val[: len(few.val)]).all()
    assert len(few.val) >= 500 and few.end not in few.val[499:-1]
    assert few.meta["sources"][0]["left_out"] == sum(jsonl.val[len(few.val) :] == few.end) > 0

def test_a_short_source_counts_several_times_in_a_weighted_vocabulary(texts):
    """Up to its share, as if its texts stood there as often."""
    long, short = part(texts[20:], "train"), part(texts[:20], "train")
    times = round(sum(map(len, long)) / 3 / sum(map(len, short)))
    sources = [prepare.Source("", [[(text, text) for text in documents].__iter__], weight)
               for documents, weight in ((long, 3.0), (short, 1.0))]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(long + short * times), 398, pattern=prepare.PATTERN)
    expected = [bytes(token) for token, _ in trainer.get_mergeable_ranks()]
    tokenizer = prepare.train_tokenizer(sources, prepare.Config(vocab_size=400))
    assert times > 2 and list(tokenizer.ranks) == expected

def test_tokenizer_json_of_a_model_and_of_a_run(jsonl, texts, tmp_path):
    """A model's own tokenizer, as its library encodes; of a run folder the newest step's."""
    model, newest = tokenizers.ByteLevelBPETokenizer(), tmp_path / "run" / "step_000200"
    model.train_from_iterator(texts, vocab_size=500, special_tokens=["<s>"])
    for folder in (newest, tmp_path / "run" / "step_000100", tmp_path / "run" / "step_000300.tmp"):
        folder.mkdir(parents=True)
    model.save(str(newest / "tokenizer.json"))
    (newest / "config.json").write_text('{"bos_token_id": 0}')
    for folder in (newest, newest.parent):
        corpus = build(tmp_path / "corpus", jsonl.words[0], f"--tokenizer={folder}")
        assert corpus.train.tolist() == [i for t in part(texts, "train") for i in (*model.encode(t).ids, 0)]
        assert set(corpus.bytes) == {*FILES[:2], "tokenizer.json", "config.json"}
        assert corpus.meta["vocab_size"] == 512 and load_corpus(tmp_path / "corpus").eot == 0

# ----------------------------------------------------------------------------------------------------
# Interruptions

def test_kill_9_and_the_same_command_again(mixed, tmp_path, monkeypatch):
    """In the middle of three sources. What is saved is not encoded again; the bytes are the same."""
    words, partial = [*mixed[1], "--vocab_size=400"], tmp_path / "mixed" / "partial"
    (tmp_path / "program.py").write_text(
        f"import sys; sys.path.insert(0, {str(DATA)!r}); import prepare; prepare.SAVE = -1; "
        "prepare.os.fsync = int; prepare.BATCH = 4; prepare.main()")
    for documents in (30, 90):
        process, done = start(tmp_path / "program.py", "mixed", f"--data_dir={tmp_path}", *words), 0
        while done < documents:
            assert process.is_alive()
            time.sleep(0.005)
            if (partial / "state.json").exists():
                state = json.loads((partial / "state.json").read_text())
                done = sum(source["train"]["documents"] for source in state["done"])
        process.kill()
        process.join()
        assert process.exitcode == -9 and not (tmp_path / "mixed" / "meta.json").exists()
    with open(partial / "train.bin", "ab") as file:
        file.write(b"more than the state knows of")
    encoded, encode = [], prepare.Tokenizer.encode_ordinary
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Tokenizer, "encode_ordinary", lambda *args: encoded.append(1) or encode(*args))
        resumed = build(tmp_path / "mixed", *words, "--workers=2")
    again = build(tmp_path / "mixed", *words)
    assert (again.bytes, again.meta) == (resumed.bytes, resumed.meta) and not partial.exists()
    assert 0 < len(encoded) <= sum(map(len, mixed[0])) - 90

def test_the_old_corpus_stays(jsonl, capfd):
    """While another process holds the lock, and when the command fails."""
    (jsonl.folder / "partial").mkdir(exist_ok=True)
    with filelock.FileLock(jsonl.folder / "partial" / ".lock"), pytest.raises(SystemExit):
        build(jsonl.folder, *jsonl.words)
    assert re.fullmatch("error: another process .*\n", capfd.readouterr().err)
    with pytest.raises(SystemExit):
        build(jsonl.folder, jsonl.words[0], "--vocab_size=60000")
    assert Corpus(jsonl.folder).bytes == jsonl.bytes
    build(jsonl.folder, *jsonl.words)
    assert not (jsonl.folder / "partial").exists()

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_while_it_reads_packages(number, tmp_path):
    """No corpus, no worker left (each holds the pipe, so its end means theirs), one line if there is time."""
    words = DATA / "prepare.py", "docstrings", "--packages=stdlib", f"--data_dir={tmp_path}", "--workers=2"
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:  # until the workers are there
        time.sleep(0.02)
    time.sleep(0.3)
    send = os.killpg if number == signal.SIGINT else os.kill  # a terminal sends Ctrl-C to the whole group
    send(process.pid, number)
    output = process.communicate(timeout=15)[0].strip()
    assert (process.returncode, output) == (-number, "stopped" if number == signal.SIGINT else "")
    assert os.listdir(tmp_path / "docstrings") == ["partial"]

# ----------------------------------------------------------------------------------------------------
# Docstrings of packages

LONG = "A paragraph of more than eighty characters, which documentation likes to repeat, stays once."
MODULE = f"""
'''Module
   and its second line.

   >>> a doctest'''
if os:
    class A:
        "A class."
        async def f(self):
            '''{LONG}'''
            def g(): '''g'''
            return '''not a docstring
            '''
else:
    def h(): "{LONG}"
x = '''not documentation
'''
add_docstr(os.open, r'''open(file)
    opens.''')
shared_docs["name"] = '''shared
'''
raise_doc("short string without a line break")
"""
TEXT = f"Module\nand its second line.\n\nA class.\n\n{LONG}\n\ng\n\nopen(file)\nopens.\n\nshared"

def test_docstrings_of_packages(tmp_path):
    """A document a module, in the split that its name's hash says; the number of workers changes no byte."""
    sources = {"__init__": MODULE, "a/__init__": "'a'", "b": f"'{LONG}'", "broken": "'text' (",
               "tests/c": "'tests'", "é": "'''Eh.\n'''"}
    for name, source in sources.items():
        (tmp_path / "pkg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pkg" / f"{name}.py").write_text(source)
    for workers in "12":
        words = "--packages=pkg", "--vocab_size=258", "--val_fraction=0.5", f"--workers={workers}"
        words = DATA / "prepare.py", "docstrings", *words, f"--data_dir={tmp_path / workers}"
        subprocess.run([sys.executable, *words], check=True,
                       env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": workers})
    corpus, other = (Corpus(tmp_path / workers / "docstrings") for workers in "12")
    assert corpus.bytes == other.bytes and corpus.meta == other.meta
    texts = {"pkg": TEXT, "pkg.a": "a", "pkg.é": "Eh."}
    for split, ids in (("train", corpus.train), ("val", corpus.val)):
        assert corpus.documents(ids) == [texts[name] for name in part(texts, split, 0.5)] != []

# ----------------------------------------------------------------------------------------------------
# Mistakes and damage

MISTAKES = {
    "--source=none.jsonl": "there is no file or folder none.jsonl",
    "--source=good.jsonl --column=body": "no column 'body', but id, text",
    "--source=good.jsonl --column=id": "holds int, not text",
    "--source=bad.jsonl": "cannot read bad.jsonl: line 2: Unterminated string",
    "--source=blank.jsonl": "too short for --vocab_size=4096",
    "--source=one.txt --vocab_size=260": "no document went to val: give more (a .txt file is one document",
    "--source=one.txt --vocab_size=300 --val_fraction=1": "--paragraphs=True cuts it at blank lines",
    "--source=good.jsonl --source=more/good.jsonl": "two sources have one name",
    "--source=good.jsonl --weights=1,2": "one for each source",
    "--source=good.jsonl --weights=-1": "numbers above 0",
    "--source=good.jsonl --source=more/good.jsonl --weights=8,1,": "numbers above 0",
    "--source=hf:more,,test": "cannot read more: Bad split: test",
}

@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line(line, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("more").mkdir()
    for name in ("good.jsonl", "more/good.jsonl"):
        write_jsonl(Path(name), [f"Document number {i} of a few." for i in range(60)])
    write_jsonl(Path("blank.jsonl"), ["", " "])
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"text": "cut o')
    Path("one.txt").write_text("Only one document, and the hash of it says train.")
    with pytest.raises(SystemExit) as end:
        build(tmp_path / "data" / "corpus", *line.split())
    output, errors = capfd.readouterr()
    assert end.value.code == 2 and output == "" and not list(tmp_path.glob("data/*/meta.json"))
    assert re.fullmatch(f"error: .*{re.escape(MISTAKES[line])}.*\n", errors)

def test_a_run_of_that_name_is_left_alone(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    write_jsonl(tmp_path / "good.jsonl", ["A text."])
    with pytest.raises(SystemExit):
        build(tmp_path / "run", f"--source={tmp_path}/good.jsonl")
    assert "holds a run or a model" in capfd.readouterr().err
    assert os.listdir(tmp_path / "run") == ["config.json"]

@pytest.mark.parametrize("damage", ["flipped train.bin", "short val.bin", "flipped tokenizer.tiktoken",
                                    "ids val.bin"])
def test_load_corpus_finds_damage(jsonl, damage, tmp_path, capfd):
    folder = shutil.copytree(jsonl.folder, tmp_path / "corpus")
    kind, name = damage.split()
    content = (folder / name).read_bytes()
    if kind == "ids":  # that the tokenizer does not have, with a sha256 that agrees
        changed = np.full(len(content) // 2, 700, "<u2").tobytes()
        old, new = (hashlib.sha256(tokens).hexdigest() for tokens in (content, changed))
        meta = (folder / "meta.json").read_text()
        (folder / "meta.json").write_text(meta.replace(old, new))
    else:
        changed = content[:-10] if kind == "short" else bytes([content[0] ^ 1]) + content[1:]
    (folder / name).write_bytes(changed)
    with pytest.raises(SystemExit):
        load_corpus(folder)
    assert re.fullmatch(f"error: cannot read .*{folder}.*\n", capfd.readouterr().err)
