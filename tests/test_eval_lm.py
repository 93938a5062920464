"""eval_lm.py as a user runs it, against a forward pass for each token and a bootstrap of plain loops."""
import gzip
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import one_line, run_many

from plumbing.checkpoint import load_model

LONG = "The quick brown fox returns the number of lazy dogs, or None where there is no dog at all. "
PROSE = [LONG * 6, "A short one.", LONG[:40], "Write the bytes to the file and return the number. " * 4, "x"]
ODD = ["", "a", None, "漢字と👩‍👩‍👧 \x00\x7f\u0301 Ωß", "<|endoftext|> is text here, <|mask|> too", "\n\n\n"]
MANY = [LONG[i : i + 9 + 5 * (i % 7)] for i in range(40)]
TEXTS = {"data/prose.jsonl.gz": PROSE, "data/odd.jsonl": ODD, "pieces/text.jsonl": MANY,
         "numbers/text.jsonl": [1, 2]}
HUB = {"one": {"validation": PROSE, "test": ["a test"]}, "two": {"test": ["b test"]}}
CASES = {  # {runs} has two copies of the tiny run, of which `early` ends at step 40
    "two": "{runs}/run {runs}/early --data={here}/data --context=12 --stride=5",
    "many": "{runs}/run {runs}/early --data={here}/pieces --context=12 --stride=5",
    "every": "{runs}/run --step=all --data={here}/pieces --context=12 --stride=5",
    "defaults": "{runs}/run --data={here}/data/prose.jsonl.gz",
    "sliding": "{runs}/run --step=80 --data={here}/data/prose.jsonl.gz --context=12 --stride=1",
    "hub": "{runs}/run --data=hf:{here}/hub --column=body",
    "part": "{runs}/run --data=hf:{here}/hub,one --split=test --column=body --out={here}/out",
}
MISTAKES = {  # and what the one line says
    "no data": ("{runs}/run", "data = : data must name"),
    "bad step": ("{runs}/run --step=last --data={here}/data", "step = last"),
    "numbers": ("{runs}/run --data={here}/numbers", "not only text, in its column text"),
}

def write(path, texts, column="text"):
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)

@pytest.fixture(scope="module")
def here(quick_start, tmp_path_factory):
    """A folder of data, and of a folder with runs for each case."""
    here = tmp_path_factory.mktemp("lm")
    for name, texts in TEXTS.items():
        write(here / name, texts)
    card = "---\nconfigs:\n"
    for part, splits in HUB.items():
        card += f"- config_name: {part}\n  data_files:\n"
        for split, texts in splits.items():
            write(here / "hub" / part / f"{split}.jsonl", texts, "body")
            card += f"  - split: {split}\n    path: {part}/{split}.jsonl\n"
    (here / "hub" / "README.md").write_text(card + "---\n")
    for name in CASES:
        shutil.copytree(quick_start.folder, here / name / "run")
        shutil.copytree(here / name / "run" / "step_000040", here / name / "early" / "step_000040")
    return here

@pytest.fixture(scope="module")
def results(here):
    """What became of the commands, by name."""
    cases = CASES | {name: words for name, (words, _) in MISTAKES.items()}
    commands = [words.format(here=here, runs=here / (name if name in CASES else "two")).split()
                for name, words in cases.items()]
    done = dict(zip(cases, run_many("eval_lm.py", commands), strict=True))
    assert not "".join(done[name].stderr for name in CASES)
    return done

def written(here, name, run="run"):
    return json.loads((here / name / run / "eval_lm.json").read_text())

def token_by_token(folder, step, texts, context, stride):
    """Nats, tokens, bytes (D, 3): a forward pass a token, from where the window that scores it begins."""
    loaded, rows = load_model(folder, step), []
    for text in texts:
        ids = [loaded.tokenizer.eot, *loaded.tokenizer.encode_ordinary(text or "")]
        nats = 0.0
        for t in range(1, len(ids)):
            late = max(0, math.ceil((t - context) / stride))  # windows after the first
            end = min(context + late * stride, max(context, len(ids) - 1))
            with torch.no_grad():
                logits = loaded.model.logits(torch.tensor([ids[max(0, end - context) : t]]))[0, -1]
            nats -= logits.log_softmax(-1)[ids[t]].item()
        rows.append((nats, len(ids) - 1, len((text or "").encode())))
    return np.array(rows)

