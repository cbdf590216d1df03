"""Packets in device memory: compress and decompress by the kernels, with the bytes of :mod:`qcomm.codec.packet`."""

import math
import struct
from typing import Any, NamedTuple

import torch

from qcomm.codec._native import DTYPE_NUMBERS, DTYPES, WIRE_TABLE, Coding
from qcomm.codec._native_cuda import (
    FAULTS,
    CodedRange,
    DecodeTask,
    KernelTensor,
    PacketSlot,
    core,
    on_device,
    static_codes,
    stream,
)
from qcomm.codec.grids import Grid
from qcomm.codec.plans_cuda import kernel_grid
from qcomm.errors import PacketError

__all__ = ["compress", "decompress", "extremes", "sample"]

MAX_CODED_BITS = 12
MAX_ELEMENTS = 1 << 42
HEADER = struct.Struct("<IBBBBIIQQHHI")  # docs/format.md
RECORD_BYTES = 32
MAGIC = 0x4D4D4351
MASK = 0xFFFFFFFF


def compress(values: torch.Tensor, grid: Grid, checksum: bool, block_steps: int) -> torch.Tensor:
    """The packet of a contiguous tensor, on its device. Waits for the device: the packet's size is known only there."""
    device, count, asked = values.device, values.numel(), kernel_grid(grid)
    tensor = KernelTensor(values.data_ptr(), count, quantizer=asked.quantizer, k=asked.k, sample=asked.sample)
    segment, shape = CodedRange(0, 0, count), tuple(values.shape)
    with torch.cuda.device_of(values):

        def plan(out: int, capacity: int) -> Any:
            arguments = (DTYPE_NUMBERS[values.dtype], block_steps, checksum, [tensor], [segment])
            return core().EncodePlan(*arguments, [PacketSlot(1, out, capacity, shape)])

        out = torch.empty(plan(0, 0).bound(0), dtype=torch.uint8, device=device)
        whole = plan(out.data_ptr(), out.numel())
        blob = on_device(whole.blob(), device)
        workspace = torch.empty(whole.workspace_bytes(), dtype=torch.uint8, device=device)
        size = torch.zeros(1, dtype=torch.int64, device=device)
        whole.encode(
            blob.data_ptr(), static_codes(device).data_ptr(), workspace.data_ptr(), size.data_ptr(), stream(device)
        )
        return out[: int(size.item())].clone()  # the buffer is as large as the worst case


def extremes(values: torch.Tensor) -> tuple[float, float, bool]:
    """Minimum, maximum, and whether all values are finite; zeros of an empty tensor. Waits for the device."""
    if not values.numel():
        return 0.0, 0.0, True
    low, high = values.aminmax()
    low, high, finite = torch.stack([low.double(), high.double(), torch.isfinite(values).all().double()]).tolist()
    return low + 0.0, high + 0.0, bool(finite)  # -0.0 becomes 0.0


def sample(values: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """The values that ``sample_index`` of csrc/include/qcomm/entropy.h takes, in their order, 1-D on their device."""
    count = values.numel()
    size = min(count, max(1024, math.ceil(fraction * count)))
    stride, number = count // size, torch.arange(size, device=values.device)
    h = (number + seed) & MASK
    h ^= h >> 16
    h = h * 0x7FEB352D & MASK
    h ^= h >> 15
    h = h * 0x846CA68B & MASK
    h ^= h >> 16
    return values.reshape(-1)[number * stride + (h * stride >> 32)]


class _Expected(NamedTuple):
    dtype: int
    shape: list[int]
    elements: int
    steps: int
    segments: int
    own_code_bits: int


def _read_metadata(packet: torch.Tensor) -> _Expected:
    """What a packet says of itself, as far as memory for it must be allocated; the kernels check all of it again."""
    if packet.numel() < HEADER.size:
        raise PacketError(f"a packet has at least {HEADER.size} bytes; found {packet.numel()}")
    header = HEADER.unpack(packet[: HEADER.size].cpu().numpy().tobytes())
    magic, version, dtype, _, ndim, _, segments, elements, _, steps, _, _ = header
    if magic != MAGIC or version != 1:
        raise PacketError("these bytes are not a qcomm packet of version 1")
    records_at = HEADER.size + 8 * ndim
    if (
        dtype >= len(DTYPES)
        or not 1 <= steps <= 512
        or segments < 1
        or records_at + RECORD_BYTES * segments > packet.numel()
    ):
        raise PacketError("the packet's metadata is damaged or truncated")
    metadata = packet[HEADER.size : records_at + RECORD_BYTES * segments].cpu().numpy().tobytes()
    shape = list(struct.unpack_from(f"<{ndim}Q", metadata))
    if max(shape, default=0) > MAX_ELEMENTS or math.prod(shape) != elements or elements > MAX_ELEMENTS:
        raise PacketError("the dimensions do not agree with the element count")
    records = struct.iter_unpack("<QBBBB20x", metadata[8 * ndim :])
    own = [
        bits for _, _, bits, coding, table in records if coding in (Coding.SINGLE, Coding.PAIR) and table == WIRE_TABLE
    ]
    return _Expected(dtype, shape, elements, steps, segments, min(max(own, default=0), MAX_CODED_BITS))


def decompress(packet: torch.Tensor) -> torch.Tensor:
    """The tensor in a 1-D uint8 packet, on its device. Waits for the device: it must know whether the packet is whole.

    Raises:
        PacketError: the bytes are not a whole, undamaged packet of this version.
    """
    device = packet.device
    if packet.data_ptr() % 4 != 0:
        packet = packet.clone()
    with torch.cuda.device_of(packet):
        expected = _read_metadata(packet)
        try:
            out = torch.empty(expected.shape, dtype=DTYPES[expected.dtype], device=device)
        except RuntimeError as error:  # a constant packet of 80 bytes may claim terabytes
            raise PacketError(f"no memory for the tensor of shape {expected.shape} that the packet claims") from error
        task = DecodeTask(packet.data_ptr(), packet.numel(), out.data_ptr(), expected.elements, exact=True)
        plan = core().DecodePlan(expected.dtype, expected.steps, expected.segments, [task], expected.own_code_bits)
        blob = on_device(plan.blob(), device)
        workspace = torch.empty(plan.workspace_bytes(), dtype=torch.uint8, device=device)
        fault = torch.zeros(1, dtype=torch.int32, device=device)
        plan.decode(
            blob.data_ptr(), static_codes(device).data_ptr(), workspace.data_ptr(), fault.data_ptr(), stream(device)
        )
        found = int(fault.item())
    if found != 0:
        raise PacketError(FAULTS[found])
    return out
