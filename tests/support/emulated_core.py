"""The kernels' module over their emulation, for tests that put it in the place of ``qcomm._cuda``."""

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from qcomm.codec import _native_cuda

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))

import emulation_build as emulation


def reason_to_skip() -> str | None:
    """Why the module cannot be built here."""
    if importlib.util.find_spec("pybind11") is None:
        return "the emulated core is a pybind11 module"
    return None if emulation.compiler() is not None else "there is no C++ compiler"


def build(folder: Path) -> Path:
    """Builds the module, in the tree's build folder where there is one, so that a second run finds it there."""
    import pybind11

    kept = emulation.ROOT / "build"
    target = kept / "cuda_emulation" if kept.is_dir() else folder
    return emulation.build_module(target, [sysconfig.get_paths()["include"], pybind11.get_include()])


def load(path: str | Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def emulated_core(path: str | Path) -> Iterator[None]:
    """The kernels' module is the emulated one meanwhile, and works on the host's memory."""
    module = load(path)
    # This restores one entry. mock.patch.dict would also drop modules that are imported meanwhile, such as
    # torch._dynamo, which cannot be imported twice.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "qcomm._cuda", module)
        yield


@contextmanager
def emulated_device(path: str | Path) -> Iterator[None]:
    """Tensors on the CPU count as tensors on a device, too: in the hook and in ``all_reduce``."""
    with emulated_core(path), mock.patch.object(_native_cuda, "KERNEL_DEVICES", {"cuda", "cpu"}):
        yield
