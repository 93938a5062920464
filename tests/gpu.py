"""Is it right on this GPU, and how fast? One command, a table, and exit code 1 where anything failed.

    python tests/gpu.py               # all of it, in at most eight minutes
    python tests/gpu.py train sizes   # or some of: PARTS at the end of the file

Each part is a process of its own with a time limit, and all end within LIMIT seconds. The table goes to
gpu.json too. Text comes from data/docstrings, which is built if it is missing; no test of pytest's asks for a
GPU.
"""
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/gpu_py_inductor")
os.environ.setdefault("OMP_NUM_THREADS", "2")  # side by side, and each with all cores, parts stand in line
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # else as many as cores, in each of six processes
if tuple(map(int, version("torch").split(".")[:2])) < (2, 13):  # takes bfloat16's code for float16 too
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import maml  # noqa: E402
import model as llama  # noqa: E402
from plumbing.machine import choose_device  # noqa: E402

GPU = choose_device("cuda")
BEGUN = float(os.environ.setdefault("GPU_PY_BEGUN", str(time.time())))
FOLDER = Path(os.environ.get("GPU_PY_FOLDER") or tempfile.mkdtemp())  # the parts share it

def row(what, passed, text):
    """One row of the table."""
    print(f"{time.time() - BEGUN:4.0f} s  {'ok    ' if passed else 'FAILED'}  {what:32}  {text}", flush=True)
    with open(FOLDER / "rows.jsonl", "a") as rows:
        rows.write(json.dumps({"what": what, "passed": bool(passed), "text": text}) + "\n")

def error(values, exact):
    """Relative error of some tensors, in the norm over all of them."""
    a, b = (torch.cat([x.double().cpu().flatten() for x in tensors]) for tensors in (values, exact))
    return ((a - b).norm() / b.norm()).item()

def in_float64():
    """Makes all of model.py compute in float64 once its weights are."""
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)

def per_call(function, calls=10):
    """Median seconds of a call, by the GPU's clock."""
    seconds = []
    for _ in range(calls + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[3:])

# --------------------------------------------------------------------------------------------------
# The card, and the mathematics on it

