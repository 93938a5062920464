"""Ranks against closed forms and numpy, entropies against a direct softmax; the signal, figures, script."""
import csv
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import log_of, one_line, run_many
from matplotlib.colors import to_hex

import spectra
from model import Llama, ModelConfig, rotary_table, rotate
from plumbing import figures

SHAPE = dict(d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40, block_size=24)
BATCH = spectra.probe(np.random.default_rng(0).integers(50, size=1000), 24, n_tokens=120)

@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = Llama(ModelConfig(**SHAPE, vocab_size=50))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.dim() > 1 else 1)  # attention far from uniform
    return model

def numpy_rank(matrix):
    """The definition, on numpy's float64 singular values."""
    s = np.linalg.svd(matrix.detach().double(), compute_uv=False)
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))

def with_spectrum(values, m, n):
    u, v = (np.linalg.qr(np.random.default_rng(seed).standard_normal((size, len(values))))[0]
            for seed, size in enumerate((m, n)))
    return torch.from_numpy((u * values) @ v.T)

# ----------------------------------------------------------------------------------------------------
# Effective rank, attention entropy, and a model measured

def test_ranks_of_known_spectra():
    for scale in (1, 1e-200, 1e200):
        matrix = torch.eye(5).double() * scale
        assert spectra.effective_rank(matrix) == pytest.approx(5)
        np.testing.assert_allclose(spectra.singular_values(matrix), np.full(5, scale))
    one = torch.outer(torch.arange(1.0, 41), torch.arange(1.0, 8))
    for matrix in (one, one.T, one.bfloat16(), one.half()):
        assert spectra.proportional_effective_rank(matrix) == pytest.approx(1 / 7, rel=0.01)
    assert spectra.effective_rank(torch.zeros(5, 9)) == spectra.effective_rank(torch.zeros(9, 5)) == 0
    assert math.isnan(spectra.effective_rank(torch.tensor([[1, math.inf], [1, 1]])))

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ranks_and_singular_values_equal_numpys(dtype):
    spike, i = np.array([1.0] + [1e-5] * 39), np.arange(40)
    for values in (i**0, 0.9**i, 0.4**i, i % 2, spike, (i + 1.0) ** 3):
        for m, n in ((40, 40), (40, 200), (200, 40)):
            matrix = with_spectrum(values, m, n).to(dtype)
            ours, exact = spectra.singular_values(matrix), np.linalg.svd(matrix.double(), compute_uv=False)
            assert spectra.effective_rank(matrix) == pytest.approx(numpy_rank(matrix), rel=2e-6)
            assert ours.dtype == np.float64 and ours.shape == (40,) and (np.diff(ours) <= 0).all()
            np.testing.assert_allclose(ours, exact, atol=1e-7 * ours[0])

