"""train.py as a user runs it: the quick start by hand, stopped and resumed, and what may go wrong."""
import json
import math
import os
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint, log_of, run_many, run_script, start, without_times
from safetensors.torch import load_file, save_file

from model import Llama, ModelConfig
from plumbing import files
from plumbing.checkpoint import sha256_of
from plumbing.run import Run

STEPS, B, T, LR, WARMUP, CLIP = 160, 8, 32, 3e-3, 20, 0.7  # of the quick start in conftest.py
SAVED = [40, 80, 120, 160]
SHAPE = ModelConfig(32, 2, 4, 2, 64, 1024, T)

def settings(words, **changes):
    """The words of a command with some settings changed."""
    changed = tuple(f"--{key}=" for key in changes)
    kept = [word for word in words if not word.startswith(changed)]
    return kept + [f"--{key}={value}" for key, value in changes.items()]

def corpus_of(data_dir):
    folder = data_dir / "docstrings"
    train, val = (np.fromfile(folder / f"{split}.bin", "<u2").astype(np.int64) for split in ("train", "val"))
    return train, val, json.loads((folder / "meta.json").read_text())

def model_of(folder, step=STEPS):
    model = Llama(SHAPE)
    model.load_state_dict(checkpoint(folder, step).model)
    return model

def loss_of(model, tokens, starts):
    """Mean surprise of a model on the rows of T tokens from `starts`."""
    rows = torch.from_numpy(np.stack([tokens[start : start + T + 1] for start in starts]))
    return F.cross_entropy(model.logits(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

def same_weights(ours, theirs):
    ours, theirs = (checkpoint(folder, STEPS) for folder in (ours, theirs))
    for a, b in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        assert a and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

# --------------------------------------------------------------------------------------------------
# The quick start

def test_quick_start_ends_with_a_paragraph_a_number_a_curve_and_the_folder(quick_start):
    lines, last = quick_start.output.splitlines(), log_of(quick_start.folder, "eval")[-1]
    result = next(i for i, line in enumerate(lines) if line.startswith("result "))
    evaluation = next(i for i, line in enumerate(lines) if line.startswith(f"eval    {STEPS}/"))
    assert len("".join(lines[evaluation + 1 : result])) > 100  # the paragraph
    assert f"{last['val_loss']:.4f}, {last['val_bits_per_byte']:.4f} bits per byte" in lines[result]
    assert lines[-2:] == [f"curves  {quick_start.folder}/curves.png", f"run     {quick_start.folder}"]
    assert (quick_start.folder / "curves.png").read_bytes().startswith(b"\x89PNG")

def test_run_folder(quick_start, data_dir):
    files = {path.name for path in quick_start.folder.iterdir()} - {".lock"}
    assert files == {"config.json", "log.jsonl", "curves.png", *(f"step_{step:06d}" for step in SAVED)}
    made, meta = json.loads((quick_start.folder / "config.json").read_text()), corpus_of(data_dir)[2]
    expected = {"d_model": 32, "lr": LR, "seed": 0, "compile": False, "vocab_size": 1024,
                "corpus_hash": meta["corpus_hash"], "argv": quick_start.words}
    assert expected.items() <= made.items() and {"git", "system"} <= made.keys()
    assert {"torch", "numpy", "python"} <= made["versions"].keys()
    for step in SAVED:
        saved = checkpoint(quick_start.folder, step)
        assert saved.state["step"] == step and saved.state["progress"]["lm_tokens"] == step * B * T
        assert saved.state["settings"].items() <= made.items()
        assert hasattr(saved, "optimizer") == (step >= 120)  # only the newest two can be resumed from
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in saved.model.values())

def test_log_has_every_step_once_and_the_loss_falls(quick_start):
    lines = log_of(quick_start.folder)
    steps = [line for line in lines if line["kind"] == "lm"]
    expected = [(0, "eval")]
    for step in range(1, STEPS + 1):
        expected += [(step, "lm"), (step, "eval")] if step in SAVED else [(step, "lm")]
    assert [(line["step"], line["kind"]) for line in lines] == expected
    flops = B * T * Llama(SHAPE).flops_per_token(T, backward=True, unembedding=True)
    for line in steps:
        assert line["lm_tokens"] == line["step"] * B * T and line["episode_tokens"] == 0
        assert line["flops"] == pytest.approx(line["step"] * flops) and line["tokens_per_second"] > 0
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    losses = [line["lm_loss"] for line in steps]
    assert losses[0] == pytest.approx(math.log(1024), rel=0.02) and np.mean(losses[-20:]) < losses[0] - 1
    printed = [line.split()[1] for line in quick_start.output.splitlines() if line.startswith("step ")]
    assert printed == [f"{step}/{STEPS}" for step in range(1, STEPS + 1)]

def test_validation_loss_is_that_of_the_saved_model_on_evenly_spaced_rows(quick_start, data_dir):
    _, val, meta = corpus_of(data_dir)
    starts = [int(i * (len(val) - T - 1) / (4 * B - 1)) for i in range(4 * B)]  # eval_steps=4
    loss = loss_of(model_of(quick_start.folder), val, starts).item()
    nats_per_byte = loss * meta["splits"]["val"]["tokens"] / meta["splits"]["val"]["bytes"]
    last = log_of(quick_start.folder, "eval")[-1]
    assert last["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2), rel=1e-5)

def test_first_steps_are_those_of_a_loop_written_by_hand(quick_start, data_dir):
    """AdamW, clipping, warm-up and rows, spelt out; decay on matrices only."""
    train, _, _ = corpus_of(data_dir)
    torch.manual_seed(0)
    model = Llama(SHAPE)
    first, second = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    logged = log_of(quick_start.folder, "lm")
    for step in range(1, 31):  # the warm-up and ten more
        starts = np.random.default_rng((0, 0, step)).integers(len(train) - T, size=B)
        loss = loss_of(model, train, starts)
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
    norms = [line["grad_norm"] for line in logged[:30]]
    assert min(norms) < CLIP < max(norms)  # clipping was met

# --------------------------------------------------------------------------------------------------
# Stopped and resumed

def stop_after(words, step, *signals, ignored=()):
    """Send signals to a run once it has printed a step. Its exit code and what it printed."""
    process, printed = start("train.py", *words, ignored=ignored), ""
    while f"\nstep {step:6d}/" not in printed:
        line = process.output.readline()
        assert line, printed
        printed += line
    for number in signals:
        os.kill(process.pid, number)
    printed += process.output.read()
    process.join(60)
    assert "Traceback" not in printed
    return process.exitcode, printed

@pytest.fixture(scope="module")
def interrupted(quick_start, tmp_path_factory):
    """The quick start stopped by three signals and resumed each time: folder and [(exit code, output)]."""
    folder = tmp_path_factory.mktemp("out") / "a stopped run"
    words = settings(quick_start.words, out_dir=folder)
    ends = [stop_after(words, 2, signal.SIGHUP)]
    words.append("--resume=True")
    reached = log_of(folder)[-1]["step"]
    ends.append(stop_after(words, reached + 1, signal.SIGHUP, signal.SIGINT, ignored=[signal.SIGHUP]))
    reached = log_of(folder)[-1]["step"]
    ends.append(stop_after(words, reached + 1, signal.SIGKILL))
    with open(folder / "log.jsonl", "a") as file:  # a kill may also leave these behind
        file.write('{"step": 159, "kind": "lm", "lm_lo')
    (folder / "step_000999.tmp").mkdir()
    (done,) = run_many("train.py", [words], report=False)
    return folder, [*ends, (done.returncode, done.stdout)]

def test_signals_save_and_resuming_goes_on_there(interrupted):
    folder, ends = interrupted
    assert [code for code, _ in ends] == [128 + signal.SIGHUP, 128 + signal.SIGINT, -signal.SIGKILL, 0]
    assert "SIGHUP" in ends[0][1] and "SIGHUP" not in ends[1][1]  # ignored from outside, as by nohup
    for (_, printed), (_, resumed) in zip(ends[:2], ends[1:3], strict=True):
        lines = printed.splitlines()
        step = max(int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step "))
        assert lines[-1].startswith("stopped") and "--resume=True" in lines[-1]
        assert f"resume  {folder} after step {step}" in resumed and f"step {step + 1:6d}/" in resumed

def test_resumed_run_is_bit_equal(quick_start, interrupted):
    folder, _ = interrupted
    assert without_times(log_of(folder)) == without_times(log_of(quick_start.folder))
    same_weights(folder, quick_start.folder)
    seconds = [line["seconds"] for line in log_of(folder)]
    assert seconds == sorted(seconds) and not list(folder.glob("*.tmp"))  # seconds add up over interruptions

# --------------------------------------------------------------------------------------------------
# Variations and mistakes, one after the other in one process

@pytest.fixture(scope="module")
def results(quick_start, tmp_path_factory):
    """What became of many commands, by name, and the folder in which it happened."""
    here, cases = tmp_path_factory.mktemp("many"), {}

    def case(name, **changes):
        cases[name] = settings(quick_start.words, **{"out_dir": here / name} | changes)

    def copy(name):
        return Path(shutil.copytree(quick_start.folder, here / name))

    # Variations
    case("evaluated often", eval_interval=7, ckpt_interval=1000, log_interval=50, eval_steps=1)
    case("accumulated", micro_batch_size=2, max_steps=20)
    case("cosine", schedule="cosine", max_steps=30)
    case("no warm-up", schedule="constant", warmup_steps=0, max_steps=4, seed=1)
    copy("raised")
    case("raised", resume=True, max_steps=STEPS + 10)
    # Mistakes
    case("bad lr", lr=2)
    case("bad block_size", block_size=10**6)
    case("taken", out_dir=quick_start.folder)
    case("nothing to resume", resume=True)
    (here / "locked").mkdir()
    case("locked")
    case("other seed", out_dir=quick_start.folder, resume=True, seed=5)
    case("no corpus", dataset="novels")
    shutil.rmtree(copy("pruned") / "step_000160")
    shutil.rmtree(here / "pruned/step_000120")
    poisoned = copy("not finite") / "step_000160"  # its weights are not a number
    weights = load_file(poisoned / "model.safetensors") | {"model.norm.weight": torch.full((32,), math.nan)}
    save_file(weights, poisoned / "model.safetensors")
    state = json.loads((poisoned / "state.json").read_text())
    state["sha256"]["model.safetensors"] = sha256_of(poisoned / "model.safetensors")
    (poisoned / "state.json").write_text(json.dumps(state))
    log = copy("short log") / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    lines.remove(next(line for line in lines if '"step": 40, "kind": "lm"' in line))
    log.write_text("".join(lines))
    for name in ("pruned", "not finite", "short log"):
        case(name, resume=True, max_steps=STEPS + 10)
    case("lowered", resume=True, max_steps=STEPS - 10, out_dir=here / "raised")
    case("a checkpoint", resume=True, out_dir=here / "raised/step_000160")
    with filelock.FileLock(here / "locked/.lock"):
        return here, dict(zip(cases, run_many("train.py", cases.values(), report=False), strict=True))

def test_evaluating_more_often_changes_no_training_number(results, quick_start):
    folder = results[0] / "evaluated often"
    others = results[1].keys() - MISTAKES.keys() - {"not finite"}
    assert {(results[1][name].returncode, results[1][name].stderr) for name in others} == {(0, "")}
    assert without_times(log_of(folder, "lm")) == without_times(log_of(quick_start.folder, "lm"))
    same_weights(folder, quick_start.folder)
    assert [line["step"] for line in log_of(folder, "eval")] == [*range(0, STEPS, 7), STEPS]

def test_accumulated_gradients_are_those_of_the_whole_batch(results, quick_start):
    parts, whole = log_of(results[0] / "accumulated", "lm"), log_of(quick_start.folder, "lm")
    for part, line in zip(parts, whole[:20], strict=True):  # the warm-up
        for key, rel in (("lm_loss", 1e-5), ("grad_norm", 1e-3), ("flops", 0)):
            assert part[key] == pytest.approx(line[key], rel=rel)

def test_schedules(results, quick_start):
    def lr_at(step, max_steps, schedule):
        if step <= WARMUP:
            return LR * step / WARMUP
        way = (step - WARMUP) / (max_steps + 1 - WARMUP)  # to just after the last step
        return LR * {"linear": 1 - way, "cosine": (1 + math.cos(math.pi * way)) / 2}[schedule]

    here, whole = results[0], log_of(quick_start.folder, "lm")
    raised, cosine = (log_of(here / name, "lm") for name in ("raised", "cosine"))
    cases = ((whole, STEPS, "linear"), (raised[STEPS:], STEPS + 10, "linear"), (cosine, 30, "cosine"))
    for lines, *schedule in cases:
        expected = [lr_at(line["step"], *schedule) for line in lines]
        assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-9)
    assert {line["lr"] for line in log_of(here / "no warm-up", "lm")} == {LR}  # and constant
    assert log_of(here / "no warm-up")[0]["val_loss"] != log_of(quick_start.folder)[0]["val_loss"]  # its seed
    assert without_times(raised[:STEPS]) == without_times(whole) and len(raised) == STEPS + 10

MISTAKES = {  # name: what the one line says
    "bad lr": "lr = 2.0", "bad block_size": "block_size = 1000000",
    "taken": "--resume=True", "nothing to resume": "--out_dir", "locked": "locked",
    "other seed": "seed = 0", "no corpus": "data/prepare.py", "pruned": "step_000080",
    "short log": "lacks steps up to 160", "lowered": "170 steps are done", "a checkpoint": "holds a model"}

@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(results, name):
    done = results[1][name]
    assert done.returncode in (1, 2) and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert MISTAKES[name] in done.stderr and "step " not in done.stdout

def test_a_loss_that_is_not_finite_stops_and_saves_nothing(results):
    folder, done = results[0] / "not finite", results[1]["not finite"]
    assert done.returncode == 1 and done.stderr.startswith("error: step 161: lm_loss nan"), done.stderr
    assert done.stderr.count("\n") == 1 and "last checkpoint is 160" in done.stderr
    assert log_of(folder)[-1]["step"] == 160 and not (folder / "step_000161").exists()

# --------------------------------------------------------------------------------------------------
# Several sources, collapses, the default corpus, the compiler

def test_each_source_of_a_corpus_has_its_loss(quick_start, data_dir, tmp_path):
    """On rows spread over its own tokens of the validation text; a source shorter than a row has none."""
    shutil.copytree(data_dir / "docstrings", tmp_path / "docstrings")
    _, val, meta = corpus_of(tmp_path)
    ranges = {"first": (0, 5000), "tiny": (5000, 5000 + T), "second": (5000 + T, len(val))}
    meta["sources"] = [{"name": name, "val_range": val_range} for name, val_range in ranges.items()]
    (tmp_path / "docstrings/meta.json").write_text(json.dumps(meta))
    words = settings(quick_start.words, data_dir=tmp_path, out_dir=tmp_path / "run", max_steps=1)
    run_many("train.py", [words], report=False)
    model, last = model_of(tmp_path / "run", 1), log_of(tmp_path / "run", "eval")[-1]
    assert "val_loss/tiny" not in last
    for name in ("first", "second"):
        begin, end = ranges[name]
        starts = [begin + int(i * (end - begin - T - 1) / (4 * B - 1)) for i in range(4 * B)]
        assert last[f"val_loss/{name}"] == pytest.approx(loss_of(model, val, starts).item(), rel=1e-5)

def test_collapse_is_decided_from_the_log_and_a_resumed_run_decides_the_same(quick_start, tmp_path):
    """In the log of a run cut off at step 40, per/weights/down was half as high again before step 34."""
    base = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24, block_size=16, batch_size=4,
                max_steps=60, warmup_steps=5, eval_interval=2, eval_steps=1, ckpt_interval=20, n_way=4,
                k_shot=1, q_query=1, episodes_per_step=1, episode_len=16, inner_steps=1, word_min_count=200,
                schedule="constant")
    actions = {"stop": 0, "vanilla": 0.5, "meta": 0.5}  # and meta_ratio

    def train(suffix, **changes):
        words = [settings(quick_start.words, out_dir=tmp_path / f"{action}{suffix}", on_collapse=action,
                          meta_ratio=ratio, **base | changes) for action, ratio in actions.items()]
        assert [done.stderr for done in run_many("train.py", words, report=False)] == ["", "", ""]
        logs = [log_of(tmp_path / f"{action}{suffix}", "lm", "meta") for action in actions]
        return ["".join(line["kind"][0] for line in log) for log in logs]

    _, plain, before = train("")
    assert before == 60 * "l" and "m" in plain[42:] and "l" in plain[:42]
    for action in actions:
        assert not log_of(tmp_path / action, "collapse")
        folder = Path(shutil.copytree(tmp_path / action, tmp_path / f"{action} doctored"))
        shutil.rmtree(folder / "step_000060")
        lines = log_of(folder)
        for line in lines:
            line["per/weights/down"] = line.get("per/weights/down", 0) * (1.5 if line["step"] < 34 else 1)
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(" doctored", resume=True) == [42 * "l", plain[:42] + 18 * "l", 42 * "l" + plain[42:]]
    for action in actions:
        folder = tmp_path / f"{action} doctored"
        (collapse,) = log_of(folder, "collapse")
        assert (collapse["step"], collapse["at"], collapse["action"]) == (42, 34, action)
        assert collapse["size"] == pytest.approx(1 / 3, abs=0.1)  # the training went on meanwhile
        shutil.rmtree(folder / f"step_0000{42 if action == 'stop' else 60}")  # as after a kill
    stop, vanilla, meta = train(" doctored", resume=True, max_steps=66)  # and raised meanwhile
    assert (stop, vanilla, meta[:60]) == (42 * "l", plain[:42] + 24 * "l", 42 * "l" + plain[42:])

def test_a_folder_with_no_step_yet_may_be_begun_again(tmp_path, capsys):
    """A run that failed at once; not the folder of a model or a corpus, nor a run that has steps."""
    run, answers = SimpleNamespace(config=SimpleNamespace(out_dir=tmp_path, resume=False)), []
    steps = [json.dumps({"step": step, "kind": "eval"}) + "\n" for step in range(2)]
    ours = '{"corpus_hash": "x"}'
    for config, log in ((None, ""), ("{}", ""), (ours, ""), (ours, steps[0]), (ours, "".join(steps))):
        if config:
            (tmp_path / "config.json").write_text(config)
        (tmp_path / "log.jsonl").write_text(log)
        with suppress(SystemExit):
            Run.open_folder(run)
        while files.locks:
            files.locks.pop().release()
        answers.append(re.findall("holds a (model|run)", capsys.readouterr().err))
    assert answers == [[], ["model"], [], [], ["run"]]
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(SystemExit):
        Run.open_folder(run)
    assert "or a corpus" in capsys.readouterr().err

@pytest.mark.slow
def test_missing_corpus_is_built(quick_start, tmp_path):
    words = settings(quick_start.words, data_dir=tmp_path, out_dir=tmp_path / "run", max_steps=2)
    assert "building the default corpus" in run_script("train.py", *words).stdout
    assert json.loads((tmp_path / "docstrings" / "meta.json").read_text())["vocab_size"] == 4096
