"""data/prepare.py against other readings of what it writes: inspect, pkgutil, rustbpe's own encoder, a tiktoken Encoding built here."""
import base64
import fcntl
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
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
from tiktoken_ext import openai_public

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
    paths = f"--source={tmp_path / 'b.jsonl'}", f"--source=second={tmp_path / 'a.jsonl'}"
    build("two", *paths, "--column=body", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}", "--val_fraction=0.2")
    two = Corpus(tmp_path / "two")
    assert [source["name"] for source in two.meta["sources"]] == ["b.jsonl", "second"]
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
    endless = prepare.batches([Endless("x" * 300)], [0, None])
    assert [(position, len(batch)) for position, batch in itertools.islice(endless, 3)] == [([0, None], 4), ([0, 4], 4), ([0, 8], 4)]
    build("small", f"--source={jsonl.folder.parent / 'texts.jsonl'}", "--vocab_size=700", f"--data_dir={tmp_path}")
    assert Corpus(tmp_path / "small").contents() == jsonl.contents()


def test_vocabulary_is_trained_on_a_bounded_sample_of_each_stream(monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE", 20_000)
    sources = [prepare.Source("both", [Endless("quixotic "), Endless("zymurgy ")])]
    tokenizer = prepare.train_tokenizer(sources, 271, 0.05)    # 256 + 7 + 6 merges + 2
    assert b"quixotic" in tokenizer.ranks and b"zymurgy" in tokenizer.ranks


def test_a_short_source_counts_several_times_in_a_weighted_vocabulary(texts):
    """Up to its share, as if its texts stood there as often: what rustbpe makes of just that."""
    long, short = [[text for text in part if not in_val(text)] for part in (texts[20:], texts[:20])]
    times = round(sum(map(len, long)) / 3 / sum(map(len, short)))
    assert times > 2
    sources = [prepare.Source("long", [prepare.Listed([(text, text) for text in long])], 3.0),
               prepare.Source("short", [prepare.Listed([(text, text) for text in short])], 1.0)]
    oracle = rustbpe.Tokenizer()
    oracle.train_from_iterator(iter(long + short * times), 398, pattern=prepare.PATTERN)
    assert list(prepare.train_tokenizer(sources, 400, 0.05).ranks) == [bytes(token) for token, _ in oracle.get_mergeable_ranks()]


def test_a_million_spaces(tmp_path):
    """Both regex engines panic at such runs if they come in one piece."""
    lines = ["an ordinary line of a file"] * 60
    spaces = ["x" + " " * 1_200_000 + "y", "\n \n" * 400_000, "tail " + "\t" * 29_999]
    documents = spaces + [f"{line} {n}" for n, line in enumerate(lines)]
    write_jsonl(tmp_path / "spaces.jsonl", ["z", *documents])
    build("spaces", f"--source={tmp_path / 'spaces.jsonl'}", "--vocab_size=300", "--val_fraction=0.2", f"--data_dir={tmp_path}")
    corpus = Corpus(tmp_path / "spaces")
    found = corpus.documents("train") + corpus.documents("val")
    assert sorted(found) == sorted(["z", *(text for text in documents if not text.isspace())])


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face datasets, several sources, GPT-2

class Endless:
    """A stream without end of one text."""

    def __init__(self, text):
        self.text, self.size = text, None

    def read(self, state=None):
        for self.count in itertools.count((state or 0) + 1):
            yield "key", self.text

    def state(self):
        return self.count


@pytest.fixture(scope="module")
def dataset(texts, tmp_path_factory):
    """A folder laid out like a dataset on the hub: two configurations, three parquet files, two splits, the text in a column `body`."""
    folder = tmp_path_factory.mktemp("hub") / "some_dataset"
    folder.mkdir()
    for number, part in enumerate((texts[:90], texts[90:91], texts[91:])):
        table = pyarrow.table({"id": range(len(part)), "body": part})
        pyarrow.parquet.write_table(table, folder / f"train-{number}.parquet", row_group_size=7)
    write_jsonl(folder / "other.jsonl", ["one", "two"])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train-*.parquet\n"
        "- config_name: other\n  data_files:\n  - split: test\n    path: other.jsonl\n---\n")
    return folder


