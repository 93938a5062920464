"""eval_lm.py as a user runs it: its numbers against one forward pass a token, models whose loss is known, and a bootstrap of plain loops."""
import gzip
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_many

import runs
from runs import load_model

LONG = "The quick brown fox returns the number of lazy dogs, or None where there is no dog at all. "
PROSE = [LONG * 6, "A short one.", LONG[:40], "Write the bytes to the file and return the number of bytes written. " * 4, "x", LONG * 3]
ODD = ["", "a", None, "漢字と👩‍👩‍👧 \x00\x7f\u0301 Ωß", "<|endoftext|> is text here, <|mask|> too", "\n\n\n"]
NOTES, TABLE = ["The first note, one file.", "The second note\nof two lines."], ["In a table: " + LONG, "b"]
DOCUMENTS = {"prose": PROSE, "odd": ODD, "notes": NOTES, "deep/table": TABLE}
CONTEXT, STRIDE = 12, 5


def write_jsonl(path, texts, column="text", compress=False):
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines) if compress else lines)


@pytest.fixture(scope="module")
def here(quick_start, tmp_path_factory):
    """A folder with data of all forms, the tiny run twice (at its end and, `early`, at step 40), and two runs whose losses need no model to know."""
    here = tmp_path_factory.mktemp("lm")
    write_jsonl(here / "data" / "prose.jsonl.gz", PROSE, compress=True)
    write_jsonl(here / "data" / "odd.json", ODD)
    for i, text in enumerate(NOTES):
        (here / "data" / "notes").mkdir(exist_ok=True)
        (here / "data" / "notes" / f"{i}.txt").write_text(text)
    (here / "data" / "deep").mkdir()
    pd.DataFrame({"text": TABLE}).to_parquet(here / "data" / "deep" / "table.parquet")
    (here / "data" / "ignored.md").write_text("not data")
    write_jsonl(here / "whole" / "text.jsonl", [LONG * 4, LONG])
    words = (LONG * 4).split(" ")[:-1]
    cut = [" ".join(words[:7]), *(" " + " ".join(words[i : i + 9]) for i in range(7, len(words), 9)), " "]
    write_jsonl(here / "chunks" / "text.jsonl", [*cut, LONG, ""])
    write_jsonl(here / "many" / "text.jsonl", [LONG[i : i + 9 + 5 * (i % 7)] for i in range(40)])
    for name in ("all", "few"):
        write_jsonl(here / "named all" / f"{name}.jsonl", ["a"])
    write_jsonl(here / "empty" / "text.jsonl", ["", None])
    write_jsonl(here / "numbers" / "text.jsonl", [1, 2])
    write_jsonl(here / "columns" / "text.jsonl", ["b"], column="body")
    (here / "broken").mkdir()
    (here / "broken" / "text.jsonl").write_text('{"text": "a"}\n{"text": ')
    (here / "none").mkdir()
    hub = here / "hub"
    for part, split, texts in (("one", "validation", PROSE), ("one", "test", ["a test"]), ("two", "test", ["b test"]), ("two", "train", ["never"])):
        write_jsonl(hub / part / f"{split}.jsonl", texts)
    (hub / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {part}\n  data_files:\n" + "".join(f"  - split: {split}\n    path: {part}/{split}.jsonl\n" for split in splits)
        for part, splits in (("one", ["validation", "test"]), ("two", ["test", "train"]))) + "---\n")  # fmt: skip
    for name in ("run", "every", "early", "uniform", "bigram"):
        shutil.copytree(quick_start.folder, here / name)
    for step in (80, 120, 160):
        (here / "early" / f"ckpt_{step:06d}.pt").unlink()
    for name in ("uniform", "bigram"):
        path = here / name / "ckpt_000160.pt"
        state = torch.load(path, weights_only=True)
        for key, weight in state["model"].items():
            if name == "uniform" and key == "embedding.weight":
                weight[:] = weight[7]  # all tokens look the same: every context predicts the same distribution
            elif name == "bigram" and key.endswith("o_proj.weight"):
                weight.zero_()  # nothing but the last token is seen
        torch.save(state, path)
    return here


