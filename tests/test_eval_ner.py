"""eval_ner.py: its scores against seqeval, its alignment against the text, its cache against the plain path, and commands as a user gives them."""
import functools
import http.server
import json
import random
import re
import shutil
import threading

import numpy as np
import pytest
import seqeval.metrics
import tiktoken
import torch
from conftest import ROOT, run_many
from seqeval.scheme import IOB2

import eval_ner
from eval_ner import TAGS, TYPES, Config, Sentence
from model import Llama, ModelConfig
from runs import load_tokenizer

UNER = ROOT / "data" / "uner"  # the real sets, where someone has fetched them
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")  # seqeval's, where there is nothing to divide by

NAMES = {"PER": ["Maria", "Jose Rizal", "Andronik Mirganjan", "Ana"], "ORG": ["Nato", "Danske Bank", "UN"], "LOC": ["Cebu", "Ny Kobenhavn", "Rom"]}
AROUND = {"PER": "siger {} nu .", "ORG": "firmaet {} , som", "LOC": "rejser til {} ."}


def mini(n, seed):
    """n sentences with one or two entities each, one in five with none."""
    rng, made = random.Random(seed), []
    for i in range(n):
        words, tags = ["Mens", "vi"], ["O", "O"]
        for kind in rng.sample(TYPES, rng.choice([1, 2])) if i % 5 else ["", ""]:
            for word in AROUND.get(kind, "venter vi her").split():
                inside = rng.choice(NAMES[kind]).split() if word == "{}" else [word]
                words += inside
                tags += [f"{'I' if k else 'B'}-{kind}" for k in range(len(inside))] if word == "{}" else ["O"]
        made.append(Sentence(words, tags, " ".join(words)))
    return made


def iob2(sentences):
    """The text of a file."""
    blocks = []
    for i, (words, tags, text) in enumerate(sentences):
        lines = [f"{k}\t{word}\t{tag}\t-\tme" for k, (word, tag) in enumerate(zip(words, tags, strict=True), 1)]
        blocks.append("\n".join([f"# sent_id = {i}", f"# text = {text}"] * bool(text) + lines) + "\n")
    return "\n".join(blocks) + "\n"


def write(folder, sets):
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentences in sets.items():
        (folder / f"{name}.iob2").write_text(sentences if isinstance(sentences, str) else iob2(sentences), encoding="utf8")
    return folder


MINI = {
    "da_ddt-ud-train": mini(60, 0), "da_ddt-ud-dev": mini(20, 1), "da_ddt-ud-test": mini(30, 2), "tl_trg-ud-test": mini(12, 3),
    "en_ewt-ud-dev": mini(60, 4),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Scores


def random_tags(rng, n, adversarial):
    """Tags in any order, or with entities that mostly begin as they should."""
    if adversarial:
        return [rng.choice(TAGS) for _ in range(n)]
    tags = []
    while len(tags) < n:
        kind = rng.choice(TYPES)
        tags += rng.choice([["O"], ["O", "O"], [f"B-{kind}"], [f"B-{kind}", f"I-{kind}"], [f"B-{kind}", f"B-{kind}", f"I-{kind}"]])
    return tags[:n]


@pytest.mark.parametrize("adversarial", [False, True])
def test_scores_are_seqevals(adversarial):
    """Micro and per type, in both schemes, on sequences that also continue what never began; empty ones too."""
    for seed in range(20):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 12) for _ in range(30)]
        gold, found = ([random_tags(rng, n, adversarial) for n in lengths] for _ in range(2))
        found = [tags if rng.random() < 0.4 else guess for tags, guess in zip(gold, found, strict=True)]
        if seed == 0:
            found = [["O"] * n for n in lengths]
        if seed == 1:
            gold = [["O"] * n for n in lengths]
        result = eval_ner.score([Sentence(["w"] * len(tags), tags, "") for tags in gold], found)
        for scheme, how in {"strict": {"mode": "strict", "scheme": IOB2}, "conlleval": {}}.items():
            for key, metric in {"f1": "f1_score", "precision": "precision_score", "recall": "recall_score"}.items():
                assert result[scheme][key] == pytest.approx(getattr(seqeval.metrics, metric)(gold, found, **how), abs=1e-12), (seed, scheme, key)
            report = seqeval.metrics.classification_report(gold, found, output_dict=True, **how)
            for kind in TYPES:
                assert result[scheme][kind] == pytest.approx(report.get(kind, {"f1-score": 0})["f1-score"], abs=1e-12)
        assert np.sum(result["sentences"], 0)[2] == result["entities"]


