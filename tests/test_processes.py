"""train.py under torchrun: processes that meet through gloo, against one; how they stop and die."""
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
from conftest import ROOT, checkpoint, log_of, run_many, without_times

SETTINGS = """--d_model=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --d_ff=64 --block_size=32 --batch_size=10
    --micro_batch_size=3 --max_steps=10 --lr=0.001 --warmup_steps=3 --schedule=constant --eval_interval=5
    --eval_steps=2 --ckpt_interval=5 --compile=False --dtype=float32 --meta_ratio=0.5 --n_way=4 --k_shot=2
    --q_query=2 --episode_len=20 --episodes_per_step=5 --micro_episodes=2 --inner_lr=3 --seed=1""".split()

def torchrun(*words, processes=2):
    """Start train.py in several processes; they and torchrun end up in a group of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*command, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)

def same_lines(ours, theirs):
    for a, b in zip(without_times(ours), without_times(theirs), strict=True):
        assert a.keys() == b.keys() and a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)

@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """A run of one process, and the words that make another like it elsewhere."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    words = [*SETTINGS, f"--data_dir={data_dir}"]
    (done,) = run_many("train.py", [[*words, f"--out_dir={folder}"]])
    assert done.returncode == 0, done.stderr
    return folder, words

def test_two_processes_are_one(alone, tmp_path):
    """The same batches, episodes, losses and weights, for both objectives; printed and written once."""
    folder, words = alone
    done = torchrun(*words, f"--out_dir={tmp_path}")
    output = done.communicate(timeout=200)[0]
    assert done.returncode == 0, output
    assert {line["kind"] for line in log_of(folder)} == {"lm", "meta", "eval"}
    same_lines(log_of(tmp_path), log_of(folder))
    for ours, theirs in ((checkpoint(tmp_path, step), checkpoint(folder, step)) for step in (5, 10)):
        for name, p in (ours.model | ours.head).items():
            torch.testing.assert_close(p, (theirs.model | theirs.head)[name], rtol=1e-5, atol=1e-5, msg=name)
    assert output.count("step     10/10 ") == output.count("result  val_loss") == 1
    assert json.loads((tmp_path / "config.json").read_text())["system"]["processes"] == 2

def until(process, text):
    """Read the output of a process up to a line with the text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}:\n{''.join(lines)}")

def test_stopped_together_resumed_by_three_and_a_death_ends_all(alone, tmp_path):
    """SIGTERM to torchrun saves one checkpoint after a step of all. Three go on as one would."""
    out, large = tmp_path / "run", ("max_steps", "ckpt_interval", "eval_interval")
    words = [*alone[1], *(f"--{name}=1000000" for name in large)]
    process = torchrun(*words, f"--out_dir={out}")
    until(process, "step      5/")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    (saved,) = out.glob("step_*")
    step = int(saved.name[5:])
    assert "stopped. To continue" in output and log_of(out)[-1]["step"] == step >= 5, output

    shutil.copytree(out, tmp_path / "one")
    words.append("--resume=True")
    process = torchrun(*words, f"--out_dir={out}", processes=3)
    until(process, f"step {step + 5:6d}/")
    ps = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(max(map(int, ps.stdout.split())), signal.SIGKILL)
    killed = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - killed < 60 and process.returncode == 1
    ours = [line for line in output.splitlines() if line.startswith("error: ")]
    assert ours and all("another process" in line and "--resume=True" in line for line in ours), output
    assert not re.search(r'File ".*train\.py"', output)  # no traceback but torchrun's own
    assert list(out.glob("step_*")) == [saved]
    run_many("train.py", [[*words, f"--out_dir={tmp_path / 'one'}", f"--max_steps={step + 5}"]])
    three, one = ([line for line in log_of(folder, "lm", "meta") if line["step"] <= step + 5]
                  for folder in (out, tmp_path / "one"))
    same_lines(three, one)

@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_all_find(alone, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    (done,) = run_many("train.py", [[*alone[1], "--episodes_per_step=1"]])
    assert done.returncode == 2 and done.stderr.startswith("error: 2 processes cannot share"), done.stderr

def test_a_mistake_that_the_first_finds(alone):
    """The other waits for it meanwhile, and is ended."""
    process = torchrun(*alone[1], f"--out_dir={alone[0]}")
    output = process.communicate(timeout=100)[0]
    assert output.count("already holds a run") == 1 and process.returncode == 1
    assert not re.search(r'File ".*train\.py"', output)