def test_a_dataset_is_streamed_like_a_file(dataset, jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    build("hub", f"--source=hf:{dataset},main,,body", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}")
    build("named", f"--source=few=hf:{dataset},main,train", "--column=body", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}")
    assert Corpus(tmp_path / "hub").contents() == Corpus(tmp_path / "named").contents() == jsonl.contents()
    assert [Corpus(tmp_path / name).meta["sources"][0]["name"] for name in ("hub", "named")] == ["some_dataset", "few"]
    assert not list(tmp_path.rglob("*.parquet")) and not (tmp_path / "cache").exists()    # no text on the disk


def mixed_command(dataset, texts, folder, *more):
    """Three sources of different kinds, 5 : 2 : 1, without a document in common."""
    write_jsonl(folder / "a.jsonl", [f"A{n} {text}" for n, text in enumerate(texts)])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": f"B{n} {text[::-1]}"}) + "\n"
                                                              for n, text in enumerate(texts[:50])).encode()))
    return ["mixed", f"--source=first={folder / 'a.jsonl'}", f"--source=second={folder / 'b.jsonl.gz'}", f"--source=third=hf:{dataset},main,,body",
            "--weights=5,2,1", "--val_fraction=0.2", f"--data_dir={folder}", *more]


def test_weights(dataset, jsonl, texts, tmp_path, capfd):
    """Each document comes from the source furthest behind; each source keeps its order, its range of val.bin, and never repeats."""
    args = mixed_command(dataset, texts, tmp_path, f"--tokenizer={jsonl.folder}")
    build(*args)
    mixed, parts = Corpus(tmp_path / "mixed"), [[f"A{n} {text}" for n, text in enumerate(texts)],
                                               [f"B{n} {text[::-1]}" for n, text in enumerate(texts[:50])], texts]
    queues = [[text for text in part if not in_val(text, 0.2)] for part in parts]
    tokens, weights, expected, at_end = [0, 0, 0], (5, 2, 1), [], None
    encoding = mixed.encoding()
    while any(queues):
        left = [number for number in range(3) if queues[number]]
        number = min(left, key=lambda number: tokens[number] / weights[number])
        expected.append(queues[number].pop(0))
        tokens[number] += len(encoding.encode_ordinary(expected[-1])) + 1
        at_end = at_end or (not queues[number] and tokens.copy())
    assert mixed.documents("train") == expected
    assert at_end[1] / sum(at_end) == pytest.approx(2 / 8, abs=0.03) and at_end[0] / sum(at_end) == pytest.approx(5 / 8, abs=0.03)
    assert [source["train_tokens"] for source in mixed.meta["sources"]] == tokens
    end = 0
    for source, part in zip(mixed.meta["sources"], parts, strict=True):
        held = mixed.documents("val", *source["val_range"])
        assert held == [text for text in part if in_val(text, 0.2)] and source["val_range"][0] == end
        assert source["val_bytes"] == sum(len(text.encode()) for text in held)
        end = source["val_range"][1]
    assert end == len(mixed.tokens["val"])
    output, errors = capfd.readouterr()
    assert re.search(r"second has run out .*: first 6[0-9.]+%, second 2[0-9.]+%, third 1[0-9.]+%", errors)
    assert "shares of the training tokens: " + ", ".join(f"{name} {n / sum(tokens):.1%}" for name, n in
                                                         zip(("first", "second", "third"), tokens, strict=True)) in output

    build(*args, "--max_tokens=2000")
    short = Corpus(tmp_path / "mixed")
    documents = short.documents("train")
    assert documents == expected[: len(documents)] and len(short.tokens["train"]) >= 2000
    assert short.tokens["train"][:2000].tolist() == mixed.tokens["train"][:2000].tolist()
    assert short.end not in short.tokens["train"][1999:-1]    # ends with the document that reaches it
    assert (short.meta["max_tokens"], [source["weight"] for source in short.meta["sources"]]) == (2000, [5, 2, 1])