def peak():
    """FLOPs a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / per_call(lambda: a @ b)

def machine():
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True).stdout.split() or ["unknown"]
    of = torch.cuda.get_device_properties(GPU)
    row("card", True, f"{torch.cuda.device_count()} x {of.name}, capability {of.major}.{of.minor}, "
        f"{of.total_memory / 2**30:.0f} GiB, driver {driver[0]}, torch {torch.__version__}")
    a, b = (torch.empty(2**30, device=GPU, dtype=torch.uint8) for _ in range(2))
    row("limits", True, f"{peak() / 1e12:.0f} TFLOP/s of bfloat16 products, "
        f"{2**31 / per_call(lambda: b.copy_(a)) / 1e12:.2f} TB/s of copies")

def attention():
    """12 query heads over 4: output and gradients against float64, spelled out."""
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)):
        errors, kernels = {}, set()
        for width in (8, 32, 64, 128):
            for length in (16, 128, 512):
                q, k, v = (torch.randn(4, heads, length, width, device=GPU, dtype=dtype, requires_grad=True)
                           for heads in (12, 4, 4))
                exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    y = llama.attend(q, k, v)
                kernels |= {e.key for e in seen.key_averages() if "_scaled_dot_product_" in e.key}
                wanted = llama.causal_attention(*exact)
                g = torch.randn_like(y)
                results = y, *torch.autograd.grad(y, (q, k, v), g)
                wanted = wanted, *torch.autograd.grad(wanted, exact, g.double())
                errors[width, length] = error(results, wanted)
        (width, length), worst = max(errors.items(), key=lambda item: item[1])
        names = ", ".join(sorted(k.removeprefix("aten::_scaled_dot_product_") for k in kernels))
        row(f"attention {str(dtype)[6:]}", worst < limit and "math" not in names and names,
            f"error {worst:.1e} at most (heads of {width}, {length} tokens); {names}")

def model(d_model):
    """Two layers of a width, compiled and eager, against float64: loss and gradients."""
    torch.manual_seed(0)
    plain = llama.Llama(llama.ModelConfig(d_model, 2, d_ff=4 * d_model, vocab_size=4096)).to(GPU)
    idx = torch.randint(4096, (8, 129), device=GPU)

    def loss_and_gradients(model, dtype=torch.float32):
        with torch.autocast("cuda", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            loss = model(idx[:, :-1], idx[:, 1:])
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    with in_float64():
        exact = loss_and_gradients(copy.deepcopy(plain).double())
    compiled = copy.deepcopy(plain)
    llama.compile_parts(compiled)
    dtypes = [torch.float32, torch.float16]
    dtypes += [torch.bfloat16] * torch.cuda.is_bf16_supported(including_emulation=False)
    errors = {f"{how} {str(dtype)[6:]}": error(loss_and_gradients(one, dtype), exact)
              for how, one in (("eager", plain), ("compiled", compiled)) for dtype in dtypes}
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    fine = all(value < (1e-4 if "float32" in name else 3e-2) for name, value in errors.items())
    text = [f"{name} {value:.1e}" for name, value in errors.items()]
    row(f"model {d_model}", fine and graphs == 2 * len(dtypes) and not breaks,
        ", ".join(text) + f"; {graphs} graphs, {breaks} breaks")

def parameters():
    """Meta-gradients in float64, GPU against CPU: the head alone, and each target, at both orders."""
    torch.manual_seed(0)
    net = llama.Llama(llama.ModelConfig(24, 2, n_heads=4, n_kv_heads=2, d_ff=32, vocab_size=64)).double()
    head = {name: p.double() + 0.1 * torch.randn(p.shape, dtype=torch.float64)
            for name, p in maml.init_head(24, 4, layers=2, hidden=8).items()}
    labels = torch.arange(8)[None] % 4
    episode = {"support_labels": labels, "query_labels": labels}
    for part in ("support", "query"):
        episode |= {part: torch.randint(64, (1, 8, 12)), f"{part}_pos": torch.full((1, 8), 11)}

    def gradients(target, first_order, device):
        reader, adapting = maml.inner_target(copy.deepcopy(net).to(device), target)
        own = {name: p.to(device).requires_grad_() for name, p in head.items()}
        e = {name: tensor.to(device) for name, tensor in episode.items()}
        with sdpa_kernel(SDPBackend.MATH), in_float64():
            loss, _ = maml.episode_loss_through_model(
                reader, adapting, own, e, head_lr=dict.fromkeys(own, 0.5), target_lr=0.5, steps=3,
                first_order=first_order, autocast=nullcontext())
            found = torch.autograd.grad(loss, [*reader.parameters(), *own.values()], allow_unused=True)
        return [loss.detach(), *(g for g in found if g is not None)]

    for target in maml.TARGETS:
        for order in ("first", "second"):
            on_gpu, on_cpu = (gradients(target, order == "first", device) for device in (GPU, "cpu"))
            row(f"maml {target}, {order} order", error(on_gpu, on_cpu) < 1e-10,
                f"error {error(on_gpu, on_cpu):.1e}")

# --------------------------------------------------------------------------------------------------
# Parts that run train.py

PROGRAM = f"""import sys, runpy
sys.path.insert(0, {str(ROOT)!r})
import torch
from plumbing.run import Run
%s
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""
# Steps and a validation loss alone, and the peak memory.
BARE = """
import smlmt, spectra
from plumbing.machine import peak_memory
spectra.measure, spectra.summary = lambda *_, **o: {}, lambda measured: {}
smlmt.Pools.problem = lambda *_, **o: "left out"
def report(run, autocast):
    run.print(f"peak {peak_memory(run.device):.1f} GiB, micro-batches {run.micro}")
Run.save, Run.report = lambda *_: None, report"""
SMALL = """config/train_11m.py --dataset=docstrings --block_size=128 --batch_size=16 --n_way=16
    --episode_len=16 --episodes_per_step=4 --max_steps=8 --warmup_steps=1 --lr=1e-3
    --eval_interval=1000 --eval_steps=2 --ckpt_interval=1000""".split()

def begin(name, *words, patch=BARE, **environment):
    """Start train.py with a patch before it; its run folder is FOLDER/name."""
    script = FOLDER / f"train_{name}.py"
    script.write_text(PROGRAM % patch)
    command = [sys.executable, str(script), *words, f"--out_dir={FOLDER / name}"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def finish(name, process):
    """Wait for a run: (its log, what it printed)."""
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}: {(errors or output)[-1500:]}")
    return log_of(name), output

def run(name, *words, **options):
    return finish(name, begin(name, *words, **options))

def log_of(name):
    return [json.loads(line) for line in (FOLDER / name / "log.jsonl").read_text().splitlines()]

def losses(log):
    """Those of the steps, and of evaluations."""
    names = {"lm": "lm_loss", "meta": "meta_loss", "eval": "val_loss"}
    return [line[names[line["kind"]]] for line in log]

