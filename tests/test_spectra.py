"""spectra.py: ranks against closed forms and numpy, entropies against a direct softmax, the signal on simulated and real curves, scripts as run."""
import csv
import io
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_many
from tqdm import tqdm

import runs
import spectra
from model import Llama, ModelConfig, rotary_table, rotate

SHAPE = dict(d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40, block_size=24)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = Llama(ModelConfig(**SHAPE, vocab_size=50))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.dim() > 1 else 1)  # attention far from uniform
    return model


@pytest.fixture(scope="module")
def batch():
    return spectra.probe(np.random.default_rng(0).integers(50, size=1000).astype(np.uint16), 24, n_tokens=120)


def numpy_rank(matrix):
    """The definition, on numpy's float64 singular values."""
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def with_spectrum(values, m, n, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in (m, n))
    return torch.from_numpy((u * values) @ v.T)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Effective rank


def test_ranks_of_known_spectra():
    for n in (1, 2, 30):
        assert spectra.effective_rank(torch.eye(n)) == pytest.approx(n)
        assert spectra.proportional_effective_rank(torch.eye(n)) == pytest.approx(1)
    one = torch.outer(torch.arange(1.0, 41), torch.arange(1.0, 8))
    for matrix in (one, one.T, one.bfloat16(), one.half()):
        assert spectra.effective_rank(one) == pytest.approx(1, abs=2e-6)
        assert spectra.proportional_effective_rank(matrix) == pytest.approx(1 / 7, rel=0.01)
    for scale in (1e-200, 1e200):
        assert spectra.effective_rank(torch.eye(5).double() * scale) == pytest.approx(5)
        np.testing.assert_allclose(spectra.singular_values(torch.eye(5).double() * scale), np.full(5, scale))
    for m, n in ((5, 9), (9, 5)):
        assert spectra.effective_rank(torch.zeros(m, n)) == spectra.proportional_effective_rank(torch.zeros(m, n)) == 0
    # sigma_i = r^i has p_i = (1 - r) r^i in the limit, of entropy -ln(1 - r) - r ln(r) / (1 - r)
    for r in (0.3, 0.5, 0.8):
        expected = math.exp(-math.log(1 - r) - r * math.log(r) / (1 - r))
        for m, n in ((100, 130), (130, 100)):
            assert spectra.effective_rank(with_spectrum(r ** np.arange(100), m, n)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ranks_and_singular_values_equal_numpys(dtype):
    spike = np.array([1.0] + [1e-5] * 39)
    for i, values in enumerate((np.ones(40), 0.9 ** np.arange(40), 0.4 ** np.arange(40), np.arange(40) % 2, spike, np.arange(41.0)[1:] ** 3)):
        for m, n in ((40, 40), (40, 200), (200, 40)):
            matrix = with_spectrum(values, m, n, i).to(dtype)
            exact = matrix.double().numpy()
            assert spectra.effective_rank(matrix) == pytest.approx(numpy_rank(exact), rel=2e-6)
            found = spectra.singular_values(matrix)
            assert found.dtype == np.float64 and found.shape == (40,) and (np.diff(found) <= 0).all()
            np.testing.assert_allclose(found, np.linalg.svd(exact, compute_uv=False), atol=1e-7 * found[0])


def test_wide_matrices_go_by_the_gram_matrix_and_low_rank_does_not(monkeypatch):
    calls = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: calls.append(matrix.shape) or svdvals(matrix))
    spectra.effective_rank(torch.randn(30, 500, generator=torch.Generator().manual_seed(0)))
    assert not calls
    spectra.effective_rank(with_spectrum(np.ones(3), 30, 500))
    assert calls == [(30, 500)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_is_named(bad):
    matrix = torch.ones(3, 4)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="weights/down/3 is not finite: 1 of its 12"):
        spectra.singular_values(matrix, "weights/down/3")
    with pytest.raises(ValueError, match="not finite"):
        spectra.effective_rank(matrix)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# A model, measured