def test_bar_with_max_tokens_ends_where_the_corpus_does(jsonl, tmp_path, monkeypatch):
    """The bound is one of training tokens; validation tokens come on top, and the last document may go beyond. Text that is shorter ends before."""
    bars = []

    class Bar(prepare.tqdm):
        def __init__(self, **settings):
            super().__init__(**settings | {"disable": False, "file": io.StringIO()})
            self.early = None
            bars.append(self)

        def update(self, n):
            super().update(n)
            if self.n > 1500:
                self.early = self.early or self.total

    monkeypatch.setattr(prepare, "tqdm", Bar)
    for bound in (3000, 10**9):
        build(f"to{bound}", f"--source={jsonl.folder.parent / 'texts.jsonl'}", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}",
              f"--max_tokens={bound}", "--val_fraction=0.3")  # fmt: skip
        made = Corpus(tmp_path / f"to{bound}").tokens
        assert bars[-1].n == len(made["train"]) + len(made["val"]) and len(made["val"]) > 0
        if bound == 3000:
            assert 3000 < bars[-1].early < 3000 + len(made["val"]) and bars[-1].total == bars[-1].n
        else:  # by the size of the file, which has more in it than the text
            assert 0.5 < bars[-1].early / bars[-1].n < 2 and 1 <= bars[-1].total / bars[-1].n < 1.3


def test_validation_tokens_are_bounded(jsonl, texts, tmp_path, capfd):
    """What is above the bound is in neither file, so that no copy of a validation document can be in train.bin."""
    write_jsonl(tmp_path / "texts.jsonl", texts)
    build("few", f"--source={tmp_path / 'texts.jsonl'}", f"--tokenizer={jsonl.folder}", f"--data_dir={tmp_path}", "--val_tokens=1000")
    few, everything = Corpus(tmp_path / "few"), jsonl.documents("val")
    held = few.documents("val")
    assert few.documents("train") == jsonl.documents("train") and 0 < len(held) < len(everything) and held == everything[: len(held)]
    assert len(few.tokens["val"]) >= 1000 and few.end not in few.tokens["val"][999:-1]
    assert few.meta["sources"][0]["left_out"] == len(everything) - len(held)
    assert f"{len(everything) - len(held):,} documents are in neither file" in capfd.readouterr().out


