"""What the tests share: a corpus, a tiny run, ways to run scripts. No network, GPU or compiler is needed."""
import fcntl
import gc
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

import filelock
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

# Where scripts' processes are forked from: importing these takes longer than most of the runs.
forks = multiprocessing.get_context("forkserver")
preloaded = "pytest torch._dynamo matplotlib.pyplot datasets sklearn.linear_model"
forks.set_forkserver_preload(preloaded.split())

def run_script(*words, expect=0, cwd=ROOT):
    """Run `python words...`, which must end with exit code `expect` and no traceback."""
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    return done

def exit_code(script):
    """Run a script of this repository in this process, as `python script` would; returns its exit code."""
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0

def execute(script, words, cwd, environment):
    """What `python script words...` does, in this process, which a hang ends; the exit code."""
    signal.alarm(300)
    gc.freeze()  # what was imported before the fork need not be looked through again and again
    multiprocessing.set_start_method(None, force=True)  # a script's own processes start as always
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, script = [script, *words], str(ROOT / script)
    sys.path.insert(0, os.path.dirname(script))
    code = exit_code(script)
    sys.stdout.flush(), sys.stderr.flush()
    return code

def run_many(script, cases, report=True, cwd=ROOT):
    """Run a script for each list of words, in one process: objects with returncode, stdout, stderr.

    report=False is for train.py without its sample and its figure, which take longer than some runs.
    """
    with ProcessPoolExecutor(1, forks) as pool:
        cases = [list(map(str, words)) for words in cases]
        return pool.submit(run_cases, script, cases, report, cwd, dict(os.environ)).result()

def run_cases(script, cases, report, *place):
    if not report:
        from plumbing.run import Run

        Run.report = lambda *_: None
    results, own = [], [os.dup(1), os.dup(2)]
    for words in cases:
        files = [tempfile.TemporaryFile() for _ in own]
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)  # beneath Python, for subprocesses too
        code = execute(script, words, *place)
        for held in sys.modules["plumbing.files"].locks if "plumbing.files" in sys.modules else []:
            held.release()  # as the end of a process would
        for number, file in enumerate(own, 1):
            os.dup2(file, number)
        stdout, stderr = (file.seek(0) or file.read().decode() for file in files)
        results.append(SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr))
    return results

def start(script, *words, ignored=(), **environment):
    """Begin `python script words...`; returns its process, with the `output` to be read."""
    reader, writer = forks.Pipe(duplex=False)
    fcntl.fcntl(reader.fileno(), fcntl.F_SETPIPE_SZ, 4096)  # it runs 50 lines ahead
    what = script, [*map(str, words)], ROOT, os.environ | environment
    process = forks.Process(target=run_started, args=(writer, ignored, *what), daemon=True)
    process.start()
    writer.close()
    process.output = open(os.dup(reader.fileno()), errors="replace")
    return process

def run_started(writer, ignored, *what):
    for kind in (signal.SIGHUP, signal.SIGINT):  # whatever is ignored where the tests run
        signal.signal(kind, signal.SIG_IGN if kind in ignored else signal.SIG_DFL)
    for number in (1, 2):
        os.dup2(writer.fileno(), number)
    writer.close()
    os._exit(execute(*what))

def one_line(done, says):
    """A command that was given a mistake ended with one line, which says this."""
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    assert says in done.stderr, done.stderr

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

def made_once(tmp_path_factory, name, script, *words):
    """A folder in which the first process of this test run that needs it runs a script; what it printed."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    output = folder.with_suffix(".txt")
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not output.exists():
            (done,) = run_many(script, [[word.format(folder=folder) for word in words]])
            assert done.returncode == 0, done.stderr
            output.write_text(done.stdout)
    return folder, output.read_text()

@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with a corpus `docstrings` of 250,000 tokens and 1,000 ids, to which the model adds 24."""
    words = [f"--packages={PACKAGES}", "--data_dir={folder}", "--vocab_size=1000", "--val_fraction=0.1"]
    return made_once(tmp_path_factory, "data", "data/prepare.py", "docstrings", *words)[0]

@pytest.fixture(scope="session")
def quick_start(data_dir, tmp_path_factory):
    """The README's quick start, shrunk: its run folder, output and settings, to be read but not changed."""
    words = ["config/train_11m.py", *TINY, f"--data_dir={data_dir}"]
    folder, output = made_once(tmp_path_factory, "tiny", "train.py", *words, "--out_dir={folder}")
    return SimpleNamespace(folder=folder, words=[*words, f"--out_dir={folder}"], output=output)
