"""The CUDA core ``qcomm._cuda``: its only importer, with the little that torch has to do for it.

The kernels' bytes are those of the CPU codec. They have been run under an emulation on the host only, never on a GPU:
see ``csrc/cuda/README.md``.
"""

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

__all__ = ["FAULTS", "core", "is_on_device", "on_device", "static_codes", "stream"]

# Device types whose tensors the kernels compress in place. The emulated core of the tests adds "cpu".
KERNEL_DEVICES = frozenset({"cuda"})

# cuda.h, Fault
FAULTS = (
    "nothing",
    "a raw or fixed segment's checksum is wrong",
    "a block is damaged",
    "the block table is damaged",
    "segment records or code lengths are damaged",
    "the packet is not what its header said",
    "the metadata is damaged: wrong header checksum or size",
)


def core() -> ModuleType:
    """The module ``qcomm._cuda``.

    Raises:
        RuntimeError: this build has none; it says how to get one.
    """
    try:
        return import_module("qcomm._cuda")
    except ImportError as error:
        raise RuntimeError(
            "this build of qcomm has no CUDA kernels: install a CUDA toolkit (nvcc 12 or newer) and build again with "
            f"QCOMM_CUDA=ON, e.g. `QCOMM_CUDA=ON pip install .`; or move the tensor with .cpu() ({error})"
        ) from error


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor's mean is computed by kernels, in device memory.

    Example:
        >>> is_on_device(torch.zeros(3))
        False
    """
    return tensor.device.type in KERNEL_DEVICES


@lru_cache(maxsize=64)
def static_codes(device: torch.device) -> torch.Tensor:
    """The static codes on a device. They are there when this returns, for whatever stream."""
    return torch.frombuffer(bytearray(core().static_tables()), dtype=torch.uint8).to(device)


def stream(device: torch.device) -> int:
    """The current stream's address."""
    # The emulated core of the tests works on the host's memory, where there are no streams.
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(blob: bytes, device: torch.device) -> torch.Tensor:
    """A copy of ``blob`` on a device. Does not wait for it: the host's copy is in pinned memory."""
    if not blob:
        return torch.empty(0, dtype=torch.uint8, device=device)
    host = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