def apart(a, b):
    """Largest relative difference of two lists of losses."""
    return max(abs(x - y) / abs(y) for x, y in zip(losses(a), losses(b), strict=True))

PLAIN = [*SMALL, "--compile=False", "--dtype=float32"]
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # products in full float32

def train():
    """Steps of both kinds in each precision, beside a CPU's in float32."""
    ways = {"bfloat16": ["--dtype=bfloat16", "--compile=False"], "bfloat16_compiled": ["--dtype=bfloat16"],
            "float16_compiled": ["--dtype=float16"]}
    running = {"cpu": begin("cpu", *PLAIN, "--device=cpu"), "float32": begin("float32", *PLAIN, **EXACT),
               **{name: begin(name, *SMALL, *words) for name, words in ways.items()}}
    on_cpu, _ = finish("cpu", running.pop("cpu"))
    for name, process in running.items():
        log, output = finish(name, process)
        skipped = sum("skipped" in line for line in log)
        steps = 1 if skipped else len(log)  # a skipped step leaves the weights behind
        away = apart(log[:steps], on_cpu[:steps])
        fine = away < (1e-5 if name == "float32" else 3e-3)
        fine = fine and ("not compiled" not in output or "compiled" not in name)
        row(f"train {name}", fine, f"{away:.1e} from float32 on the CPU, {skipped} steps skipped")

def second():
    """Steps in which attention adapts, differentiated through the inner loop."""
    words = [*PLAIN, "--target=attention", "--second_order=True", "--meta_ratio=1", "--max_steps=3",
             "--target_lr=0.01", "--episodes_per_step=1", "--inner_steps=3"]
    running = {"second_cpu": begin("second_cpu", *words, "--device=cpu"),
               "second_gpu": begin("second_gpu", *words, **EXACT)}
    on_cpu, on_gpu = (finish(name, process)[0] for name, process in running.items())
    row("train attention, second order", apart(on_gpu, on_cpu) < 1e-4,
        f"{apart(on_gpu, on_cpu):.1e} from the CPU")

def resume():
    """kill -9, --resume=True, and the scripts that read a run."""
    words = [*SMALL, "--max_steps=60", "--ckpt_interval=20"]
    uninterrupted = begin("whole", *words, patch="")
    process = begin("killed", *words, patch="")
    for line in process.stdout:
        if line.startswith("step     47/"):
            process.kill()
    process.wait()
    resumed, output = run("killed", *words, "--resume=True", patch="")
    whole, _ = finish("whole", uninterrupted)
    row("kill -9 and resume", apart(resumed, whole) < 2e-2 and "after step 40" in output,
        f"{apart(resumed, whole):.1e} from the whole run, equal: {losses(resumed) == losses(whole)}")
    pipes = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    scripts = {script: subprocess.Popen([sys.executable, script, FOLDER / "whole", *words], **pipes)
               for script, *words in (["spectra.py"], ["sample.py"], ["eval_fewshot.py", "--n_episodes=5"])}
    for script, process in scripts.items():
        _, errors = process.communicate()
        row(script, not process.returncode, errors[-300:] if process.returncode else "reads the run")

def large():
    """A data folder with a corpus `large`: docstrings, with the 50,304 ids of the paper's vocabulary."""
    folder = FOLDER / "large"
    if not folder.exists():
        folder.mkdir()
        for path in (ROOT / "data/docstrings").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"vocab_size": 50304}))
    return FOLDER

def medians(log, kind):
    """Median seconds and FLOPs of a step of one kind, but of the first four steps, which compile."""
    seconds = [(b["seconds"] - a["seconds"], b["flops"] - a["flops"])
               for a, b in zip(log, log[1:], strict=False) if b["kind"] == kind and b["step"] > 4]
    return statistics.median(s for s, _ in seconds), seconds[-1][1]

# Of these ten steps, by seed 3, three of each kind come after the fourth, when all is compiled.
TEN = """--seed=3 --max_steps=10 --warmup_steps=2 --lr=3e-4 --eval_interval=1000 --eval_steps=1""".split()
TURNS = BARE + """
import fcntl, os, time
from pathlib import Path
log_step = Run.log_step
torch.cuda.mem_get_info = lambda: (torch.cuda.get_device_properties(0).total_memory - 2**30, 0)  # as if alone
def in_turn(run, step, *numbers):  # one of two has the GPU to itself, after both have compiled
    log_step(run, step, *numbers)
    if step == 4:
        run.flush_log()
        folder = Path(run.config.out_dir).parent
        (folder / run.config.out_dir / "compiled").touch()
        for _ in range(1500):
            if not all((folder / name / "compiled").exists() for name in os.environ["PAIR"].split()):
                time.sleep(0.1)
        run.lock = open(folder / "turn", "w")
        fcntl.flock(run.lock, fcntl.LOCK_EX)
        run.clock = time.perf_counter()
Run.log_step = in_turn"""