def command(*words, data="data", context=CONTEXT, stride=STRIDE):
    return ["{here}/" + words[0], *words[1:], "--data={here}/" + data, f"--context={context}", f"--stride={stride}"]


CASES = {
    "two": command("run", "{here}/early"),
    "every": command("every", "--step=all", data="many"),
    "step": command("run", "--step=80", data="many"),
    "defaults": ["{here}/run", "--data={here}/data/prose.jsonl.gz"],
    "sliding": command("run", data="data/prose.jsonl.gz", stride=1),
    "bigram 1": command("bigram", context=1, stride=1),
    "bigram 9": command("bigram", context=9, stride=4),
    "uniform whole": command("uniform", data="whole"),
    "uniform chunks": command("uniform", data="chunks", context=20, stride=20),
    "whole": command("run", data="whole", context=32, stride=1),
    "chunks": command("run", data="chunks", context=32, stride=1),
    "many": command("run", "{here}/early", data="many"),
    "hub": ["{here}/run", "--data=hf:{here}/hub"],
    "hub part": ["{here}/run", "--data=hf:{here}/hub,one", "--split=test"],
    "other column": [*command("run", data="columns"), "--column=body"],
}
MISTAKES = {
    "no run": (["--data={here}/data"], ["nothing is not a run folder"]),
    "no data": (["{here}/run"], ["data = nothing", "hf:NAME"]),
    "missing data": (["{here}/run", "--data={here}/mamba"], ["mamba: no such file or folder"]),
    "twice": (["{here}/run", "{here}/data/../run", "--data={here}/data"], ["twice"]),
    "bad step": (["{here}/run", "--step=last", "--data={here}/data"], ["step = last", "newest, all"]),
    "no such step": (["{here}/run", "--step=7", "--data={here}/data"], ["no checkpoint of step 7"]),
    "no checkpoint": (["{here}/none", "--data={here}/data"], ["none holds no checkpoint"]),
    "stride": (command("run", stride=13), ["stride = 13 is longer than context = 12"]),
    "context": (command("run", context=-1), ["context = -1"]),
    "named all": (command("run", data="named all"), ["a domain of", "is named all"]),
    "no text": (command("run", data="empty"), ["the domain text", "holds no text"]),
    "no files": (command("run", data="none"), ["no text in", ".jsonl"]),
    "numbers": (command("run", data="numbers"), ["'text' of text holds something else than text"]),
    "column": (command("run", data="columns"), ["no column 'text'", "'body'"]),
    "broken": (command("run", data="broken"), ["cannot read", "text.jsonl"]),
    "no split": (["{here}/run", "--data=hf:{here}/hub", "--split=train"], ["hub,one has no split train, but validation, test"]),
    "no dataset": (["{here}/run", "--data=hf:no/such-dataset"], ["cannot read no/such-dataset"]),
}


@pytest.fixture(scope="module")
def results(here):
    """What became of the commands, by name, and the numbers that each wrote, for each of its runs, into copies of their own."""
    cases, copies = {name: [word.format(here=here) for word in words] for name, (words, _) in MISTAKES.items()}, {}
    for name, words in CASES.items():
        words = [word.format(here=here) for word in words]
        copies[name] = [here / "copies" / name / word.split("/")[-1] for word in words if not word.startswith("--")]
        for word, copy in zip(words, copies[name], strict=False):  # the runs come first
            shutil.copytree(word, copy)
        cases[name] = [*copies[name], *words[len(copies[name]) :]]
    done = dict(zip(cases, run_many("eval_lm.py", cases.values()), strict=True))
    assert not [done[name].stderr for name in CASES if done[name].returncode]
    return done, {name: [json.loads((copy / "eval_lm.json").read_text()) for copy in copies[name]] for name in CASES}