def test_gpt2(jsonl, tmp_path, monkeypatch):
    """tiktoken's own definition of gpt2, only with other merges, for its files are downloaded."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"the ": 256, b" a": 257} | {b"%07d" % number: number for number in range(258, 50_256)}
    monkeypatch.setattr("tiktoken_ext.openai_public.data_gym_to_mergeable_bpe_ranks", lambda **files: ranks)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    build("gpt2", f"--source={jsonl.folder.parent / 'texts.jsonl'}", "--tokenizer=gpt2", f"--data_dir={tmp_path}")
    gpt2 = Corpus(tmp_path / "gpt2")
    assert gpt2.meta["special_tokens"] == {"<|endoftext|>": 50_256, "<|mask|>": 50_257} and gpt2.meta["vocab_size"] == 50_304
    assert gpt2.ranks == ranks and gpt2.meta["pattern"] == openai_public.r50k_pat_str
    assert gpt2.documents("train") == jsonl.documents("train") and gpt2.documents("val") == jsonl.documents("val")
    assert 257 in gpt2.tokens["train"] and 50_257 not in gpt2.tokens["train"]


def test_gpt2_offline(tmp_path):
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    (tmp_path / "a.txt").write_text("text")
    args = command("gpt2", f"--source={tmp_path / 'a.txt'}", "--tokenizer=gpt2", f"--data_dir={tmp_path}")
    done = subprocess.run(args, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: --tokenizer=gpt2 is downloaded by tiktoken .*; go online, .* or train a vocabulary .*\n", done.stderr)
    assert "openaipublic" in done.stderr and len(done.stderr) < 400


# ----------------------------------------------------------------------------------------------------------------------
# Going on after an interruption

def test_kill_9_and_the_same_command_again(dataset, texts, tmp_path, monkeypatch, capfd):
    """A real one, in the middle of three sources; what is saved then is used, and the bytes are those of an undisturbed build."""
    args = mixed_command(dataset, texts, tmp_path, "--vocab_size=400", "--workers=1")
    wrapper = (f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import prepare; prepare.SAVE, prepare.BATCH = 0, 3000; "
               f"sys.argv = ['prepare.py', *{args!r}]; prepare.main(prepare.arguments())")
    process = subprocess.Popen([sys.executable, "-c", wrapper], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    state, until, documents = tmp_path / "mixed" / "partial" / "state.json", time.time() + 60, 0
    while documents < 60:
        assert process.poll() is None and time.time() < until
        time.sleep(0.005)
        if state.exists():
            done = json.loads(state.read_text())["done"]
            documents = sum(source["train"]["documents"] for source in done)
    process.kill()
    process.communicate()
    with open(state.parent / "train.bin", "ab") as file:
        file.write(b"more than the state knows of")
    assert not (tmp_path / "mixed" / "meta.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "train_tokenizer", None)    # it would not be the same command if this were called
        build(*args[:-1], "--workers=2")
    resumed, meta = Corpus(tmp_path / "mixed").contents(), Corpus(tmp_path / "mixed").meta
    files = sorted(file.name for file in (tmp_path / "mixed").iterdir())
    assert files == ["meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
    build(*args)
    assert Corpus(tmp_path / "mixed").contents() == resumed and Corpus(tmp_path / "mixed").meta == meta


class PowerCut(BaseException):
    pass


def test_cut_anywhere(dataset, jsonl, texts, tmp_path, monkeypatch):
    """Again and again, at every 19th document: none is lost or comes twice. And another command starts over."""
    monkeypatch.setattr(prepare, "BATCH", 2000)
    args = mixed_command(dataset, texts[:80], tmp_path, f"--tokenizer={jsonl.folder}", "--max_tokens=9000", "--val_tokens=1500")
    build(*args)
    undisturbed, meta, encoded = Corpus(tmp_path / "mixed").contents(), Corpus(tmp_path / "mixed").meta, prepare.encoded
    documents = itertools.count(1)
    monkeypatch.setattr(prepare, "SAVE", -1)

    def cut(source, encode):
        for document in encoded(source, encode):
            if next(documents) % 19 == 0:
                raise PowerCut
            yield document

    monkeypatch.setattr(prepare, "encoded", cut)
    cuts = 0
    while cuts == 0 or not (tmp_path / "mixed" / "meta.json").exists() or (tmp_path / "mixed" / "partial").exists():
        try:
            build(*args)
        except PowerCut:
            cuts += 1
    assert cuts > 3
    assert Corpus(tmp_path / "mixed").contents() == undisturbed and Corpus(tmp_path / "mixed").meta == meta

    with pytest.raises(PowerCut):
        build(*args)
    assert (tmp_path / "mixed" / "partial" / "state.json").exists()
    monkeypatch.setattr(prepare, "encoded", encoded)
    build(*args, "--val_fraction=0.3")
    other = Corpus(tmp_path / "mixed").contents()
    build(*args, "--val_fraction=0.3")
    assert Corpus(tmp_path / "mixed").contents() == other != undisturbed


def test_stopped_in_the_middle(dataset, texts, tmp_path):
    """SIGTERM after a save: one line says that the same command goes on."""
    args = mixed_command(dataset, texts, tmp_path, "--vocab_size=400")
    code = (f"import sys, signal, os; sys.path.insert(0, {str(SCRIPT.parent)!r}); import prepare; prepare.SAVE = -1; save = os.replace; "
            "signal.signal(signal.SIGTERM, prepare.stop); "
            "os.replace = lambda *names: (save(*names), str(names[1]).endswith('state.json') and os.kill(os.getpid(), signal.SIGTERM)); "
            f"sys.argv = ['prepare.py', *{args!r}]; prepare.main(prepare.arguments())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (143, "stopped, the same command goes on from here")
    assert (tmp_path / "mixed" / "partial" / "state.json").exists() and not (tmp_path / "mixed" / "meta.json").exists()


def test_two_at_once(jsonl, capfd):
    before = jsonl.contents()
    opened = os.open(jsonl.folder, os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    with pytest.raises(SystemExit):
        build("corpus", f"--source={jsonl.folder.parent / 'texts.jsonl'}", "--vocab_size=300", f"--data_dir={jsonl.folder.parent}")
    os.close(opened)
    assert capfd.readouterr().err == f"error: another process is preparing {jsonl.folder}: wait until it has ended\n"
    assert jsonl.contents() == before


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
    "corpus --source=good.jsonl --source=more/good.jsonl": "two sources have one name (good.jsonl, good.jsonl): give names",
    "corpus --source=good.jsonl --weights=1,2": "--weights has 2 numbers for 1 sources",
    "corpus --source=good.jsonl --weights=0": "--weights: invalid weights value: '0'",
    "corpus --source=good.jsonl --source=b=good.jsonl --max_tokens=9": "--max_tokens with several sources needs --weights",
    "corpus --source=good.jsonl --max_tokens=0": "--max_tokens=0 is less than 1",
    "corpus --source=good.jsonl --source=blank.jsonl": "no document with text in blank.jsonl",
    "corpus --source=hf:": "is not hf:DATASET[,config][,split][,column]",
    "corpus --source=hf:a,b,c,d,e": "is not hf:DATASET[,config][,split][,column]",
    "corpus --source=hf:no/such_dataset": "hf:no/such_dataset: cannot be streamed: ",
    "corpus --source=hf:hub,cc": "hf:hub: cannot be streamed: BuilderConfig 'cc' not found",
    "corpus --source=hf:hub,,test": "hf:hub: cannot be streamed: Bad split: test. Available splits: ['train']",
    "corpus --source=hf:hub,,,body": "hf:hub: no column 'body', but id, text",
    "corpus --source=good.jsonl --tokenizer=many": "more than the 65536 ids that uint16 holds",
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
    for folder in ("empty", "more", "hub", "many"):
        Path(folder).mkdir()
    for folder in ("more", "hub"):
        shutil.copy("good.jsonl", folder)
    if "many" in line:
        many = b"".join(base64.b64encode(b"%07d" % number) + b" %d\n" % number for number in range(65_535))
        Path("many/tokenizer.tiktoken").write_bytes(many)
        Path("many/meta.json").write_text(json.dumps({"sha256": {"tokenizer.tiktoken": hashlib.sha256(many).hexdigest()},
                                                      "pattern": prepare.PATTERN, "special_tokens": {"<|endoftext|>": 65_535, "<|mask|>": 65_536}}))
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


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_is_no_mistake(tmp_path, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    args = command("docstrings", "--packages=json,email,logging", "--vocab_size=400", f"--data_dir={tmp_path}")
    done = subprocess.run(args, stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, timeout=100)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"") and Corpus(tmp_path / "docstrings").documents("train")


def test_changed_tokenizer_is_refused(jsonl, tmp_path, capfd):
    (tmp_path / "meta.json").write_bytes((jsonl.folder / "meta.json").read_bytes())
    (tmp_path / "tokenizer.tiktoken").write_bytes(jsonl.contents()["tokenizer.tiktoken"][:-10])
    with pytest.raises(SystemExit):
        build("corpus", f"--source={jsonl.folder.parent / 'texts.jsonl'}", f"--tokenizer={tmp_path}", f"--data_dir={tmp_path}")
    assert "is not the file that its meta.json describes" in capfd.readouterr().err


@pytest.mark.parametrize("change", [
    {"sha256": []}, {"special_tokens": []}, {"special_tokens": {"<|endoftext|>": -1, "<|mask|>": 1}}, {"pattern": "("}, {"pattern": 5},
    {"normalizer": "NFX"},
])  # fmt: skip
def test_a_tokenizer_that_is_not_well_described_is_refused(jsonl, tmp_path, capfd, change):
    (tmp_path / "meta.json").write_text(json.dumps(json.loads((jsonl.folder / "meta.json").read_text()) | change))
    (tmp_path / "tokenizer.tiktoken").write_bytes(jsonl.contents()["tokenizer.tiktoken"])
    with pytest.raises(SystemExit):
        build("corpus", f"--source={jsonl.folder.parent / 'texts.jsonl'}", f"--tokenizer={tmp_path}", f"--data_dir={tmp_path}")
    assert "does not describe a tokenizer" in capfd.readouterr().err


def test_help(capfd):
    with pytest.raises(SystemExit) as stop:
        build("--help")
    output = capfd.readouterr().out
    assert stop.value.code == 0 and "$ python data/prepare.py docstrings" in output
    assert all(f"--{key}" in output for key in ("source", "column", "packages", "vocab_size", "tokenizer", "val_fraction", "data_dir",
                                                  "weights", "max_tokens", "val_tokens")) and "hf:" in output
