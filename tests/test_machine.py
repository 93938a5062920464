"""Machines that are not here: GPUs, Macs, Windows, pretended as far as it goes."""
import math
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log_of, run_many, run_script, without_times

from plumbing import machine

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))

def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="Python 3.10 or newer is needed"):
        runpy.run_path(ROOT / "plumbing/__init__.py")

def test_auto_takes_the_gpu_that_there_is(monkeypatch, capsys):
    assert machine.choose_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.choose_device("auto").type == "mps" and machine.choose_device("cpu").type == "cpu"
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        machine.choose_device("cuda")
    assert "--device=cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert machine.choose_device("auto").type == "cuda" and not torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(SystemExit):
        machine.choose_device("auto", local_rank=1)

def test_a_driver_that_torch_cannot_use_is_told(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for cuda, says in (("13.0", "driver too old for CUDA 13.0"), (None, "this build of torch is for CPUs")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert machine.choose_device("auto").type == "cpu" and says in capsys.readouterr().err

@pytest.mark.parametrize(("capability", "bfloat16", "expected"), [
    ((9, 0), True, torch.bfloat16), ((7, 5), False, torch.float16), ((6, 1), False, torch.float32)])
def test_half_precision_where_there_are_instructions_for_it(monkeypatch, capability, bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert machine.choose_dtype("auto", CUDA) == expected
    assert machine.choose_dtype("float16", CUDA) == torch.float16
    assert machine.choose_dtype("auto", MPS) == torch.float32

def test_what_cannot_be_compiled_is_told(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert machine.not_compiled(CPU) == "" and machine.not_compiled(CUDA) != ""
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine.not_compiled(CPU) == "only on Linux"

def test_peak_memory_in_the_units_of_each_system(monkeypatch):
    here = machine.peak_memory(CPU)
    assert 0.1 < here < 100
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts bytes
    assert machine.peak_memory(CPU) == pytest.approx(here / 1024, rel=0.1)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(machine.peak_memory(CPU))

WORDS = """config/train_11m.py --d_model=16 --n_layers=2 --n_heads=2 --n_kv_heads=1 --d_ff=24 --block_size=16
    --batch_size=8 --max_steps=6 --warmup_steps=1 --eval_interval=3 --eval_steps=2 --ckpt_interval=3 --n_way=4
    --k_shot=2 --q_query=2 --episode_len=20 --episodes_per_step=4 --inner_steps=2 --compile=False
    --dtype=float32""".split()
PRETENDED = {
    # As on a GPU the numbers of a step are read when the next has begun.
    "later": """
class Event:
    record = synchronize = lambda self: None
torch.cuda.Event, begin = Event, Run.__init__
def later(run, config):
    begin(run, config)
    run.steps_late = 1
Run.__init__ = later""",
    # In a step or an evaluation memory runs out with more than two rows or episodes at a time.
    "small": """
read, attempt, in_step = Llama.features, Run.within_memory, []
def features(model, idx, *cache, **options):
    if in_step and len(idx) > 2 * (8 if idx.size(1) == 20 else 1):
        model.norm.weight.grad = torch.ones_like(model.norm.weight)  # a part of the step that went well
        raise torch.OutOfMemoryError("pretended")
    return read(model, idx, *cache, **options)
def within_memory(run, *step):
    in_step.append(step)
    numbers = attempt(run, *step)
    in_step.clear()
    return numbers
Llama.features, Run.within_memory, torch.cuda.empty_cache = features, within_memory, lambda: None""",
    # It runs out with more than two episodes at a time, first in an evaluation.
    "episodes": """
read = Llama.features
def features(model, idx, *cache, **options):
    if idx.size(1) == 20 and len(idx) > 2 * 8:
        raise torch.OutOfMemoryError("pretended")
    return read(model, idx, *cache, **options)
Llama.features, torch.cuda.empty_cache = features, lambda: None"""}
PROGRAM = """import sys
sys.path.insert(0, {root!r})
import runpy, torch
from model import Llama
from plumbing.run import Run
{patch}
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""
# Every script, one after the other, without what Windows and macOS lack.
ELSEWHERE = """import asyncio, multiprocessing, os, runpy, signal, sys, tempfile
for name in ("resource", "fcntl"):
    sys.modules[name] = None
for name in ("sysconf", "fork", "mkfifo"):
    delattr(os, name)
for name in ("SIGHUP", "alarm"):
    delattr(signal, name)
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    root, run, corpora, *words = sys.argv[1:]
    sys.path[:0] = root, root + "/data"
    for script, words in {
            "data/prepare.py": ["docstrings", "--packages=asyncio,email", "--vocab_size=300",
                                "--val_fraction=0.5", "--workers=1", "--data_dir=" + tempfile.mkdtemp()],
            "train.py": words, "smlmt.py": [corpora + "/docstrings"],
            "sample.py": [run, "--prompt=Caf\u00e9 ~/a", "--n_samples=1"],
            "eval_lm.py": [run, "--data=text.txt"], "spectra.py": [run],
            "eval_fewshot.py": [run, "--shots=1", "--n_episodes=2"], "eval_ner.py": ["--help"]}.items():
        sys.argv = [script, *words]
        try:
            runpy.run_path(os.path.join(root, script), run_name="__main__")
        except SystemExit as end:
            print(script, "ended with", end.code or 0)
        else:
            print(script, "ended with 0")
"""

@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """{name: (run folder, output)} of one short run, plain and under each pretence."""
    here, done = tmp_path_factory.mktemp("runs"), {}
    for name, patch in {"plain": "", **PRETENDED}.items():
        (here / f"{name}.py").write_text(PROGRAM.format(root=str(ROOT), patch=patch))
        words = [*WORDS, f"--data_dir={data_dir}", f"--out_dir={here / name}"]
        (result,) = run_many(here / f"{name}.py", [words], report=False)
        assert result.returncode == 0, result.stderr
        done[name] = here / name, result.stdout
    return done

def test_numbers_that_are_read_later_are_the_same(runs):
    assert without_times(log_of(runs["later"][0])) == without_times(log_of(runs["plain"][0]))
    assert runs["later"][1].count("step ") == 6

@pytest.mark.parametrize(("name", "said"), [
    ("small", "2 rows, 1 episodes"), ("episodes", "4 rows, 2 episodes")])
def test_memory_that_runs_out_halves_the_micro_batches(runs, name, said):
    whole, halves = log_of(runs["plain"][0]), log_of(runs[name][0])
    assert f"ran out: {said} at a time" in runs[name][1]
    for a, b in zip(whole, halves, strict=True):
        for key in ("lm_loss", "meta_loss", "grad_norm", "val_loss", "heldout_query_acc"):
            assert key not in a or a[key] == pytest.approx(b[key], rel=1e-5)

def test_every_script_elsewhere(runs, data_dir, tmp_path, monkeypatch):
    """Also in the environment of a notebook, of a cluster, of a terminal without UTF-8; a ~."""
    for key, text in {"MPLBACKEND": "module://nowhere", "PYTHONIOENCODING": "ascii", "RANK": "",
                      "LOCAL_RANK": "3", "WORLD_SIZE": "2", "HOME": tmp_path}.items():
        monkeypatch.setenv(key, str(text))
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    (tmp_path / "text.txt").write_text("Some words to be read.")
    words = ["~/a/run", data_dir, *WORDS, f"--data_dir={data_dir}", "--out_dir=~/a/run"]
    done = run_script(tmp_path / "elsewhere.py", ROOT, *words, cwd=tmp_path)
    ends = [line for line in done.stdout.splitlines() if " ended with " in line]
    assert len(ends) == 8 and all(line.endswith(" 0") for line in ends), done.stderr
    assert "1 x cpu" in done.stdout and "peak memory nan GiB" in done.stdout and "Caf? ~/a" in done.stdout
    run = tmp_path / "a/run"
    assert without_times(log_of(run)) == without_times(log_of(runs["plain"][0]))
    assert (run / "curves.png").exists() and (run / "heat.png").exists()

@pytest.mark.slow
def test_a_compiler_that_cannot_work(tmp_path, monkeypatch):
    (tmp_path / "with space").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "with space"))
    program = "import torch; from plumbing import machine; print(machine.not_compiled(torch.device('cpu')))"
    assert len(run_script("-c", program).stdout) > 2

@pytest.mark.slow
@pytest.mark.parametrize("size", ["11m", "65m", "181m", "570m"])
@pytest.mark.parametrize(("capability", "kernel"), [("75", "efficient"), ("90", "flash")])
def test_the_cuda_branch_runs_dry(data_dir, size, capability, kernel):
    words = ["tests/dry_cuda.py", capability, f"config/train_{size}.py", "--dataset=docstrings"]
    words += ["--word_min_count=3", "--n_way=8", f"--data_dir={data_dir}"]  # for so small a corpus
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = [line.split() for line in done.stdout.splitlines() if line.startswith(("lm ", "meta "))]
    assert [kind for kind, *_ in kinds] == ["lm", "meta", "lm"]
    for _, *kernels in kinds:  # fused attention only: the plain one would have a softmax of its own
        assert f"_scaled_dot_product_{kernel}_attention" in kernels and "_softmax" not in kernels
