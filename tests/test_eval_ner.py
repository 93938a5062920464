"""eval_ner.py: words keep their tags, scores are seqeval's, cached features the plain ones."""
import itertools
import json
import random
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import seqeval.metrics
import torch
from conftest import run_many
from seqeval.scheme import IOB2

import eval_ner
from eval_ner import TAGS, TYPES, Config, Sentence
from plumbing.checkpoint import load_model

NAMES = {"PER": ["Maria", "Jose Rizal"], "ORG": ["Nato", "Danske Bank"], "LOC": ["Cebu", "Ny Kobenhavn"]}

def mini(n, seed):
    """n sentences with one or two entities each, one in five with none."""
    rng, sentences = random.Random(seed), []
    for i in range(n):
        words, tags = ["Mens"], ["O"]
        for kind in rng.sample(TYPES, rng.choice([1, 2]) if i % 5 else 0):
            entity = rng.choice(NAMES[kind]).split()
            words += [kind.lower(), *entity, ","]
            tags += ["O", f"B-{kind}", *[f"I-{kind}"] * (len(entity) - 1), "O"]
        sentences.append(Sentence(words, tags, " ".join(words)))
    return sentences

def write(path, sentences):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for words, tags, text in sentences:
        lines += [f"# text = {text}"] * bool(text)
        lines += [f"{k}\t{word}\t{tags[k - 1]}\t-\tme" for k, word in enumerate(words, 1)] + [""]
    path.write_text("\n".join(lines), encoding="utf8")

SETS = {"da_ddt-ud-train": mini(60, 0), "da_ddt-ud-dev": mini(20, 1), "da_ddt-ud-test": mini(30, 2),
        "tl_trg-ud-test": mini(12, 3)}
HARD = [
    Sentence("自從 2004 年 提出 了 。".split(), ["O"] * 6, "自從2004年提出了。"),
    Sentence("Tua sa Cebu ang -ng".split(), ["O", "O", "B-LOC", "O", "O"], "Tua sa Cebu ang -ng"),
    Sentence(["\u200b", "a\u200db", "e\u0301", "🤷🏽‍♀️"], ["B-PER", "I-PER", "O", "B-ORG"],
             "\u200ba\u200db e\u0301🤷🏽‍♀️"),
    Sentence(["5 000", "kr\u00a0", "<|endoftext|>", "-", "-"], ["O"] * 5, "5 000 kr\u00a0 <|endoftext|> --"),
    Sentence(["not", "in", "text"], ["O"] * 3, "else"),
    Sentence([f"w{i}" for i in range(90)], ["O", "B-PER", "I-PER"] * 30, ""),
    Sentence(["a", "x" * 400, "b"], ["O", "B-LOC", "O"], "a " + "x" * 400 + " b"),
]

@pytest.fixture(scope="module")
def loaded(quick_start):
    return load_model(quick_start.folder)

@pytest.mark.parametrize("content", [b"1\tA\tO\t-\n", b"1 A O - me\n", b"", b"1\t\xc6\tO\t-\tme\n",
                                     b"1\tA\tO\t-\tme\n2\tB\tB-GPE\t-\tme\n"])
def test_broken_file_is_one_line(tmp_path, capsys, content):
    (tmp_path / "x.iob2").write_bytes(content)
    with pytest.raises(SystemExit):
        eval_ner.read_iob2(tmp_path / "x.iob2")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{tmp_path}/x.iob2" in error and error.count("\n") == 1

def test_reading_gives_back_what_was_written(tmp_path):
    """With any end of lines. OTH is O, as in the published loader; an I- that follows no B- stays."""
    others = Sentence(list("abcd"), ["B-OTH", "I-OTH", "I-PER", "B-LOC"], "a b c d")
    expected = [*HARD, others._replace(tags=["O", "O", "I-PER", "B-LOC"])]
    write(tmp_path / "x", [*HARD, others])
    (tmp_path / "y").write_bytes((tmp_path / "x").read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "z").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "x").read_bytes())
    assert eval_ner.read_iob2(tmp_path / "x") == expected == eval_ner.read_iob2(tmp_path / "y")
    assert eval_ner.read_iob2(tmp_path / "z") == expected

def test_few_sentences():
    """Four for each type, none twice; each seed has its own."""
    draw, other, again = (eval_ner.few(mini(60, 0), 4, seed) for seed in (0, 1, 0))
    assert draw == again != other and len(draw) == len({id(s) for s in draw}) == 12
    assert all(sum(f"B-{kind}" in s.tags for s in draw) >= 4 for kind in TYPES)

