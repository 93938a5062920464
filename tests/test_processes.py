"""train.py in several processes that meet through gloo, against one; how they stop and die."""
import json
import os
import shutil
import signal
import socket

import pytest
import torch
import torch.distributed.run
from conftest import checkpoint, log_of, one_line, run_many, start, without_times

SETTINGS = """--d_model=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --d_ff=64 --block_size=32 --batch_size=10
    --micro_batch_size=3 --max_steps=10 --lr=0.001 --warmup_steps=3 --schedule=constant --eval_interval=5
    --eval_steps=2 --ckpt_interval=5 --compile=False --dtype=float32 --meta_ratio=0.5 --n_way=4 --k_shot=2
    --q_query=2 --episode_len=20 --episodes_per_step=5 --micro_episodes=2 --inner_lr=0.75 --inner_steps=2
    --seed=1""".split()

def ranks(world, *words):
    """Begin train.py in several processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [start("train.py", *words, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), **where)
            for rank in range(world)]

def end(processes):
    """The exit codes of processes and what each printed, once all have ended."""
    printed = [process.output.read() for process in processes]
    for process in processes:
        process.join(60)
    assert "Traceback" not in "".join(printed), printed
    return [process.exitcode for process in processes], printed

def until(process, text):
    """Read the output of a process up to a line with the text."""
    lines = []
    while text not in "".join(lines[-1:]):
        lines.append(process.output.readline())
        assert lines[-1], f"ended without {text!r}:\n{''.join(lines)}"

def same_lines(ours, theirs):
    for a, b in zip(without_times(ours), without_times(theirs), strict=True):
        assert a.keys() == b.keys() and a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)

@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """A run of one process, and the words that make another like it elsewhere."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    words = [*SETTINGS, f"--data_dir={data_dir}"]
    (done,) = run_many("train.py", [[*words, f"--out_dir={folder}"]], report=False)
    assert done.returncode == 0, done.stderr
    return folder, words

def test_two_processes_are_one(alone, tmp_path):
    """The same batches, episodes, losses and weights, for both objectives; printed and written once."""
    folder, words = alone
    codes, (printed, silence) = end(ranks(2, *words, f"--out_dir={tmp_path}"))
    assert codes == [0, 0] and silence == "", printed
    assert {line["kind"] for line in log_of(folder)} == {"lm", "meta", "eval"}
    same_lines(log_of(tmp_path), log_of(folder))
    for ours, theirs in ((checkpoint(tmp_path, step), checkpoint(folder, step)) for step in (5, 10)):
        for name, p in (ours.model | ours.head).items():
            torch.testing.assert_close(p, (theirs.model | theirs.head)[name], rtol=1e-5, atol=1e-5, msg=name)
    assert printed.count("step     10/10 ") == printed.count("result  val_loss") == 1
    result = "heldout_query_acc {heldout_query_acc:.4f}±{heldout_query_acc_se:.3f}"
    assert result.format_map(log_of(tmp_path, "eval")[-1]) in printed
    assert json.loads((tmp_path / "config.json").read_text())["system"]["processes"] == 2

def test_stopped_together_resumed_by_three_and_a_death_ends_all(alone, tmp_path):
    """SIGTERM to torchrun saves one checkpoint after a step of all. Three go on as one would."""
    out, large = tmp_path / "run", ("max_steps", "ckpt_interval", "eval_interval")
    words = [*alone[1], *(f"--{name}=1000000" for name in large)]
    torchrun = start(torch.distributed.run.__file__, "--standalone", "--nproc_per_node=2", "train.py", *words,
                     f"--out_dir={out}")
    until(torchrun, "step      5/")
    os.kill(torchrun.pid, signal.SIGTERM)
    output = torchrun.output.read()
    (saved,) = out.glob("step_*")
    step = int(saved.name[5:])
    assert "stopped. To continue" in output and log_of(out)[-1]["step"] == step >= 5, output

    shutil.copytree(out, tmp_path / "one")
    words.append("--resume=True")
    three = ranks(3, *words, f"--out_dir={out}")
    until(three[0], f"step {step + 5:6d}/")
    os.kill(three[2].pid, signal.SIGKILL)
    codes, printed = end(three)
    assert codes == [1, 1, -signal.SIGKILL]
    for text in printed[:2]:
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "another process" in line and "--resume=True" in line
    assert list(out.glob("step_*")) == [saved]
    words += [f"--out_dir={tmp_path / 'one'}", f"--max_steps={step + 5}"]
    run_many("train.py", [words], report=False)
    same_lines(*([line for line in log_of(folder, "lm", "meta") if line["step"] <= step + 5]
                 for folder in (out, tmp_path / "one")))

@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_all_find(alone, monkeypatch, rank):
    for key, text in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(key, str(text))
    (done,) = run_many("train.py", [[*alone[1], "--episodes_per_step=1"]])
    one_line(done, "2 processes need")

def test_a_mistake_that_the_first_finds(alone):
    """The other waits for it meanwhile, and ends too."""
    codes, printed = end(ranks(2, *alone[1], f"--out_dir={alone[0]}"))
    assert codes == [2, 1] and printed[0].count("already holds a run") == 1, printed
