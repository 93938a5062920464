"""bench.py: its sums against sums by hand, whether the ways that it times do the same work, and mistakes. Times themselves are not tested."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_many

import bench
from model import Llama, ModelConfig

pytest.importorskip("higher")
pytest.importorskip("transformers")
TINY = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=64, block_size=16)


def test_a_comparison_is_medians_in_turn_without_the_first_round(monkeypatch, capsys):
    times, called = iter([100, 100, 1, 20, 5, 10, 3, 90]), []  # a and b in turn, four rounds
    monkeypatch.setattr(bench, "seconds", lambda function: function() or next(times))
    monkeypatch.setattr(bench, "found", [])
    ways = {name: lambda name=name: called.append(name) for name in "ab"}
    assert bench.compare("title", ways, 3, {"a": 30, "b": 40}, "tokens", {"a": {"share of peak": 1.5, "GiB": 2.0}}) == {"a": 3, "b": 20}
    assert called == [*"abababab"]
    shared = {"comparison": "title"}
    assert bench.found == [
        shared | {"way": "a", "seconds": 3, "low": 1, "high": 5, "share of peak": 0.5, "GiB": 2.0, "times the first": 1.0, "tokens/s": 10.0},
        shared | {"way": "b", "seconds": 20, "low": 10, "high": 90, "times the first": 20 / 3, "tokens/s": 2.0}]  # fmt: skip
    a, b = capsys.readouterr().out.splitlines()[2:]
    assert a.split() == "a 3000.00 ms [1000.00, 5000.00] 1.00 x the first 10 tokens/s 50.0% of peak GiB 2.00".split()
    assert b.split() == "b 20000.00 ms [10000.00, 90000.00] 6.67 x the first 2 tokens/s".split()


def test_language_models_have_the_same_weights_and_each_way_learns(monkeypatch):
    """Of the eager ways: each makes a whole step, whose first loss is that of knowing nothing."""
    shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (bench.hugging_face(TINY), Llama(TINY))]
    assert shapes[0] == shapes[1]
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss))
    for kind, compiled, dtype in bench.LM_WAYS.values():
        if not compiled:
            step = bench.lm_step(kind, TINY, 4, compiled, dtype)
            for _ in range(12):
                step()
            first, *_, last = losses[-12:]
            assert first == pytest.approx(math.log(64), abs=0.1) and last < first - 0.005
    assert len(losses) == 4 * 12


def test_ways_of_a_meta_step_are_the_same_meta_step(monkeypatch):
    """One loss, and as many backbone calls as their names say: of support and query, or of the support in each of ten steps, episode by episode."""
    E, N, K, Q, L = 2, 3, 2, 1, 8
    rng, rows = np.random.default_rng(0), []
    draws = [SimpleNamespace(**{part: rng.integers(64, size=(N * n, L)) for part, n in (("support", K), ("query", Q))},
                             **{f"{part}_pos": np.full(N * n, L - 1) for part, n in (("support", K), ("query", Q))},
                             **{f"{part}_labels": np.arange(N).repeat(n) for part, n in (("support", K), ("query", Q))})
             for _ in range(E)]  # fmt: skip
    for draw in draws:
        draw.query = draw.support[::K]  # so that what is learnt from the support helps
    plain = Llama.features_at
    monkeypatch.setattr(Llama, "features_at", lambda self, idx, positions: rows.append(len(idx)) or plain(self, idx, positions))
    monkeypatch.setattr(bench.maml, "init_head", lambda d, n: {"0.weight": torch.randn(n, d), "0.bias": torch.randn(n)})  # unlike any other
    losses, calls = {}, {}
    for name in ("meta step, first order", "meta step, second order", "backbone in every inner step", "head driven by higher"):
        torch.manual_seed(0)
        ways = bench.meta_ways(TINY, E, N, K, Q, SimpleNamespace(episode=lambda number: draws[number]))
        with torch.compiler.set_stance("force_eager"):
            losses[name] = ways[name]().item()
        calls[name] = rows[:]
        rows.clear()
    first, *others = losses.values()
    assert others == pytest.approx([first] * 3, rel=1e-2) and abs(first - math.log(N)) > 0.05  # and it has adapted
    once = [E * N * K, E * N * Q]
    assert [*calls.values()] == [once, once, [*[N * K] * 10, N * Q] * E, once]


def test_mistakes_are_a_line_before_anything_is_measured(data_dir):
    cases = {
        "cannot measure 'peak': there are lm, meta, data, ner, spectra, startup": ["peak"],
        "rounds = 0: at least 1": ["lm", "--rounds=0"],
        "shapes = 12m: no such shape; there are quick start, 11m, 65m": ["data", "meta", "--shapes=12m"],
        "out = nowhere/b.json: its folder is not there or may not be written to; take another --out": ["data", "--out=nowhere/b.json"],
        "no corpus docstrings in nowhere: make it with python data/prepare.py docstrings": ["data", "--data_dir=nowhere"],
    }
    for line, done in zip(cases, run_many("bench.py", [[f"--data_dir={data_dir}", *words] for words in cases.values()]), strict=True):
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


def test_a_process_that_fails_is_a_line(tmp_path, capsys):
    path = tmp_path / "x.py"
    for text, line in (("raise SystemExit('error: no luck')", "no luck"), ("import os; os.kill(os.getpid(), 9)", "ended with code -9, perhaps")):
        path.write_text(text)
        with pytest.raises(SystemExit, match="1"):
            bench.run(str(path))
        told = capsys.readouterr().err
        assert told.startswith(f"error: {path}: {line}") and told.count("\n") == 1


def test_the_machine_is_in_the_numbers(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda function: 1.0)
    monkeypatch.setattr(bench, "found", [])
    assert set(bench.machine()) == {torch.float32, torch.bfloat16}
    top = json.loads(json.dumps(bench.found))[0]["machine"]
    assert torch.__version__ in top and f"{torch.get_num_threads()} threads" in top