def direct_entropy(q, k):
    """(H,) from all scores at once, in float64: head h reads h // (H / K)."""
    H, T, D = q.shape[1:]
    k = k[:, torch.arange(H) // (H // k.shape[1])].double()
    p = (q.double() @ k.mT / D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    return (torch.special.entr(p).sum(-1)[..., 1:] / torch.arange(2, T + 1).log()).mean((0, 2))

@torch.no_grad()
def test_attention_entropy(model):
    cos, sin = rotary_table(24, 4, model.config.rope_theta, "cpu")
    x, expected = model.embedding(BATCH[0]), []
    for block in model.blocks:
        y = block.attention_norm(x)
        q, k = (part(y).unflatten(-1, (-1, 4)).transpose(1, 2)
                for part in (block.attention.q_proj, block.attention.k_proj))
        expected.append(direct_entropy(rotate(q, cos, sin), rotate(k, cos, sin)).numpy())
        x = block(x, cos, sin)
    assert np.max(expected) < 0.97 and np.std(expected) > 0.005  # there is something to see
    np.testing.assert_allclose(spectra.attention_entropy(model, BATCH[0]), expected, atol=2e-6)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 1500, 8, generator=g), torch.randn(1, 1, 1500, 8, generator=g)
    np.testing.assert_allclose(spectra.head_entropy(q, k), direct_entropy(q, k), atol=1e-5)  # in two chunks
    assert spectra.head_entropy(0 * q, k).tolist() == pytest.approx([1] * 2)  # uniform
    assert spectra.head_entropy(q[:, :, :1], k[:, :, :1]).tolist() == [0] * 2  # a row of length one has none

def test_everything_measured_equals_numpy(model):
    idx, targets = BATCH
    measured, cheap = spectra.measure(model, idx, targets), spectra.measure(model, idx)
    assert set(cheap) == {"activations", "entropy", "weights/down", "weights/ov"}
    for name, values in cheap.items():
        np.testing.assert_array_equal(values, measured[name])
    numbers, loss = spectra.summary(measured), model(idx, targets)
    loss.backward()
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-6)
    paths = {role: [f"blocks.{i}.{path}.weight" for i in range(3)] for role, path in spectra.ROLES.items()}
    paths |= {"embedding": ["embedding.weight"], "unembedding": ["unembedding.weight"]}
    named = dict(model.named_parameters())
    assert set(sum(paths.values(), [])) == {name for name, p in named.items() if p.dim() == 2}
    for role, of_role in paths.items():
        weights = [named[path] for path in of_role]
        for kind, matrices in (("weights", weights), ("gradients", [weight.grad for weight in weights])):
            expected = np.mean([numpy_rank(matrix) / min(matrix.shape) for matrix in matrices])
            assert numbers[f"per/{kind}/{role}"] == pytest.approx(expected, rel=1e-5), (kind, role)
    model.zero_grad()
    cos, sin = rotary_table(24, 4, model.config.rope_theta, "cpu")
    x, shares = model.embedding(idx), []
    for layer, block in enumerate(model.blocks):
        x = block(x, cos, sin)
        assert 16 * numbers[f"per/activations/{layer}"] == pytest.approx(numpy_rank(x.flatten(0, 1)), 1e-5)
        assert numbers[f"entropy/{layer}"] == pytest.approx(measured["entropy"][layer].mean())
        o, v = block.attention.o_proj.weight.split(4, dim=1), block.attention.v_proj.weight.split(4)
        shares += [numpy_rank(o[h] @ v[h // 2]) / 4 for h in range(4)]
    assert numbers["per/weights/ov"] == pytest.approx(np.mean(shares), rel=1e-5)

def test_measuring_leaves_no_trace(model):
    down = model.blocks[0].mlp.down.weight
    down.grad = torch.full_like(down, 3.0)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    spectra.measure(model, *BATCH)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert (down.grad == 3).all() and all(p.grad is None for p in model.parameters() if p is not down)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    down.grad = None

def test_a_damaged_matrix_is_named_and_the_others_are_measured(model):
    up, told = model.blocks[1].mlp.up.weight.data, []
    kept, up[2, 3] = up[2, 3].item(), math.nan
    numbers = spectra.summary(spectra.measure(model, *BATCH, complain=told.append))
    up[2, 3] = kept
    assert len(told) == 1 and " weights/up, activations, entropy, " in told[0]
    expected = np.mean([numpy_rank(model.blocks[i].mlp.up.weight) / 16 for i in (0, 2)])
    assert numbers["per/weights/up"] == pytest.approx(expected, rel=1e-5)
    assert "per/activations/0" in numbers and all(map(math.isfinite, numbers.values()))

def test_a_problem_without_a_solution_ends_no_run(model, monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    told, expected = [], spectra.summary(spectra.measure(model, BATCH[0]))
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigvalsh", fails)  # then singular values are computed directly
        assert spectra.summary(spectra.measure(model, BATCH[0])) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    metrics = spectra.summary(spectra.measure(model, BATCH[0], complain=told.append))
    assert "weights/ov" in told[0] and "per/weights/ov" not in metrics and "per/weights/down" in metrics

# ----------------------------------------------------------------------------------------------------
# The signal

# per/weights/down times 10,000 of a vanilla run, every 10 of 600 steps, from the end of warm-up on
VANILLA = np.array("""
7676 7573 7507 7474 7374 7334 7392 7496 7541 7558 7583 7629 7661 7695 7700 7705 7735 7741 7758 7778 7796
7807 7818 7828 7840 7853 7865 7881 7895 7911 7940 7957 7971 7982 7993 8012 8028 8045 8050 8059 8067 8079
8087 8092 8092 8098 8106 8112 8117 8119 8122 8125 8127 8127 8128""".split(), float) / 10_000

def test_false_alarms_on_noise_and_drift():
    for n, n_curves in ((24, 100), (100, 30)):
        t, e = np.arange(n), np.random.default_rng(n).standard_normal((n_curves, n))
        smooth = 0.75 + 0.15 * np.exp(-t / 6) + 0.05 * t / n  # falls, and rises again
        for curves in (0.8 + 0.03 * e, smooth + 0.01 * e, smooth + 1e-6 * e, 0.8 + 0.02 * e.cumsum(1)):
            alarms = [spectra.collapse(values) is not None for values in curves]
            assert np.mean(alarms) <= 0.07  # the true rates are at most 5%
    assert not any(spectra.collapse(VANILLA[::every]) for every in (1, 2, 4))

def test_power_place_and_size_of_a_drop():
    rng, t, n, at = np.random.default_rng(3), np.arange(24), 100, 14
    smooth = 0.75 + 0.15 * np.exp(-t / 6)
    for size, noise, within in ((0.2, 0.01, 1), (0.2, 0.01, 2), (0.1, 0.002, 2)):
        fallen = np.clip((t - at + within) / within, 0, 1)  # 0 before, 1 from `at` on
        curves = smooth * (1 - size * fallen) * (1 + noise * rng.standard_normal((n, 24)))
        drops = [spectra.collapse(values) for values in curves]
        hits = [drop for drop in drops if drop]
        assert len(hits) >= 0.8 * n, (size, noise, within)
        assert np.mean([abs(index - at) <= 1 for index, _ in hits]) > 0.95
        assert np.mean([share for _, share in hits]) == pytest.approx(size, rel=0.2)
        for values, drop in zip(curves[:20], drops, strict=False):  # a decision stands, whatever comes later
            seen = [spectra.collapse(values[:k]) for k in range(len(values) + 1)]
            assert set(seen) <= {None, drop} and (drop is None or seen.index(drop) >= drop[0] + 3)
    fall, spike, rise = VANILLA.copy(), VANILLA.copy(), VANILLA.copy()
    fall[30:], spike[30], rise[30:] = 0.9 * fall[30:], 0.8 * spike[30], 1.2 * rise[30:]
    assert spectra.collapse(fall)[0] == 30 and not spectra.collapse(spike) and not spectra.collapse(rise)

def test_change_points_count_from_the_end_of_warm_up():
    values = np.repeat([0.9, 0.6], 20) + 1e-3 * np.sin(range(40))
    lines = [{"step": 10 * i, "kind": kind, "per/a": v if kind == "eval" else 7}
             for i, v in enumerate(values) for kind in ("lm", "eval")]
    drop = {"curve": "per/a", "at": 200, "size": pytest.approx(1 / 3, abs=0.02)}
    assert spectra.change_point(lines, "per/a", 50) == drop
    assert not spectra.change_point(lines, "per/a", 200) and not spectra.change_point(lines, "per/b", 0)

# ----------------------------------------------------------------------------------------------------
# Figures, and the command line

def made_up_log(seed=0, meta=True, n=21):
    """Evaluations every 10 steps. In 100 steps the validation loss falls by 2, without meta steps by 1."""
    lines = []
    for step in range(0, 10 * n, 10):
        line = {"step": step, "lm_tokens": 100 * step, "flops": 1e6 * step * (1 + meta), "seconds": step / 2}
        lines += [line | {"kind": "meta", "query_acc": step}, line | {"kind": "lm", "lm_loss": 8}]
        per = (0.7 if step >= 150 and meta else 1) * (0.8 + step * 7919 % 13 * 1e-4)
        layers = {f"{key}/{i}": 0.5 + 0.1 * i for key in ("per/activations", "entropy") for i in range(3)}
        lines.append(line | layers | {
            "kind": "eval", "per/weights/down": per, "val_loss": 8 - (1 + meta) * step / 100 + 0.01 * seed,
            "heldout_query_acc": 0.2 + 0.001 * step, "heldout_query_acc_se": 0.01})
    return lines

def test_figures_show_the_numbers_of_the_logs():
    settings = {"n_layers": 3, "n_way": 16, "k_shot": 4, "warmup_steps": 20}
    arms = [figures.Arm("half meta", [made_up_log(seed) for seed in range(3)], settings),
            figures.Arm("vanilla", [made_up_log(meta=False, n=9)], settings)]
    evals = [line for line in arms[0].runs[1] if line["kind"] == "eval"]  # the middle seed is the mean
    for x in ("step", "flops"):
        axes = figures.phase(arms, x, spectra.change_point).axes
        loss, warm = (line.get_xydata() for line in axes[3].lines[:2])
        np.testing.assert_allclose(loss, [(line[x], line["val_loss"]) for line in evals])
        assert warm[0, 0] == evals[2][x] and axes[-1].get_xlabel().startswith(figures.AXES[x])
    lone = [figures.Arm("a checkpoint", [evals[-1:]], settings)]
    lines = figures.phase(lone, "step").axes[0].lines
    assert not [line for line in lines if line.get_linestyle() == ":"]  # it is long after the warm-up
    assert np.ptp(figures.heat_maps(lone, "step").axes[0].collections[0].get_coordinates()[..., 0]) >= 1
    texts = [text.get_text() for text in axes[0].texts]  # no drop in the vanilla run
    assert texts == ["drop of 30%"] * 3 and len(axes) == 5
    bands = [axes[panel].collections[i].get_paths()[0].vertices[:, 1] for panel, i in ((3, 0), (4, 2))]
    half = 4.30265 * 0.01 / 3**0.5  # of three seeds, by a table of Student's t
    expected = (evals[-1]["val_loss"] - half, 8.01 + half, 0.19, 0.29)  # and a standard error
    assert [end for band in bands for end in (band.min(), band.max())] == pytest.approx(expected)
    maps = figures.heat_maps(arms, "step").axes
    np.testing.assert_allclose(maps[0].collections[0].get_array(), np.tile([[0.5], [0.6], [0.7]], 21))
    axes = figures.curves(made_up_log(n=40), settings, "title").axes
    lines = {line.get_label(): line.get_ydata() for ax in axes for line in ax.lines}
    assert len(axes) == 2 and {"training, each step", "validation", "chance, 1/16"} <= set(lines)
    assert lines["training words, after (mean of 25 steps)"][[1, 24, 39]] == pytest.approx([5, 120, 270])

def test_times_sooner():
    """Of an arm of two seeds that lie as far above the mean as below, one with an evaluation more."""
    fast = [made_up_log(seed, n=21 + (seed > 0)) for seed in (-1, 1)]
    arms = figures.Arm("slow", [made_up_log(meta=False)], {}), figures.Arm("fast", fast, {})
    start = spectra.reached(spectra.mean_evals(fast), 7.5)
    assert start == {"step": 25, "lm_tokens": 2500, "flops": 5e7, "seconds": 12.5}
    assert "fast reached at step 100. Speed-up: 2.00 in step, 2.00 in lm_tokens" in spectra.sooner(*arms)

def test_twenty_arms_and_sources_are_told_apart_and_named_as_they_are(tmp_path):
    names = ["_base", "cost $5 to $9", "a$\\q$", *map(str, range(17))]
    plain = made_up_log(n=5)
    log = [line | {f"val_loss/{name}": 1.0 for name in names} for line in plain]
    settings = {"n_layers": 3, "n_way": 16, "k_shot": 4, "warmup_steps": 20}
    figure = figures.phase([figures.Arm(name, [plain], settings) for name in names], "step")
    assert [text.get_text() for text in figure.legends[0].texts] == names
    assert len({to_hex(line.get_color()) for line in figure.legends[0].get_lines()}) == 20
    for few in ("a", "ab"):
        axes = figures.phase([figures.Arm(name, [log], settings) for name in few], "step").axes
        legend = next(ax.get_legend() for ax in axes if "loss" in ax.get_ylabel())
        texts = [text.get_text().strip() for text in legend.texts]
        styles = {str(line._unscaled_dash_pattern) for line in legend.get_lines()}
        assert set(names) < set(texts) and len(styles) >= 20
    rows = {name: {"mean": 0.5, "ci95": 0.1} for name in [f"{name}, step 1, adapt" for name in names]}
    systems = [f"{name}, step 1" for name in names]
    task = {"shots": {1: rows}, "after_each_inner_step": {1: dict.fromkeys(systems, [0.1, 0.5])}}
    drawn = figures.few_shot({"tasks": {"q": task}}, systems), figures.lm_bars({
        name: {"steps": {"1": {"all": {"bits_per_byte": 1}}}} for name in names})
    for figure in drawn:
        assert [text.get_text().split(",")[0].strip() for text in figure.legends[0].texts] == names
        figures.save(figure, tmp_path / "figure.png")

def test_command_line(data_dir, tmp_path, monkeypatch):
    base = SHAPE | dict(data_dir=data_dir, batch_size=4, max_steps=20, warmup_steps=5, eval_steps=1, n_way=4,
                        eval_interval=10, ckpt_interval=10, word_min_count=200, compile=False)
    arms = {"run": {}, "seed1": {"seed": 1, "ckpt_interval": 20}, "half": {"meta_ratio": 0.5}}
    settings = [base | arm | {"out_dir": tmp_path / name} for name, arm in arms.items()]
    words = [[f"--{key}={setting}" for key, setting in of_run.items()] for of_run in settings]
    assert [done.returncode for done in run_many("train.py", words, report=False)] == [0] * 3
    run, seed1, half, alone, last = (tmp_path / name for name in [*arms, "alone", "run/step_000020"])
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("log.jsonl"))
    (half / "eval_lm.json").write_text('{"steps": {"10": {"all": {"bits_per_byte": 3.5}}}}')
    *good, none = run_many("spectra.py", [
        [run, seed1, half, "--x=lm_tokens", f"--out={tmp_path}/out"], [alone, f"{alone}/"],
        [last, f"--corpus={data_dir}/docstrings"], []])
    one_line(none, "name run")
    assert [done.returncode for done in good] == [0] * 3 and "Speed-up" in good[0].stdout
    assert (tmp_path / "out/phase.png").exists() and (alone / "heat.png").exists()
    assert not (run / "spectra.csv").exists()  # with --out nothing is written into runs
    lines = [row for out in ("out", "alone") for row in csv.DictReader(open(tmp_path / out / "spectra.csv"))]
    rows = {str(folder): [] for folder in (run, seed1, half, alone)}
    for row in lines:
        rows[row.pop("model")].append(row)
    numbers = [{k: float(row[k]) for k in row if row[k]} for row in rows[str(run)]]
    assert [{"kind": "eval"} | line for line in numbers] == log_of(run, "eval")
    for row, line in zip(rows[str(alone)], log_of(run, "eval")[1:], strict=True):
        for key in ("step", "lm_tokens", "per/weights/down", "per/activations/2", "entropy/1"):
            assert float(row[key]) == pytest.approx(line[key], rel=1e-5)
        assert float(row["val_loss"]) == pytest.approx(line["val_loss"], abs=0.3) and row["per/gradients/q"]
    assert list(csv.DictReader(good[2].stdout.splitlines())) == [{"model": str(last)} | rows[str(alone)][-1]]
    assert [row["bits_per_byte/all"] for row in rows[str(half)]] == ["", "3.5", ""]
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr("sys.argv", ["spectra.py", *map(str, (run, half, seed1))])
    spectra.main()
    arms = [text.get_text() for text in drawn[0].legends[0].texts]
    assert arms == ["meta_ratio=0.0 (2 seeds, 95%)", "meta_ratio=0.5"]
