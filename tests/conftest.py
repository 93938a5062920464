"""What the tests share: a corpus, a tiny run, ways to run scripts. No network, GPU or compiler is needed."""
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that pytest may be started from anywhere
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in each child
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-equality is promised on a CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask for more than is here, or wait for what does not answer

# Modules of the standard library with long docstrings, present in every Python from 3.11 on.
PACKAGES = ("argparse,ast,asyncio,collections,concurrent,decimal,difflib,doctest,email,ftplib,http,imaplib,"
            "importlib,inspect,json,logging,multiprocessing,optparse,pickletools,random,shutil,smtplib,"
            "statistics,string,subprocess,tarfile,typing,unittest,urllib,xml,zipfile")
TINY = """--d_model=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --d_ff=64 --block_size=32 --batch_size=8
    --max_steps=160 --warmup_steps=20 --eval_interval=40 --eval_steps=4 --ckpt_interval=40 --compile=False
    --dtype=float32 --grad_clip=0.7 --meta_ratio=0""".split()

# Where run_many's processes are forked from: importing torch and pyplot takes longer than most of the runs.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot"])

def run_script(*words, expect=0, cwd=ROOT):
    """Run `python words...`, which must end with exit code `expect` and no traceback."""
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    return done

def run_many(script, cases):
    """Run a script for each list of words, in one process: objects with returncode, stdout, stderr."""
    with ProcessPoolExecutor(1, forks) as pool:
        cases = [list(map(str, words)) for words in cases]
        return pool.submit(run_cases, str(script), cases, dict(os.environ)).result()

def run_cases(script, cases, environment):
    signal.alarm(300)  # a case that hangs ends the process
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    results, own = [], [os.dup(1), os.dup(2)]
    for words in cases:
        files = [tempfile.TemporaryFile() for _ in own]
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)  # beneath Python, for subprocesses too
        sys.argv, code = [script, *words], 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        for held in sys.modules["plumbing.files"].locks if "plumbing.files" in sys.modules else []:
            held.release()  # as the end of a process would
        sys.stdout.flush(), sys.stderr.flush()
        for number, file in enumerate(own, 1):
            os.dup2(file, number)
        stdout, stderr = (file.seek(0) or file.read().decode() for file in files)
        results.append(SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr))
    return results

def log_of(folder, *kinds):
    """The lines of a run's log, of these kinds or all."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if not kinds or line["kind"] in kinds]

def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]

def checkpoint(folder, step):
    """A saved step: weights by our names, head, AdamW's "exp_avg/norm.weight" etc., and state.json."""
    from safetensors.torch import load_file

    from plumbing.checkpoint import their_names

    path = Path(folder) / f"step_{step:06d}"
    files = {name: load_file(path / f"{name}.safetensors") for name in ("model", "head", "optimizer")
             if (path / f"{name}.safetensors").exists()}
    names = their_names(json.loads((path / "config.json").read_text())["num_hidden_layers"])
    files["model"] = {ours: files["model"][theirs] for ours, theirs in names.items()}
    return SimpleNamespace(**files, state=json.loads((path / "state.json").read_text()))

@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with a corpus `docstrings` of 250,000 tokens and 1,000 ids, to which the model adds 24."""
    folder = tmp_path_factory.mktemp("data")
    words = [f"--packages={PACKAGES}", f"--data_dir={folder}", "--vocab_size=1000", "--val_fraction=0.1"]
    run_script("data/prepare.py", "docstrings", *words)
    return folder

@pytest.fixture(scope="session")
def quick_start(data_dir, tmp_path_factory):
    """The README's quick start, shrunk: its run folder, output and settings, to be read but not changed."""
    folder = tmp_path_factory.mktemp("out") / "tiny"
    words = ["config/train_11m.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={folder}"]
    (done,) = run_many("train.py", [words])
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, words=words, output=done.stdout)