def direct_attention(model, idx):
    """Entropies (L, H) the long way: each layer's input by hand, the whole matrix of scores, a loop over its rows."""
    c, T = model.config, idx.shape[1]
    D = c.d_model // c.n_heads
    cos, sin = rotary_table(T, D, c.rope_theta, idx.device)
    x, result = model.embedding(idx), []
    for block in model.blocks:
        y = block.attention_norm(x)
        q, k = block.attention.q_proj(y), block.attention.k_proj(y)
        heads = []
        for h in range(c.n_heads):
            g = h // (c.n_heads // c.n_kv_heads)
            scores = rotate(q[..., h * D : h * D + D], cos, sin) @ rotate(k[..., g * D : g * D + D], cos, sin).mT / D**0.5  # (B, T, T)
            rows = [scores[b, t, : t + 1].double().log_softmax(-1) for b in range(len(idx)) for t in range(1, T)]
            heads.append(np.mean([float(-(row.exp() * row).sum()) / math.log(len(row)) for row in rows]))
        result.append(heads)
        x = block(x, cos, sin)
    return np.array(result)


@torch.no_grad()
def test_attention_entropy_equals_a_direct_softmax(model, batch):
    expected = direct_attention(model, batch[0])
    assert expected.max() < 0.97 and expected.std() > 0.005  # there is something to see
    np.testing.assert_allclose(spectra.attention_entropy(model, batch[0]), expected, atol=2e-6)


def test_the_batch_is_spread_over_the_text():
    idx, targets = spectra.probe(np.arange(1001), 24, n_tokens=120)
    assert idx.shape == (5, 24) and torch.equal(targets, idx + 1) and torch.equal(idx[0], torch.arange(24)) and targets[-1, -1] == 1000


