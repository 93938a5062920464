"""sample.py as a user runs it, on the run of the quick start."""
import re

import pytest
import torch
from conftest import one_line, run_many

from plumbing.checkpoint import load_model

PROMPT = "Return the number of"
MISTAKES = {  # the words, and what the one line says
    "no such run": (["out/no_such_run"], "holds no checkpoint"),
    "no run named": (["--prompt=a"], "python sample.py out/<run>"),
    "no such step": (["{run}", "--step=41"], "no checkpoint of step 41; there is 40, 80, 120, 160"),
    "bad temperature": (["{run}", "--temperature=-1"], "temperature"),
}

@pytest.fixture(scope="module")
def results(quick_start):
    """What became of many commands, by name."""
    run, prompt = quick_start.folder, f"--prompt={PROMPT}"
    greedy = [run, prompt, "--temperature=0", "--n_tokens=20", "--n_samples=2"]
    plain = [run, prompt, "--n_tokens=40"]
    cases = {
        "plain": plain, "again": plain, "other seed": [*plain, "--seed=1"],
        "any id": [run, "--n_samples=1", "--temperature=3", "--top_k=0", "--n_tokens=400"],  # padding's too
        "special": [run, "--prompt=<|endoftext|><|mask|>", "--n_samples=1"],
        "likeliest": greedy, "likeliest of step 40": [*greedy, "--step=40"],
        **{name: [word.format(run=run) for word in words] for name, (words, _) in MISTAKES.items()},
    }
    return dict(zip(cases, run_many("sample.py", cases.values()), strict=True))

def texts(done):
    """The continuations: what follows each rule."""
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return re.split(r"^---\n", done.stdout, flags=re.MULTILINE)[1:]

def test_samples_and_seeds(results):
    written = texts(results["plain"])
    assert len(set(written)) == 3 and all(text.startswith(PROMPT) for text in written)
    assert not set(written) & set(texts(results["other seed"]))
    assert results["again"].stdout == results["plain"].stdout
    assert len(texts(results["any id"])) == len(texts(results["special"])) == 1

@pytest.mark.parametrize(("name", "step"), [("likeliest", 160), ("likeliest of step 40", 40)])
def test_temperature_zero_takes_the_likeliest(quick_start, results, name, step):
    loaded = load_model(quick_start.folder, step)
    ids = [loaded.tokenizer.eot, *loaded.tokenizer.encode_ordinary(PROMPT)]
    start = len(ids)
    for _ in range(20):
        ids.append(loaded.model.logits(torch.tensor([ids[-32:]]))[0, -1].argmax().item())
    expected = PROMPT + loaded.tokenizer.decode(ids[start:]).split("<|endoftext|>")[0]
    assert set(texts(results[name])) == {expected + "\n"} and f"step {step}" in results[name].stdout

def test_mistakes_are_one_line(results):
    for name, (_, says) in MISTAKES.items():
        one_line(results[name], says)
        assert results[name].stdout == ""
