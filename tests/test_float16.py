"""float16 with a gradient scaler, as far as a CPU goes, and what is shown on Weights & Biases: train.py in one process behind small changes."""
import json
import shutil

import pytest
import torch
from conftest import ROOT, run_many

WORDS = (
    "--d_model=16 --n_layers=1 --n_heads=2 --n_kv_heads=1 --d_ff=24 --block_size=16 --batch_size=4 --max_steps=8 --lr=0.003 --warmup_steps=2 "
    "--eval_interval=100 --eval_steps=2 --ckpt_interval=4 --compile=False --meta_ratio=0.5 --n_way=4 --k_shot=2 --q_query=2 --episode_len=20 "
    "--inner_lr=1 --schedule=constant"
).split()
CHANGED = f"""
import functools, os, runpy, sys
import torch
sys.path.insert(0, {str(ROOT)!r})
scale, sys.argv = float(sys.argv[1]), [{str(ROOT / "train.py")!r}, *sys.argv[2:]]
torch.amp.GradScaler, plain = functools.partial(torch.amp.GradScaler, init_scale=scale), torch.amp.GradScaler
os.environ["WANDB_MODE"] = "offline"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    torch.amp.GradScaler = plain
    print("wandb was", "imported" if "wandb" in sys.modules else "left alone")
"""
CASES = {  # name -> loss scale at the start, and settings
    "float32": (1024, ["--dtype=float32"]),
    "float16": (1024, ["--dtype=float16"]),
    "half": (1024, ["--dtype=float16", "--max_steps=4"]),
    "too large": (2.0**27, ["--dtype=float16", "--max_steps=30"]),
    "hopeless": (2.0**100, ["--dtype=float16", "--max_steps=30"]),
    "shown": (1024, ["--dtype=float32", "--wandb=True", "--wandb_project=hedgehogs"]),
}


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """The folder of all runs, and what became of the commands by name."""
    here = tmp_path_factory.mktemp("float16")
    (here / "changed.py").write_text(CHANGED)

    def run(cases):
        words = [[scale, *WORDS, f"--data_dir={data_dir}", f"--out_dir={here / name}", *more] for name, (scale, more) in cases.items()]
        return dict(zip(cases, run_many(here / "changed.py", words), strict=True))

    done = run(CASES)  # the wandb run comes last: what is imported stays so
    shutil.copytree(here / "half", here / "gone on")
    shutil.copytree(here / "half", here / "in float32")
    return here, done | run({"gone on": (1, ["--dtype=float16", "--resume=True"]), "in float32": (1, ["--dtype=float32", "--resume=True"])})


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return {(line["step"], line["kind"]): line.get("lm_loss", line.get("meta_loss", line.get("val_loss"))) for line in log_of(folder)}


def test_float16_trains_like_float32(runs):
    """Within the 11 bits of its products, for both objectives; gradients are scaled and scaled back before they are clipped and logged."""
    here, _ = runs
    assert {line["kind"] for line in log_of(here / "float16")} == {"lm", "meta", "eval"}
    assert losses(here / "float16") == pytest.approx(losses(here / "float32"), rel=2e-3) and losses(here / "float16") != losses(here / "float32")
    for a, b in zip(log_of(here / "float16"), log_of(here / "float32"), strict=True):
        assert a["kind"] == "eval" or a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)


def test_scaler_is_in_the_checkpoint_and_resumed(runs):
    """The run that goes on would start with a scale of 1, if it were not for the checkpoint."""
    here, _ = runs
    whole, again = (torch.load(here / name / "ckpt_000008.pt", weights_only=True) for name in ("float16", "gone on"))
    assert whole["scaler"] == again["scaler"] and whole["scaler"]["scale"] == 1024 and whole["scaler"]["_growth_tracker"] == 8
    assert torch.load(here / "float32/ckpt_000008.pt", weights_only=True)["scaler"] == {}
    assert all(torch.equal(p, again["model"][name]) for name, p in whole["model"].items())
    assert losses(here / "float16").items() <= losses(here / "gone on").items()


def test_a_run_may_change_its_dtype(runs):
    here, done = runs
    assert done["in float32"].returncode == 0, done["in float32"].stderr
    expected, found = losses(here / "float16"), losses(here / "in float32")
    same = {key for key in expected if found[key] == expected[key]}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=2e-3)
    assert {step for step, _ in same} <= {0, 1, 2, 3, 4} and len(same) < len(expected)
    assert torch.load(here / "in float32/ckpt_000008.pt", weights_only=True)["scaler"] == {}


def test_overflow_skips_the_step_and_halves_the_scale(runs):
    here, done = runs
    lines = [line for line in log_of(here / "too large") if line["kind"] != "eval"]
    skipped = [line for line in lines if "skipped" in line]
    assert 2 <= len(skipped) < 20 and skipped[:2] == lines[:2]
    assert [line["loss_scale"] for line in skipped] == [2.0 ** (26 - i) for i in range(len(skipped))]
    for before, line in zip(lines, lines[1:], strict=False):  # how many in a row
        assert line.get("skipped", 0) == ("skipped" in line) * (before.get("skipped", 0) + 1)
    assert done["too large"].stdout.count("skipped: float16 overflow, loss scale now ") == len(skipped) and done["too large"].returncode == 0
    assert "Infinity" not in (here / "too large/log.jsonl").read_text() and "NaN" not in (here / "too large/log.jsonl").read_text()
    assert torch.load(here / "too large/ckpt_000030.pt", weights_only=True)["optimizer"]["state"][1]["step"] == 30 - len(skipped)


def test_twenty_skipped_steps_in_a_row_stop_the_run(runs):
    here, done = runs
    assert done["hopeless"].returncode == 1 and done["hopeless"].stderr.startswith("error: step 20: ") and done["hopeless"].stderr.count("\n") == 1
    assert "20th in a row" in done["hopeless"].stderr and len(log_of(here / "hopeless")) == 20  # 19 steps and the evaluation before them


def test_wandb_gets_what_log_jsonl_has_and_is_left_alone_otherwise(runs):
    here, done = runs
    assert {name: "wandb was imported" in result.stdout for name, result in done.items()} == {name: name == "shown" for name in done}
    assert done["shown"].returncode == 0, done["shown"].stderr
    (record,) = (here / "shown" / "wandb").glob("offline-run-*-shown-*/run-shown-*.wandb")
    content = record.read_bytes()
    names = {name for line in log_of(here / "shown") for name in line} - {"kind"}
    assert not [name for name in names | {"hedgehogs", "curves", "d_model"} if name.encode() not in content]
    assert list((here / "shown/wandb").glob("offline-run-*/files/media/images/curves*.png"))