def test_fetching(tmp_path, monkeypatch, capsys):
    """What is missing is fetched and kept; offline, one line says what to do."""
    for name in SETS:
        write(tmp_path / "host" / f"{name}.iob2", SETS[name])

    def urlopen(url, timeout):
        *_, repository, _, name = url.split("/")
        if repository not in ("UNER_Danish-DDT", "UNER_Tagalog-TRG"):
            raise URLError("no network")
        return open(tmp_path / "host" / name, "rb")

    monkeypatch.setattr(eval_ner, "ROOT", tmp_path)
    monkeypatch.setattr(eval_ner, "urlopen", urlopen)
    train, dev, tests = eval_ner.load_sets(Config(test="da_ddt,tl_trg"))
    assert (train, dev) == (SETS["da_ddt-ud-train"], SETS["da_ddt-ud-dev"])
    assert tests == {"da_ddt": SETS["da_ddt-ud-test"], "tl_trg": SETS["tl_trg-ud-test"]}
    assert eval_ner.load_sets(Config(uner_dir=f"{tmp_path}/data/uner")) == (train, dev, tests)
    with pytest.raises(SystemExit):
        eval_ner.load_sets(Config())
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: cannot fetch https://") and f"--uner_dir={tmp_path}/data/uner" in error

@pytest.mark.parametrize("case", [*itertools.product(["first", "last"], [1, 2], [16, 128])])
def test_alignment(loaded, case):
    """Each word is tagged once, at its first or last token; the windows hold nothing but the text."""
    (label_at, copies, length), tokenizer, sentences = case, loaded.tokenizer, HARD + mini(20, 5)
    config = Config(label_at=label_at, twice=copies == 2, length=length)
    rows, room = eval_ner.rows_of(tokenizer, sentences, config), (length - 1) // copies
    made = iter(rows)
    for s in sentences:
        pieces, word = eval_ner.pieces_of(tokenizer, s), 0
        written = b"".join(tokenizer.token_bytes[i] for i in sum(pieces, [])).decode()
        assert written == " " + s.text or s.text in ("", "else")
        assert "".join(written.split()) == "".join("".join(s.words).split())
        pieces = [piece[-room:] if label_at == "last" else piece[:room] for piece in pieces]
        while word < len(s.words):
            ids, at, tags = next(made)
            tagged, wanted = (part[word : word + len(at)] for part in (pieces, s.tags))
            word += len(at)
            shown = list(ids[-((len(ids) - 1) // copies) :])
            assert list(ids) == [tokenizer.eot, *shown * copies] and len(ids) <= length and len(at) > 0
            assert shown == sum(pieces[:word], [])[-len(shown) :] and list(tags) == wanted
            starts = [len(ids) - len(sum(tagged[i:], [])) for i in range(len(tagged) + 1)]
            assert starts[0] >= len(ids) - len(shown)  # in the second copy, where there are two
            assert list(at) == ([start - 1 for start in starts[1:]] if label_at == "last" else starts[:-1])
    assert next(made, None) is None

def test_long_sentence_is_read_behind_what_precedes_it():
    """By hand, words of 2 tokens in 15: 7 a window, later ones behind what fits into half of it."""
    assert list(eval_ner.windows([2] * 12, 15)) == [(0, 0, 7), (5, 7, 12)]
    assert list(eval_ner.windows([15, 15, 1], 15)) == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]

@pytest.mark.parametrize("parts", [[[tag] for tag in TAGS], [["O"], *(
    [f"B-{kind}", *[f"I-{kind}"] * n] for kind in TYPES for n in range(3))]], ids=["adversarial", "proper"])
def test_scores_are_seqevals(parts):
    """Micro and by type, in both schemes, also on entities that never begin and where there are none."""
    for seed in range(5):
        rng = random.Random(seed)
        gold, other = ([sum(rng.choices(parts, k=9), [])[:n] for n in range(1, 10)] for _ in range(2))
        tagged = [true if rng.random() < 0.4 else tags for true, tags in zip(gold, other, strict=True)]
        tagged = tagged if seed else [["O"] * len(tags) for tags in gold]
        result = eval_ner.score([Sentence(tags, tags, "") for tags in gold], tagged)
        for scheme, how in {"strict": {"mode": "strict", "scheme": IOB2}, "conlleval": {}}.items():
            for key in ("f1", "precision", "recall"):
                metric = getattr(seqeval.metrics, f"{key}_score")
                assert result[scheme][key] == pytest.approx(metric(gold, tagged, zero_division=0, **how))
            by_type = seqeval.metrics.f1_score(gold, tagged, average=None, zero_division=0, **how)
            present = sorted({tag[2:] for tags in gold + tagged for tag in tags if tag != "O"})
            assert [result[scheme][kind] for kind in present] == pytest.approx(list(by_type))
        correct, predicted, true = np.sum(result["sentences"], 0)
        assert result["strict"]["f1"] == pytest.approx(2 * correct / max(predicted + true, 1))

def test_bootstrap_is_that_of_a_loop():
    """Mean and deviation of F1 over resampled sentences; two models meet the same samples."""
    rng, loop = random.Random(0), []
    counts = [[rng.randint(0, 1), rng.randint(1, 3), rng.randint(1, 3)] for _ in range(40)]
    better = [[1, predicted, true] for _, predicted, true in counts]
    samples, others = (eval_ner.resampled([{"sentences": part}], 4000) for part in (counts, better))
    for _ in range(2000):
        correct, predicted, true = np.sum(rng.choices(counts, k=40), 0)
        loop.append(2 * correct / (predicted + true))
    assert samples.mean() == pytest.approx(np.mean(loop), abs=0.005)
    assert samples.std() == pytest.approx(np.std(loop), rel=0.06)
    both = eval_ner.resampled([{"sentences": counts}, {"sentences": better}], 4000)
    assert both == pytest.approx((samples + others) / 2) and eval_ner.p_value(samples - samples) == 1
    normal = np.random.default_rng(0).normal(1.96, 1, 200_000)
    assert eval_ner.p_value(normal) == eval_ner.p_value(-normal) == pytest.approx(0.05, rel=0.05)

def test_cached_features_equal_the_plain_path(loaded):
    """A head tuned on cached features is that of features computed anew at every step."""
    train, dev = mini(25, 0) + HARD, mini(10, 1)
    config = Config(device="cpu", length=32, head_epochs=3)
    rows, dev_rows = (eval_ner.rows_of(loaded.tokenizer, part, config) for part in (train, dev))

    def plain(rows):  # one at a time, no padding
        with torch.no_grad():
            features = [loaded.model.features(torch.tensor([row.ids]))[0, list(row.at)] for row in rows]
        return torch.cat(features)

    cached = eval_ner.frozen(loaded.model)
    for part in (rows[::2], rows[::-1]):
        assert torch.allclose(cached(part), plain(part), atol=1e-5)
    heads = [eval_ner.tune(config, read, [], 32, rows, dev_rows, dev, 0)[0] for read in (cached, plain)]
    assert torch.allclose(heads[0].weight, heads[1].weight, atol=1e-3)
    assert eval_ner.predict(plain, heads[0], rows, train) == eval_ner.predict(cached, heads[0], rows, train)

def last_token(rows):
    """Features of a word: a one for its last token."""
    return torch.eye(1024)[[row.ids[column] for row in rows for column in row.at]]

@pytest.mark.parametrize("shuffled", [False, True])
def test_labels_in_the_embeddings_are_learned_and_shuffled_ones_are_not(loaded, shuffled):
    """F1 is 1 on sentences never seen, and almost 0 after tuning on tags that were shuffled."""
    parts = [mini(200, 0), mini(40, 1), mini(40, 2)]
    parts = [[s._replace(words=[str(TAGS.index(tag)) for tag in s.tags], text="") for s in p] for p in parts]
    if shuffled:
        tags = [tag for s in parts[0] for tag in s.tags]
        random.Random(0).shuffle(tags)
        parts[0] = [s._replace(tags=[tags.pop() for _ in s.tags]) for s in parts[0]]
    config = Config(device="cpu", head_epochs=10, head_lr=0.05)
    train, dev, test = (eval_ner.rows_of(loaded.tokenizer, part, config) for part in parts)
    head, dev_f1, _ = eval_ner.tune(config, last_token, [], 1024, train, dev, parts[1], 0)
    f1 = eval_ner.score(parts[2], eval_ner.predict(last_token, head, test, parts[2]))["strict"]["f1"]
    assert f1 < 0.02 and dev_f1 < 0.02 if shuffled else f1 == dev_f1 == 1

@pytest.mark.parametrize(("patience", "epochs", "best"), [(0, 6, 6), (1, 3, 2), (3, 5, 2)])
def test_early_stopping_keeps_the_best(loaded, monkeypatch, patience, epochs, best):
    """Of 10 entities 1, 5, 2, ... are right: the head that comes back had the most while it lived."""
    right, weights, train = [1, 5, 2, 3, 4, 1], [], [Sentence(["Maria"], ["B-PER"], "")] * 10

    def predict(read, head, rows, sentences):
        weights.append(head.weight.detach().clone())
        return [["B-PER"] if i < right[len(weights) - 1] else ["O"] for i in range(10)]

    monkeypatch.setattr(eval_ner, "predict", predict)
    config = Config(device="cpu", head_epochs=6, patience=patience)
    rows = eval_ner.rows_of(loaded.tokenizer, train, config)
    head, f1, epoch = eval_ner.tune(config, last_token, [], 1024, rows, rows, train, 0)
    assert (epoch, len(weights)) == (best, epochs) and f1 == 2 * right[best - 1] / (right[best - 1] + 10)
    assert torch.equal(head.weight, weights[best - 1]) and not torch.equal(weights[0], weights[1])

RUN = "{here}/a {here}/b --uner_dir={here}/uner --epochs=3 --head_epochs=8 --lr=3e-3 --batch_size=5 --seeds=2"
MISTAKES = {"": "name a run folder", "{here}/a --length=1": "length = 1", "{here}/a --mode=heads": "mode",
            "{here}/a --train=tl_trg": "train",
            "{here}/a --test=da_dtt": "da_dtt", "{here}/a --train=hr_set": "no train and dev file of hr_set"}

@pytest.fixture(scope="module")
def commands(quick_start, tmp_path_factory):
    """A folder with a run, an older checkpoint of it and sets; what became of RUN and of the mistakes."""
    here = tmp_path_factory.mktemp("ner")
    shutil.copytree(quick_start.folder, here / "a")
    shutil.copytree(quick_start.folder / "step_000040", here / "b")
    for name in SETS:
        write(here / "uner" / f"{name}.iob2", SETS[name])
    cases = [RUN, *(f"--uner_dir={{here}}/uner {words}" for words in MISTAKES)]
    return here, run_many("eval_ner.py", [words.format(here=here).split() for words in cases])

def test_two_runs(commands):
    """A row for each mode, set and system: means of the seeds, and differences of two rows."""
    here, (done, *_) = commands
    assert done.returncode == 0 and done.stderr.count("dev F1") == 12, done.stderr
    table = json.loads((here / "a" / "ner_da_ddt_both.json").read_text())["table"]
    rows = {(row["mode"], row["set"], row["system"]): row for row in table}
    systems = ["all O", "random weights", f"{here}/a", f"{here}/b", f"{here}/a - {here}/b"]
    assert len(rows) == 20 and all(f" {row['f1']:.3f} " in done.stdout for row in table)
    for mode, name in itertools.product(["head", "full"], ["da_ddt", "tl_trg"]):
        nothing, _, first, second, difference = (rows[mode, name, system] for system in systems)
        paths = (here / "a" / "ner").glob(f"*-{mode}-step160-*")
        kept = [json.loads(path.read_text())["sets"] for path in paths]
        f1 = [of["strict"]["f1"] for sets in kept for key, of in sets.items() if key.split()[0] == name]
        assert nothing["f1"] == 0 and len(f1) == 2 and 0.3 < first["f1"] == pytest.approx(np.mean(f1))
        assert difference["f1"] == pytest.approx(first["f1"] - second["f1"]) and 0 < difference["p"] <= 1

def test_only_what_is_missing_is_tuned_again(commands, monkeypatch, capsys):
    """Each seed moves all but the unembedding of a copy of the run's own weights, to the same numbers."""
    (here, (done, *_)), tune, starts = commands, eval_ner.tune, []

    def watched(config, read, backbone, *rest):
        starts.append([p.detach().clone() for p in backbone])
        tuned = tune(config, read, backbone, *rest)
        assert not any(map(torch.equal, backbone, starts[-1]))
        return tuned

    monkeypatch.setattr(eval_ner, "tune", watched)
    for path in (here / "b" / "ner").glob("*full*"):
        path.unlink()
    words = RUN.format(here=here).split()
    eval_ner.main(words)
    assert capsys.readouterr().out == done.stdout
    own = [p for name, p in load_model(here / "b").model.named_parameters() if "unembedding" not in name]
    assert len(starts[0]) == len(own) and all(map(torch.equal, sum(starts, []), own * 2))
    eval_ner.main([*words, "--mode=head", "--seeds=1", "--head_lr=0.02", f"--out={here}/out"])
    assert len(list(here.glob("out/ner/*"))) == 3 and (here / "out/ner_da_ddt_head.png").exists()
    assert len(starts) == 5  # with other settings the two models and the random weights are tuned anew
    *_, path = (here / "b/ner").glob("*-head-*")
    content = path.read_text()
    kept = json.loads(content)
    kept["sets"] = {key: of for key, of in kept["sets"].items() if not key.startswith("tl_trg")}
    path.write_text(json.dumps(kept))
    eval_ner.main(words)
    assert len(starts) == 5 and json.loads(path.read_text()) == json.loads(content)  # by the head kept

def test_mistakes_are_one_line(commands):
    for done, part in zip(commands[1][1:], MISTAKES.values(), strict=True):
        *notes, line = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("error: ") and part in line, done.stderr
        assert all(note.startswith("note: ") for note in notes)
