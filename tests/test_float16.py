"""float16 with a gradient scaler, as far as a CPU goes; Weights & Biases: train.py behind small changes."""
import re
import shutil

import pytest
import torch
from conftest import ROOT, checkpoint, log_of, run_many, without_times

WORDS = """--d_model=16 --n_layers=1 --n_heads=2 --n_kv_heads=1 --d_ff=24 --block_size=16 --batch_size=4
    --max_steps=8 --lr=0.003 --warmup_steps=2 --eval_interval=100 --eval_steps=2 --ckpt_interval=4
    --compile=False --meta_ratio=0.5 --n_way=4 --k_shot=2 --q_query=2 --episode_len=20 --inner_lr=0.25
    --schedule=constant --word_min_count=200""".split()
CHANGED = f"""
import functools, os, runpy, sys
import torch
sys.path.insert(0, {str(ROOT)!r})
from plumbing.run import Run
scale, sys.argv = float(sys.argv[1]), [{str(ROOT / "train.py")!r}, *sys.argv[2:]]
plain = torch.amp.GradScaler
torch.amp.GradScaler = functools.partial(plain, init_scale=abs(scale))
os.environ["WANDB_MODE"] = "offline"
begin, torch.cuda.Event = Run.__init__, torch.cpu.Event
def late(run, config):  # logs a step when the next is done, as on a GPU
    begin(run, config)
    run.steps_late = 1
if scale < 0:
    Run.__init__ = late
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    torch.amp.GradScaler, Run.__init__ = plain, begin
    print("wandb was", "imported" if "wandb" in sys.modules else "left alone")
"""
HALF, SINGLE = "--dtype=float16", "--dtype=float32"
CASES = {  # name -> loss scale at the start (below 0: steps are logged late), and settings
    "float32": (1024, [SINGLE]), "float16": (1024, [HALF]), "half": (1024, [HALF, "--max_steps=4"]),
    "too large": (2.0**27, [HALF, "--max_steps=30"]), "hopeless": (2.0**100, [HALF, "--max_steps=30"]),
    "late": (-(2.0**27), [HALF, "--max_steps=5"])}
WANDB = [SINGLE, "--wandb=True", "--wandb_project=hedgehogs"]
SHOWN = {"lr=1,shown": (1024, WANDB), "lr=1,shown/again": (1024, [*WANDB, "--max_steps=9", "--resume=True"])}
RESUMED = {"resumed": (1, [HALF, "--resume=True"]), "in float32": (1, [SINGLE, "--resume=True"])}

@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """The folder of all runs, and what became of the commands by name."""
    here, done = tmp_path_factory.mktemp("float16"), {}
    (here / "changed.py").write_text(CHANGED)
    for cases in (CASES, RESUMED, SHOWN):
        words = [[scale, *WORDS, f"--data_dir={data_dir}", f"--out_dir={here / name.split('/')[0]}", *more]
                 for name, (scale, more) in cases.items()]
        done |= zip(cases, run_many(here / "changed.py", words, report=False), strict=True)
        for name in RESUMED if cases is CASES else ():
            shutil.copytree(here / "half", here / name)
    return here, done

def losses(folder):
    return {(line["step"], line["kind"]): line.get("lm_loss", line.get("meta_loss", line.get("val_loss")))
            for line in log_of(folder)}

def test_float16_trains_like_float32(runs):
    """For both objectives; gradients are scaled and scaled back before they are clipped and logged."""
    half, single = (runs[0] / name for name in ("float16", "float32"))
    assert {line["kind"] for line in log_of(half)} == {"lm", "meta", "eval"}
    assert losses(half) == pytest.approx(losses(single), rel=2e-3) and losses(half) != losses(single)
    for a, b in zip(log_of(half, "lm", "meta"), log_of(single, "lm", "meta"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)

def test_scaler_is_in_the_checkpoint_and_resumed(runs):
    """The resumed run would start with a scale of 1, if it were not for the checkpoint."""
    whole, again, single = (checkpoint(runs[0] / name, 8) for name in ("float16", "resumed", "float32"))
    scaler = whole.state["scaler"]
    assert scaler == again.state["scaler"] and (scaler["scale"], scaler["_growth_tracker"]) == (1024, 8)
    assert all(torch.equal(p, again.model[name]) for name, p in whole.model.items())
    assert losses(runs[0] / "float16").items() <= losses(runs[0] / "resumed").items()
    assert single.state["scaler"] == {}

def test_a_run_may_change_its_dtype(runs):
    expected, changed = losses(runs[0] / "float16"), losses(runs[0] / "in float32")
    assert checkpoint(runs[0] / "in float32", 8).state["scaler"] == {}
    assert {key: changed[key] for key in expected} == pytest.approx(expected, rel=2e-3)
    assert {step for (step, _), loss in expected.items() & changed.items()} <= {0, 1, 2, 3, 4}

def test_overflow_skips_the_step_and_halves_the_scale(runs):
    folder, done = runs[0] / "too large", runs[1]["too large"]
    lines = log_of(folder, "lm", "meta")
    skipped = [line for line in lines if "skipped" in line]
    assert 2 <= len(skipped) < 20 and skipped[:2] == lines[:2] and done.returncode == 0
    assert [line["loss_scale"] for line in skipped] == [2.0 ** (26 - i) for i in range(len(skipped))]
    late = [line for line in log_of(runs[0] / "late", "lm", "meta") if "skipped" in line]
    assert without_times(late) == without_times(skipped)[: len(late)] and len(late) > 1
    for before, line in zip(lines, lines[1:], strict=False):  # how many in a row
        assert line.get("skipped", 0) == ("skipped" in line) * (before.get("skipped", 0) + 1)
    assert done.stdout.count("  skipped ") == len(skipped)
    assert not re.search("Infinity|NaN", (folder / "log.jsonl").read_text())
    assert checkpoint(folder, 30).optimizer["step/norm.weight"] == 30 - len(skipped)

def test_twenty_skipped_steps_in_a_row_stop_the_run(runs):
    here, done = runs[0], runs[1]["hopeless"]
    assert done.returncode == 1 and done.stderr.startswith("error: step 20: ")
    assert len(log_of(here / "hopeless")) == 20  # 19 steps and the evaluation before them

def test_wandb_gets_what_log_jsonl_has_and_is_left_alone_otherwise(runs):
    here, done = runs
    assert [name for name in done if "wandb was imported" in done[name].stdout] == list(SHOWN)
    assert [done[name].returncode for name in SHOWN] == [0, 0], done["lr=1,shown"].stderr
    records = sorted((here / "lr=1,shown").glob("wandb/offline-run-*/run-*.wandb"))
    (wandb_id,) = {path.stem for path in records}  # a resumed run has the old one, any other its own
    assert len(records) == 2 and re.fullmatch("run-[a-z0-9]{8}", wandb_id)
    names = {name for line in log_of(here / "lr=1,shown") for name in line} - {"kind"} | {"lr=1,shown"}
    content = records[0].read_bytes()
    assert not [name for name in names | {"hedgehogs", "d_model"} if name.encode() not in content]