def sizes():
    """The shipped configs as they are. Two compile side by side, since each takes half of the memory; each is
    timed alone."""
    flops, folder = peak(), large()
    torch.cuda.empty_cache()
    for pair in (("11m", "570m"), ("65m", "181m")):
        running = {size: begin(size, f"config/train_{size}.py", "--dataset=large", f"--data_dir={folder}",
                               *TEN, patch=TURNS, PAIR=" ".join(pair)) for size in pair}
        for size, process in running.items():
            log, output = finish(size, process)
            text = [re.search("peak .*", output)[0]]
            for kind in ("lm", "meta"):
                seconds, work = medians(log, kind)
                text.append(f"{kind} {1e3 * seconds:.0f} ms, {work / seconds / flops:.0%} of the peak")
            row(size, "ran out" not in output, "; ".join(text))

PROFILE = BARE + """
import json, time
from torch.profiler import ProfilerActivity, profile
ten_steps = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
log_step, events = Run.log_step, []
def watched(run, step, *numbers):
    log_step(run, step, *numbers)
    events.append(torch.cuda.Event(enable_timing=True))
    events[-1].record()
    if step == 60:
        torch.cuda.synchronize()
        ten_steps.start()
        run.began = time.perf_counter()
    if step == 70:
        torch.cuda.synchronize()
        wall = time.perf_counter() - run.began
        ten_steps.stop()
        kinds = ten_steps.key_averages()
        waits = {kind.key: kind.count / 10 for kind in kinds
                 if "ynchronize" in kind.key or kind.key in ("cudaMemcpy", "aten::item")}
        kernels = {kind.key: kind.self_device_time_total / 1e6 for kind in kinds
                   if kind.device_type.name == "CUDA" and not kind.is_user_annotation}
        ends = [begin.elapsed_time(end) / 1e3 for begin, end in zip(events, events[1:])]
        print("PROFILE", json.dumps([waits, kernels, ends, wall]))
Run.log_step = watched"""

def profiled():
    """Waits in a step, how busy the GPU is, and logged seconds beside the GPU's own clock."""
    log, output = run("11m_profiled", "config/train_11m.py", "--dataset=large", f"--data_dir={large()}", *TEN,
                      "--max_steps=72", patch=PROFILE)
    waits, kernels, ends, wall = json.loads(re.search("PROFILE (.*)", output)[1])
    seconds = {line["step"]: line["seconds"] for line in log if line["kind"] != "eval"}
    ratios = [(seconds[step + 1] - seconds[step]) / ends[step - 1] for step in range(30, 57)]
    ratio = statistics.median(ratios)
    row("waits a step", kernels and 0.5 < sum(waits.values()) < 3, str(waits))  # one is of the step's numbers
    row("GPU busy", True, f"{sum(kernels.values()) / wall:.0%} of ten steps of 11m, with the profiler on")
    longest = sorted(kernels, key=kernels.get)[:-9:-1]
    row("longest kernels", True, ", ".join(f"{name[:60]} {kernels[name] / wall:.0%}" for name in longest))
    row("logged seconds", 0.95 < ratio < 1.05, f"{ratio:.3f} of those between events")

TIMED = """
import time, spectra
def timed(name, function):
    def call(*inputs, **options):
        start = time.perf_counter()
        result = function(*inputs, **options)
        print(f"TIME {name} {time.perf_counter() - start:.1f} s", flush=True)
        return result
    return call
import smlmt
smlmt.Pools.problem = lambda *_, **o: "left out"
spectra.measure, Run.save = timed("spectra", spectra.measure), timed("save", Run.save)"""

