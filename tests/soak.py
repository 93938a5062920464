"""Faults on purpose: what training, preparation and evaluation make of kills, full disks, damage and malice.

    python tests/soak.py                          # a little of each, in half a minute
    python tests/soak.py --long                   # for real: ten to fifteen minutes
    python tests/soak.py --only=kill,bits --seed=7

One line for each fault: how often it was tried, and how often survived. To survive is to end as the
undisturbed run did, bit for bit, or with one line. What did not is printed with its case, which the seed
repeats; the exit code is then 1. The processes are forked from this one: importing torch would take longest.
"""
import argparse
import gc
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import torch._dynamo  # noqa: E402, F401
from conftest import exit_code  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from model import Llama  # noqa: E402
from plumbing.checkpoint import checkpoints, load_model, sha256_of  # noqa: E402
from plumbing.corpus import load_corpus  # noqa: E402
from plumbing.run import read_log  # noqa: E402

STEPS = 12
SETTINGS = (  # val.bin is too short for episodes: most of the time would go there
    "--d_model=16 --n_layers=1 --n_heads=2 --n_kv_heads=1 --d_ff=16 --block_size=32 --batch_size=4 "
    f"--max_steps={STEPS} --warmup_steps=3 --eval_steps=2 --eval_interval=4 --ckpt_interval=2 "
    "--meta_ratio=0.5 --n_way=4 --k_shot=2 --q_query=2 --episode_len=16 --word_min_count=5 --inner_steps=2 "
    "--compile=False --dtype=float32").split()

parser = argparse.ArgumentParser()
parser.add_argument("--long", action="store_true", help="for real")
parser.add_argument("--only", default="kill,signals,disk,nan,hostile,bits", help="some of these faults")
parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
args = parser.parse_args()
rng = random.Random()  # each fault seeds it
here = Path(tempfile.mkdtemp(prefix="soak-"))  # with the corpus docstrings/ and the undisturbed run straight/
straight, last, marker = here / "straight", f"step_{STEPS:06d}", here / "marker"
numbers, losses = itertools.count(), []
if not args.long:  # to draw takes longer than to train
    Figure.savefig = lambda self, file, **_: file.write(bytes(50_000))

def attempts(fault, function, cases):
    """Call the function with the words of each case, a tuple; print its losses and its line."""
    notes = []
    for case in cases:
        try:
            notes.append(function(*case))
        except (Exception, SystemExit) as error:
            losses.append(fault)
            print(f"lost: {fault} {str(case)[:150]}: {type(error).__name__}: {error}", file=sys.stderr)
    counts = ", ".join(f"{notes.count(note)} {note}" for note in dict.fromkeys(notes) if note)
    print(f"{fault:36} tried {len(cases):4}  survived {len(notes):4}  {counts}".rstrip(), flush=True)

def n(short, long):
    return long if args.long else short

# --------------------------------------------------------------------------------------------------
# Processes

