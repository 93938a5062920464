"""train.py under torchrun: real processes that meet through gloo, against one process; and what happens when they are stopped or die."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_many

SETTINGS = (  # three processes would get unequal shares of these rows and episodes; two do of the micro-batches
    "--d_model=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --d_ff=64 --block_size=32 --batch_size=10 --micro_batch_size=3 --max_steps=10 --lr=0.001 "
    "--warmup_steps=3 --eval_interval=5 --eval_steps=2 --ckpt_interval=5 --compile=False --dtype=float32 --meta_ratio=0.5 --n_way=4 --k_shot=2 "
    "--q_query=2 --episode_len=20 --episodes_per_step=5 --micro_episodes=2 --inner_lr=3 --seed=1"
).split()
TIMES = {"seconds", "tokens_per_second"}


def torchrun(*words, processes=2):
    """Start train.py in several processes; they and torchrun end up in a group of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def workers(parent):
    """The process ids of the workers of a torchrun, in the order of their ranks."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True).stdout.split()
    return sorted(map(int, children))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_run(ours, theirs, steps):
    for a, b in zip(log_of(ours), log_of(theirs), strict=True):
        assert a.keys() == b.keys() and a["kind"] == b["kind"]
        for key in a.keys() - TIMES - {"kind"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (a["step"], key)
    for step in steps:
        a, b = (torch.load(folder / f"ckpt_{step:06d}.pt", weights_only=True) for folder in (ours, theirs))
        for part in ("model", "head"):
            for name, p in a[part].items():
                torch.testing.assert_close(p, b[part][name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """A run of one process, and the words that make another like it elsewhere."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    words = [*SETTINGS, f"--data_dir={data_dir}"]
    (done,) = run_many("train.py", [[*words, f"--out_dir={folder}"]])
    assert done.returncode == 0, done.stderr
    return folder, words


def test_two_processes_are_one(alone, tmp_path):
    """The same batches, episodes, losses, gradients and weights, for both objectives, with accumulation; printed and written once."""
    folder, words = alone
    done = torchrun(*words, f"--out_dir={tmp_path / 'run'}")
    output = done.communicate(timeout=200)[0]
    assert done.returncode == 0, output
    assert {line["kind"] for line in log_of(folder)} == {"lm", "meta", "eval"}
    same_run(tmp_path / "run", folder, (5, 10))
    assert output.count("step     10/10 ") == output.count("result  val_loss") == 1 and "system  2 x " in output
    assert json.loads((tmp_path / "run/config.json").read_text())["system"]["processes"] == 2


def test_resumed_with_another_number_of_processes(alone, tmp_path):
    folder, words = alone
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/ckpt_000010.pt").unlink()
    done = torchrun(*words, f"--out_dir={tmp_path / 'run'}", "--resume=True", processes=3)
    output = done.communicate(timeout=200)[0]
    assert done.returncode == 0, output
    same_run(tmp_path / "run", folder, (10,))


def until(process, text):
    """Read the output of a process up to a line with the text, and return what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"ended without {text!r}:\n{''.join(lines)}")


def test_stopped_together_and_a_death_ends_all(alone, tmp_path, monkeypatch):
    """SIGTERM to torchrun saves one checkpoint after a step of all. When one of three is killed the others end, with one line of ours."""
    out = tmp_path / "run"
    words = [*alone[1], f"--out_dir={out}", *(f"--{name}=1000000" for name in ("max_steps", "ckpt_interval", "eval_interval"))]
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = torchrun(*words, "--wandb=True")
    until(process, "step      5/")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    (checkpoint,) = out.glob("ckpt_*.pt")
    stopped_at = int(checkpoint.stem[5:])
    assert f"stopped after step {stopped_at}. To go on: " in output and log_of(out)[-1]["step"] == stopped_at >= 5
    (record,) = out.glob("wandb/offline-run-*/*.wandb")
    assert all(str(line["seconds"]).encode() in record.read_bytes() for line in log_of(out)[-3:])  # the end is there too

    process = torchrun(*words, "--resume=True", processes=3)
    until(process, f"step {stopped_at + 3:6d}/")
    os.kill(workers(process)[-1], signal.SIGKILL)
    killed = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - killed < 60 and process.returncode == 1
    (ours,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "another process of this run is gone" in ours and "--resume=True" in ours, output
    assert not re.search(r'File ".*train\.py"', output)  # no traceback but torchrun's own
    assert list(out.glob("ckpt_*")) == [checkpoint]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_is_told_once(alone, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    (done,) = run_many("train.py", [[*alone[1], "--episodes_per_step=1"]])
    told = "error: episodes_per_step = 1, but there are 2 processes to share it: raise episodes_per_step, or start fewer\n"
    assert done.returncode == 2 and done.stderr == ("" if rank else told) and not done.stdout


@pytest.mark.parametrize("words, told", [
    (["--resume=True", "--seed=2"], "cannot resume "),
    (["--lr=0.99", "--warmup_steps=0", "--weight_decay=100000"], "step "),
])  # fmt: skip
def test_a_mistake_of_all_processes_is_told_once(alone, tmp_path, words, told):
    """Also one that only the first process looks for, and one that all find within the loop."""
    out = alone[0] if "--resume=True" in words else tmp_path / "run"
    output = torchrun(*alone[1], f"--out_dir={out}", *words).communicate(timeout=100)[0]
    (ours,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert ours.startswith(f"error: {told}") and not re.search(r'File ".*train\.py"', output)
