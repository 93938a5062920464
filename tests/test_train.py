"""train.py as a user runs it: the quick start, stopped and resumed in every way, replayed by hand, and all that may go wrong."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_many, run_script

from model import Llama, ModelConfig
from runs import load_checkpoint, load_model, read_log

STEPS, B, T, LR, WARMUP, CLIP = 160, 8, 32, 3e-3, 20, 0.7  # of the quick start as conftest.py shrinks it; lr is that of config/train_11m.py
TIMES = {"seconds", "tokens_per_second"}


def log_of(folder, kind=None):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def checkpoint(folder, step=STEPS):
    return torch.load(Path(folder) / f"ckpt_{step:06d}.pt", weights_only=True)


def corpus_of(data_dir):
    folder = data_dir / "docstrings"
    meta = json.loads((folder / "meta.json").read_text())
    return np.fromfile(folder / "train.bin", "<u2").astype(np.int64), np.fromfile(folder / "val.bin", "<u2").astype(np.int64), meta


def settings(words, **changes):
    """The words of a command with some settings changed."""
    changed = [f"--{key}=" for key in changes]
    return [word for word in words if not word.startswith(tuple(changed))] + [f"--{key}={value}" for key, value in changes.items()]


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The quick start


def test_quick_start_ends_with_a_number_a_paragraph_a_curve_and_the_folder(quick_start):
    lines = quick_start.output.splitlines()
    last = log_of(quick_start.folder, "eval")[-1]
    result = next(i for i, line in enumerate(lines) if line.startswith("result "))
    assert f"{last['val_loss']:.4f}" in lines[result] and f"{last['val_bits_per_byte']:.4f} bits per byte" in lines[result]
    before = "\n".join(lines[:result]).split(f"eval {STEPS:6d}/{STEPS}")[1].split("\n", 1)[1]
    assert len(before.strip()) > 100  # the paragraph
    figure = Path(next(line for line in lines if line.startswith("curve")).split(maxsplit=1)[1])
    assert figure.parent == quick_start.folder and figure.read_bytes().startswith(b"\x89PNG")
    assert lines[-1].split(maxsplit=1) == ["run", str(quick_start.folder)]


def test_run_folder(quick_start, data_dir):
    files = {path.name for path in quick_start.folder.iterdir()}
    expected = {"config.json", "log.jsonl", "meta.json", "tokenizer.tiktoken", *(f"ckpt_{step:06d}.pt" for step in (40, 80, 120, 160)),
                *(f"spectra_{step:06d}.npz" for step in (40, 80, 120, 160))}  # fmt: skip
    assert {name for name in files if not name.endswith(".png")} == expected and len(files) == len(expected) + 1
    for name in ("meta.json", "tokenizer.tiktoken"):
        assert (quick_start.folder / name).read_bytes() == (data_dir / "docstrings" / name).read_bytes()
    made = json.loads((quick_start.folder / "config.json").read_text())
    assert made["d_model"] == 32 and made["lr"] == LR and made["seed"] == 0 and made["compile"] is False
    assert made["corpus_hash"] == json.loads((quick_start.folder / "meta.json").read_text())["corpus_hash"] and made["vocab_size"] == 1024
    assert {"torch", "numpy", "python"} <= set(made["versions"]) and made["argv"] == quick_start.words and "git" in made


def test_checkpoints(quick_start):
    for step in (40, 80, 120, 160):
        state = checkpoint(quick_start.folder, step)
        assert {"model", "head", "optimizer", "scaler", "step", "progress", "config"} == set(state) and state["step"] == step
        assert bool(state["optimizer"]) == (step >= 120)  # only the newest two can be gone on from
        assert state["progress"]["lm_tokens"] == step * B * T
        assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in state["model"].values())


def test_log_has_every_step_once(quick_start):
    steps, looks = log_of(quick_start.folder, "lm"), log_of(quick_start.folder, "eval")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)) and [line["step"] for line in looks] == [0, 40, 80, 120, 160]
    assert [line["step"] for line in log_of(quick_start.folder)] == sorted(line["step"] for line in steps + looks)
    budget = {"lm_tokens", "episode_tokens", "flops", "seconds"}
    config = ModelConfig(32, 2, 4, 2, 64, 1024, T)
    with torch.device("meta"):
        flops = B * T * Llama(config).flops_per_token(T, backward=True, unembedding=True)
    for line in steps:
        assert {"step", "kind", "lm_loss", "lr", "grad_norm", "tokens_per_second"} | budget <= set(line)
        assert line["lm_tokens"] == line["step"] * B * T and line["episode_tokens"] == 0
        assert line["flops"] == pytest.approx(line["step"] * flops)
        assert line["tokens_per_second"] > 0
    assert all({"val_loss", "val_bits_per_byte"} | budget <= set(line) for line in looks)
    seconds = [line["seconds"] for line in log_of(quick_start.folder)]
    assert seconds == sorted(seconds) and seconds[0] > 0
    printed = [line for line in quick_start.output.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1].split("/")[0]) for line in printed] == list(range(1, STEPS + 1))


def test_it_learns(quick_start):
    steps, looks = log_of(quick_start.folder, "lm"), log_of(quick_start.folder, "eval")
    assert steps[0]["lm_loss"] == pytest.approx(math.log(1024), rel=0.02)
    assert np.mean([line["lm_loss"] for line in steps[-20:]]) < steps[0]["lm_loss"] - 1
    losses = [line["val_loss"] for line in looks]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1


def test_validation_loss_is_that_of_the_saved_model_on_evenly_spaced_rows(quick_start, data_dir):
    model, _, state = load_model(str(quick_start.folder))
    _, val, meta = corpus_of(data_dir)
    count = 4 * B  # eval_steps * batch_size
    starts = [int(i * (len(val) - T - 1) / (count - 1)) for i in range(count)]
    surprise = []
    for start in starts:
        row = torch.from_numpy(val[start : start + T + 1])
        surprise += (-model.logits(row[None, :-1])[0].log_softmax(-1)[range(T), row[1:]]).tolist()
    last = log_of(quick_start.folder, "eval")[-1]
    assert last["val_loss"] == pytest.approx(np.mean(surprise), rel=1e-5)
    nats_a_byte = np.mean(surprise) * meta["splits"]["val"]["tokens"] / meta["splits"]["val"]["bytes"]
    assert last["val_bits_per_byte"] == pytest.approx(nats_a_byte / math.log(2), rel=1e-5)
    assert state["step"] == STEPS


@pytest.mark.parametrize("borders", [{"first": 5000, "tiny": 5000 + T, "second": None}, {"first": T, "second": None}])
def test_each_source_of_a_corpus_has_its_loss(quick_start, data_dir, tmp_path, borders):
    """On rows spread over its own tokens of the validation text; a source that is shorter than a row has none."""
    shutil.copytree(data_dir / "docstrings", tmp_path / "docstrings")
    _, val, meta = corpus_of(tmp_path)
    ends = [end or len(val) for end in borders.values()]
    ranges = dict(zip(borders, zip([0, *ends], ends, strict=False), strict=True))
    short = [name for name, (begin, end) in ranges.items() if end - begin <= T]
    sources = [{"name": name, "val_range": val_range} for name, val_range in ranges.items()]
    (tmp_path / "docstrings/meta.json").write_text(json.dumps(meta | {"sources": sources}))
    (done,) = run_many("train.py", [settings(quick_start.words, data_dir=tmp_path, out_dir=tmp_path / "run", max_steps=1)])
    model, _, _ = load_model(str(tmp_path / "run"))
    last = log_of(tmp_path / "run", "eval")[-1]
    assert len(short) == 1 and f"for a loss of their own: {short[0]}\n" in done.stdout
    assert {key for key in last if key.startswith("val_loss/")} == {f"val_loss/{name}" for name in ranges if name not in short}
    assert f"  second {last['val_loss/second']:.4f}" in done.stdout
    for name in ranges.keys() - short:
        begin, end = ranges[name]
        starts = [begin + int(i * (end - begin - T - 1) / (4 * B - 1)) for i in range(4 * B)]
        batch = torch.from_numpy(np.stack([val[start : start + T + 1] for start in starts]))
        loss = torch.nn.functional.cross_entropy(model.logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        assert last[f"val_loss/{name}"] == pytest.approx(loss.item(), rel=1e-5)


def test_first_steps_are_those_of_a_loop_written_by_hand(quick_start, data_dir):
    """AdamW, clipping, warm-up and rows, spelt out; decay on matrices only."""
    train, _, _ = corpus_of(data_dir)
    torch.manual_seed(0)
    model = Llama(ModelConfig(32, 2, 4, 2, 64, 1024, T))
    first, second = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    logged = log_of(quick_start.folder, "lm")
    for step in range(1, 31):  # the warm-up and ten more
        starts = np.random.default_rng((0, 0, step)).integers(len(train) - T, size=B)
        batch = torch.from_numpy(np.stack([train[start : start + T + 1] for start in starts]))
        loss = torch.nn.functional.cross_entropy(model.logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        lr = LR * min(step / WARMUP, (STEPS + 1 - step) / (STEPS + 1 - WARMUP))
        assert logged[step - 1]["lm_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged[step - 1]["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert logged[step - 1]["lr"] == pytest.approx(lr, rel=1e-12)
        with torch.no_grad():
            for p, g, m, v in zip(model.parameters(), gradients, first, second, strict=True):
                g = g * min(1, CLIP / norm)
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                p.mul_(1 - lr * (0.1 if p.dim() == 2 else 0))
                p.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8))
    assert min(line["grad_norm"] for line in logged[:30]) < CLIP < max(line["grad_norm"] for line in logged[:30])  # clipping was met


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


def stop_after(words, step, signum, where=ROOT):
    """Start a run and send it a signal once it has printed a step. Returns its exit code and what it printed."""
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # it cannot run more than 50 lines ahead of what is read here
    printed = b""
    while f"\nstep {step:6d}/".encode() not in printed:
        line = process.stdout.readline()
        assert line, process.stderr.read().decode()
        printed += line
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert b"Traceback" not in err, err.decode()
    return process.returncode, (printed + out).decode()


@pytest.fixture(scope="module")
def interrupted(quick_start, tmp_path_factory):
    """The quick start once more, stopped by SIGTERM, by SIGINT and by SIGKILL, each time gone on from: folder and [(exit code, output)]."""
    folder = tmp_path_factory.mktemp("out") / "a stopped run"
    words, ends = settings(quick_start.words, out_dir=folder), []
    ends.append(stop_after(words, 2, signal.SIGTERM))
    reached = log_of(folder)[-1]["step"]
    words.append("--resume=True")
    ends.append(stop_after(words, reached + 2, signal.SIGINT))
    reached = log_of(folder)[-1]["step"]
    ends.append(stop_after(words, reached + 2, signal.SIGKILL))
    with open(folder / "log.jsonl", "a") as file:  # a kill may also leave these behind
        file.write('{"step": 159, "kind": "lm", "lm_lo')
    (folder / "ckpt_000999.pt.77.tmp").write_bytes(b"half a checkpoint")
    ends.append((0, run_script("train.py", *words).stdout))  # to the end of a process of its own, and with its exit code
    return folder, ends


def test_signals_save_and_say_how_to_go_on(interrupted):
    folder, ends = interrupted
    assert [code for code, _ in ends] == [128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGKILL, 0]
    for (_, printed), (_, resumed) in zip(ends[:2], ends[1:3], strict=True):
        last = printed.splitlines()[-1]
        step = max(int(line.split()[1].split("/")[0]) for line in printed.splitlines() if line.startswith("step "))
        assert f"after step {step}" in last and "python train.py config/train_11m.py" in last and last.endswith("--resume=True")
        assert last.count("--resume=True") == 1 and f"'--out_dir={folder}'" in last  # quoted: the name has spaces
        assert f"resume  {folder} after step {step}" in resumed and f"step {step + 1:6d}/" in resumed


def test_resumed_run_is_bit_equal(quick_start, interrupted):
    folder, _ = interrupted
    assert without_times(log_of(folder)) == without_times(log_of(quick_start.folder))
    straight, resumed = checkpoint(quick_start.folder), checkpoint(folder)
    assert list(straight["model"]) == list(resumed["model"])
    assert all(torch.equal(straight["model"][name], resumed["model"][name]) for name in straight["model"])
    moments, again = (state["optimizer"]["state"] for state in (straight, resumed))
    assert moments and all(torch.equal(moments[i][key], again[i][key]) for i in moments for key in ("exp_avg", "exp_avg_sq", "step"))
    seconds = [line["seconds"] for line in log_of(folder)]
    assert seconds == sorted(seconds)  # they add up over the interruptions


def test_numbers_read_a_step_late_are_the_same(quick_start, tmp_path):
    """On a GPU a step begins before the numbers of the one before are read; here the CPU is told to do so. Also when it is stopped in between."""
    for path in [*ROOT.glob("*.py"), ROOT / "config"]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "train.py").unlink()
    text = (ROOT / "train.py").read_text()
    assert text.count("late, unread = int(") == 1
    (tmp_path / "train.py").write_text(text.replace("late, unread = int(", "late, unread = 1, []  # ("))
    words = settings(quick_start.words, out_dir=tmp_path / "run", max_steps=50, ckpt_interval=20)
    stop_after(words, 31, signal.SIGTERM, tmp_path)
    for script, more in ((ROOT / "train.py", [f"--out_dir={tmp_path / 'straight'}"]), (tmp_path / "train.py", ["--resume=True"])):
        (done,) = run_many(script, [words + more])
        assert done.returncode == 0, done.stderr
    assert without_times(log_of(tmp_path / "run")) == without_times(log_of(tmp_path / "straight"))
    weights, others = (checkpoint(tmp_path / name, 50)["model"] for name in ("run", "straight"))
    assert all(torch.equal(weights[name], others[name]) for name in others)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Variations and mistakes, one after the other in one process


def poison(path):
    """Make the weights of a checkpoint not a number."""
    state = torch.load(path, weights_only=True)
    state["model"]["norm.weight"].fill_(math.nan)
    torch.save(state, path)


class Mischief:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def results(quick_start, data_dir, tmp_path_factory):
    """What became of many commands, by name: an object with returncode, stdout, stderr. And the folder in which it happened."""
    here, cases = tmp_path_factory.mktemp("many"), {}

    def case(name, **changes):
        cases[name] = settings(quick_start.words, **{"out_dir": here / name} | changes)

    def copy(name, folder=quick_start.folder):
        return Path(shutil.copytree(folder, here / name))

    def damaged(name):
        """A copy of the corpus to damage; returns its folder."""
        return copy(f"data_{name}/docstrings", data_dir / "docstrings")

    # Variations
    case("looked at more often", eval_interval=7, ckpt_interval=1000, log_interval=50, eval_steps=1)
    case("accumulated", micro_batch_size=2, max_steps=STEPS)
    case("cosine", schedule="cosine", max_steps=30, dtype="bfloat16")
    case("no warm-up", schedule="constant", warmup_steps=0, max_steps=4, seed=1)
    (copy("raised") / "log.jsonl.1.tmp").mkdir()  # no leftover of ours, and no reason to die
    case("raised", resume=True, max_steps=STEPS + 10, expected="loss 1.23 on corpus 0123456789ab")
    # Settings
    for name, value in {
        "lr": 2, "batch_size": 0, "n_kv_heads": 3, "n_heads": 5, "meta_ratio": 2, "schedule": "stairs", "device": "tpu",
        "dtype": "int8", "warmup_steps": -1, "max_steps": 0, "grad_clip": -1, "weight_decay": "nan", "seed": 10**30, "block_size": 10**6, "d_ff": 1.5,
        "max_stepz": 3,
    }.items():  # fmt: skip
        case(f"bad {name}", **{name: value})
    case("bad lr nan", lr="nan")
    case("cuda", device="cuda")
    cases["no config"] = ["config/train_11.py"]
    cases["junk"] = [*quick_start.words, "junk"]
    # Folders
    case("taken", out_dir=quick_start.folder)
    case("nothing to resume", resume=True)
    (here / "a file").touch()
    case("a file")
    for key, value in {"d_ff": 96, "seed": 5, "batch_size": 4, "schedule": "constant"}.items():
        case(f"other {key}", out_dir=quick_start.folder, resume=True, **{key: value})
    case("behind", out_dir=quick_start.folder, resume=True, max_steps=100)
    # Corpora
    case("no corpus", dataset="novels")
    case("cannot build", data_dir=here / "a file")
    with open(damaged("short") / "train.bin", "r+b") as file:
        file.truncate(100_000)
    with open(damaged("flipped") / "val.bin", "r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    (damaged("json") / "meta.json").write_text('{"format": 1, ')
    (damaged("lacking") / "meta.json").write_text('{"format": 1}')
    (damaged("gone") / "val.bin").unlink()
    meta = json.loads((damaged("ranges") / "meta.json").read_text())
    two = [{"name": "a", "val_range": [0, 1000.5]}, {"name": "b", "val_range": [0, 900]}]
    (here / "data_ranges/docstrings/meta.json").write_text(json.dumps(meta | {"sources": two}))
    for name in ("short", "flipped", "json", "lacking", "gone", "ranges"):
        case(f"corpus {name}", data_dir=here / f"data_{name}")
    # Checkpoints
    for name in ("cut", "mischief", "stripped", "poisoned"):
        newest = copy(name) / "ckpt_000160.pt"
        case(name, resume=True, max_steps=STEPS + 10)
        if name == "cut":
            os.truncate(newest, 50_000)
        elif name == "mischief":
            torch.save({"model": Mischief(here / "mischief done")}, newest)
        elif name == "stripped":
            newest.unlink()
            newest.with_name("ckpt_000120.pt").unlink()
        else:
            poison(newest)
    return here, dict(zip(cases, run_many("train.py", cases.values()), strict=True))


VARIATIONS = ["looked at more often", "accumulated", "cosine", "no warm-up", "raised"]


@pytest.mark.parametrize("name", VARIATIONS)
def test_variation_runs(results, name):
    _, done = results
    assert done[name].returncode == 0 and "Traceback" not in done[name].stderr and "error" not in done[name].stderr, done[name].stderr


def test_looking_changes_no_training_number(results, quick_start):
    here, _ = results
    folder = here / "looked at more often"
    assert without_times(log_of(folder, "lm")) == without_times(log_of(quick_start.folder, "lm"))
    straight, looked = checkpoint(quick_start.folder)["model"], checkpoint(folder)["model"]
    assert all(torch.equal(straight[name], looked[name]) for name in straight)
    assert [line["step"] for line in log_of(folder, "eval")] == [*range(0, STEPS, 7), STEPS]


def test_accumulated_gradients_are_those_of_the_whole_batch(results, quick_start):
    here, _ = results
    parts, whole = log_of(here / "accumulated", "lm"), log_of(quick_start.folder, "lm")
    for part, line in zip(parts[:40], whole[:40], strict=True):  # later, rounding has grown
        assert part["lm_loss"] == pytest.approx(line["lm_loss"], rel=1e-5)
        assert part["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
        assert part["lm_tokens"] == line["lm_tokens"] and part["flops"] == line["flops"]
    losses = [log_of(folder, "eval")[-1]["val_loss"] for folder in (here / "accumulated", quick_start.folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_schedules(results, quick_start):
    here, _ = results

    def logged(folder):
        return {line["step"]: line["lr"] for line in log_of(folder, "lm")}

    def fraction(step, max_steps=STEPS):  # of the way from the peak, at the last step of the warm-up, to zero, just after the last step
        return (step - WARMUP) / (max_steps + 1 - WARMUP)

    warmup = {step: LR * step / 20 for step in range(1, 21)}
    linear = {step: LR * (1 - fraction(step)) for step in range(21, STEPS + 1)}
    raised = {step: LR * (1 - fraction(step, STEPS + 10)) for step in range(STEPS + 1, STEPS + 11)}
    cosine = {step: LR * (1 + math.cos(math.pi * fraction(step, 30))) / 2 for step in range(21, 31)}
    assert logged(quick_start.folder) == pytest.approx(warmup | linear, rel=1e-12)
    assert logged(here / "cosine") == pytest.approx(warmup | cosine, rel=1e-9)
    assert logged(here / "raised") == pytest.approx(warmup | linear | raised, rel=1e-12)
    assert logged(here / "no warm-up") == dict.fromkeys(range(1, 5), LR)  # and constant


def test_raising_max_steps_goes_on_and_says_what_it_does(results, quick_start):
    here, done = results
    lr = log_of(here / "raised", "lm")[STEPS]["lr"]
    assert f"max_steps was {STEPS} and is now {STEPS + 10}" in done["raised"].stdout and f"{lr:.2e} at the next step" in done["raised"].stdout
    lines = log_of(here / "raised")
    assert without_times(lines[:-11]) == without_times(log_of(quick_start.folder))
    assert [line["step"] for line in lines[-11:]] == [*range(161, 171), 170]
    assert "expect  loss 1.23 on corpus 0123456789ab; this corpus is" in done["raised"].stdout
    assert [bool(checkpoint(here / "raised", step)["optimizer"]) for step in (40, 80, 120, 160, 170)] == [False, False, False, True, True]


def test_another_seed_is_another_model(results, quick_start):
    here, _ = results
    before = [log_of(folder)[0] for folder in (here / "no warm-up", quick_start.folder)]
    assert before[0]["kind"] == "eval" and before[0]["val_loss"] != before[1]["val_loss"]


MISTAKES = {  # name: what the one line says
    "bad lr": ["lr = 2.0", "between 0 and 1"],
    "bad lr nan": ["lr = nan"],
    "bad batch_size": ["batch_size = 0", "at least 1"],
    "bad n_kv_heads": ["n_kv_heads = 3", "n_heads = 4"],
    "bad n_heads": ["d_model = 32", "n_heads = 5"],
    "bad meta_ratio": ["meta_ratio = 2.0"],
    "bad schedule": ["'stairs'", "linear, cosine, constant"],
    "bad device": ["'tpu'", "auto, cpu, cuda"],
    "bad dtype": ["'int8'", "float32"],
    "bad warmup_steps": ["warmup_steps = -1"],
    "bad max_steps": ["max_steps = 0", "at least 1"],
    "bad grad_clip": ["grad_clip = -1.0"],
    "bad weight_decay": ["weight_decay = nan"],
    "bad seed": ["seed = 1000000"],
    "bad block_size": ["block_size = 1000000", "split", "tokens"],
    "bad d_ff": ["--d_ff=1.5", "a whole number"],
    "bad max_stepz": ["'max_stepz'", "'max_steps'"],
    "cuda": ["device = cuda", "--device=cpu"],
    "no config": ["config/train_11.py", "config/train_11m.py"],
    "junk": ["junk", "--key=value"],
    "taken": ["already holds a run", "--resume=True", "--out_dir"],
    "nothing to resume": ["nothing to resume holds no run", "--out_dir"],
    "a file": ["a file", "--out_dir"],
    "other d_ff": ["d_ff = 96", "d_ff = 64"],
    "other seed": ["seed = 5", "seed = 0"],
    "other batch_size": ["batch_size = 4", "batch_size = 8"],
    "other schedule": ["schedule = constant", "schedule = linear"],
    "behind": ["max_steps = 100", "160"],
    "no corpus": ["novels", "python data/prepare.py novels --source="],
    "cannot build": ["a file"],
    "corpus short": ["train.bin holds 50,000 tokens", "meta.json", "data/prepare.py"],
    "corpus flipped": ["val.bin", "sha256", "data/prepare.py"],
    "corpus json": ["meta.json", "not valid JSON"],
    "corpus lacking": ["meta.json", "lacks", "data/prepare.py"],
    "corpus gone": ["val.bin", "data/prepare.py"],
    "corpus ranges": ["meta.json", "do not fit each other"],
    "cut": ["ckpt_000160.pt", "delete it"],
    "mischief": ["ckpt_000160.pt", "delete it"],
    "stripped": ["ckpt_000080.pt", "optimizer"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(results, name):
    _, done = results
    done = done[name]
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and [line.startswith("error: ") for line in lines] == [True], (done.returncode, done.stderr)
    assert all(part in lines[0] for part in MISTAKES[name]), lines[0]
    assert "step " not in done.stdout


def test_every_case_was_looked_at(results):
    assert set(results[1]) == {*VARIATIONS, *MISTAKES, "poisoned"}


def test_mistakes_leave_nothing_behind(results):
    here, _ = results
    assert not (here / "mischief done").exists()
    assert not [name for name in MISTAKES if (here / name / "config.json").exists() and name not in ("cut", "mischief", "stripped")]


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(results):
    here, done = results
    done = done["poisoned"]
    assert done.returncode == 1 and done.stderr.startswith("error: step 161: loss nan") and done.stderr.count("\n") == 1, done.stderr
    assert "of step 160" in done.stderr and "lr" in done.stderr
    assert sorted(path.name for path in (here / "poisoned").glob("ckpt_*")) == [f"ckpt_{step:06d}.pt" for step in (40, 80, 120, 160)]
    assert "NaN" not in (here / "poisoned" / "log.jsonl").read_text()


def test_exit_code_of_a_mistake_is_seen_outside():
    assert run_script("train.py", "--lr=2", expect=2).stderr.startswith("error: lr = 2.0")


@pytest.mark.slow
def test_missing_corpus_is_built(quick_start, tmp_path):
    words = settings(quick_start.words, data_dir=tmp_path, out_dir=tmp_path / "run", max_steps=2)
    assert "building the default corpus" in run_script("train.py", *words).stdout
    assert json.loads((tmp_path / "docstrings" / "meta.json").read_text())["vocab_size"] == 4096


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_compiled_blocks_train_alike(quick_start, tmp_path):
    run_script("train.py", *settings(quick_start.words, out_dir=tmp_path / "run", compile=True))
    pairs = zip(log_of(tmp_path / "run", "lm")[:40], log_of(quick_start.folder, "lm"), strict=False)
    assert all(compiled["lm_loss"] == pytest.approx(plain["lm_loss"], rel=1e-4) for compiled, plain in pairs)


@pytest.mark.parametrize("change", [
    lambda line: line.update(wal_loss=line.pop("val_loss")), lambda line: line.pop("val_bits_per_byte"), lambda line: line.update(val_loss="2"),
    lambda line: line.update(val_loss=None), lambda line: line.update(heldout_query_acc=0.5), lambda line: line.update(kind=["eval"]),
])  # fmt: skip
def test_a_line_of_the_log_that_lacks_a_number_is_damaged(quick_start, tmp_path, capsys, change):
    """A flipped bit in a name leaves valid JSON: who reads the log must not die of the name that is gone."""
    lines = log_of(quick_start.folder)
    assert read_log(quick_start.folder) == lines
    change(lines[-1])
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit):
        read_log(tmp_path)
    assert f"log.jsonl, line {len(lines)} is damaged" in capsys.readouterr().err


def test_a_checkpoint_that_is_replaced_while_it_is_read(quick_start, tmp_path, monkeypatch):
    """A run at work takes the optimizer out of an older checkpoint while an evaluation reads it: it sees the old file or the new, no mixture."""
    path = Path(shutil.copytree(quick_start.folder, tmp_path / "run")) / "ckpt_000160.pt"
    testzip, whole = zipfile.ZipFile.testzip, load_checkpoint(path)

    def replaced_meanwhile(archive):
        torch.save(whole | {"model": {}, "head": {}}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        return testzip(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", replaced_meanwhile)
    assert load_checkpoint(path)["model"].keys() == whole["model"].keys()
