"""train.py's CUDA branch on tensors without numbers, for machines without a GPU.

    python tests/dry_cuda.py 75 config/train_570m.py --dataset=docstrings    # 75: a T4, 90: an H100

A library, built on the spot, lets a CPU build of torch take device cuda:0 for real, with torch 2.13's rule
for the choice of an attention kernel. FakeTensorMode then runs train.py's own source up to its loop, and
language-model, meta and evaluation steps. It shows that devices and dtypes fit, and which kernels are asked
for. It shows nothing of numbers, of speed, or of nccl.
"""
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LIBRARY = r"""
#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  const c10::Device zero{c10::DeviceType::CUDA, 0};
  c10::Stream first() const { return c10::Stream(c10::Stream::DEFAULT, zero); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device exchangeDevice(c10::Device) const override { return zero; }
  c10::Device getDevice() const override { return zero; }
  c10::Stream getStream(c10::Device) const noexcept override { return first(); }
  c10::Stream getNewStream(c10::Device, int) const override { return first(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return first(); }
  void record(void** e, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *e = (void*)1;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
namespace native {
// flash: half precision from capability 8.0 on, grouped queries too; memory-efficient: no groups; else plain
static int64_t choice(const Tensor& q, const Tensor& k, const Tensor&, const std::optional<Tensor>& mask,
                      double, bool, std::optional<double>, bool) {
  int sm = atoi(getenv("FAKE_SM"));
  bool half = q.scalar_type() == kHalf || (q.scalar_type() == kBFloat16 && sm >= 80);
  auto& context = at::globalContext();
  if (context.userEnabledFlashSDP() && half && sm >= 80 && !mask) return 1;
  bool takes = q.size(-3) == k.size(-3) && (half || q.scalar_type() == kFloat);
  return context.userEnabledMemEfficientSDP() && takes ? 2 : 0;
}
static struct Register { Register() { _fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choice); } } use_choice;
}
}
"""

def build_library():
    """Compile LIBRARY once, and load it. Before torch is imported: it asks for devices only once."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    library = f"{tempfile.gettempdir()}/dry_cuda_{os.getuid()}_{version('torch')}.so"
    if not os.path.exists(library):
        source, built = f"{library}.{os.getpid()}.cpp", f"{library}.{os.getpid()}"
        Path(source).write_text(LIBRARY)
        options = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include", f"-L{torch}/lib",
                   f"-Wl,-rpath,{torch}/lib", "-ltorch_cpu", "-lc10", "-O1", "-shared", "-fPIC", "-std=c++20"]
        subprocess.run(["g++", source, "-o", built, *options], check=True)
        os.replace(built, library)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

SM = int(sys.argv[1])
os.environ["FAKE_SM"] = str(SM)
build_library()

import torch  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

ANSWERS = {"is_available": True, "is_initialized": True, "_lazy_init": None, "device_count": 1,
           "set_device": None, "current_device": 0, "is_bf16_supported": SM >= 80,
           "get_device_name": f"pretended GPU of capability {SM}", "mem_get_info": (70 << 30, 80 << 30),
           "get_device_capability": divmod(SM, 10)}
for name, answer in ANSWERS.items():
    setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
fake_tensor.init_gpu_context = lambda *args: None
fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
torch.Tensor.pin_memory = lambda self, *args: self
torch.Tensor.item = lambda self: 1.0  # there is no number to read

class Names(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.add(operation.name().removeprefix("aten::"))
        result = operation(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda and SM >= 80:  # GradScaler makes one below
                assert tensor.dtype != torch.float64, f"{operation} makes float64, which Apple's GPUs lack"
        return result

def main():
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train.py", *sys.argv[2:], f"--out_dir={folder}/run", "--compile=False"]
        source = (ROOT / "train.py").read_text()
        start, end = source.index("# Model, head, optimizer"), source.index("# The loop")
        names = {"__name__": "train", "__file__": str(ROOT / "train.py")}
        exec(compile(source[:start], "train.py", "exec"), names)
        rest = "\n" * source[:start].count("\n") + source[start:end]  # with the numbers of its lines
        moved = "model = Llama(shape)"  # no fake module can move
        assert f"{moved}.to(device)" in rest
        rest = rest.replace(f"{moved}.to(device)", f"with device: {moved}")
        fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        with fake, Names() as operations:
            exec(compile(rest, "train.py", "exec"), names)
            run, params = names["run"], names["params"]
            scaler, optimizer = names["scaler"], names["optimizer"]
            run.choose_micro_batches(names["model"])
            print(f"{run.dtype}, micro-batches {run.micro}")
            for step, kind in enumerate(("lm", "meta", "lm"), 1):
                operations.seen.clear()
                metrics = names[f"{kind}_step"](step)
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                scaler.step(optimizer)
                scaler.update()
                assert all(value.device.type == "cuda" for value in metrics.values()), metrics
                kernels = sorted(name for name in operations.seen if "attention" in name or "softmax" in name)
                print(kind, *kernels)
            names["val_loss"](0, len(names["corpus"].val))
            head = names["maml"].fresh_head(names["head"], names["config"].n_way)
            names["run_episodes"]([names["val_pools"].sampler(0).episode(0, heldout=True)], head)

if __name__ == "__main__":
    main()
