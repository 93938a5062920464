"""sample.py as a user runs it, on the run of the quick start."""
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_many, run_script

from runs import load_model

PROMPT = "Return the number of"


@pytest.fixture(scope="module")
def results(quick_start, tmp_path_factory):
    """What became of many commands, by name: an object with returncode, stdout, stderr."""
    run, empty = quick_start.folder, tmp_path_factory.mktemp("empty")
    cases = {
        "plain": [run, f"--prompt={PROMPT}"],
        "again": [run, f"--prompt={PROMPT}"],
        "other seed": [run, f"--prompt={PROMPT}", "--seed=1"],
        "no prompt": [run, "--n_samples=1", "--temperature=3", "--top_k=0", "--n_tokens=400"],  # any id may come, those of the padding too
        "special": [run, "--prompt=<|endoftext|><|mask|>", "--n_samples=1"],
        "likeliest": [run, f"--prompt={PROMPT}", "--temperature=0", "--n_tokens=20", "--n_samples=2"],
        "likeliest of step 40": [run, f"--prompt={PROMPT}", "--temperature=0", "--n_tokens=20", "--n_samples=1", "--step=40"],
        "no such run": ["out/no_such_run", f"--prompt={PROMPT}"],
        "no run named": [f"--prompt={PROMPT}"],
        "two runs": [run, run],
        "no checkpoint": [empty],
        "no such step": [run, "--step=41"],
        "bad temperature": [run, "--temperature=-1"],
        "bad n_tokens": [run, "--n_tokens=0"],
        "misspelt": [run, "--promt=x"],
    }
    return dict(zip(cases, run_many("sample.py", cases.values()), strict=True))


def texts(done):
    """The continuations: what follows each rule."""
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return re.split(r"^---\n", done.stdout, flags=re.MULTILINE)[1:]


def test_the_readmes_command(quick_start, results):
    printed = run_script("sample.py", quick_start.folder, f"--prompt={PROMPT}").stdout
    assert printed == results["plain"].stdout  # and the same in another process


@pytest.mark.parametrize("unbuffered", ["", "1"])  # it is noticed while printing, or at the very end
def test_a_reader_that_went_away_is_no_mistake(quick_start, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / "sample.py", quick_start.folder]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, timeout=100)
    os.close(writer)
    assert done.stderr == b""


def test_continuations(results):
    written = texts(results["plain"])
    assert len(written) == 3 and len(set(written)) == 3 and all(text.startswith(PROMPT) for text in written)
    assert "step 160" in results["plain"].stdout.splitlines()[0]
    assert any(len(text) > len(PROMPT) + 20 for text in written)


def test_seed(results):
    assert texts(results["plain"]) == texts(results["again"])
    assert not set(texts(results["plain"])) & set(texts(results["other seed"]))


@pytest.mark.parametrize("name", ["no prompt", "special"])
def test_every_id_and_every_prompt_can_be_printed(results, name):
    assert len(texts(results[name])) == 1


@pytest.mark.parametrize(("name", "step"), [("likeliest", 160), ("likeliest of step 40", 40)])
def test_temperature_zero_takes_the_likeliest(quick_start, results, name, step):
    model, encoding, _ = load_model(str(quick_start.folder), step)
    end = encoding.encode_single_token("<|endoftext|>")
    ids = [end, *encoding.encode_ordinary(PROMPT)]
    start = len(ids)
    for _ in range(20):
        ids.append(model.logits(torch.tensor([ids[-32:]]))[0, -1].argmax().item())
    expected = PROMPT + encoding.decode(ids[start:]).split("<|endoftext|>")[0]
    written = texts(results[name])
    assert set(written) == {expected + "\n"}
    assert f"step {step}" in results[name].stdout.splitlines()[0]


MISTAKES = {
    "no such run": ["out/no_such_run"],
    "no run named": ["python sample.py out/<run>"],
    "two runs": ["one run folder"],
    "no checkpoint": ["holds no checkpoint"],
    "no such step": ["no checkpoint of step 41", "40, 80, 120, 160"],
    "bad temperature": ["temperature"],
    "bad n_tokens": ["n_tokens"],
    "misspelt": ["'promt'", "'prompt'"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(results, name):
    done = results[name]
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in MISTAKES[name]), done.stderr


def test_every_case_was_looked_at(results):
    assert set(results) == {*MISTAKES, "plain", "again", "other seed", "no prompt", "special", "likeliest", "likeliest of step 40"}
