"""Bindings to the CUDA core ``qcomm._cuda``: the records that it takes and its setup with torch.

No other module imports the core. The kernels write the same bytes as the CPU codec. They have been run under an
emulation on the host only, never on a GPU: see ``csrc/cuda/README.md``.

``csrc/include/qcomm/cuda.h`` explains the records, which have its names and defaults. Its ``count`` is ``elements``
here, because tuples have a method ``count``. The core takes the records as tuples, by position. Addresses are of device
memory, 0 for none.
"""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch

from qcomm.codec.quantizers import WIRE_TABLE, Coding, GridKind

__all__ = [
    "FAULTS",
    "CodedRange",
    "DecodeTask",
    "KernelTensor",
    "PacketSlot",
    "QuantizerHead",
    "Run",
    "SampleRule",
    "core",
    "is_on_device",
    "on_device",
    "static_codes",
    "stream",
]

# Device types whose tensors the kernels compress in place. The emulated core of the tests adds "cpu".
KERNEL_DEVICES = frozenset({"cuda"})

# Messages of the values of Fault in cuda.h, by number.
FAULTS = (
    "nothing",
    "a raw or fixed segment's checksum is wrong",
    "a block is damaged",
    "the block table is damaged",
    "segment records or code lengths are damaged",
    "the packet is not what its header said",
    "the metadata is damaged: wrong header checksum or size",
)


class QuantizerHead(NamedTuple):
    """A :class:`~qcomm.codec.Quantizer` before its tensor is measured; raw by default."""

    grid: GridKind = GridKind.NONE
    num_bits: int = 0
    coding: Coding = Coding.RAW
    table: int = WIRE_TABLE


class SampleRule(NamedTuple):
    """Rules for the kernels' choices on a sample of a tensor: a range grid's bits, a sigma grid's code."""

    c: float = 6.0
    entropy_bits: int = 4
    fraction: float = 0.03
    max_bits: int = 16
    seed: int = 0
    choose_code: bool = False


class KernelTensor(NamedTuple):
    """``cuda::Tensor``, the sum ``values * inv_scale + residual``, measured as a whole."""

    values: int
    elements: int
    residual: int = 0
    inv_scale: int = 0
    quantizer: QuantizerHead = QuantizerHead()
    k: float = 1.0
    sample: SampleRule = SampleRule()
    nonfinite_is_constant: bool = False
    as_it_is: bool = False
    zero_keeps_residual: bool = False


class CodedRange(NamedTuple):
    """``cuda::Segment``, the values [offset, offset + elements) of tensor number ``tensor``, one segment."""

    tensor: int
    offset: int
    elements: int
    residual_out: int = 0


class PacketSlot(NamedTuple):
    """``cuda::Packet``, memory of ``capacity`` bytes at ``out`` for a packet of the next ``segments`` segments."""

    segments: int
    out: int = 0
    capacity: int = 0
    dims: tuple[int, ...] = ()


class DecodeTask(NamedTuple):
    """``cuda::DecodeTask``, a packet of at most ``bytes`` bytes and its ``elements`` values.

    The packet has exactly ``bytes`` bytes if ``exact`` is True.
    """

    packet: int
    bytes: int
    out: int
    elements: int
    exact: bool = False


class Run(NamedTuple):
    """``cuda::Run``, a run of ``elements`` neighbouring values to copy or to add."""

    source: int
    target: int
    elements: int
    first_fault: int = 0
    faults: int = 0
    tensor: int = -1
    residual: int = 0


def core() -> ModuleType:
    """Returns the module ``qcomm._cuda``.

    Raises:
        RuntimeError: this build has no CUDA core; the message explains how to build one.
    """
    try:
        return import_module("qcomm._cuda")
    except ImportError as error:
        raise RuntimeError(
            "this build of qcomm has no CUDA kernels: install a CUDA toolkit (nvcc 12 or newer) and build again with "
            f"QCOMM_CUDA=ON, e.g. `QCOMM_CUDA=ON pip install .`; or move the tensor with .cpu() ({error})"
        ) from error


def is_on_device(tensor: torch.Tensor) -> bool:
    """Returns whether kernels compute a tensor's mean, in device memory.

    Example:
        >>> is_on_device(torch.zeros(3))
        False
    """
    return tensor.device.type in KERNEL_DEVICES


def static_codes(device: torch.device) -> torch.Tensor:
    """Copies the static codes to a device. The copy is complete when this returns, for any stream.

    The caller keeps the copy for as long as kernels may read it.
    """
    return torch.frombuffer(bytearray(core().static_tables()), dtype=torch.uint8).to(device)


def stream(device: torch.device) -> int:
    """Returns the address of the device's current stream; 0 on the host."""
    # The emulated core of the tests works on the host's memory, where there are no streams.
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(blob: bytes, device: torch.device) -> torch.Tensor:
    """Copies ``blob`` to a device through pinned memory, without waiting for the device."""
    if not blob:
        return torch.empty(0, dtype=torch.uint8, device=device)
    host = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