def test_schemes_differ_on_an_entity_that_does_not_begin():
    """By hand: conlleval takes I-PER after O for an entity, strict IOB2 does not."""
    result = eval_ner.score([Sentence(["a", "b", "c"], ["B-PER", "O", "B-LOC"], "")], [["I-PER", "O", "B-LOC"]])
    assert result["strict"] == {"f1": pytest.approx(2 / 3), "precision": 1, "recall": 0.5, "PER": 0, "ORG": 0, "LOC": 1}
    assert result["conlleval"]["f1"] == result["conlleval"]["PER"] == 1
    assert result["sentences"] == [[1, 1, 2]] and result["entities"] == 2


def test_bootstrap_is_that_of_a_loop():
    """Mean and quantiles of F1 over resampled sentences, as a plain loop finds them; a copy of a run differs from it by nothing."""
    rng = random.Random(0)
    counts = [[rng.randint(0, 1), rng.randint(1, 3), rng.randint(1, 3)] for _ in range(40)]
    other = [[min(found + rng.randint(0, 1), 1), predicted, true] for found, predicted, true in counts]
    samples = eval_ner.resampled([{"sentences": counts}], 4000)
    loop = []
    for _ in range(4000):
        found, predicted, true = (sum(column) for column in zip(*rng.choices(counts, k=40), strict=True))
        loop.append(2 * found / (predicted + true))
    assert samples.mean() == pytest.approx(np.mean(loop), abs=0.005)
    assert np.quantile(samples, [0.025, 0.975]) == pytest.approx(np.quantile(loop, [0.025, 0.975]), abs=0.015)
    two = eval_ner.resampled([{"sentences": counts}, {"sentences": other}], 4000)
    assert two == pytest.approx((samples + eval_ner.resampled([{"sentences": other}], 4000)) / 2)  # paired: the same sentences for both
    assert eval_ner.p_value(samples - samples) == 1
    assert eval_ner.p_value(eval_ner.resampled([{"sentences": other}], 4000) - samples) < 0.01


@pytest.mark.parametrize("z", [0.5, 1.5, 2.5])
def test_p_value_is_that_of_a_normal_test(z):
    difference = np.random.default_rng(0).normal(z, 1, 200_000)
    p = eval_ner.p_value(difference)
    assert p == pytest.approx(2 * (1 - torch.distributions.Normal(0, 1).cdf(torch.tensor(z)).item()), rel=0.05) == eval_ner.p_value(-difference)


