"""What this machine can do: device, precision, compiler, memory."""
import contextlib
import ctypes
import os
import shlex
import shutil
import sysconfig

import torch

from plumbing.files import fail

def choose_device(setting, local_rank=0):
    """The torch.device that a setting (auto, cpu, cuda) means for this process."""
    if setting == "cuda" and not torch.cuda.is_available():
        fail("device = cuda, but torch finds no CUDA GPU; take --device=cpu or a CUDA build of torch")
    if setting == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        fail(f"only {torch.cuda.device_count()} GPUs for process {local_rank}: lower --nproc_per_node")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)

def choose_dtype(setting, device):
    """The dtype of matrix products: bfloat16 where there are instructions for it, else float32."""
    if setting != "auto":
        return getattr(torch, setting)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities()
        has_bfloat16 = can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32

def has_compiler(device):
    """Whether torch.compile will work: on a CPU it needs a C++ compiler and Python's headers."""
    cxx = shlex.split(os.environ.get("CXX", "g++"))[0]
    headers = os.path.join(sysconfig.get_path("include"), "Python.h")
    return device.type == "cuda" or bool(shutil.which(cxx) and os.path.exists(headers))

def keep_freed_memory():
    """Have glibc keep what is freed. A fresh page of memory costs more than the arithmetic on it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # elsewhere than on Linux
        for option, number in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, number)

def peak_memory(device):
    """The most memory that this process has had, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