def start(script, *words, before=lambda: None):
    """Begin `python script words...` in a process of its own, after a call of `before`; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(300)  # ends a hang
        for number in (1, 2):
            os.dup2(os.open(here / f"{os.getpid()}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, sys.path[0] = [script, *map(str, words)], str((ROOT / script).parent)
        sys.path.insert(1, str(ROOT))
        before()
        code = exit_code(script)
        sys.stdout.flush()
    finally:
        os._exit(code)

def printed(pid, number):
    path = here / f"{pid}.{number}"
    return path.read_text(errors="replace") if path.exists() else ""

def end(pid):
    """How a process ended: code (or minus the signal), out, err, and its memory in MiB at its peak."""
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    out, err = (printed(pid, number) for number in (1, 2))
    assert "Traceback" not in err and code != -signal.SIGALRM, f"exit code {code}: {err[-1500:]}"
    return SimpleNamespace(code=code, out=out, err=err, memory=usage.ru_maxrss / 2**10)

def ends(well, done):
    """A program must have ended well, or else with one line."""
    line = done.err.startswith("error: ") and done.err.count("\n") == 1 and done.code in (1, 2)
    assert done.code == 0 if well else line, f"exit code {done.code}: {done.err[:1500]}"
    return done

def train(folder, *words, **options):
    """Begin a run in a folder, or continue the one that is there."""
    words = f"--resume={(folder / 'config.json').exists()}", *words
    return start("train.py", *SETTINGS, f"--data_dir={here}", f"--out_dir={folder}", *words, **options)

def prepare(place, **options):
    return start("data/prepare.py", "docstrings", "--packages=argparse,json,email", f"--data_dir={place}",
                 "--vocab_size=400", "--val_fraction=0.1", "--workers=1", **options)

# --------------------------------------------------------------------------------------------------
# What must hold afterwards

def fresh():
    return here / f"run{next(numbers)}"

def log_of(folder):
    """The log without what differs from run to run, and the steps in it."""
    log = [{key: x for key, x in line.items() if key not in ("seconds", "tokens_per_second")}
           for line in read_log(folder)]
    return log, [line["step"] for line in log if line["kind"] != "eval"]

def same_weights(folder):
    """Weights, head, moments of AdamW and spectra are those of the undisturbed run, byte for byte."""
    for name in ("model.safetensors", "head.safetensors", "optimizer.safetensors", "spectra.npz"):
        one, other = (run / last / name for run in (folder, straight))
        assert one.read_bytes() == other.read_bytes(), f"another {name}"

def disturbed(times, disturb, *words):
    """A run that disturb(folder) disturbs is whole, and continues to be the undisturbed one; a note."""
    folder = fresh()
    for _ in range(times):
        note = disturb(folder, *words) or ("in a checkpoint" if list(folder.glob("*.tmp")) else "")
        if folder.exists():
            stands(folder)
    ends(True, end(train(folder)))
    same_weights(folder)
    assert log_of(folder) == log_of(straight), "another log"
    assert set(checkpoints(folder)) >= set(checkpoints(straight)) and not list(folder.glob("*.tmp"))
    shutil.rmtree(folder)
    return note

def stands(folder):
    """Whatever happened to a run, what is in its folder is whole and finite."""
    for number, path in enumerate(reversed(checkpoints(folder).values())):
        loaded = load_model(path)
        for name, sha256 in loaded.state["sha256"].items():
            pruned = number >= 2 and name == "optimizer.safetensors"
            assert pruned or sha256_of(f"{path}/{name}") == sha256, f"{path}/{name} is torn"
        weights = [*loaded.model.state_dict().values(), *loaded.head.values()]
        assert all(p.isfinite().all() for p in weights), f"{path} is not finite"
    log, steps = log_of(folder)
    assert steps == list(range(1, len(steps) + 1)), f"the log has the steps {steps}"
    assert not any(word in json.dumps(log) for word in ("NaN", "Infinity")), "the log is not finite"

# --------------------------------------------------------------------------------------------------
# Kills, signals, full disks, numbers that are not finite. Afterwards a run continues as if nothing was.

def kill_at(folder, count):
    """SIGKILL just before this process opens, renames or removes the count-th file in `folder`."""
    def look(event, details):
        nonlocal count
        touches = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")
        count -= touches and str(details[0]).startswith(f"{folder}/")
        if count == 0:
            signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(look)

def kill(usual):
    def at_any_time(folder):
        pid = train(folder)
        time.sleep(rng.uniform(0, usual.duration))
        os.kill(pid, signal.SIGKILL)
        end(pid)

    def at_a_file(folder):
        count = rng.randrange(1, 190)
        end(train(folder, before=lambda: kill_at(folder, count)))

    def preparation():
        def hook():
            time.time = lambda: next(ticks)  # progress is saved each half minute: now after each document
            kill_at(place, count)

        place, count, ticks = fresh(), rng.randrange(1, 100), itertools.count(0, 31)
        end(prepare(place, before=hook))
        if (place / "docstrings" / "meta.json").exists():
            load_corpus(place / "docstrings")
        ends(True, end(prepare(place)))
        one, other = ({path.name: path.read_bytes() for path in (folder / "docstrings").iterdir()}
                      for folder in (place, here))
        assert one == other, "another corpus"

    attempts("kill -9 at any time", disturbed, [(n(1, 2), at_any_time)] * n(1, 40))
    attempts("kill -9 at any file", disturbed, [(n(1, 2), at_a_file)] * n(1, 40))
    attempts("kill -9, preparing a corpus", preparation, [()] * n(1, 30))

def signals(usual):
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    codes = (0, *(128 + kind for kind in kinds), *(-kind for kind in kinds))

    def strike(folder):
        pid = train(folder)
        while not printed(pid, 1):
            time.sleep(0.001)  # until its first word it may be Python that answers
        time.sleep(rng.uniform(0, usual.duration / 3))
        for _ in range(rng.randrange(1, 3)):
            os.kill(pid, rng.choice(kinds))
            time.sleep(rng.uniform(0, 0.05))
        done = end(pid)
        early = (done.code, done.err) == (1, "\nstopped\n")  # Ctrl-C before the loop
        assert early or done.code in codes and not done.err, f"exit code {done.code}: {done.err}"
        if done.code > 0 and "saving after this step" in done.out:
            assert max(checkpoints(folder)) == log_of(folder)[1][-1], "the last step was not saved"
        return "left at once" if early or done.code < 0 else "saved" if done.code else "had ended"

    attempts("SIGINT, SIGTERM, SIGHUP, also twice", disturbed, [(n(1, 2), strike)] * n(1, 40))

def disk(usual):
    """What is written beyond a limit on the size of files fails, as on a full disk."""
    def full(folder, begin, low, high, *words):
        limit = (rng.randrange(low, high), resource.RLIM_INFINITY)
        done = end(begin(folder, *words, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)))
        assert "is untouched" in ends(False, done).err, done.err

    def figure(folder, low, high):
        shutil.copytree(straight, folder)
        full(folder, train, low, high)
        assert (folder / "curves.png").read_bytes() == (straight / "curves.png").read_bytes()

    def corpus(low, high):
        place = fresh()
        full(place, prepare, low, high)
        assert not (place / "docstrings" / "meta.json").exists(), "half a corpus has a meta.json"

    log, curves, moments = ((straight / name).stat().st_size for name in (
        "log.jsonl", "curves.png", f"{last}/optimizer.safetensors"))
    attempts("full disk, checkpoint", disturbed, [(1, full, train, log, moments)] * n(1, 30))
    no_checkpoints = f"--ckpt_interval={STEPS}"  # nothing else is written before the end, but for config.json
    attempts("full disk, log", disturbed, [(1, full, train, 2500, log, no_checkpoints)] * n(1, 20))
    attempts("full disk, figure", disturbed, [(1, figure, log, curves)] * n(1, 10))
    attempts("full disk, preparing a corpus", corpus, [(10, 50_000)] * n(1, 20))

def nan(usual):
    """Hooks around functions that train.py calls put in a number that is not finite."""
    def infect(folder, where):
        at, spot, bad = rng.randint(1, STEPS), rng.randrange(10**6), rng.choice((math.nan, math.inf))
        steps, clip, features = [], torch.nn.utils.clip_grad_norm_, Llama.features

        def spoiled_clip(parameters, *rest):
            steps.append(1)
            if len(steps) == at and where != "batch":
                with_grad = [p for p in parameters if p.grad is not None]
                p = with_grad[spot % 2 * spot % len(with_grad)]  # often of an embedding that is not read
                (p.data if where == "weights" else p.grad).view(-1)[spot % p.numel()] = bad
            return clip(parameters, *rest)

        def spoiled_features(self, idx):
            return features(self, idx) + (bad if len(steps) == at - 1 and where == "batch" else 0.0)

        def hook():
            torch.nn.utils.clip_grad_norm_, Llama.features = spoiled_clip, spoiled_features

        line = ends(False, end(train(folder, before=hook))).err  # error: step 7: ...
        assert at - 1 <= int(line.split()[2][:-1]) <= at + 2, f"step {at}: {line}"  # a checkpoint is every 2

    for where in rng.sample(("weights", "gradients", "batch"), n(1, 3)):
        attempts(f"not a finite number in {where}", disturbed, [(1, infect, where)] * n(1, 20))

# --------------------------------------------------------------------------------------------------
# Malice and damage: a file of a run, of its newest checkpoint or of its corpus becomes another

class Payload:
    """What unpickling makes of it is a call of os.mkdir: it leaves a marker."""
    def __reduce__(self):
        return os.mkdir, (str(marker),)

def tensors(header, size=None):
    """A .safetensors file with a header that may lie about its own size, and four bytes."""
    return (len(header) if size is None else size).to_bytes(8, "little") + header + bytes(4)

PICKLE, NESTED, HUGE = pickle.dumps(Payload()), b"[" * 10**6, b'{"step": ' + b"9" * 10**5 + b"}"
LIE = b'{"model.norm.weight":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
LIES = [PICKLE, *(tensors(LIE % sizes) for sizes in ((10**12, 4 * 10**12), (10**12, 4), (2**62, 4))),
        tensors(b"{}", 2**62), tensors(NESTED)]
STEP, INDEX = f"step_{STEPS - 2:06d}", "model.safetensors.index.json"
KEYS = "num_hidden_layers hidden_size intermediate_size vocab_size max_position_embeddings".split()
HOSTILE = {  # what a file becomes, or what changes in its JSON
    "model.safetensors": LIES, "head.safetensors": LIES, "optimizer.safetensors": LIES,
    "pytorch_model.bin": [PICKLE],  # instead of model.safetensors, as the index
    INDEX: [NESTED, b'{"weight_map": {"norm": "pytorch_model.bin"}}',
            json.dumps({"weight_map": {"norm": f"../../straight/{last}/model.safetensors"}}).encode()],
    "config.json": [NESTED, b"[]", HUGE, {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}},
                    {"num_attention_heads": 0}, *({key: x} for key in KEYS for x in (-1, 10**6, 10**12))],
    "tokenizer.json": [NESTED, b"[]", {"model": {"type": "BPE", "merges": [], "vocab": {"a": 2**26}}}],
    "state.json": [NESTED, b"[]", HUGE, {"sha256": [1]}, {"settings": [1]}, {"step": "2"}, {"step": 2},
                   {"step": 10**400}, {"progress": []}, {"scaler": [1]}],
    "../config.json": [NESTED, b"3", {"d_model": 10**400}],
    "../log.jsonl": [NESTED + b"\n", b"3\n", HUGE + b"\n", b'{"step": 1, "kind": "lm"}\n'],
    "../docstrings/meta.json": [NESTED, b"[]", HUGE, *({key: x} for key in ("vocab_size", "sha256", "splits")
                                                       for x in (10**12, "448", [1], {}))],
    "../docstrings/train.bin": [PICKLE], "../docstrings/tokenizer.tiktoken": [PICKLE],
}

def spoiled(name, content, usual, signed):
    """A run continues with a changed file, signed or not; a model without state.json only writes."""
    folder = shutil.copytree(here / "whole", fresh())
    path, state = folder / STEP / name, folder / STEP / "state.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_bytes()) | content).encode()
    (folder / STEP / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    (folder / STEP / "pytorch_model.bin").write_bytes(PICKLE)
    path.write_bytes(content)
    if name in ("pytorch_model.bin", INDEX):
        (folder / STEP / "model.safetensors").unlink()
        state.unlink()
        done = end(start("sample.py", folder / STEP))
        assert done.code, "it was read"
    else:
        if signed and path.parent == state.parent and path != state:
            signature = json.loads(state.read_bytes())
            signature["sha256"][name] = sha256_of(path)
            state.write_text(json.dumps(signature))
        done = end(train(folder, f"--data_dir={folder}"))
    if ends(done.code == 0, done).code == 0:
        same_weights(folder)
    assert done.memory < usual.memory + 100 and "emory" not in done.err, f"{done.memory:.0f} MiB: {done.err}"
    assert not marker.exists(), "code ran"
    shutil.rmtree(folder)
    return "refused" if done.code else "read"

def hostile(usual):
    cases = [(name, content, usual, True) for name, contents in HOSTILE.items() for content in contents]
    attempts("hostile files", spoiled, cases if args.long else rng.sample(cases, 5))

def bits(usual):
    def damaged(name, cut):
        content = bytearray((here / "whole" / STEP / name).read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        return spoiled(name, bytes(content[:place] if cut else content), usual, False)

    names = [name for name in HOSTILE if name not in ("pytorch_model.bin", INDEX, "../docstrings/meta.json")]
    cases = list(itertools.product(names, [False] * n(1, 40) + [True] * n(1, 10)))
    attempts("flipped bits and cut files", damaged, cases if args.long else rng.sample(cases, 5))

# --------------------------------------------------------------------------------------------------

def main():
    begun = time.time()
    gc.freeze()  # for the processes forked from this one
    ends(True, end(prepare(here)))
    before = time.time()
    usual = ends(True, end(train(straight)))
    usual.duration = time.time() - before
    stands(straight)
    shutil.copytree(straight, here / "whole")
    shutil.rmtree(here / "whole" / last)  # so that there is something to train
    shutil.copytree(here / "docstrings", here / "whole" / "docstrings")
    for fault in args.only.split(","):
        rng.seed(f"{args.seed} {fault}")
        globals()[fault](usual)
    print(f"{len(losses)} not survived, {time.time() - begun:.0f} s")
    sys.exit(bool(losses))

if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(here, ignore_errors=True)