def memory():
    """What happens where memory is short; how long the largest checkpoint takes."""
    words = ["--dataset=large", f"--data_dir={large()}", *TEN, "--max_steps=3"]
    total = torch.cuda.get_device_properties(GPU).total_memory / 2**30
    limit = "\ntorch.cuda.set_per_process_memory_fraction({})"
    largest = begin("570m_saved", "config/train_570m.py", *words, "--max_steps=1", "--warmup_steps=1",
                    "--compile=False", patch=TIMED, OMP_NUM_THREADS="8")
    process = begin("shorter", "config/train_11m.py", *words, "--compile=False",
                    patch=BARE + limit.format(0.2 / total))
    _, output = run("short", "config/train_11m.py", "--micro_batch_size=64", *words, "--compile=False",
                    patch=BARE + limit.format(5 / total))
    said = re.findall("memory  ran out.*", output)
    row("memory of 5 GiB", said, "; ".join([*said, re.search("peak .*", output)[0]]))
    _, errors = process.communicate()
    row("memory of 0.2 GiB", process.returncode == 1 and "Traceback" not in errors, errors.strip()[-300:])
    _, output = finish("570m_saved", largest)
    row("checkpoint of 570m", (FOLDER / "570m_saved/step_000001").exists(),
        ", ".join(re.findall("TIME (.*)", output)))

ONE = """
class One(int):  # one process that speaks to the others, though there are none
    __gt__ = lambda self, other: other == 1
import plumbing.run
plumbing.run.int = lambda text: One(text) if text == "1" else int(text)
"""

def nccl():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def process(name, rank, world, patch=BARE):  # not by torchrun, whose workers outlive it
        return begin(name, *PLAIN, patch=patch, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank),
                     LOCAL_RANK=str(rank), WORLD_SIZE=str(world), **EXACT)
    running = {"alone": begin("alone", *PLAIN, **EXACT), "one": process("one", 0, 1, BARE + ONE)}
    alone, one = (finish(name, running[name])[0] for name in running)
    row("nccl, one process", apart(one, alone) < 1e-5, f"{apart(one, alone):.1e} from the run without")
    if torch.cuda.device_count() > 1:
        first, second = (process("two", rank, 2) for rank in range(2))
        two, _ = finish("two", first)
        second.communicate()
        row("nccl, two cards", apart(two, alone) < 1e-4, f"{apart(two, alone):.1e} from one")

PARTS = {  # name: (function, seconds that it may take)
    "machine": (machine, 60), "attention": (attention, 150), "parameters": (parameters, 150),
    **{f"model_{width}": (partial(model, width), 300) for width in (96, 384, 768, 1536)},
    "train": (train, 300), "second": (second, 300), "resume": (resume, 300), "memory": (memory, 300),
    "nccl": (nccl, 150), "sizes": (sizes, 300), "profiled": (profiled, 120)}
MEASURED = ["machine"], ["sizes"], ["profiled"]  # alone; what is only checked runs side by side
GROUPS = [MEASURED[0], [name for name in PARTS if [name] not in MEASURED], *MEASURED[1:]]
LIMIT = 450  # seconds of everything

def run_part(name):
    """The process of one part. An error is a row, too."""
    try:
        PARTS[name][0]()
    except Exception as error:
        row(name, False, f"{type(error).__name__}: {error}"[-600:])

def stop(process):
    """End a part and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

def run_group(names):
    """Parts that run side by side. Whatever is left of them when their time is up is ended."""
    begun = time.time()
    running = {name: subprocess.Popen([sys.executable, __file__, name], start_new_session=True)
               for name in names}
    try:
        for name, process in running.items():
            try:
                code = process.wait(max(0.1, min(begun + PARTS[name][1], BEGUN + LIMIT) - time.time()))
            except subprocess.TimeoutExpired:
                code = "its time was up"
            if code:
                row(name, False, f"ended: {code}")
            stop(process)
    finally:
        for process in running.values():
            stop(process)

def main():
    names = sys.argv[1:] or list(PARTS)
    if unknown := set(names) - set(PARTS):
        sys.exit(f"no part {' '.join(unknown)}: there are {', '.join(PARTS)}")
    if "GPU_PY_FOLDER" in os.environ:  # the process of one part
        return run_part(*names)
    os.environ["GPU_PY_FOLDER"] = str(FOLDER)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: the parts end, the table is written
    row("began", True, time.strftime("%Y-%m-%d %H:%M"))
    try:
        if not (ROOT / "data/docstrings/meta.json").exists():  # else each part would build it
            subprocess.run([sys.executable, ROOT / "data/prepare.py", "docstrings"], check=True)
        for group in GROUPS:
            run_group([name for name in group if name in names])
    finally:
        rows = [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()]
        Path("gpu.json").write_text(json.dumps(rows, indent=1))
        failed = sum(not one["passed"] for one in rows)
        print(f"{len(rows) - failed} passed, {failed} failed, {time.time() - BEGUN:.0f} s; written gpu.json")
        shutil.rmtree(FOLDER, ignore_errors=True)  # gigabytes
    sys.exit(failed > 0)

main()
