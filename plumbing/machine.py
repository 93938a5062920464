"""What this machine can do: device, precision, compiler, memory."""
import contextlib
import ctypes
import math
import shutil
import sys

import torch

from plumbing.files import fail

def choose_device(setting, local_rank=0):
    """The torch.device that a setting (auto, cpu, cuda, mps) means for this process."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if setting == "auto":
        setting = next(kind for kind in available if available[kind])
        if setting == "cpu" and shutil.which("nvidia-smi"):
            cuda = torch.version.cuda
            why = f"is the driver too old for CUDA {cuda}?" if cuda else "this build of torch is for CPUs"
            print(f"system  torch finds no GPU, though nvidia-smi is here: {why}", file=sys.stderr)
    if not available[setting]:
        fail(f"device = {setting}, but torch finds none; take --device=cpu or another build of torch")
    if setting == "cpu":
        # Have glibc keep what is freed: a fresh page costs more than the arithmetic on it. The options are
        # M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD.
        with contextlib.suppress(OSError, AttributeError, TypeError):  # elsewhere than on Linux
            for option, number in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
                ctypes.CDLL(None).mallopt(option, number)
    if setting != "cuda":
        return torch.device(setting)
    if local_rank >= torch.cuda.device_count():
        fail(f"process {local_rank} has no GPU, of {torch.cuda.device_count()}: lower --nproc_per_node")
    torch.cuda.set_device(local_rank)
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans for each length; has a bug (pytorch#193893)
    return torch.device("cuda", local_rank)

def choose_dtype(setting, device):
    """The dtype of matmuls: bfloat16 where the hardware has it, float16 on older GPUs, or float32."""
    if setting != "auto":
        return getattr(torch, setting)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability() >= (7, 0) else torch.float32
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    has_bfloat16 = any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32

def not_compiled(device):
    """Why torch.compile cannot work here, in a few words; "" if it can."""
    if sys.platform != "linux":
        return "only on Linux"
    try:  # the smallest of programs: a compiler, triton, Python.h or a place to write may be missing
        torch.compile(torch.exp)(torch.ones(16, device=device))
    except Exception as error:  # each backend has exceptions of its own
        return str(error).strip().partition("\n")[0][:100]
    return ""

def peak_memory(device):
    """Peak memory of this process in GiB (on MPS what it holds now); NaN on Windows, which does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)
