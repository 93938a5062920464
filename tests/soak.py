"""Faults on purpose: what a run, a corpus or an evaluation makes of kills, full disks, flipped bits, nonsense and malice.

    python tests/soak.py                          # a little of each, in half a minute
    python tests/soak.py --long                   # 100 kills, 1,000 flipped bits in each file, 2,000 configurations: an hour
    python tests/soak.py --only=kill,bits --seed=7

One line for each fault: how often it was tried, and how often survived. To survive is to end as the undisturbed run ended, or with one clear line,
and never with a traceback, a hang, twice the memory, something not finite on the disk or a file outside the folder. What did not survive is printed
with its case, which the seed repeats, and the exit code is 1. The processes are real ones, killed by SIGKILL; they are forked from this one, which
saves each the seconds that importing torch takes.
"""
import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # bit-equality is promised on a CPU

import matplotlib.pyplot  # noqa: E402, F401
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401
from tqdm import tqdm  # noqa: E402

import configurator  # noqa: E402
import eval_ner  # noqa: E402
import export_hf  # noqa: E402
import model as model_file  # noqa: E402
import runs  # noqa: E402

PACKAGES = "argparse,ast,asyncio,collections,decimal,difflib,doctest,email,http,importlib,inspect,json,logging,statistics,unittest,urllib"
SETTINGS = (
    "--d_model=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --d_ff=64 --block_size=32 --batch_size=8 --max_steps=24 --warmup_steps=5 --eval_steps=2 "
    "--eval_interval=3 --ckpt_interval=3 --compile=False --dtype=float32 --meta_ratio=0.5 --n_way=4 --k_shot=2 --q_query=2 --episode_len=16 "
    "--word_min_count=5 --inner_steps=3"
).split()
FAULTS = "kill signals disk nan configs hostile bits fuzz".split()  # in this order: the last two start threads, after which one should not fork
TIMES = ("seconds", "tokens_per_second")  # what differs between two equal logs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--long", action="store_true", help="for real")
parser.add_argument("--only", default=",".join(FAULTS), help="faults, with commas between (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
args = parser.parse_args()
if wrong := set(args.only.split(",")) - set(FAULTS):
    sys.exit(f"error: --only={args.only}: {', '.join(sorted(wrong))} is not among {', '.join(FAULTS)}")
rng = random.Random(args.seed)  # each fault seeds it anew
here = Path(tempfile.mkdtemp(prefix="soak-"))
lost = []  # what did not survive


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# How it is told and counted


class Lost(Exception):
    """Something did not survive; the text says what."""


class Hang(BaseException):
    """It took too long. No Exception, so that nothing catches it on the way."""


def must(condition, text):
    if not condition:
        raise Lost(text)


def attempts(fault, cases, note=""):
    """Go through `cases`, (name, function) pairs, calling each function; print the line of the fault."""
    survived, tried, notes, known = 0, 0, {}, len(lost)
    rng.seed(f"{args.seed} {fault}")
    for name, function in tqdm(cases, fault, leave=False, delay=10, disable=None):
        tried += 1
        try:
            found = function()
            survived += 1
            notes[found] = notes.get(found, 0) + 1
        except (Exception, Hang) as error:
            lost.append(f"{fault}, case {tried} ({name}), --seed={args.seed}: {type(error).__name__}: {error}")
    told = ", ".join(f"{count} {text}" for text, count in notes.items() if isinstance(text, str))
    print(f"{fault:44} tried {tried:5,}  survived {survived:5,}  {note}{told}")
    print("".join(f"lost: {line}\n" for line in lost[known:]), end="", flush=True)


def outcome(call, seconds=60):
    """(what `call` returns, ""), or (None, the one line with which it ended). A second line, a traceback or a hang is not survived."""

    def hang(signum, frame):
        raise Hang(f"more than {seconds} seconds")

    signal.signal(signal.SIGALRM, hang)
    printed = io.StringIO()
    try:
        signal.alarm(seconds)
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            return call(), ""
    except SystemExit:
        line = "\n".join(line for line in printed.getvalue().strip().split("\n") if not line.startswith("note: "))
        must(line.startswith("error: ") and len(line.splitlines()) == 1, f"not one clear line: {line[:300]}")
        return None, line
    finally:
        signal.alarm(0)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Processes


def run_as_script(script, words, printed, before):
    """What a child does: be `python script words...`, with its output in the two files `printed`, after calling `before`."""
    os.setpgrp()  # what it starts is killed with it
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(ROOT)
    before()
    sys.argv, code, sys.path[0] = [script, *words], 0, str(ROOT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def nothing():
    pass


class Run:
    """A script that runs in a process of its own."""

    number = 0

    def __init__(self, script, *words, before=nothing):
        Run.number += 1
        self.script = script
        self.printed = [here / f"{Run.number}.{name}" for name in ("out", "err")]
        target = (script, list(map(str, words)), self.printed, before)
        self.process = multiprocessing.get_context("fork").Process(target=run_as_script, args=target)
        self.process.start()

    def send(self, signum):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signum)

    def end(self, seconds=300):
        """(exit code, stdout, stderr) when it has ended; minus the signal where one ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise Hang(f"still running after {seconds} seconds")
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self.printed)
        must("Traceback" not in err, f"a traceback: {err[-1500:]}")
        return self.process.exitcode, out, err

    def line(self, code=None):
        """The one line on stderr with which it ended."""
        found, _, err = self.end()
        must(err.startswith("error: ") and err.count("\n") == 1 and found in ((1, 2) if code is None else (code,)), f"exit code {found}: {err[:500]}")
        return err


def train(folder, *words, resume=False, before=nothing):
    return Run("train.py", *SETTINGS, f"--data_dir={here / 'data'}", f"--out_dir={folder}", f"--resume={resume}", *words, before=before)


def go_on(folder, *words, **options):
    """Train in a folder, from where it stands."""
    return train(folder, *words, resume=(folder / "config.json").exists(), **options)


def fresh(name="run"):
    """A new folder's path."""
    Run.number += 1
    return here / f"{name}{Run.number}"


def copied(name="run"):
    return Path(shutil.copytree(here / "straight", fresh(name)))


def same(one, other):
    """Whether two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def log_of(folder):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in runs.read_log(str(folder))]


def equals_straight(folder):
    """The run in a folder is the undisturbed one: log but times, weights, moments; nothing lies about."""
    must(log_of(folder) == log_of(here / "straight"), "the log is another")
    steps = [line["step"] for line in log_of(folder) if line["kind"] != "eval"]
    must(steps == [*range(1, 25)], f"the log's steps are {steps}")
    one, other = (runs.load_checkpoint(str(out / "ckpt_000024.pt")) for out in (here / "straight", folder))
    must(all(same(one[part], other[part]) for part in ("model", "head", "optimizer", "step")), "the weights are others")
    must(not list(folder.glob("*.tmp")), f"left behind: {[path.name for path in folder.glob('*.tmp')]}")


def stands(folder):
    """Whatever happened to a run, what is in its folder is whole."""
    for path in runs.checkpoints(str(folder)).values():
        state, line = outcome(lambda path=path: runs.load_checkpoint(path))
        must(not line, line)
        must(all(p.isfinite().all() for p in [*state["model"].values(), *state["head"].values()]), f"{path} is not finite")
    for path in folder.glob("spectra_*.npz"):
        with np.load(path) as arrays:
            must(all(len(arrays[name]) >= 0 if arrays[name].ndim else True for name in arrays), f"{path} is torn")
    lines, line = outcome(lambda: runs.read_log(str(folder)))
    must(not line, line)
    steps = [line["step"] for line in lines if line["kind"] in ("lm", "meta")]
    must(steps == [*range(1, len(steps) + 1)], f"the log's steps are {steps}")
    must("NaN" not in (folder / "log.jsonl").read_text() if lines else True, "the log holds NaN")


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait(run, ready, seconds=120):
    """Until `ready` or the end of the run."""
    until = time.time() + seconds
    while not ready() and run.process.exitcode is None:
        must(time.time() < until, "waited too long")
        time.sleep(0.001)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# kill, signals, disk, nan: all end as the undisturbed run


def moment(run, folder, spoken):
    """Wait for a random moment: of the start (with `spoken` after the first word), or a random number of lines of the log and a bit more."""
    if spoken:
        wait(run, lambda: run.printed[0].exists() and run.printed[0].stat().st_size)
    if rng.random() < 0.15:
        time.sleep(rng.uniform(0, 0.7))
        return
    wanted = lines_in(folder / "log.jsonl") + rng.randrange(1, 14)
    begun = time.time()  # a resumed run cuts the log back first, so that lines may be fewer than they were
    wait(run, lambda: lines_in(folder / "log.jsonl") >= wanted or time.time() > begun + 8)
    time.sleep(rng.uniform(0, 0.04))


def interruptions(number, strike, spoken=False):
    """Cases: runs interrupted by `strike(run)` at random moments and gone on from, again and again; those that come to their end are compared."""
    folder = fresh()

    def interrupt():
        nonlocal folder
        run = go_on(folder)
        moment(run, folder, spoken)
        found = strike(run)
        half = list(folder.glob("*.tmp"))
        if folder.exists():
            stands(folder)
        if run.process.exitcode == 0:
            equals_straight(folder)
            folder = fresh()
        return "with a file half written" if half else found

    def last():
        code, _, err = go_on(folder).end()
        must(code == 0, err)
        equals_straight(folder)
        return "gone on to an end equal to the undisturbed run's"

    return [("interruption", interrupt)] * number + [("to the end", last)]


def kill(n):
    def strike(run):
        run.send(signal.SIGKILL)
        run.process.join()
        return None

    attempts("kill -9, training", interruptions(n(4, 100), strike))
    whole = {path.name: path.read_bytes() for path in (here / "data" / "docstrings").iterdir()}
    place = fresh("data")

    def prepare():
        run = prepared(place)
        time.sleep(rng.uniform(0, 1.5))
        run.send(signal.SIGKILL)
        run.process.join()
        if (place / "docstrings" / "meta.json").exists():
            must(not outcome(lambda: runs.load_corpus(str(place / "docstrings")))[1], "a torn corpus has a meta.json")
        return None

    def to_the_end():
        must(prepared(place).end()[0] == 0, "did not go on")
        must({path.name: path.read_bytes() for path in (place / "docstrings").iterdir()} == whole, "the corpus is another")
        shutil.rmtree(place)
        return "gone on to the same bytes"

    attempts("kill -9, preparing a corpus", ([("kill", prepare)] * n(1, 4) + [("to the end", to_the_end)]) * n(1, 5))


def prepared(place, **options):
    return Run("data/prepare.py", "docstrings", f"--packages={PACKAGES}", f"--data_dir={place}", "--vocab_size=1000", "--val_fraction=0.2",
               "--workers=1", **options)  # fmt: skip


def signals(n):
    def strike(run):
        run.send(rng.choice((signal.SIGINT, signal.SIGTERM)))
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.05))
            run.send(rng.choice((signal.SIGINT, signal.SIGTERM)))
        code, _, err = run.end()
        must(code in (0, 130, 143, -signal.SIGINT, -signal.SIGTERM) and not err, f"exit code {code}: {err[:300]}")
        return "saved its step" if code > 0 else "left at once" if code < 0 else None

    # Before train.py has said its first word it may be Python that answers, with its KeyboardInterrupt.
    attempts("SIGTERM and SIGINT, also twice", interruptions(n(3, 60), strike, spoken=True))

    def second():
        folder = fresh()
        first = train(folder)
        wait(first, lambda: lines_in(folder / "log.jsonl") > rng.randrange(1, 9))
        first.send(signal.SIGSTOP)  # so that it certainly is not over yet
        try:
            for resume in (False, True):
                line = train(folder, resume=resume).line(2)
                must("another process is at work" in line, line)
        finally:
            first.send(signal.SIGCONT)
        must(first.end()[0] == 0, "the first one did not end well")
        equals_straight(folder)

    attempts("a second process in the same folder", [("second", second)] * n(1, 10))


def disk(n):
    """A limit on the size of files: what is written beyond it fails as on a full disk. Python ignores the signal that comes with it."""

    def limited(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def full(words, low, high, what):
        def case():
            folder = fresh()
            line = train(folder, *words, before=limited(rng.randrange(low, high))).line(1)
            must(what in line and "free space" in line and "untouched" in line, line)
            stands(folder)
            must(not list(folder.glob("*.tmp")), "a .tmp is left behind")
            must(go_on(folder).end()[0] == 0, "did not go on")
            equals_straight(folder)

        return case

    size = (here / "straight" / "ckpt_000024.pt").stat().st_size
    attempts("full disk, checkpoint", [("checkpoint", full([], 30_000, size, "ckpt_"))] * n(1, 30))
    late = ["--ckpt_interval=100"]  # nothing but the log is written until the end
    attempts("full disk, log", [("log", full(late, 11_500, 15_000, "log.jsonl"))] * n(1, 20))

    def figure():
        folder = copied()
        before = (folder / "curves.png").read_bytes()
        line = train(folder, resume=True, before=limited(rng.randrange(30_000, len(before)))).line(1)
        must("curves.png" in line and "free space" in line, line)
        must((folder / "curves.png").read_bytes() == before, "the figure is another")
        equals_straight(folder)

    def corpus():
        place = fresh("data")
        size = (here / "data" / "docstrings" / "train.bin").stat().st_size
        code, _, err = prepared(place, before=limited(rng.randrange(20_000, size))).end()
        must(code == 2 and "error: " in err and "free space" in err, f"exit code {code}: {err}")
        must(not (place / "docstrings" / "meta.json").exists(), "half a corpus has a meta.json")
        shutil.rmtree(place)

    attempts("full disk, figure", [("figure", figure)] * n(1, 10))
    attempts("full disk, preparing a corpus", [("corpus", corpus)] * n(1, 10))


def nan(n):
    """A number that is none, at a random place of a random step, put there by a hook around a function that train.py calls."""

    def case(where):
        def run():
            bad, spot = rng.choice((math.nan, math.inf, -math.inf)), rng.random()
            at = rng.choice([step for step in range(1, 25) if where != "batch" or step % 3 != 1])  # before those it would meet an evaluation
            folder = fresh()

            def hook():
                clip, features, step = torch.nn.utils.clip_grad_norm_, model_file.Llama.features, 1

                def clip_and_count(parameters, *rest):
                    nonlocal step
                    if step == at and where != "batch":
                        tensors = [p.data if where == "weights" else p.grad for p in parameters if where == "weights" or p.grad is not None]
                        tensor = tensors[int(spot * len(tensors))].view(-1)
                        tensor[int(spot * 1e6) % len(tensor)] = bad
                    step += 1
                    return clip(parameters, *rest)

                def features_and_batch(self, idx):
                    found = features(self, idx)
                    if step == at and where == "batch" and torch.is_grad_enabled():
                        found = found + torch.where(torch.rand(()) >= 0, bad, 0.0)
                    return found

                torch.nn.utils.clip_grad_norm_, model_file.Llama.features = clip_and_count, features_and_batch

            line = train(folder, before=hook).line(1)
            must(line.startswith(f"error: step {at}: "), f"not found at step {at}: {line}")
            must(max((line["step"] for line in log_of(folder)), default=0) < at, "the step was logged")
            stands(folder)
            must(go_on(folder).end()[0] == 0, "did not go on")
            equals_straight(folder)

        return run

    for where in ("weights", "gradients", "batch"):
        attempts(f"not a finite number, {where}", [(where, case(where))] * n(1, 20))


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# configs


def configs(n):
    """Nonsense in the settings: through `check`, as words of the command line and as config files; and some as real starts."""
    text = (ROOT / "train.py").read_text().partition("\nwith contextlib.redirect_stderr(")[0]  # all that stands before it looks at the command line
    script = types.ModuleType("train")
    script.__file__ = str(ROOT / "train.py")
    before = signal.getsignal(signal.SIGINT)
    exec(compile(text, "train.py", "exec"), script.__dict__)
    signal.signal(signal.SIGINT, before)
    kinds = {name: field.type for name, field in script.Config.__dataclass_fields__.items()}
    words = ("head auto cpu cuda float16 bfloat16 int8 linear cosine constant before mask last all norms mlp off stop vanilla meta 0,1 1,1 7 -1 , "
             "stairs docstrings ../data /dev/null").split() + ["", " ", "a\nb", "\0", "\ud800", "ä" * 300, "$(touch x)", "%s", "'"]  # fmt: skip
    wild = {
        int: [-(10**400), -(2**63), -1, 0, 1, 2, 3, 5, 7, 8, 12, 64, 1000, 65_537, 10**6, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 10**30, 10**400],
        float: [math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 5e-324, 1e-30, 0.01, 0.3, 0.5, 1.0, 1.5, 2, 10.0, 1e30, 1e308, 10**400],
        bool: [True, False], str: words,
    }  # fmt: skip
    other = [None, [], {}, 1j, b"x", (), "text", 3, 0.5, True, np.float32(1), np.zeros(1000), len]

    def names_a_setting(line):
        must(any(name in line for name in [*kinds, "wild.py, line", "setting"]), f"names no setting: {line}")

    def checked():
        chosen = {name: rng.choice(wild[kinds[name]] if rng.random() < 0.9 else other) for name in rng.sample(list(kinds), rng.randrange(1, 7))}
        if rng.random() < 0.1:
            chosen[rng.choice(("lrr", "", "out-dir", "class", "__doc__"))] = 1
        if rng.random() < 0.5:
            arguments = [f"--{name}={value if not isinstance(value, int) or abs(value) < 2**64 else hex(value)}" for name, value in chosen.items()]
        else:
            path = here / "wild.py"
            numpy_array = "import numpy as _np\n"
            written = {name: repr(value).replace("array", "_np.array").replace("np.float32", "_np.float32") for name, value in chosen.items()}
            written = {name: "len" if "built-in" in text else "_np.zeros(1000)" if "_np.array" in text else text for name, text in written.items()}
            written = {name: f"float('{text}')" if text in ("nan", "inf", "-inf") else text for name, text in written.items()}
            lines = [f"{name} = {'-' * (value < 0)}10**400" if type(value) is int and abs(value) == 10**400 else f"{name} = {written[name]}"
                     for name, value in chosen.items()]  # fmt: skip
            path.write_bytes((numpy_array + "\n".join(lines) + "\0" * (rng.random() < 0.02)).encode(errors="surrogatepass"))
            arguments = [str(path)]

        def both():
            config, _ = configurator.load(script.Config, arguments)
            script.check(config)

        _, line = outcome(both)
        if line:
            names_a_setting(line)
        return "refused" if line else "taken"

    attempts("random settings, checked", [("settings", checked)] * n(100, 2000))

    def started():
        small = {int: [-1, 0, 1, 2, 3, 5, 7, 8, 12, 64, 300, 10**9, 2**62], float: wild[float][:-1], bool: [True, False], str: words[:-9] + ["", "ä"]}
        kept_out = {"wandb", "wandb_project", "resume", "out_dir", "data_dir", "compile", "max_steps", "eval_steps", "batch_size", "expected"}
        chosen = {name: rng.choice(small[kinds[name]]) for name in rng.sample(sorted(set(kinds) - kept_out), rng.randrange(1, 4))}
        folder = fresh()
        arguments = [f"--{name}={value}" for name, value in ({"max_steps": 3, "warmup_steps": 1} | chosen).items()]
        run = train(folder, *arguments, before=lambda: resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, resource.RLIM_INFINITY)))
        try:
            code, out, err = run.end(60)
        except Hang:
            must("step " in run.printed[0].read_text(), f"neither a run nor a line: {arguments}")
            return "ran on"  # such a large model takes its time
        shutil.rmtree(folder, ignore_errors=True)
        if code == 0:
            return "ran"
        must(code in (1, 2) and err.startswith("error: ") and err.count("\n") == 1, f"{arguments}: exit code {code}: {err[:500]}")
        names_a_setting(err)
        return "refused"

    attempts("random settings, started", [("start", started)] * n(2, 50))


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# bits: damaged files


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def mutations(data, flips, cuts):
    """(name, function that makes it) of `data` with one bit flipped, or cut short."""
    bits, lengths = [rng.randrange(8 * len(data)) for _ in range(flips)], [rng.randrange(len(data)) for _ in range(cuts)]
    return [(f"bit {bit} flipped", lambda bit=bit: flipped(data, bit)) for bit in bits] + [
        (f"cut to {length} bytes", lambda length=length: data[:length]) for length in lengths]  # fmt: skip


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bits(n):
    folder, corpus = copied("damaged"), here / "damaged corpus"
    shutil.copytree(here / "data" / "docstrings", corpus)
    arrays = dict(np.load(folder / "spectra_000024.npz"))
    good_log, good_state = log_of(folder), runs.load_checkpoint(str(folder / "ckpt_000024.pt"))
    good_corpus = runs.load_corpus(str(corpus))
    tokens = good_corpus.train.tolist()

    def state():
        found = runs.load_checkpoint(str(folder / "ckpt_000024.pt"))
        must(same(found, good_state), "other numbers were read")

    def text():
        found = runs.load_corpus(str(corpus))
        must(found.train.tolist() == tokens and found.encoding._mergeable_ranks == good_corpus.encoding._mergeable_ranks, "another text was read")
        return "read with another value" if found.meta != good_corpus.meta else None

    def spectra():
        try:
            with np.load(folder / "spectra_000024.npz") as file:
                found = {name: file[name] for name in file}
        except Exception as error:  # nothing of ours reads these files: whoever does is told by numpy
            runs.fail(" ".join(str(error).split()) or type(error).__name__)
        must(all(name in arrays and np.array_equal(found[name], arrays[name]) for name in found), "other numbers were read")
        return "read less some arrays" if len(found) < len(arrays) else None  # the zip's directory is not under its checksums: it can lose some

    def settings():
        found = runs.read_json(str(folder / "config.json"))
        return "read with another value" if found != good_config else None

    def log():
        found = log_of(folder)
        return None if found == good_log else "recovered, less the last line" if found == good_log[:-1] else "read with another value"

    def exported():
        must(same(export_hf.weights_of(str(hub))[1], good_weights), "other numbers were read")

    good_config = runs.read_json(str(folder / "config.json"))
    hub = fresh("hub")
    must(Run("export_hf.py", here / "straight", hub).end()[0] == 0, "the run was not exported")
    good_weights = export_hf.weights_of(str(hub))[1]
    readers = {
        folder / "ckpt_000024.pt": state, corpus / "train.bin": text, corpus / "tokenizer.tiktoken": text, folder / "spectra_000024.npz": spectra,
        hub / "model.safetensors": exported, corpus / "meta.json": text, folder / "config.json": settings, folder / "log.jsonl": log,
    }  # fmt: skip
    usual = {path: reader() for path, reader in readers.items()}
    must(not any(usual.values()), "the undamaged files are not read as they are")
    memory = peak()
    for path, reader in readers.items():
        data = path.read_bytes()

        def damaged(make, path=path, reader=reader, data=data):
            content = make()
            path.write_bytes(content)
            before = peak()
            try:
                found, line = outcome(reader)
            finally:
                path.write_bytes(data)
            must(peak() <= max(before, 2 * memory), f"{peak() / memory:.1f} times the memory")
            cut = len(content) < len(data)
            must(not (cut and path.suffix in (".pt", ".bin", ".tiktoken", ".npz", ".safetensors")) or line, "what was cut short was taken for whole")
            return "refused" if line else found or "read as it was"

        rng.seed(f"{args.seed} {path.name}")
        cases = [(name, lambda make=make: damaged(make)) for name, make in mutations(data, n(40, 1000), n(10, 200))]
        attempts(f"damaged {path.name}", cases)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# fuzz: text for the evaluations

IOB2 = """# sent_id = 1
# text = Anna Berg lives in Oslo.
1	Anna	B-PER	-	me
2	Berg	I-PER	-	me
3	lives	O	-	me
4	in	O	-	me
5	Oslo	B-LOC	-	me
6	.	O	-	me

# sent_id = 2
# text = UNICEF works in Paris.
1	UNICEF	B-ORG	-	me
2	works	O	-	me
3	in	O	-	me
4	Paris	B-LOC	-	me
5	.	O	-	me

"""
STRANGE = ["\t", "\n", "\r", "\0", " ", "\u2028", "\ufeff", "\\ud800", "{", "}", "[", '"', "B-", "I-PER", "null", "1e999", "-", "9" * 50, "é"]


def spoiled(text):
    """`text` with a few random pieces taken out, doubled, or replaced by something strange."""
    for _ in range(rng.randrange(1, 5)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 1, 1, 2, 8, 60)))
        piece = rng.choice(("", text[start:end] * 2, rng.choice(STRANGE), rng.choice(STRANGE), chr(rng.randrange(0xD800))))
        text = text[:start] + piece + text[end:]
    data = bytearray(text.encode())
    if rng.random() < 0.2 and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def fuzz(n):
    encoding = runs.load_tokenizer(str(here / "straight"))
    config = eval_ner.Config(length=32)
    rows = [{"text": text, "label": label} for text, label in [("Anna Berg lives in Oslo.", "a"), ("UNICEF works in Paris.", "b")] * 4]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows)

    def iob2():
        path = here / "spoiled.iob2"
        path.write_bytes(spoiled(IOB2))

        def read():
            sentences = eval_ner.read_iob2(str(path))
            found = eval_ner.rows_of(encoding, sentences, config)
            must(sum(map(len, found.tags)) == sum(len(s.words) for s in sentences), "words were lost")
            return eval_ner.score(sentences, [s.tags for s in sentences])

        return "refused" if outcome(read)[1] else "read"

    def lines():
        path = here / "spoiled.jsonl"
        path.write_bytes(spoiled(jsonl))
        columns = rng.choice((["text"], ["text", "label"]))
        return "refused" if outcome(lambda: runs.read_files([str(path)], columns))[1] else "read"

    def tokenizer():
        """Spoiled, but with a checksum that matches: as somebody would who means harm."""
        folder = here / "spoiled tokenizer"
        folder.mkdir(exist_ok=True)
        content = spoiled((here / "straight" / "tokenizer.tiktoken").read_text())
        meta = runs.read_json(str(here / "straight" / "meta.json"))
        meta["sha256"]["tokenizer.tiktoken"] = hashlib.sha256(content).hexdigest()
        (folder / "tokenizer.tiktoken").write_bytes(content)
        (folder / "meta.json").write_text(json.dumps(meta))

        def use():
            found = runs.load_tokenizer(str(folder))
            found.decode(found.encode_ordinary("".join(map(chr, range(0x2000)))))

        return "refused" if outcome(use)[1] else "read"

    def strange_text():
        text = "".join(rng.choice([*STRANGE, "word", " the", chr(rng.randrange(0x110000)), " " * rng.choice((1, 10**4, 10**6))]) for _ in range(30))
        ids, line = outcome(lambda: encoding.encode_ordinary(text))
        must(not line and encoding.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "another text came back")

    attempts("spoiled IOB2 files", [("iob2", iob2)] * n(100, 2000))
    attempts("spoiled jsonl files", [("jsonl", lines)] * n(10, 300))
    attempts("spoiled tokenizers", [("tokenizer", tokenizer)] * n(30, 500))
    attempts("strange text", [("text", strange_text)] * n(5, 100))

    def evaluated(script, name, content, words):
        def case():
            folder, out = fresh("texts"), copied()
            folder.mkdir()
            for suffix in name:
                (folder / suffix).write_bytes(spoiled(content) if suffix == name[0] else content.encode())
            code, _, err = Run(script, out, *[word.format(folder) for word in words]).end()
            told = [line for line in err.splitlines() if line.startswith("error: ")]
            must(code == 0 or (code in (1, 2) and len(told) == 1), f"exit code {code}: {err[:500]}")
            shutil.rmtree(out)
            return "refused" if code else "scored"

        return [(script, case)] * n(1, 20)

    sentences = [f"da_ddt-ud-{split}.iob2" for split in ("train", "dev", "test")]
    words = ["--uner_dir={}", "--mode=head", "--head_epochs=1", "--test=da_ddt"]
    attempts("eval_ner.py on spoiled sentences", evaluated("eval_ner.py", sentences, IOB2, words))
    words = ["--data={}", "--shots=1", "--n_episodes=2"]
    attempts("eval_fewshot.py on spoiled examples", evaluated("eval_fewshot.py", ["t_train.jsonl", "t_test.jsonl"], jsonl, words))
    attempts("eval_lm.py on spoiled text", evaluated("eval_lm.py", ["a.jsonl", "b.jsonl"], jsonl, ["--data={}"]))


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# hostile: files made to harm


class Payload:
    """What pickle makes of it is a call of os.mkdir: it leaves a marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def hostile(n):
    """Each case damages a copy of the run or of the corpus; a script then reads it, and must end with one line, the marker not being there."""
    marker = here / "marker"
    newest, state = "ckpt_000024.pt", runs.load_checkpoint(str(here / "straight" / "ckpt_000024.pt"))

    def saved(folder, **changes):
        torch.save(state | changes, folder / newest)

    def payload(folder):
        saved(folder, model={"norm.weight": Payload(marker)})

    def payload_in_optimizer(folder):
        saved(folder, optimizer={"state": Payload(marker)})

    def bare_pickle(folder):
        (folder / newest).write_bytes(pickle.dumps(Payload(marker)))

    def legacy_pickle(folder):
        torch.save(state | {"model": Payload(marker)}, folder / newest, _use_new_zipfile_serialization=False)

    def bomb(folder):
        """A zip whose records unpack to a thousand times its size."""
        with zipfile.ZipFile(folder / newest) as old, zipfile.ZipFile(folder / "bomb", "w", zipfile.ZIP_DEFLATED) as new:
            for record in old.infolist():
                new.writestr(record.filename, old.read(record) if not record.filename.endswith("data/0") else bytes(10**8))
        os.replace(folder / "bomb", folder / newest)

    def wide(folder):
        saved(folder, config=state["config"] | {"d_model": 4 * 10**9})

    def deep(folder):
        saved(folder, config=state["config"] | {"n_layers": 10**12})

    def stretched(folder):
        """A weight of 4e18 numbers, all of them one number in the file."""
        big = torch.zeros(1).expand(2 * 10**9, 2 * 10**9)
        saved(folder, model=state["model"] | {"embedding.weight": big}, config=state["config"] | {"vocab_size": 2 * 10**9, "d_model": 2 * 10**9})

    def no_dict(folder):
        torch.save(["model", "head", "optimizer", "step", "progress", "config"], folder / newest)

    def texts_for_weights(folder):
        saved(folder, model={name: "text" for name in state["model"]})

    def meta(**changes):
        def change(folder):
            path = folder / "meta.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    def raw(name, content):
        return lambda folder: (folder / name).write_bytes(content)

    def pipe(name):
        def replace(folder):
            (folder / name).unlink()
            os.mkfifo(folder / name)

        return replace

    def tokenizer(ranks, **changes):
        content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)

        def replace(folder):
            (folder / "tokenizer.tiktoken").write_bytes(content)
            meta(sha256={"tokenizer.tiktoken": hashlib.sha256(content).hexdigest()}, **changes)(folder)

        return replace

    in_run = [payload, payload_in_optimizer, bare_pickle, legacy_pickle, bomb, wide, deep, stretched, no_dict, texts_for_weights, pipe(newest)]
    in_tokenizer = {
        "nested meta.json": raw("meta.json", b"[" * 10**6), "list in meta.json": raw("meta.json", b"[]"),
        "huge number in meta.json": raw("meta.json", b'{"vocab_size": ' + b"9" * 10**5 + b"}"),
        "pipe for meta.json": pipe("meta.json"), "pipe for the tokenizer": pipe("tokenizer.tiktoken"),
        "checksums lacking": meta(sha256={}), "checksums a list": meta(sha256=[1]),
        "special tokens collide": meta(special_tokens={"<|endoftext|>": 5}),
        "special tokens huge": meta(special_tokens={"<|endoftext|>": 998, "<|mask|>": 2**62}),
        "no pattern": meta(pattern=""), "broken pattern": meta(pattern="("), "pattern a list": meta(pattern=["a"]),
        "ranks twice": tokenizer([(bytes([i]), i) for i in range(256)] + [(b"ab", 255)]), "bytes lacking": tokenizer([(b"a", 0)]),
        "negative rank": tokenizer([(bytes([i]), -i) for i in range(256)]),
    }  # fmt: skip
    in_corpus = in_tokenizer | {
        "path outside as a file's name": meta(sha256={"../../../../etc/passwd": "0" * 64}), "splits lacking": meta(splits={}),
        "vocabulary of 10^12": meta(vocab_size=10**12), "vocabulary a text": meta(vocab_size="1024"), "vocabulary too small": meta(vocab_size=64),
        "sources outside": meta(sources=[{"name": "a", "val_range": [-5, 10**12]}]), "sources a number": meta(sources=3),
        "no bytes": meta(splits=json.loads((here / "data/docstrings/meta.json").read_text())["splits"] | {"val": {"tokens": 0, "bytes": 0}}),
        "tokens a text": meta(splits={"train": {"tokens": "5"}, "val": {"tokens": "5"}}),
    }  # fmt: skip

    def ends_in_a_line(script, damage, words=(), corpus=False):
        def case():
            folder = Path(shutil.copytree(here / "data" / "docstrings", fresh("data") / "docstrings")) if corpus else copied()
            damage(folder)
            if corpus:
                run = Run("train.py", *SETTINGS, f"--data_dir={folder.parent}", f"--out_dir={fresh()}")
            elif script == "train.py":
                run = train(folder, "--max_steps=30", resume=True)
            else:
                run = Run(script, folder, *words)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            run.line()
            must(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(2 * peak, 2**20), "twice the memory")
            must(not marker.exists(), "the payload ran")
            shutil.rmtree(folder)

        return case

    def every(cases):
        return cases if args.long else [cases[0], rng.choice(cases[1:])]

    cases = [(f"{damage.__name__}, sample.py", ends_in_a_line("sample.py", damage)) for damage in in_run]
    cases += [(f"{damage.__name__}, train.py", ends_in_a_line("train.py", damage)) for damage in in_run if damage not in (wide, deep)]  # not asked
    attempts("hostile checkpoints", every(cases))
    cases = [(f"{name}, sample.py", ends_in_a_line("sample.py", damage)) for name, damage in in_tokenizer.items()]
    attempts("hostile tokenizers in a run", every(cases))
    cases = [(f"{name}, train.py", ends_in_a_line("train.py", damage, corpus=True)) for name, damage in in_corpus.items()]
    attempts("hostile corpora", every(cases))
    lines = [b"[" * 10**6 + b"\n", b'{"step": 1, "kind": "lm"}\n', b"3\n"]
    contents = [("config.json", b"[" * 10**6), ("config.json", b"3"), ("config.json", b'{"lr": 1e999}'), *(("log.jsonl", line) for line in lines)]
    cases = [(f"{name}: {content[:9]}", ends_in_a_line("train.py", raw(name, content))) for name, content in contents]
    cases += [(f"pipe for {name}", ends_in_a_line("train.py", pipe(name))) for name in ("config.json", "log.jsonl")]
    attempts("hostile settings and logs", every(cases))

    def links():
        """Every name that a run writes to is a link to a file outside, or to one that is not there yet."""
        folder, outside = copied(), fresh("outside")
        outside.mkdir()
        for number, name in enumerate(("log.jsonl", "config.json", "meta.json", "tokenizer.tiktoken", "curves.png", "spectra_000024.npz", newest)):
            victim = outside / f"{number}"
            shutil.copyfile(folder / name, victim)
            (folder / name).unlink()
            (folder / name).symlink_to(victim)
        for name in ("log.jsonl", "config.json", "curves.png", "ckpt_000027.pt", "spectra_000027.npz", "eval_lm.json", "eval_lm.png", "phase.png"):
            (folder / f"{name}.tmp").symlink_to(outside / "new")
        for name in ("ckpt_000027.pt", "eval_lm.json", "eval_lm.png", "phase.png", "heat.png", "spectra.csv"):
            (folder / name).symlink_to(outside / "new")
        (folder / "ner").symlink_to(outside)
        before = {path.name: path.read_bytes() for path in outside.iterdir()}
        (folder / "ckpt_000027.pt").unlink()
        texts = fresh("texts")
        texts.mkdir()
        (texts / "a.txt").write_text("Some text to score. " * 20)
        for split in ("train", "dev", "test"):
            (texts / f"da_ddt-ud-{split}.iob2").write_text(IOB2)
        for begin, code in [
            (lambda: train(folder, "--max_steps=27", resume=True), 0),
            (lambda: Run("eval_lm.py", folder, f"--data={texts / 'a.txt'}"), 0),
            (lambda: Run("spectra.py", folder), 0),
            (lambda: Run("eval_ner.py", folder, f"--uner_dir={texts}", "--test=da_ddt", "--head_epochs=1", "--mode=head"), 2),
        ]:
            run = begin()
            found, _, err = run.end()
            must(found == code, f"exit code {found}: {err[:500]}")
            after = {path.name: path.read_bytes() for path in outside.iterdir()}
            must(after == before, f"{run.script} wrote outside: {[name for name in after if after[name] != before.get(name)]}")

    attempts("links out of a run folder", [("links", links)])

    def source():
        """No call in our files runs what it reads. Config files are run by runpy in configurator.py, and nothing else is."""
        for path in [*ROOT.glob("*.py"), ROOT / "data" / "prepare.py"]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    name, keys = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
                    must(name not in "eval exec compile os.system os.popen pickle.load pickle.loads marshal.loads".split(), f"{path.name}: {name}")
                    must(keys.get("shell", "False") == "False" and keys.get("allow_pickle", "False") == "False", f"{path.name}: {keys}")
                    must(name != "torch.load" or keys.get("weights_only") == "True", f"{path.name}: torch.load without weights_only=True")
                    must(not name.startswith("runpy.") or path.name == "configurator.py", f"{path.name}: {name}")

    attempts("calls that would run data", [("source", source)])


# ----------------------------------------------------------------------------------------------------------------------------------------------------


def main():
    begun = time.time()
    try:
        print(f"tests/soak.py, seed {args.seed}{', long' if args.long else ''}", flush=True)
        for begin in (lambda: prepared(here / "data"), lambda: train(here / "straight")):
            code, _, err = begin().end()
            must(code == 0, err)
        stands(here / "straight")
        for fault in FAULTS:
            if fault in args.only.split(","):
                globals()[fault](lambda short, long: long if args.long else short)
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        shutil.rmtree(here, ignore_errors=True)
    print(f"{len(lost)} not survived, {time.time() - begun:.0f} s")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