def test_table_has_the_first_run_less_the_second_and_both_schemes():
    """By hand: a finds all, b only entities that do not begin, which conlleval alone counts."""
    gold = mini(40, 9)
    tagged = {"random weights": [["O"] * len(s.words) for s in gold], "a": [s.tags for s in gold],
              "b": [[tag.replace("B-", "I-") for tag in s.tags] for s in gold]}  # fmt: skip
    systems = {name: {("head", 0): {"sets": {"da_ddt": eval_ner.score(gold, tags)}}} for name, tags in tagged.items()}
    rows = eval_ner.table(systems, ["head"], 1, {"da_ddt": gold})
    cells = [[cell.strip() for cell in line.split("|")[4:-1]] for line in eval_ner.markdown(rows).splitlines()[2:7]]
    nothing = ["0.0", "0.0 to 0.0", "0.0", "0.0"]
    assert cells == [
        ["all O", *nothing, "0.0", "0.0", "0.0", "0.0"], ["random weights", *nothing, "0.0", "0.0", "0.0", "0.0"],
        ["a", "100.0", "100.0 to 100.0", *["100.0"] * 6], ["b", *nothing, "100.0", "0.0", "0.0", "0.0"],
        ["a - b", "100.0", "100.0 to 100.0", "p = 0.002", *[""] * 5],
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Words and subwords

BYTES = tiktoken.Encoding("bytes", explicit_n_vocab=257, pat_str=r"[^\r\n]+|\s+", special_tokens={"<|endoftext|>": 256},
                          mergeable_ranks={bytes([i]): i for i in range(256)})  # fmt: skip
HARD = [
    Sentence("自從 2004 年 提出 了 。".split(), ["O"] * 6, "自從2004年提出了。"),
    Sentence(["Tua", "sa", "Cebu", "ang", "ako", "-ng", "ginikanan", "."], ["O", "O", "B-LOC"] + ["O"] * 5, "Tua sa Cebu ang ako -ng ginikanan."),
    Sentence(["\u200b", "a\u200db", "\ufeff", "e\u0301", "🤷🏽‍♀️"], ["B-PER", "I-PER", "O", "O", "B-ORG"], "\u200ba\u200db \ufeff e\u0301🤷🏽‍♀️"),
    Sentence(["5 000", "kr\u00a0om", "<|endoftext|>", "-", "-"], ["O"] * 5, "5 000 kr\u00a0om <|endoftext|> --"),
    Sentence(["not", "in", "the", "text"], ["O"] * 4, "something else"),
    Sentence(["no", "text"], ["B-ORG", "I-ORG"], ""),
    Sentence([f"w{i}" for i in range(90)], ["O", "B-PER", "I-PER"] * 30, ""),
    Sentence(["a", "x" * 400, "b"], ["O", "B-LOC", "O"], "a " + "x" * 400 + " b"),
]


def check_alignment(encoding, sentences, config):
    """Each word is tagged once, at its first or last token, after all of the window before it; the windows hold nothing but the text."""
    rows, eot, word = eval_ner.rows_of(encoding, sentences, config), encoding.encode_single_token("<|endoftext|>"), 0
    pieces = [piece for s in sentences for piece in eval_ner.pieces_of(encoding, s)]
    tags = [tag for s in sentences for tag in s.tags]
    for s in sentences:
        written = b"".join(encoding.decode_single_token_bytes(t) for piece in eval_ner.pieces_of(encoding, s) for t in piece).decode()
        if "".join(s.text.split()) == "".join("".join(s.words).split()):
            assert written == " " + s.text
        assert "".join(written.split()) == "".join("".join(s.words).split())
    for ids, at, labels in zip(rows.ids, rows.at, rows.tags, strict=True):
        assert len(ids) <= config.length and ids[0] == eot and eot not in ids[1:] and len(at) == len(labels) > 0 and at == sorted(set(at))
        half = (len(ids) - 1) // 2
        if config.twice:
            assert ids[1 : half + 1] == ids[half + 1 :] and min(at) > half
        for column, label in zip(at, labels, strict=True):
            piece, n = pieces[word], len(pieces[word])
            assert TAGS[label] == tags[word]
            if n > half:  # longer than a window
                assert ids[column] == piece[-1 if config.label_at == "last" else 0]
            elif config.label_at == "last":
                assert ids[column - n + 1 : column + 1] == piece
            else:
                assert ids[column : column + n] == piece
            word += 1
    assert word == len(pieces) == len(tags) == sum(len(s.words) for s in sentences)
    return rows


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("label_at", ["first", "last"])
@pytest.mark.parametrize("length", [16, 64, 128])
def test_alignment(quick_start, label_at, twice, length):
    config = Config(label_at=label_at, twice=twice, length=length)
    for encoding in (BYTES, load_tokenizer(quick_start.folder)):
        check_alignment(encoding, HARD + mini(20, 5), config)


def test_long_sentence_is_read_behind_what_precedes_it():
    """By hand: words of 2 tokens, 15 of room, so 7 words a window; later windows begin with the words that fit into half of it."""
    assert list(eval_ner.windows([2] * 12, 15)) == [(0, 0, 7), (5, 7, 12)]
    assert list(eval_ner.windows([15, 15, 1], 15)) == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert list(eval_ner.windows([2] * 7, 15)) == [(0, 0, 7)]


@pytest.mark.skipif(not list(UNER.glob("*.iob2")), reason="data/uner holds no real sets")
def test_alignment_of_real_sets(quick_start):
    encoding = load_tokenizer(quick_start.folder)
    for path in sorted(UNER.glob("*.iob2")):
        sentences = eval_ner.read_iob2(path)
        for config in (Config(), Config(label_at="first", twice=True, length=32)):
            check_alignment(encoding, sentences, config)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Files

BROKEN = {  # what is wrong -> content of a file, the line to be named, a part of the message
    "four columns": (b"1\tA\tO\t-\n", 1, "5 columns"),
    "spaces for tabs": (b"# text = A\n1 A O - me\n", 2, "5 columns"),
    "no word": (b"1\tA\tO\t-\tme\n2\t\tO\t-\tme\n", 2, "5 columns"),
    "unknown tag": (b"1\tA\tO\t-\tme\n2\tB\tB-GPE\t-\tme\n", 2, "'B-GPE'"),
    "only tabs": (b"1\tA\tO\t-\tme\n\t\t\t\t\n", 2, "5 columns"),
    "no blank line": (b"1\tA\tO\t-\tme\n1\tB\tO\t-\tme\n", 2, "the index 2"),
    "empty": (b"", 1, "no words"),
    "comments only": (b"# text = A\n\n", 1, "no words"),
    "encoding": ("1\tÆ\tO\t-\tme\n2\tbåd\tO\t-\tme\n".encode("latin1"), 1, "UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_one_line(tmp_path, capsys, name):
    content, line, part = BROKEN[name]
    (tmp_path / "x.iob2").write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        eval_ner.read_iob2(tmp_path / "x.iob2")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(f"error: {tmp_path}/x.iob2, line {line}: ") and part in error and error.count("\n") == 1


def test_reading_gives_back_what_was_written(tmp_path, capsys):
    for ending in ("\n", "\r\n"):
        (tmp_path / "x.iob2").write_bytes(iob2(HARD + mini(5, 6)).rstrip("\n").replace("\n", ending).encode())
        assert eval_ner.read_iob2(tmp_path / "x.iob2") == HARD + mini(5, 6)
    assert capsys.readouterr().err == ""


def test_tags_of_the_published_files(tmp_path, capsys):
    """OTH is O; an entity that does not begin is told and stays."""
    tags = ["B-OTH", "I-OTH", "I-PER", "I-PER", "B-LOC", "I-ORG"]
    write(tmp_path, {"x": [Sentence(list("abcdef"), tags, "a b c d e f")]})
    assert eval_ner.read_iob2(tmp_path / "x.iob2")[0].tags == ["O", "O", "I-PER", "I-PER", "B-LOC", "I-ORG"]
    assert "x.iob2: no B- before I-PER on line 5, I-ORG on line 8;" in capsys.readouterr().err


def test_without_a_train_file_a_tenth_of_dev_is_dev(tmp_path):
    write(tmp_path, {"en_ewt-ud-dev": mini(300, 7), "en_ewt-ud-test": mini(5, 8)})
    train, dev, _ = eval_ner.load_sets(Config(train="en_ewt", uner_dir=str(tmp_path)))
    texts = [{s.text for s in part} for part in (train, dev)]
    assert len(train) + len(dev) == 300 and not texts[0] & texts[1] and 10 < len(dev) < 60
    write(tmp_path, {"en_ewt-ud-dev": mini(300, 7)[::-1]})  # in another order: the same tenth
    assert {s.text for s in eval_ner.load_sets(Config(train="en_ewt", uner_dir=str(tmp_path)))[1]} == texts[1]


def test_few_sentences(capsys):
    sentences = mini(60, 0)
    draws = [eval_ner.few(sentences, 4, seed) for seed in range(5)]
    for draw in draws:
        assert len(draw) == len({id(s) for s in draw}) == 12
        assert all(sum(f"B-{kind}" in s.tags for s in draw) >= 4 for kind in TYPES)
    assert draws[0] == eval_ner.few(sentences, 4, 0) and draws[0] != draws[1]
    with pytest.raises(SystemExit):
        eval_ner.few(sentences, 40, 0)
    assert "lower shots" in capsys.readouterr().err


@pytest.fixture
def host(tmp_path):
    """A web server with the repositories of two sets, and what was asked of it."""
    for name, repository in {"da_ddt": "Danish-DDT", "tl_trg": "Tagalog-TRG"}.items():
        write(tmp_path / "host" / f"UNER_{repository}" / "HEAD", {key: value for key, value in MINI.items() if key.startswith(name)})
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append((self.path, self.headers["User-Agent"]))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "host"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_fetching(tmp_path, monkeypatch, host, capsys):
    """What is missing is fetched once and kept; what is not published is named in one line; offline the line says what to put where."""
    monkeypatch.setattr(eval_ner.configurator, "HERE", str(tmp_path))
    url, asked = host
    config = Config(uner_url=url)
    first = eval_ner.load_sets(config)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(notes) == 1 and "de_pud (UNER_German-PUD), " in notes[0] and "da_ddt" not in notes[0]
    assert set(first[2]) == {"da_ddt", "tl_trg"} and [len(part) for part in first[:2]] == [60, 20]
    kept = {path.name: path.read_text(encoding="utf8") for path in (tmp_path / "data" / "uner").iterdir()}
    assert kept == {f"{name}.iob2": iob2(sentences) for name, sentences in MINI.items() if not name.startswith("en")}
    assert not any("Python" in agent for _, agent in asked) and not any("da_ddt" in path for path, _ in asked[20:])
    again = eval_ner.load_sets(Config(uner_url="http://127.0.0.1:9", test="da_ddt,tl_trg"))  # nobody listens there
    assert again == first
    with pytest.raises(SystemExit):
        eval_ner.load_sets(Config(uner_url="http://127.0.0.1:9", train="sv_talbanken"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --train=sv_talbanken: no file for sv_talbanken (UNER_Swedish-Talbanken); download <set>-ud-<split>.iob2 from https://")
    assert f"put it into {tmp_path}/data/uner" in error and "refused" in error


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Tuning


def tiny(seed=0):
    torch.manual_seed(seed)
    return Llama(ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24, vocab_size=257)).eval()


CONFIG = Config(device="cpu", length=32, head_epochs=3, epochs=2)


def test_cached_features_equal_the_plain_path():
    """A head tuned on cached features, and its tags, are those of a head whose features are computed anew at every step."""
    model, train, dev = tiny(), mini(25, 0) + HARD, mini(10, 1)
    rows, dev_rows = (eval_ner.rows_of(BYTES, part, CONFIG) for part in (train, dev))
    with torch.no_grad():  # one row at a time, no padding
        slow = [model.features(torch.tensor([ids]))[0, at] for ids, at in zip(rows.ids, rows.at, strict=True)]
    order = list(range(len(slow)))[::-1]
    assert torch.allclose(eval_ner.frozen(model)(rows, order), torch.cat(slow[::-1]), atol=1e-5)

    def plain(rows, which):
        with torch.no_grad():
            return eval_ner.word_features(model, rows, which)

    heads = [eval_ner.tune(CONFIG, read, [], 16, rows, dev_rows, dev, 0)[0] for read in (eval_ner.frozen(model), plain)]
    assert torch.allclose(heads[0].weight, heads[1].weight, atol=1e-4) and heads[0].weight.abs().max() > 0.1
    assert eval_ner.predict(plain, heads[0], rows, train) == eval_ner.predict(eval_ner.frozen(model), heads[0], rows, train)


class Oracle(torch.nn.Module):
    """Its embedding of a byte is the tag that a word ending in the byte has."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.eye(len(TAGS))[torch.arange(257) % len(TAGS)])

    def features(self, idx):
        return self.table[idx]


def with_label(sentences, tags=None):
    """Sentences whose words end in a letter that tells the tag, with these tags or others."""
    told = [[word + chr(112 + TAGS.index(tag)) for word, tag in zip(s.words, s.tags, strict=True)] for s in sentences]  # 112 is a multiple of 7
    return [Sentence(words, s.tags if tags is None else tags[i], "") for i, (s, words) in enumerate(zip(sentences, told, strict=True))]


@pytest.mark.parametrize("shuffled", [False, True])
def test_told_labels_are_found_and_shuffled_ones_are_not(shuffled):
    """F1 is 1 where the embeddings hold the labels, in sentences never seen; and about 0 where the labels tuned on have nothing to do with them."""
    parts = [mini(200, 0), mini(40, 1), mini(40, 2)]
    if shuffled:
        rng, tags = random.Random(0), [tag for s in parts[0] for tag in s.tags]
        rng.shuffle(tags)
        flat = iter(tags)
        parts[0] = with_label(parts[0], [[next(flat) for _ in s.tags] for s in parts[0]])
        parts[1:] = map(with_label, parts[1:])
    else:
        parts = list(map(with_label, parts))
    rows, config = [eval_ner.rows_of(BYTES, part, CONFIG) for part in parts], Config(device="cpu", head_epochs=10, head_lr=0.05)
    read = eval_ner.frozen(Oracle())
    head, dev_f1, _ = eval_ner.tune(config, read, [], len(TAGS), rows[0], rows[1], parts[1], 0)
    f1 = eval_ner.score(parts[2], eval_ner.predict(read, head, rows[2], parts[2]))["strict"]["f1"]
    assert f1 < 0.02 and dev_f1 < 0.02 if shuffled else f1 == dev_f1 == 1


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_early_stopping_keeps_the_best(monkeypatch, patience):
    """F1 on dev made up as 0.1, 0.5, 0.2, 0.3, 0.4, 0.1: the head that is returned is the one that had the best of those it lived to see."""
    made_up, seen = [0.1, 0.5, 0.2, 0.3, 0.4, 0.1], []

    def predict(read, head, rows, sentences):
        seen.append(head.weight.detach().clone())
        return [s.tags for s in sentences]

    monkeypatch.setattr(eval_ner, "predict", predict)
    monkeypatch.setattr(eval_ner, "score", lambda gold, tagged: {"strict": {"f1": made_up[len(seen) - 1]}})
    train = mini(20, 0)
    rows = eval_ner.rows_of(BYTES, train, CONFIG)
    head, f1, epoch = eval_ner.tune(Config(device="cpu", head_epochs=6, patience=patience), eval_ner.frozen(tiny()), [], 16, rows, rows, train, 0)
    best = 2 if patience else 6
    assert (f1, epoch, len(seen)) == (made_up[best - 1], best, {0: 6, 1: 3, 3: 5}[patience])
    assert torch.equal(head.weight, seen[best - 1]) and not torch.equal(seen[0], seen[1])


def test_tuning_is_the_loop_written_out():
    """Every row once an epoch in another order; AdamW by hand, head and backbone each at its rate, falling to zero; gradients clipped together."""
    config = Config(device="cpu", epochs=2, batch_size=8, lr=3e-3, head_lr=2e-2, patience=0)
    model, plain, train, seen = tiny(), tiny(), mini(20, 0), []
    rows = eval_ner.rows_of(BYTES, train, config)

    def read(rows, which):
        seen.extend([which] * torch.is_grad_enabled())  # not those for the tags of the dev set
        return eval_ner.word_features(model, rows, which)

    backbones = [[p for name, p in m.named_parameters() if name != "unembedding.weight"] for m in (model, plain)]
    head = eval_ner.tune(config, read, backbones[0], 16, rows, rows, train, 0)[0]
    assert [sorted(sum(seen[i : i + 3], [])) for i in (0, 3)] == 2 * [list(range(20))] and seen[:3] != seen[3:] and len(seen) == 6
    weight = torch.tensor(np.random.default_rng(0).normal(0, 0.02, (len(TAGS), 16)), dtype=torch.float32, requires_grad=True)
    params = [weight, torch.zeros(len(TAGS), requires_grad=True), *backbones[1]]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))  # moments
    for step, which in enumerate(seen):
        x = torch.cat([plain.features(torch.tensor([rows.ids[i]]))[0, rows.at[i]] for i in which])
        tags = torch.tensor([tag for i in which for tag in rows.tags[i]])
        loss = -(x @ params[0].T + params[1]).log_softmax(-1)[range(len(tags)), tags].mean()
        grads = torch.autograd.grad(loss, params)
        clip = min(1, 1 / sum(g.square().sum() for g in grads).sqrt())
        for k, (p, g) in enumerate(zip(params, grads, strict=True)):
            lr = (config.head_lr if k < 2 else config.lr) * (1 - step / 6)
            first[k], second[k] = 0.9 * first[k] + 0.1 * clip * g, 0.999 * second[k] + 0.001 * (clip * g) ** 2
            with torch.no_grad():
                p.mul_(1 - 0.01 * lr).sub_(lr * first[k] / (1 - 0.9 ** (step + 1)) / ((second[k] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    for p, by_hand in zip([*head.parameters(), *backbones[0]], params, strict=True):
        assert torch.allclose(p, by_hand, atol=1e-4)


def test_what_is_kept_belongs_to_its_settings_weights_and_sets(tmp_path, monkeypatch):
    """The same again is read; other weights, settings, sentences to stop by or test sets are made anew; and each seed has its own draw of shots."""
    given = []

    def tune(config, read, backbone, d_model, train, *rest):
        given.append(train.ids)
        return torch.nn.Linear(d_model, len(TAGS)), 0.0, 1

    monkeypatch.setattr(eval_ner, "tune", tune)
    base, a, b, sets = Config(device="cpu", shots=2), tiny(0), tiny(1), {"da_ddt": mini(5, 2)}
    for config, model, dev, tests in ((base, a, mini(5, 1), sets), (base, a, mini(5, 1), sets), (base, b, mini(5, 1), sets),
                                      (Config(device="cpu", shots=2, head_lr=0.1), a, mini(5, 1), sets), (base, a, mini(6, 3), sets),
                                      (base, a, mini(5, 1), sets | {"tl_trg": mini(5, 4)})):  # fmt: skip
        found = eval_ner.evaluate(config, str(tmp_path), "x", model, BYTES, (mini(30, 0), dev, tests), ["head"], 2)
        assert found["head", 1]["sets"].keys() == tests.keys()
    draws = [eval_ner.rows_of(BYTES, eval_ner.few(mini(30, 0), 2, seed), base).ids for seed in range(2)]
    assert given == 5 * draws and draws[0] != draws[1]


def test_full_tuning_moves_the_copy_and_not_the_model(tmp_path, monkeypatch):
    model, tuned, tune = tiny(), [], eval_ner.tune

    def seen(config, read, backbone, *rest):
        tuned.append(list(backbone))
        return tune(config, read, backbone, *rest)

    monkeypatch.setattr(eval_ner, "tune", seen)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    data = mini(20, 0), mini(10, 1), {"da_ddt": mini(10, 2)}
    results = {}
    for name in ("a", "b"):
        results[name] = eval_ner.evaluate(CONFIG, str(tmp_path / name), "x", model, BYTES, data, ["head", "full"], 2)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    reads = [p.shape for name, p in model.named_parameters() if "unembedding" not in name]  # all but that take part
    assert [[p.shape for p in backbone] for backbone in tuned] == 2 * [[], [], reads, reads]
    assert results["a"].keys() == {("head", 0), ("head", 1), ("full", 0), ("full", 1)}
    sets = {name: {key: (result["sets"], result["dev_f1"]) for key, result in done.items()} for name, done in results.items()}
    assert sets["a"] == sets["b"]  # the same seed, the same number


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Commands

FAST = ["--uner_dir={uner}", "--epochs=3", "--head_epochs=8", "--lr=3e-3", "--batch_size=4"]
CASES = {  # name -> words; {here} holds copies of a run, {uner} the mini sets
    "two runs": ["{here}/a", "{here}/b", *FAST, "--seeds=2"],
    "shots": ["{here}/c", *FAST, "--mode=head", "--shots=3", "--test=tl_trg", "--twice=True", "--label_at=first"],
    "joint": ["{here}/c", *FAST, "--mode=head", "--train=da_ddt,en_ewt", "--test=da_ddt"],
    "all": ["{here}/c", *FAST, "--mode=head", "--train=all", "--test=tl_trg,da_ddt"],
    "paper": ["{here}/c", "config/ner_paper.py", "--uner_dir={uner}", "--mode=head", "--test=da_ddt"],
}
MISTAKES = {
    "no folder": (["--uner_dir={uner}"], ["nothing is not a run folder"]),
    "missing folder": (["{here}/z"], ["z is not a run folder"]),
    "empty folder": (["{uner}", "--uner_dir={uner}"], ["holds no checkpoint"]),
    "mode": (["{here}/a", "--mode=heads"], ["mode is one of head, full, both"]),
    "train on a test set": (["{here}/a", "--train=tl_trg"], ["'tl_trg' is no set to train on", "da_ddt"]),
    "misspelt set": (["{here}/a", "--test=da_dtt"], ["'da_dtt'", "nearest is da_ddt"]),
    "no such file": (["{here}/a", "--uner_dir={uner}", "--train=hr_set"], ["no file for hr_set (UNER_Croatian-SET)", "put it into {uner}"]),
    "no test file": (["{here}/a", "--uner_dir={uner}", "--test=zh_pud"], ["no file for zh_pud"]),
    "no sets": (["{here}/a", "--uner_dir={here}"], ["no file for", "da_ddt"]),
    "too short": (["{here}/a", "--length=8"], ["length must be at least 16"]),
    "learning rate": (["{here}/a", "--lr=3"], ["lr must lie between"]),
    "many shots": (["{here}/a", "--uner_dir={uner}", "--shots=99"], ["shots = 99"]),
    "no entities": (["{here}/a", "--uner_dir={bare}", "--test=da_ddt"], ["hold no entity"]),
    "no place for results": (["{here}/full", "--uner_dir={uner}"], ["cannot read or write {here}/full/ner: File exists"]),
}


@pytest.fixture(scope="module")
def here(quick_start, tmp_path_factory):
    here = tmp_path_factory.mktemp("ner")
    for name in ("a", "b", "c", "full"):
        shutil.copytree(quick_start.folder, here / name)
    (here / "full" / "ner").write_text("in the way")
    latest = max((here / "b").glob("ckpt_*.pt"))
    state = torch.load(latest, weights_only=True)  # b's weights are not a's
    state["model"] = {key: p + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for key, p in state["model"].items()}
    torch.save(state, latest)
    write(here / "uner", MINI)
    bare = [Sentence(s.words, ["O"] * len(s.words), s.text) for s in MINI["da_ddt-ud-dev"]]
    write(here / "bare", {f"da_ddt-ud-{split}": bare for split in ("train", "dev", "test")})
    return here


def filled(words, here):
    return [word.format(here=here, uner=here / "uner", bare=here / "bare") for word in words]


@pytest.fixture(scope="module")
def results(here):
    cases = CASES | {name: given for name, (given, _) in MISTAKES.items()}
    return dict(zip(cases, run_many("eval_ner.py", [filled(given, here) for given in cases.values()]), strict=True))


def cells(stdout):
    """The rows of the Markdown table as lists of text, without the head."""
    lines = [line for line in stdout.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {13}
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_two_runs(here, results):
    """Every set has all systems in both modes; the difference is that of the two rows; the files hold what the screen shows."""
    done, table = results["two runs"], cells(results["two runs"].stdout)
    assert done.returncode == 0, done.stderr
    a, b = f"{here}/a", f"{here}/b"
    systems = ["all O", "random weights", a, b, f"{a} - {b}"]
    entities = {name: str(sum(tag[0] == "B" for s in MINI[f"{name}-ud-test"] for tag in s.tags)) for name in ("da_ddt", "tl_trg")}
    assert [row[:4] for row in table] == [[mode, f"{name} ⚠", entities[name], system] for mode in ("head", "full") for name in entities
                                          for system in systems]  # fmt: skip
    assert "fewer than 200 entities" in done.stdout and "de_pud" in done.stderr
    by = {tuple(row[i].removesuffix(" ⚠") for i in (0, 1, 3)): row for row in table}
    for mode in ("head", "full"):
        assert by[mode, "da_ddt", "all O"][4:] == ["0.0", "0.0 to 0.0"] + ["0.0"] * 6
        f1 = {system: float(by[mode, "da_ddt", system][4].split(" ± ")[0]) for system in systems}
        assert f1[systems[-1]] == pytest.approx(f1[a] - f1[b], abs=0.11) and re.fullmatch(r"p = [01]\.\d{3}", by[mode, "da_ddt", systems[-1]][6])
        assert by[mode, "da_ddt", "random weights"][4:] != by[mode, "da_ddt", a][4:]
        assert f1[a] > 30 and "±" in by[mode, "da_ddt", a][4]
    written = json.loads((here / "a" / "ner_da_ddt.json").read_text())
    assert [f"{100 * row['f1']:.1f}" for row in written["table"]] == [row[4].split(" ± ")[0] for row in table]
    assert (here / "a" / "ner_da_ddt.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((here / "a" / "ner").glob("*.json"))) == 8 and len(list((here / "b" / "ner").glob("*.json"))) == 4
    for row in written["table"]:  # mean and deviation are those of the seeds
        if row["system"] == a:
            seeds = [json.loads(p.read_text())["sets"][row["set"]] for p in (here / "a" / "ner").glob(f"da_ddt-{row['mode']}-step*.json")]
            f1 = [cell["strict"]["f1"] for cell in seeds]
            assert len(f1) == 2 and row["f1"] == pytest.approx(sum(f1) / 2) and row["deviation"] == pytest.approx(abs(f1[0] - f1[1]) / 2**0.5)
            assert row["interval"][0] <= row["f1"] <= row["interval"][1]


def test_finished_cells_are_not_made_again(here, results, capsys):
    """Of twelve one is damaged, which is told, and deleted: only that is made again, and it is the same; so are table and files."""
    assert results["two runs"].stderr.count("dev F1") == 12
    cell = next((here / "b" / "ner").glob("*full*seed1*.json"))
    before = json.loads(cell.read_text())
    cell.write_text(cell.read_text()[:99])
    with pytest.raises(SystemExit):
        eval_ner.main(filled(CASES["two runs"], here))
    assert f"{cell} is not valid JSON" in (error := capsys.readouterr().err) and "delete it and give the command again" in error
    cell.unlink()
    eval_ner.main(filled(CASES["two runs"], here))
    done = capsys.readouterr()
    assert done.err.count("dev F1") == 1 and done.out == results["two runs"].stdout
    after = json.loads(cell.read_text())
    assert after["sets"] == before["sets"]  # the same seed, the same number, in another process


def test_kinds_of_training(here, results):
    """Draws for shots, several sets at once, all of them, and the paper's settings, whose head hardly moves."""
    for name in ("shots", "joint", "all", "paper"):
        assert results[name].returncode == 0, results[name].stderr
    made = {path.name.rsplit("-", 1)[0] for path in (here / "c" / "ner").glob("*step*.json")}
    step = "step160"
    assert made == {f"da_ddt-head-{step}-seed{seed}" for seed in range(5)} | {f"da_ddt+en_ewt-head-{step}-seed0", f"all-head-{step}-seed0"}
    assert [row[1] for row in cells(results["all"].stdout)][::3] == ["tl_trg ⚠", "da_ddt ⚠"]
    assert "en_ewt has only one of train and dev" in results["joint"].stderr and "sv_talbanken (UNER_Swedish-Talbanken)" in results["all"].stderr
    paper = [json.loads(path.read_text()) for path in (here / "c" / "ner").glob("da_ddt-head-step160-seed0-*.json")]
    paper = next(cell for cell in paper if not cell["settings"]["patience"])
    wanted = dict(lr=3e-5, head_lr=3e-5, batch_size=16, epochs=10, head_epochs=10, length=128, label_at="first")
    assert paper["settings"].items() >= wanted.items() and paper["epoch"] == 10 and paper["dev_f1"] < 0.2 < 0.6 < min(
        json.loads(path.read_text())["dev_f1"] for path in (here / "c" / "ner").glob("a*-step160-*.json"))  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(here, results, name):
    done, parts = results[name], filled(MISTAKES[name][1], here)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and all(part in lines[0] for part in parts), done.stderr