def test_entropy_of_long_rows_in_chunks():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 2048, 8, generator=g), torch.randn(2, 2, 2048, 8, generator=g)
    found = spectra.head_entropy(q, k)
    for h in (0, 3):  # whole
        score = (q[:, h] @ k[:, h // 2].mT / 8**0.5).masked_fill(torch.ones(2048, 2048).triu(1).bool(), -math.inf)
        p = score.softmax(-1)
        rows = -(p * p.clamp(min=1e-38).log()).sum(-1)[:, 1:] / torch.arange(2, 2049).log()
        assert found[h].item() == pytest.approx(rows.mean().item(), abs=1e-5)
    assert spectra.head_entropy(torch.zeros(1, 2, 300, 4), k[:1, :, :300, :4]).tolist() == pytest.approx([1, 1])  # uniform
    assert spectra.head_entropy(q[:, :, :1], k[:, :, :1]).tolist() == [0] * 4  # a row of length one has none
    pointed = 100 * torch.nn.functional.one_hot(torch.arange(9)).float()[None, None]
    assert spectra.head_entropy(pointed, pointed).item() == pytest.approx(0, abs=1e-6)  # each sees itself only


def test_everything_measured_equals_numpy(model, batch):
    idx, targets = batch
    measured, cheap = spectra.measure(model, idx, targets), spectra.measure(model, idx)
    assert set(cheap) == {"activations", "entropy", "weights/down", "weights/ov"}
    for name, values in cheap.items():
        np.testing.assert_array_equal(values, measured[name])
    numbers = spectra.summary(measured)

    model.zero_grad()
    loss = model(idx, targets)
    loss.backward()
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-6)
    paths = {role: [f"blocks.{i}.{path}.weight" for i in range(3)] for role, path in spectra.ROLES.items()}
    paths |= {"embedding": ["embedding.weight"], "unembedding": ["unembedding.weight"]}
    named = dict(model.named_parameters())
    assert {p for group in paths.values() for p in group} == {name for name, p in named.items() if p.dim() == 2}
    for role, group in paths.items():
        for kind, tensors in (("weights", [named[p].detach() for p in group]), ("gradients", [named[p].grad for p in group])):
            expected = np.mean([numpy_rank(t) / min(t.shape) for t in tensors])
            assert numbers[f"per/{kind}/{role}"] == pytest.approx(expected, rel=1e-5), (kind, role)
    model.zero_grad(set_to_none=True)

    with torch.no_grad():
        cos, sin = rotary_table(24, 4, model.config.rope_theta, idx.device)
        x = model.embedding(idx)
        for layer, block in enumerate(model.blocks):
            x = block(x, cos, sin)
            assert numbers[f"per/activations/{layer}"] == pytest.approx(numpy_rank(x.flatten(0, 1)) / 16, rel=1e-5)
        shares = []
        for block in model.blocks:
            o, v = block.attention.o_proj.weight, block.attention.v_proj.weight
            shares += [numpy_rank(o[:, 4 * h : 4 * h + 4] @ v[h // 2 * 4 : h // 2 * 4 + 4]) / 4 for h in range(4)]
        assert numbers["per/weights/ov"] == pytest.approx(np.mean(shares), rel=1e-5)
    for layer, heads in enumerate(measured["entropy"]):
        assert numbers[f"entropy/{layer}"] == pytest.approx(heads.mean())


@pytest.mark.parametrize("with_targets", [False, True])
def test_measuring_leaves_no_trace(model, batch, with_targets):
    model.train()
    some = model.blocks[0].mlp.down.weight
    some.grad = torch.full_like(some, 3.0)
    before, state = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    spectra.measure(model, batch[0], batch[1] if with_targets else None)
    assert torch.equal(torch.get_rng_state(), state) and model.training and torch.is_grad_enabled()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert (some.grad == 3).all() and all(p.grad is None for p in model.parameters() if p is not some)
    assert not any(block._forward_hooks for block in model.blocks)
    some.grad = None


def test_a_damaged_matrix_is_told_and_the_others_are_measured(model, batch):
    kept = model.blocks[1].mlp.up.weight[2, 3].item()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[2, 3] = math.nan
    with pytest.raises(ValueError, match="weights/up/1 is not finite"):
        spectra.measure(model, *batch)
    assert not any(block._forward_hooks for block in model.blocks)
    told = []
    measured = spectra.measure(model, *batch, complain=told.append)
    assert told == ["weights/up/1 is not finite: 1 of its 640 numbers"]  # and nothing of what follows from it
    assert np.isnan(measured["weights/up"][1]).all() and np.isfinite(measured["weights/up"][[0, 2]]).all()
    numbers = spectra.summary(measured)
    assert numbers["per/weights/up"] == pytest.approx(
        np.mean([numpy_rank(model.blocks[i].mlp.up.weight.detach()) / 16 for i in (0, 2)]), rel=1e-5)  # fmt: skip
    assert "per/activations/0" in numbers and "per/activations/1" not in numbers and "per/weights/ov" in numbers
    assert all(map(math.isfinite, numbers.values()))
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[2, 3] = kept


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The signal

# per/weights/down times 10,000 of three vanilla runs (d 48, 4 layers, 600 steps on documentation strings) every 10 steps from the end of warm-up on
VANILLA = """
7934 7918 7986 7959 7894 7902 7887 7918 7931 7936 7957 7961 7963 7984 8002 8034 8052 8087 8123 8121 8124 8154 8194 8216 8244 8257 8273 8291 8301 8311
8320 8327 8337 8352 8365 8376 8384 8397 8408 8421 8426 8437 8441 8445 8453 8462 8469 8473 8476 8478 8480 8482 8483 8483 8484
7868 7858 7967 7951 7933 7958 7959 7987 8057 8072 8078 8084 8125 8142 8172 8204 8220 8228 8250 8289 8307 8342 8370 8396 8413 8428 8446 8465 8483 8493
8501 8515 8524 8540 8554 8567 8573 8576 8582 8595 8605 8614 8622 8627 8632 8635 8638 8643 8647 8649 8651 8653 8655 8656 8657
7676 7573 7507 7474 7374 7334 7392 7496 7541 7558 7583 7629 7661 7695 7700 7705 7735 7741 7758 7778 7796 7807 7818 7828 7840 7853 7865 7881 7895 7911
7940 7957 7971 7982 7993 8012 8028 8045 8050 8059 8067 8079 8087 8092 8092 8098 8106 8112 8117 8119 8122 8125 8127 8127 8128
"""
VANILLA = np.array(VANILLA.split(), float).reshape(3, 55) / 10_000


def alarms(curves):
    return np.array([spectra.collapse(values) is not None for values in curves])


@pytest.mark.parametrize("n", [24, 100])
def test_false_alarms_on_noise_and_drift(n):
    rng, t = np.random.default_rng(n), np.arange(n)
    e = rng.standard_normal((150 if n == 24 else 80, n))
    persistent = np.zeros_like(e)
    for i in range(n):
        persistent[:, i] = e[:, i] + (0.9 * persistent[:, i - 1] if i else 0)
    smooth = 0.75 + 0.15 * np.exp(-t / 6) + 0.05 * t / n  # falls, and rises again
    worlds = {"white": 0.8 + 0.03 * e, "white on drift": smooth + 0.01 * e, "autoregressive": smooth + 0.01 * persistent,
              "random walk": 0.8 + 0.02 * e.cumsum(1), "drift": smooth + 1e-6 * e, "falling": 0.9 - 0.4 * t / n + 0.003 * e}  # fmt: skip
    for name, curves in worlds.items():
        # the true rates are at most 3%: that many in a sample would be seen less than once in a thousand samples
        assert alarms(curves).mean() <= 0.1 if name == "random walk" else alarms(curves).mean() <= 0.05, name


def test_no_false_alarm_on_vanilla_runs():
    assert not alarms(VANILLA).any()
    assert not alarms(VANILLA[:, ::2]).any() and not alarms(VANILLA[:, ::4]).any()  # evaluated more seldom


def test_power_place_and_size_of_a_drop():
    rng, t, n, at = np.random.default_rng(3), np.arange(24), 150, 14
    smooth = 0.75 + 0.15 * np.exp(-t / 6)
    for size, noise, within in ((0.2, 0.01, 1), (0.2, 0.01, 2), (0.1, 0.002, 1), (0.1, 0.002, 2)):
        fallen = np.clip((t - at + within) / within, 0, 1)  # 0 before, 1 from `at` on
        curves = smooth * (1 - size * fallen) * (1 + noise * rng.standard_normal((n, 24)))
        found = [spectra.collapse(values) for values in curves]
        hits = [f for f in found if f]
        assert len(hits) >= 0.8 * n, (size, noise, within)
        assert np.mean([abs(index - at) <= 1 for index, _ in hits]) > 0.95
        assert np.mean([drop for _, drop in hits]) == pytest.approx(size, rel=0.2)
        for values, f in zip(curves[:20], found, strict=False):  # online: a decision stands, whatever comes later
            seen = [spectra.collapse(values[:k]) for k in range(len(values) + 1)]
            assert all(s in (None, f) for s in seen) and (f is None or seen.index(f) >= f[0] + 3)
    real = VANILLA.copy()
    real[:, 30:] *= 0.9
    assert [spectra.collapse(values)[0] for values in real] == [30, 30, 30]
    spike = VANILLA.copy()
    spike[:, 30] *= 0.8
    assert not alarms(spike).any()  # one low value is no sustained drop
    rise = VANILLA.copy()
    rise[:, 30:] *= 1.2
    assert not alarms(rise).any() and spectra.collapse([]) is None


def test_change_points_count_from_the_end_of_warm_up():
    values = np.concatenate([np.full(20, 0.9), np.full(20, 0.6)]) + 1e-3 * np.random.default_rng(0).standard_normal(40)
    lines = [{"step": 10 * i, "kind": kind, "per/a": v if kind == "eval" else 7} for i, v in enumerate(values) for kind in ("lm", "eval")]
    found = spectra.change_point(lines, "per/a", after=50)
    assert found["curve"] == "per/a" and found["at"] == 200 and found["size"] == pytest.approx(1 / 3, abs=0.02)
    assert spectra.change_point(lines, "per/a", after=200) is None and spectra.change_point(lines, "per/b", after=0) is None


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Figures and words


def made_up_log(seed=0, speed=1.0, meta=True, n=21, extra=()):
    """A log whose validation loss is 8 - speed * step / 100, with an evaluation every 10 steps."""
    lines = []
    for step in range(0, 10 * n, 5):
        spent = {"lm_tokens": 100 * step, "flops": 1e6 * step * (1 + meta), "seconds": 0.5 * step}
        kind = "meta" if meta and step % 10 else "lm"
        episodes = {"query_acc": 0.3, "query_acc_before": 0.1} if kind == "meta" else {}
        lines.append({"step": step, "kind": kind, "lm_loss": 8.0, **episodes, **spent})
        if step % 10 == 0:
            fall = 0.7 if step >= 150 and meta else 1
            lines.append({"step": step, "kind": "eval", "val_loss": 8 - speed * step / 100 + 0.01 * seed,
                          "heldout_query_acc": 0.2 + 0.001 * step + 0.01 * seed,
                          "heldout_query_acc_before": 0.0625, "heldout_query_acc_se": 0.01, **{key: 1.0 for key in extra}, **spent,
                          **{f"per/weights/{r}": fall * (0.8 + 1e-3 * ((step * 7919) % 13) / 13) for r in ("down", "ov")},
                          **{f"{p}/{layer}": 0.5 + 0.1 * layer for p in ("per/activations", "entropy") for layer in range(3)}})  # fmt: skip
    return lines


CONFIG = {"n_layers": 3, "n_way": 16, "k_shot": 4, "warmup_steps": 20}


def drawn_lines(drawn, panel):
    return {line.get_label(): line.get_xydata() for line in drawn.axes[panel].lines if not line.get_label().startswith("_")}


def test_phase_figure_shows_the_numbers_of_the_logs():
    arms = [spectra.Arm("half meta", [made_up_log(s) for s in (0, 1, 2)], CONFIG), spectra.Arm("vanilla", [made_up_log(meta=False)], CONFIG)]
    for x, name in spectra.AXES.items():
        drawn = spectra.figure(arms, x)
        assert not any(ax.yaxis.get_major_formatter().get_useOffset() for ax in drawn.axes)
        assert len(drawn.axes) == 5 and drawn.axes[-1].get_xlabel() == name and all(ax.get_ylabel() for ax in drawn.axes)
        loss = drawn.axes[3].lines[0].get_xydata()
        evals = [line for line in arms[0].runs[0] if line["kind"] == "eval"]
        np.testing.assert_allclose(loss, [(line[x], line["val_loss"] + 0.01) for line in evals])  # the middle seed is the mean
        band = drawn.axes[3].collections[0].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx(evals[-1]["val_loss"]) and band.max() == pytest.approx(evals[0]["val_loss"] + 0.02)
        assert {ax.lines[-1].get_color() for ax in drawn.axes[:2]} <= set(spectra.COLORS) | {"0.6"}
        ends = [line.get_xdata()[0] for line in drawn.axes[0].lines if len(line.get_xdata()) == 2]
        assert ends and ends[0] == pytest.approx(next(line[x] for line in evals if line["step"] == 20))
    accuracy = spectra.figure(arms).axes[4].collections[2].get_paths()[0].vertices  # the vanilla run's, after two bands of three seeds
    np.testing.assert_allclose([accuracy[:, 1].min(), accuracy[:, 1].max()], [0.2 - 0.01, 0.4 + 0.01])  # its one standard error
    short = spectra.figure([spectra.Arm("two", [made_up_log(), made_up_log(n=9)], CONFIG)])
    assert short.axes[3].lines[0].get_xdata().max() == 80  # as far as both go
    marks = [text.get_text() for text in drawn.axes[0].texts]
    assert marks.count("drop of 30%") == 6 and "warm-up ends" in marks  # three seeds, two curves; none in the vanilla run
    heat = spectra.heat_maps(arms)
    assert [ax.get_title() for ax in heat.axes[:2]] == ["half meta", "vanilla"]
    values = heat.axes[0].collections[0].get_array()
    np.testing.assert_allclose(values, np.tile([[0.5], [0.6], [0.7]], 21))
    bare = [{key: value for key, value in line.items() if "activations" not in key} for line in made_up_log()]  # NaN in the first block
    for logs in ([bare], [made_up_log(), bare]):
        heat = spectra.heat_maps([spectra.Arm(str(i), [log], CONFIG) for i, log in enumerate(logs)])
        assert [ax.collections[0].get_array().mask.all() for ax in heat.axes[: len(logs)]] == [log is bare for log in logs]
        heat.savefig(io.BytesIO())
    sharper = [line | {f"entropy/{layer}": 0.1 for layer in range(3)} for line in made_up_log()]
    heat = spectra.heat_maps([spectra.Arm("a", [made_up_log()], CONFIG), spectra.Arm("b", [sharper], CONFIG)])
    assert [ax.collections[0].get_clim() for ax in heat.axes[2:4]] == [(0.1, 0.7)] * 2  # alike


def test_curves_of_a_short_run():
    lines = made_up_log(n=5, extra=("val_loss/wiki", "val_loss/code")) + [{"step": 30, "kind": "collapse", "lm_tokens": 0, "flops": 0, "seconds": 0}]
    drawn = spectra.figure([spectra.Arm("short", [lines], CONFIG)], inside=False)
    assert len(drawn.axes) == 2
    found = drawn_lines(drawn, 0) | drawn_lines(drawn, 1)
    assert {"training, each step", "validation", "wiki", "code", "chance, 1/16"} <= set(found)
    after = found["training words, after adaptation (mean of 25 steps)"]
    np.testing.assert_allclose(after, [(step, 0.3) for step in range(5, 50, 10)])  # as many points as meta steps
    assert any(line.get_xdata()[0] == 30 for line in drawn.axes[0].lines if len(line.get_xdata()) == 2)


def test_running_mean_of_the_last_25():
    acc = np.random.default_rng(0).random(60)
    lines = [{"step": i, "kind": "meta", "query_acc": a, "query_acc_before": a} for i, a in enumerate(acc)]
    ax = SimpleNamespace(drawn=[], plot=lambda *args, **style: ax.drawn.append(args))
    spectra._each_step(ax, lines, {"heldout_query_acc": ""}, "step")
    np.testing.assert_allclose(ax.drawn[0][1], [acc[max(0, i - 24) : i + 1].mean() for i in range(60)])


def test_times_sooner():
    fast, slow = made_up_log(speed=2.0), made_up_log(meta=False)
    assert spectra.reached(fast, 7.5) == pytest.approx({"step": 25, "lm_tokens": 2500, "flops": 5e7, "seconds": 12.5})  # between two evaluations
    assert spectra.reached(slow, 1) is None and spectra.reached(slow, 9)["step"] == 0
    text = spectra.sooner(("a", "b"), (fast, slow))  # the final loss of b, at step 200, is 6: a is there at step 100
    assert "a reached it after 100 steps, 10,000 LM tokens, 2e+08 FLOPs, 50 s" in text
    assert "2.00x in optimizer step, 2.00x in language-model tokens, 1.00x in training FLOPs, 2.00x in training time" in text
    assert "b never came down to it: its lowest is 6.0000" in spectra.sooner(("b", "a"), (slow, fast))
    damaged = [line | {"val_loss": math.nan} for line in fast]
    assert "a ended without a finite validation loss" in spectra.sooner(("a", "a"), (damaged, damaged))


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The scripts

BASE = SHAPE | dict(
    batch_size=4, max_steps=60, lr=0.003, warmup_steps=5, schedule="constant", meta_ratio=0.5, n_way=4, k_shot=2, q_query=2, episode_len=16,
    inner_steps=2, eval_steps=1, eval_interval=2, ckpt_interval=20, log_interval=1000, compile=False, dtype="float32", device="cpu",
)  # fmt: skip
RARE = {"word_min_count": 100}  # too few such words in the validation text for episodes, which would be most of the work of an evaluation
TIMES = {"seconds", "tokens_per_second"}


def words(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def train(here, data_dir, **runs):
    """Train one after the other; `name` is the run folder up to a double underscore."""
    cases = [words(**BASE | {"data_dir": data_dir, "out_dir": here / name.split("__")[0]} | changes) for name, changes in runs.items()]
    for done in run_many("train.py", cases):
        assert done.returncode == 0, done.stderr


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def here(data_dir, tmp_path_factory):
    here = tmp_path_factory.mktemp("spectra")
    seldom = {"eval_interval": 20, "max_steps": 40}
    train(here, data_dir, maml=seldom, maml_1=seldom | {"seed": 1}, vanilla=seldom | {"meta_ratio": 0}, other=seldom | {"d_ff": 44},
          stop=RARE | {"on_collapse": "stop", "meta_ratio": 0},
          switched=RARE | {"on_collapse": "vanilla"}, meta=RARE | {"on_collapse": "meta"})  # fmt: skip
    return here


def test_training_logs_and_stores_what_it_measures(here, data_dir):
    evals = [line for line in log_of(here / "maml") if line["kind"] == "eval"]
    wanted = {"per/weights/down", "per/weights/ov"} | {f"{p}/{layer}" for p in ("per/activations", "entropy") for layer in range(3)}
    assert [line["step"] for line in evals] == [0, 20, 40] and all(wanted <= set(line) for line in evals)
    state = torch.load(here / "maml" / "ckpt_000040.pt", weights_only=True)["model"]
    downs = [numpy_rank(state[f"blocks.{i}.mlp.down.weight"]) / 16 for i in range(3)]
    assert evals[-1]["per/weights/down"] == pytest.approx(np.mean(downs), rel=1e-5)
    stored = np.load(here / "maml" / "spectra_000040.npz", allow_pickle=False)
    exact = np.linalg.svd(state["blocks.1.attention.q_proj.weight"], compute_uv=False)
    np.testing.assert_allclose(stored["weights/q"][1], exact, rtol=1e-4, atol=1e-6)
    assert stored["entropy"].shape == (3, 4) and stored["entropy"][2].mean() == pytest.approx(evals[-1]["entropy/2"])
    assert {f"gradients/{role}" for role in [*spectra.ROLES, "embedding", "unembedding"]} <= set(stored)


def doctored(here, action, name, until):
    """A copy of a run without its last checkpoint, in whose log per/weights/down was half as high again before a step: a collapse to be found."""
    shutil.copytree(here / action, here / name)
    os.remove(here / name / "ckpt_000060.pt")
    lines = [json.loads(line) for line in (here / name / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval" and line["step"] < until:
            line["per/weights/down"] *= 1.5
    (here / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_on_collapse_is_decided_from_the_log_and_a_resumed_run_decides_the_same(here, data_dir):
    for action in ("stop", "switched", "meta"):
        assert not any(line["kind"] == "collapse" for line in log_of(here / action))
        doctored(here, action, f"{action}_a", 34)
    setting = {"stop": RARE | {"on_collapse": "stop", "meta_ratio": 0}, "switched": RARE | {"on_collapse": "vanilla"},
               "meta": RARE | {"on_collapse": "meta"}}  # fmt: skip
    train(here, data_dir, **{f"{action}_a": changes | {"resume": True} for action, changes in setting.items()})
    kinds = {}
    for action in setting:
        lines = log_of(here / f"{action}_a")
        found = [line for line in lines if line["kind"] == "collapse"]
        assert [(line["step"], line["at"], line["curve"], line["action"]) for line in found] == [
            (42, 34, "per/weights/down", setting[action]["on_collapse"])]  # fmt: skip
        assert found[0]["size"] == pytest.approx(1 / 3, abs=0.04)  # the training went on meanwhile
        kinds[action] = "".join(line["kind"][0] for line in lines if line["kind"] in ("lm", "meta"))
        shutil.copytree(here / f"{action}_a", here / f"{action}_b")
        for path in (here / f"{action}_b").glob("ckpt_00006*.pt"):
            path.unlink()  # as after a kill: the last checkpoint is of step 40 again, or of step 42, where stop stopped
    plain = "".join(line["kind"][0] for line in log_of(here / "switched") if line["kind"] in ("lm", "meta"))
    assert kinds["stop"] == 42 * "l" and (here / "stop_a" / "ckpt_000042.pt").exists()
    assert kinds["switched"] == plain[:42] + 18 * "l" and "m" in plain[42:]
    assert kinds["meta"] == 42 * "l" + plain[42:]
    train(here, data_dir, **{f"{action}_b": changes | {"resume": True} for action, changes in setting.items()})
    for action in setting:
        assert log_of(here / f"{action}_b") == log_of(here / f"{action}_a")
    longer = {f"{action}_a": setting[action] | {"resume": True, "max_steps": 66} for action in ("stop", "meta")}  # it lies before the checkpoint
    train(here, data_dir, **longer)
    end = {action: "".join(line["kind"][0] for line in log_of(here / f"{action}_a") if line["kind"] in ("lm", "meta")) for action in ("stop", "meta")}
    assert end["stop"] == kinds["stop"] and "m" in end["meta"][60:] and len(end["meta"]) == 66


def test_settings_of_on_collapse_are_checked(data_dir, tmp_path):
    base = BASE | {"data_dir": data_dir, "out_dir": tmp_path / "no"}
    cases = {"on_collapse is one of off, stop": {"on_collapse": "halt"}, "switches meta steps off or on": {"on_collapse": "meta", "meta_ratio": 0},
             "takes 12 evaluations after warm-up": {"on_collapse": "stop", "eval_interval": 10}}  # fmt: skip
    for text, done in zip(cases, run_many("train.py", [words(**base | changes) for changes in cases.values()]), strict=True):
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1


def test_command_line(here, tmp_path, data_dir):
    """Runs with their logs, and the same runs as checkpoints alone, with the mistakes in between."""
    alone, old = tmp_path / "alone", tmp_path / "old"
    shutil.copytree(here / "maml", alone, ignore=shutil.ignore_patterns("log.jsonl", "config.json", "*.npz", "*.png"))
    shutil.copytree(here / "vanilla", old)  # a log from before there were spectra
    lines = [json.loads(line) for line in (old / "log.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if not key.startswith(("per/", "entropy/"))} for line in lines]
    (old / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "empty").mkdir()
    shutil.copytree(here / "maml", tmp_path / "torn")
    torn = tmp_path / "torn" / "ckpt_000020.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    shutil.copytree(here / "vanilla", tmp_path / "damaged")
    path = tmp_path / "damaged" / "ckpt_000040.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["blocks.2.attention.o_proj.weight"][0, 0] = math.nan
    torch.save(state, path)
    found = {"steps": {"20": {"all": {"bits_per_byte": 3.25}}, "25": {"all": {"bits_per_byte": 3.0}}}}  # as eval_lm.py --step=all leaves it
    (old / "eval_lm.json").write_text(json.dumps(found))
    shutil.copytree(here / "maml", tmp_path / "misled")
    (tmp_path / "misled" / "eval_lm.json").write_text('{"steps": {"last": 3}}')
    shutil.copytree(here / "maml", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text("{}")
    shutil.copytree(here / "maml", tmp_path / "torn_log")  # as a crash leaves it
    shutil.copytree(here / "maml", tmp_path / "garbled")
    (tmp_path / "unmade").mkdir()
    shutil.copy(here / "maml" / "log.jsonl", tmp_path / "unmade")
    text = (here / "maml" / "log.jsonl").read_text()
    (tmp_path / "torn_log" / "log.jsonl").write_text(text + '{"step": 41, "ki')
    (tmp_path / "garbled" / "log.jsonl").write_text(text.replace("\n", "\nrubbish\n", 1))
    out = f"--out={tmp_path / 'figures'}"
    both, single, lacking, damaged, torn_log, *mistakes = run_many("spectra.py", [
        [here / "maml", here / "maml_1", here / "vanilla", "--x=lm_tokens", out], [alone, f"{alone}/"], [old],
        [tmp_path / "damaged", "--from_checkpoints=True"], [tmp_path / "torn_log"],
        [], [tmp_path / "empty"], [tmp_path / "torn", "--from_checkpoints=True"], [here / "maml", here / "other"], [here / "maml", "--x=steps"],
        [tmp_path / "misled"], [tmp_path / "bare"], [here / "maml", "--out=/dev/null/figures"], [tmp_path / "garbled"],
        [tmp_path / "unmade"],
    ])  # fmt: skip
    for done in (both, single, lacking, damaged, torn_log):
        assert done.returncode == 0, done.stderr
    assert "ended" not in single.stdout  # given twice, it is compared with nothing
    for name in ("phase.png", "heat.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG") and (alone / name).exists()
    table = {name: list(csv.DictReader(open(folder / "spectra.csv"))) for name, folder in (("maml", here / "maml"), ("alone", alone), ("old", old))}
    evals = [line for line in log_of(here / "maml") if line["kind"] == "eval"]
    assert [{key: float(row[key]) for key in evals[0] if key != "kind"} for row in table["maml"]] == [
        {key: value for key, value in line.items() if key != "kind"} for line in evals]  # fmt: skip
    for row, line in zip(table["alone"], evals[1:], strict=True):  # the numbers of training, out of the checkpoints
        assert float(row["step"]) == line["step"] and float(row["lm_tokens"]) == line["lm_tokens"]
        for key in ("per/weights/down", "per/activations/2", "entropy/1"):
            assert float(row[key]) == pytest.approx(line[key], rel=1e-5)
        assert float(row["val_loss"]) == pytest.approx(line["val_loss"], abs=0.3) and float(row["per/gradients/q"]) > 0
    assert [row["per/weights/down"] != "" for row in table["old"]] == [False, True, False, True]
    assert [row["bits_per_byte/all"] for row in table["old"]] == ["", "3.25", "3.0", ""] and float(table["old"][2]["lm_tokens"]) == 25 * 4 * 24
    final = [line for line in log_of(here / "vanilla") if line["kind"] == "eval"][-1]["val_loss"]
    assert f"vanilla ended with validation loss {final:.4f}: 40 steps" in both.stdout
    assert "step 40: weights/o/2 is not finite: 1 of its 256 numbers; left out" in damaged.stderr
    says = ["nothing is not a run folder", "empty holds neither checkpoints nor a log", "cannot read the checkpoint", "d_ff = 44", "x = 'steps'",
            "misled/eval_lm.json is not what", "bare/config.json has d_model = None", "cannot make this folder",
            "garbled/log.jsonl, line 2 is damaged: 'rubbish", "unmade/config.json"]
    for text, done in zip(says, mistakes, strict=True):
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1


def test_an_error_has_a_line_of_its_own(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1]")
    with tqdm(total=2, file=sys.stderr), pytest.raises(SystemExit):
        runs.read_json(str(tmp_path / "list.json"))
    assert f"error: {tmp_path}/list.json is not valid JSON (an object is expected): it is damaged; make it or copy it again" in [
        line.strip() for line in capsys.readouterr().err.splitlines()]  # fmt: skip