def check(numbers, rows):
    nats, tokens, size = rows.sum(0)
    assert [numbers[key] for key in ("documents", "tokens", "bytes")] == [len(rows), tokens, size]
    assert numbers["nats"] == pytest.approx(nats, 1e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(nats / tokens), 1e-4)
    assert numbers["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, 1e-5)

@pytest.mark.parametrize(("run", "step"), [("run", 160), ("early", 40)])
def test_every_document_counts(here, results, run, step):
    """Longer than the context, of one token, empty, missing, of odd bytes, with special tokens spelt out."""
    prose, odd = (token_by_token(here / "two" / run, step, texts, 12, 5) for texts in (PROSE, ODD))
    steps = written(here, "two", run)["steps"]
    assert list(steps) == [str(step)] and steps[str(step)].keys() == {"prose", "odd", "all"}
    for domain, rows in {"prose": prose, "odd": odd, "all": np.concatenate([prose, odd])}.items():
        check(steps[str(step)][domain], rows)

@pytest.mark.parametrize("name, step, context, stride", [("defaults", 160, 32, 16), ("sliding", 80, 12, 1)])
def test_context_and_stride(here, results, name, step, context, stride):
    """The defaults are block_size and half of it. At stride 1 each token sees all of the context."""
    numbers, rows = written(here, name), token_by_token(here / "two/run", step, PROSE, context, stride)
    assert (numbers["context"], numbers["stride"]) == (context, stride)
    check(numbers["steps"][str(step)]["prose"], rows)

def test_intervals(here, results):
    """A bootstrap of plain loops, of a run and of the difference of two."""
    first, second = (token_by_token(here / "two" / run, step, MANY, 12, 5)
                     for run, step in (("run", 160), ("early", 40)))

    def numbers(rows):
        (nats, tokens, size), nats_2 = first[rows].sum(0), second[rows].sum(0)[0]
        bits, bits_2 = nats / size / math.log(2), nats_2 / size / math.log(2)
        return math.exp(nats / tokens), bits, bits_2, bits_2 - bits

    draws = np.random.default_rng(5).integers(len(MANY), size=(4000, len(MANY)))
    expected = np.quantile([numbers(rows) for rows in draws], (0.025, 0.975), axis=0).T  # (4, 2)
    run, early = written(here, "many"), written(here, "many", "early")
    mine, difference = run["steps"]["160"]["all"], early["difference"]["all"]
    parts = [mine, early["steps"]["40"]["all"], difference]
    intervals = [mine["perplexity_interval"], *(part["bits_per_byte_interval"] for part in parts)]
    for interval, (low, high) in zip(intervals, expected, strict=True):
        assert interval == pytest.approx((low, high), abs=0.06 * (high - low))
    assert difference["bits_per_byte"] == pytest.approx(numbers(range(len(MANY)))[-1], rel=1e-4)
    assert early["difference"]["from"].endswith("run") and "difference" not in run

def test_every_step(here, results):
    """Each checkpoint in order, as if it had been asked for alone; a line for each."""
    every = written(here, "every")["steps"]
    assert list(every) == ["40", "80", "120", "160"] and every["80"] != every["120"]
    assert every["160"] == written(here, "many")["steps"]["160"]
    assert every["40"] == written(here, "many", "early")["steps"]["40"]
    lines = [line for line in results["every"].stdout.splitlines() if " over all" in line]
    assert len(lines) == 4 and f"step 80: {every['80']['all']['bits_per_byte']:.4f} [" in lines[1]

def test_hub(here, results):
    """A configuration is a domain, of its validation split or else the test split; or what is asked for."""
    whole, (part,) = written(here, "hub"), json.loads((here / "out/eval_lm.json").read_text()).values()
    whole, part = whole["steps"]["160"], part["steps"]["160"]
    assert not (here / "part/run/eval_lm.json").exists()
    prose = sum(map(len, PROSE))
    assert [whole[domain]["bytes"] for domain in ("one", "two", "all")] == [prose, 6, prose + 6]
    assert part.keys() == {"one", "all"} and part["one"]["bytes"] == 6
    assert "bits_per_byte_interval" not in part["one"]  # of a single document

def test_table(here, results):
    """A row for each domain with the numbers of the file, and a chart in the first folder."""
    table, numbers = results["two"].stdout.split("\n\n")[2].splitlines(), written(here, "two", "early")
    for (domain, cells), line in zip(numbers["steps"]["40"].items(), table[2:], strict=False):
        difference = numbers["difference"][domain]["bits_per_byte"]
        shown = [str(cells["documents"]), f"{cells['perplexity']:.2f}", f"{difference:+.3f}"]
        assert line.startswith(f"{domain} ") and all(f" {text} " in line for text in shown), line
    assert (here / "two/run/eval_lm.png").read_bytes().startswith(b"\x89PNG")

def test_mistakes_are_one_line(results):
    for name, (_, says) in MISTAKES.items():
        one_line(results[name], says)
        assert results[name].stdout == ""