def one_by_one(folder, step, texts, context, stride):
    """Nats, tokens and bytes of each text, (D, 3): a forward pass for each token, from where the window that scores it begins."""
    model, encoding, _ = load_model(str(folder), step)
    rows = []
    for text in texts:
        text = text or ""
        ids = [encoding.encode_single_token("<|endoftext|>"), *encoding.encode_ordinary(text)]
        nats = 0.0
        for t in range(1, len(ids)):
            end = context if t <= context else min(context + math.ceil((t - context) / stride) * stride, len(ids) - 1)
            with torch.no_grad():
                logits = model.logits(torch.tensor([ids[max(0, end - context) : t]]))[0, -1]
            nats -= logits.log_softmax(-1)[ids[t]].item()
        rows.append((nats, len(ids) - 1, len(text.encode())))
    return np.array(rows)


def check(numbers, rows):
    nats, tokens, size = rows.sum(0)
    assert (numbers["documents"], numbers["tokens"], numbers["bytes"]) == (len(rows), tokens, size)
    assert numbers["nats"] == pytest.approx(nats, rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert numbers["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_table(results, name):
    """A row for each domain and one for all; the same numbers in the file of each run; a chart in the first folder."""
    done = results[0][name]
    assert not done.stderr
    tables = done.stdout.split("\n\n")[1:]
    assert len(tables) == len(results[1][name])
    for i, (numbers, table) in enumerate(zip(results[1][name], tables, strict=True)):
        step, *lines = list(numbers["steps"])[-1], *table.splitlines()
        assert lines[0].endswith(f"step {step}") and ("minus" in lines[1]) == (i > 0)
        for (group, found), line in zip(numbers["steps"][step].items(), lines[2:], strict=False):
            values = [f"{found['documents']:,}", f"{found['bytes']:,}", f"{found['perplexity']:.2f}", f"{found['bits_per_byte']:.3f}"]
            values += [f"{numbers['difference'][group]['bits_per_byte']:+.3f}"] if i else []
            assert line.split(" ")[0] == group and [part for part in values if f" {part}" not in line] == []
            assert line.count("[") == (2 + (i > 0) if found["documents"] > 1 else 0)
    written = [line.removeprefix("written ") for line in done.stdout.splitlines() if line.startswith("written ")]
    assert [path.split("/")[-1] for path in written] == ["eval_lm.json"] * len(tables) + ["eval_lm.png"]
    assert open(written[-1], "rb").read(4) == b"\x89PNG"


def test_every_document_is_counted_rightly(here, results):
    """Longer than the context, shorter than two tokens, empty, missing, of unseen bytes, with special tokens written out: one token at a time."""
    for numbers, (run, step) in zip(results[1]["two"], (("run", 160), ("early", 40)), strict=True):
        assert set(numbers["steps"]) == {str(step)} and numbers["steps"][str(step)].keys() == {*DOCUMENTS, "all"}
        rows = {domain: one_by_one(here / run, step, texts, CONTEXT, STRIDE) for domain, texts in DOCUMENTS.items()}
        for domain in DOCUMENTS:
            check(numbers["steps"][str(step)][domain], rows[domain])
        check(numbers["steps"][str(step)]["all"], np.concatenate(list(rows.values())))


@pytest.mark.parametrize(("name", "context", "stride"), [("defaults", 32, 16), ("sliding", CONTEXT, 1)])
def test_context_and_stride(here, results, name, context, stride):
    """The defaults are block_size and half of it; at stride 1 each token sees all of the context."""
    numbers = results[1][name][0]
    assert (numbers["context"], numbers["stride"]) == (context, stride)
    check(numbers["steps"]["160"]["prose"], one_by_one(here / "run", 160, PROSE, context, stride))


def test_cutting_changes_nothing_but_the_context(results):
    """Where context does not matter, neither do windows nor cuts into documents. Where it does, windows that begin anew only cost."""
    steps = {name: numbers[0]["steps"]["160"]["all"] for name, numbers in results[1].items() if "160" in numbers[0]["steps"]}
    assert steps["bigram 1"]["bits_per_byte"] == pytest.approx(steps["bigram 9"]["bits_per_byte"], rel=1e-6)
    for kind in ("uniform ", ""):
        whole, chunks = (steps[f"{kind}{part}"] for part in ("whole", "chunks"))
        assert (chunks["documents"] > 8) and (whole["tokens"], whole["bytes"]) == (chunks["tokens"], chunks["bytes"])
        assert whole["bits_per_byte"] == pytest.approx(chunks["bits_per_byte"], rel=0.1 if kind == "" else 1e-6)
    assert steps["whole"]["bits_per_byte"] != steps["chunks"]["bits_per_byte"]


def test_intervals(here, results):
    """A bootstrap of plain loops, of one run and of the difference of two."""
    texts = [json.loads(line)["text"] for line in open(here / "many" / "text.jsonl")]
    first, second = (one_by_one(here / run, step, texts, CONTEXT, STRIDE) for run, step in (("run", 160), ("early", 40)))
    rng, draws = np.random.default_rng(5), []
    for _ in range(4000):
        chosen = rng.integers(len(texts), size=len(texts))
        a, b = first[chosen].sum(0), second[chosen].sum(0)
        draws.append((math.exp(a[0] / a[1]), a[0] / a[2] / math.log(2), b[0] / b[2] / math.log(2), (b[0] / b[2] - a[0] / a[2]) / math.log(2)))
    expected = np.quantile(draws, (0.025, 0.975), axis=0).T  # (4, 2)
    mine, other = results[1]["many"]
    found = [mine["steps"]["160"]["text"][f"{name}_interval"] for name in ("perplexity", "bits_per_byte")]
    found += [other["steps"]["40"]["text"]["bits_per_byte_interval"], other["difference"]["text"]["bits_per_byte_interval"]]
    for interval, (low, high) in zip(found, expected, strict=True):
        assert interval == pytest.approx((low, high), abs=0.06 * (high - low))
    difference = (second.sum(0)[0] / second.sum(0)[2] - first.sum(0)[0] / first.sum(0)[2]) / math.log(2)
    assert other["difference"]["from"].endswith("run") and "difference" not in mine
    assert other["difference"]["text"]["bits_per_byte"] == pytest.approx(difference, rel=1e-4)


def test_one_document_gives_no_interval(results):
    numbers = results[1]["hub part"][0]["steps"]["160"]["one"]
    assert numbers["documents"] == 1 and not [name for name in numbers if "interval" in name]


def test_every_step(results):
    """Each checkpoint of the run, in order, as if it had been asked for alone."""
    every, alone = results[1]["every"][0]["steps"], results[1]["step"][0]["steps"]
    assert list(every) == ["40", "80", "120", "160"] and list(alone) == ["80"]
    assert every["80"] == alone["80"] and every["160"] != alone["80"]
    assert every["160"] == results[1]["many"][0]["steps"]["160"] and every["40"] == results[1]["many"][1]["steps"]["40"]
    lines = [line for line in results[0]["every"].stdout.splitlines() if " over all" in line]
    assert len(lines) == 3 and f"step 80: perplexity {alone['80']['all']['perplexity']:.2f}," in lines[1]


def test_datasets_of_the_hub(results):
    """Each configuration is a domain, of its validation split or else the test split; one configuration and split if asked for."""
    whole, part = results[1]["hub"][0]["steps"]["160"], results[1]["hub part"][0]["steps"]["160"]
    assert {name: numbers["bytes"] for name, numbers in whole.items()} == {"one": sum(map(len, PROSE)), "two": 6, "all": sum(map(len, PROSE)) + 6}
    assert {name: numbers["bytes"] for name, numbers in part.items()} == {"one": 6, "all": 6}


def test_gated_dataset_is_one_line(capsys):
    from datasets.exceptions import DatasetNotFoundError

    with pytest.raises(SystemExit) as end, runs.datasets_library("allenai/paloma"):
        raise DatasetNotFoundError("Dataset 'allenai/paloma' is a gated dataset on the Hub.\nYou must be authenticated to access it.")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: allenai/paloma is gated") and error.count("\n") == 1
    assert "https://huggingface.co/datasets/allenai/paloma" in error and "hf auth login" in error


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(results, name):
    done = results[0][name]
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in MISTAKES[name][1]), done.stderr
