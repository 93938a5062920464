"""What the tests share: a small corpus, a tiny run trained on it, and ways to run the repository's scripts as a user would.

Nothing here needs a network, a GPU or a compiler. Scripts run in processes of their own, on one thread: the models are too small to share.
"""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that pytest may be started from anywhere
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in every process started from here
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-equality is promised on a CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported: no test may ask for more than is here, or wait for what does not answer

# Modules of the standard library with much to say, present in every Python from 3.11 on.
PACKAGES = (
    "argparse,ast,asyncio,collections,concurrent,decimal,difflib,doctest,email,ftplib,http,imaplib,importlib,inspect,json,logging,multiprocessing,"
    "optparse,pickletools,random,shutil,smtplib,statistics,string,subprocess,tarfile,typing,unittest,urllib,xml,zipfile"
)
TINY = (
    "--d_model=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --d_ff=64 --block_size=32 --batch_size=8 --max_steps=160 --warmup_steps=20 "
    "--eval_interval=40 --eval_steps=4 --ckpt_interval=40 --compile=False --dtype=float32 --grad_clip=0.7 --meta_ratio=0"
).split()

# Where run_many's processes are forked from: importing torch, its compiler and pyplot takes longer than most of the runs.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot"])


def run_script(*words, expect=0, cwd=ROOT):
    """Run `python words...` and return the finished process, with stdout and stderr as text; the exit code must be `expect`, without a traceback."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, f"exit code {done.returncode}, not {expect}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_many(script, cases):
    """Run a script once for each list of words, one after the other in one process that has torch already.

    Returns for each an object with `returncode`, `stdout` and `stderr`, like a finished process. Subprocesses of the script are caught too.
    """
    ours, theirs = forks.Pipe(duplex=False)
    process = forks.Process(target=_run_cases, args=(str(script), [list(map(str, words)) for words in cases], dict(os.environ), theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(300), f"{script}: nothing after 300 s"
        return [SimpleNamespace(**result) for result in ours.recv()]
    except EOFError:
        process.join(10)
        raise AssertionError(f"{script}: its process ended with exit code {process.exitcode} in one of the cases") from None
    finally:
        process.kill()
        process.join()


def _run_cases(script, cases, environment, pipe):
    """What the process of run_many does."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    results, own = [], [os.dup(1), os.dup(2)]
    for words in cases:
        files = [tempfile.TemporaryFile() for _ in own]
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)  # beneath Python, so that subprocesses of the script write there too
        sys.argv, code = [script, *words], 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        for number, file in enumerate(own, 1):
            os.dup2(file, number)
        texts = [file.seek(0) or file.read().decode() for file in files]
        results.append({"returncode": code, "stdout": texts[0], "stderr": texts[1]})
    pipe.send(results)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder that holds the corpus `docstrings`, made of some of the standard library: 250,000 tokens.

    Of the model's 1,024 ids the text uses 1,000, so that padding is there to be met.
    """
    folder = tmp_path_factory.mktemp("data")
    run_script("data/prepare.py", "docstrings", f"--packages={PACKAGES}", f"--data_dir={folder}", "--vocab_size=1000", "--val_fraction=0.1")
    return folder


@pytest.fixture(scope="session")
def quick_start(data_dir, tmp_path_factory):
    """The command of the README's quick start, shrunk: its run folder, its output and its settings, to be read and copied but not changed."""
    folder = tmp_path_factory.mktemp("out") / "tiny"
    words = ["config/train_11m.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={folder}"]
    (done,) = run_many("train.py", [words])
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, words=words, output=done.stdout)
