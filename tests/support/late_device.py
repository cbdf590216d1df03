"""The test device ``late`` of tests/device, built and registered, and a process group that knows it."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "tests/device").glob("late_*"))
NAME = "late"
LIBRARY = torch.library.Library("aten", "IMPL")


@functools.cache
def build():
    """Returns the path of the device's library, which is built where its sources or torch have changed."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler for the test device")
    known = hashlib.sha256(torch.__version__.encode())
    for source in SOURCES:
        known.update(source.read_bytes())
    kept = ROOT / "build"
    folder = kept / "late_device" if kept.is_dir() else Path(tempfile.mkdtemp(prefix="qcomm-test-"))
    folder.mkdir(exist_ok=True)
    path = folder / f"late_device-{known.hexdigest()[:16]}.so"
    if not path.exists():
        torch_folder = Path(torch.__file__).parent
        includes = ["-isystem", str(torch_folder / "include")]
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        flags = [
            "-std=c++20",
            "-O1",
            "-fPIC",
            "-shared",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        made = path.with_suffix(f".{os.getpid()}")  # two processes of tests may build it
        source = ROOT / "tests/device/late_device.cpp"
        subprocess.run([compiler, *flags, *includes, str(source), "-o", str(made), *libraries], check=True)
        made.replace(path)
    return path


def load(path):
    """Registers the device with torch, once in a process, before autograd's threads start."""
    torch.ops.load_library(path)
    torch.utils.rename_privateuse1_backend(NAME)
    module = ModuleType(f"torch.{NAME}")
    answers = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0}
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.set_device = lambda device: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module(NAME, module)
    LIBRARY.impl("convolution_overrideable", _convolution, "PrivateUse1")
    LIBRARY.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    dist.Backend.register_backend("late_gloo", GlooOfDevice, devices=[NAME])


def _convolution(inputs, weight, bias, *options):
    """The operator that a device of this kind has to bring, because the CPU has none of that name."""
    found = torch.convolution(inputs.cpu(), weight.cpu(), None if bias is None else bias.cpu(), *options)
    return found.to(NAME)


def _convolution_backward(gradient, inputs, weight, *options):
    found = torch.ops.aten.convolution_backward(gradient.cpu(), inputs.cpu(), weight.cpu(), weight.shape[:1], *options)
    return tuple(None if part is None else part.to(NAME) for part in found)


class GlooOfDevice(dist.ProcessGroup):
    """A process group with collectives for the device and for nothing else, as one of NCCL is: DDP's own needs."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._store = store
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):
        return "late_gloo"

    def get_group_store(self):
        return self._store

    def allreduce(self, tensors, opts=None):
        return self._run(self._gloo.allreduce, tensors, opts)

    def broadcast(self, tensors, opts=None):
        return self._run(self._gloo.broadcast, tensors, opts)

    def allgather(self, outputs, inputs, opts=None):
        gathered = [[torch.empty_like(tensor, device="cpu") for tensor in tensors] for tensors in outputs]
        self._gloo.allgather(gathered, [tensor.cpu() for tensor in inputs]).wait()
        for ours, theirs in zip(outputs, gathered, strict=True):
            torch._foreach_copy_(ours, theirs)
        return _ended(outputs)

    def _run(self, collective, tensors, opts):
        assert all(tensor.device.type == NAME for tensor in tensors), "the group is for the device alone"
        copies = [tensor.cpu() for tensor in tensors]
        collective(copies, *([] if opts is None else [opts])).wait()
        with torch.no_grad():
            for tensor, copied in zip(tensors, copies, strict=True):
                tensor.copy_(copied)
        return _ended(tensors)


def _ended(result):
    future = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


@contextmanager
def order(seed):
    """Runs the device's work early, in an order that the seed gives; with 0, as late as possible."""
    torch.ops.late.run_early(seed)
    try:
        yield
    finally:
        torch.ops.late.run_early(0)


# Seeds of :func:`order`: everything as late as possible, and other streams ahead by chance.
ORDERS = range(5)
