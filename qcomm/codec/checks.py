"""The gate for tensors that enter the core, and for the numbers beside them: TypeError or ValueError with the name."""

import math
from collections.abc import Sequence

import torch

from qcomm.codec.refusals import dtype_refusal, memory_refusal
from qcomm.errors import PacketError

__all__ = [
    "CPU",
    "DTYPES",
    "DTYPE_NUMBERS",
    "check_claim",
    "check_floats",
    "check_memory",
    "check_num_threads",
    "check_packet",
    "floats_address",
    "memory_address",
    "negated",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # the index is the dtype's number in a packet
DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES)}
CPU = torch.device("cpu")  # allocations say so, since the default device may be another
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
MAX_THREADS = 1024


def check_num_threads(num_threads: object) -> int:
    """Returns ``num_threads``, at most ``MAX_THREADS``, if it is an int of at least 1."""
    if isinstance(num_threads, bool) or not isinstance(num_threads, int):
        raise TypeError(f"num_threads must be an int, got {type(num_threads).__name__}")
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    return min(num_threads, MAX_THREADS)


def memory_address(name: str, tensor: torch.Tensor) -> int:
    """Returns the address of a tensor's first element, if all of its elements lie in memory.

    Every tensor that the core reads or writes comes through here. It is judged by what it has, and not by its type: a
    layout, an address, and a storage that reaches from the first element to the last.

    Raises:
        TypeError: the core would touch memory that is not the tensor's; the message names it and what to pass instead.
    """
    try:
        storage = tensor.untyped_storage()
        # A fake tensor claims another device than its storage's, and warns where it is asked for an address.
        there = type(tensor) in PLAIN_TYPES or storage.device.type == tensor.device.type
        if there and tensor.layout == torch.strided and not tensor.is_nested:
            address, count = tensor.data_ptr(), tensor.numel()
            last = count - 1
            if count and not tensor.is_contiguous():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = (tensor.storage_offset() + last + 1) * tensor.element_size()
            if not count or (address and end <= storage.nbytes()):
                return address
    except (RuntimeError, ValueError):  # transforms, tracers and lazy parameters have no address to ask for
        raise memory_refusal(name, tensor) from None
    raise memory_refusal(name, tensor)


def check_memory(name: str, tensor: object) -> torch.Tensor:
    """Returns ``tensor`` if it is a tensor whose elements all lie in dense memory; raises TypeError otherwise."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    memory_address(name, tensor)
    return tensor


def _check_device(name: str, tensor: torch.Tensor, devices: tuple[str, ...]) -> None:
    if tensor.is_cpu or tensor.device.type in devices:
        return
    if devices == ("cpu",):
        raise ValueError(
            f"{name} must be on the CPU, got device {tensor.device}; only compress, decompress, inspect, "
            "estimate_entropy, all_reduce and the hook take more"
        )
    raise ValueError(f"{name} must be on one of {devices}, got device {tensor.device}")


def check_floats(
    name: str, tensor: object, devices: tuple[str, ...] = ("cpu",), may_be_negated: bool = False
) -> torch.Tensor:
    """Returns ``tensor`` if it is dense, real and floating-point on one of ``devices``; raises an error otherwise.

    ``devices`` begins with the CPU. A lazily negated view, whose memory holds other values, needs ``may_be_negated``.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    floats_address(name, tensor, devices)
    if tensor.is_neg() and not may_be_negated:
        raise negated(name)
    return tensor


def floats_address(name: str, tensor: torch.Tensor, devices: tuple[str, ...]) -> int:
    """Returns the address of a tensor's first element, after the checks of :func:`check_floats` but for the last."""
    if tensor.dtype not in DTYPE_NUMBERS:
        raise dtype_refusal(name, tensor.dtype)
    _check_device(name, tensor, devices)
    return memory_address(name, tensor)


def negated(name: str) -> ValueError:
    """Returns the error about a view whose memory holds other values than the tensor."""
    return ValueError(f"{name} is a lazily negated view, whose memory holds other values; call .resolve_neg() first")


def check_packet(packet: object, devices: tuple[str, ...] = ("cpu",)) -> torch.Tensor:
    """Returns ``packet`` as a contiguous 1-D uint8 tensor on one of ``devices``; raises an error otherwise."""
    if not isinstance(packet, torch.Tensor):
        raise TypeError(
            f"packet must be a 1-D uint8 tensor, got {type(packet).__name__}; torch.frombuffer makes one from bytes"
        )
    if packet.dtype != torch.uint8 or packet.dim() != 1:
        raise TypeError(f"packet must be a 1-D uint8 tensor, got {packet.dim()}-D {packet.dtype}")
    _check_device("packet", packet, devices)
    memory_address("packet", packet)
    return packet.contiguous()


def check_claim(shape: Sequence[int], dtype: torch.dtype, max_bytes: object) -> None:
    """Raises ``PacketError`` if a tensor that a packet claims to hold takes more than ``max_bytes``; None is no limit.

    Example:
        >>> check_claim((2, 3), torch.float32, 24)
    """
    if max_bytes is None:
        return
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes must be an int or None, got {type(max_bytes).__name__}")
    if max_bytes < 0:
        raise ValueError(f"max_bytes must be >= 0, got {max_bytes}")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > max_bytes:
        raise PacketError(
            f"the packet claims a tensor of shape {tuple(shape)}, {claimed} bytes, more than max_bytes={max_bytes}"
        )
