"""Packets in device memory, compressed and decompressed by the kernels.

Their bytes are those of :mod:`qcomm.codec.packet`.
"""

from typing import Any

import torch

from qcomm.codec import _native
from qcomm.codec._native import PACKET_HEADER_BYTES, PacketFront
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
from qcomm.codec.checks import DTYPE_NUMBERS, check_claim
from qcomm.codec.grids import Grid
from qcomm.codec.plans_cuda import kernel_grid
from qcomm.codec.quantizers import WIRE_TABLE, Coding
from qcomm.errors import PacketError

__all__ = ["compress", "decompress", "extremes", "sample"]


def compress(values: torch.Tensor, grid: Grid, checksum: bool, block_steps: int) -> torch.Tensor:
    """Returns the packet of a contiguous tensor, on its device.

    It waits for the device, because the packet's size is known only there.
    """
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
        codes = static_codes(device)
        size = torch.zeros(1, dtype=torch.int64, device=device)
        whole.encode(blob.data_ptr(), codes.data_ptr(), workspace.data_ptr(), size.data_ptr(), stream(device))
        return out[: int(size.item())].clone()  # the buffer is as large as the worst case


def extremes(values: torch.Tensor) -> tuple[float, float, bool]:
    """Returns the minimum, the maximum, and whether all values are finite.

    The extremes of an empty tensor are 0. The function waits for the device.
    """
    if not values.numel():
        return 0.0, 0.0, True
    low, high = values.aminmax()
    low, high, finite = torch.stack([low.double(), high.double(), torch.isfinite(values).all().double()]).tolist()
    return low + 0.0, high + 0.0, bool(finite)  # -0.0 becomes 0.0


def sample(values: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """Returns the values that an entropy estimate on the CPU samples, in their order, 1-D on their device."""
    indices = _native.sample_indices(values.numel(), fraction, seed)
    return values.reshape(-1)[indices.to(values.device)]


def _read_front(packet: torch.Tensor) -> PacketFront:
    """Copies only a packet's front to the host and parses it there. The kernels check it again."""
    size = _native.front_bytes(packet[:PACKET_HEADER_BYTES].cpu(), packet.numel())
    return _native.parse_front(packet[:size].cpu(), packet.numel())


def _own_code_bits(front: PacketFront) -> int:
    own = (
        quantizer.num_bits
        for _, quantizer in front.records
        if quantizer.coding in (Coding.SINGLE, Coding.PAIR) and quantizer.table == WIRE_TABLE
    )
    return max(own, default=0)


def _takes_runs(front: PacketFront) -> bool:
    return any(quantizer.coding == Coding.RUNS for _, quantizer in front.records)


def decompress(packet: torch.Tensor, max_bytes: int | None = None) -> torch.Tensor:
    """Returns the tensor in a 1-D uint8 packet, on its device, if it takes at most ``max_bytes`` bytes.

    It waits for the device, which must first find out whether the packet is valid.

    Raises:
        PacketError: the bytes are not a whole, undamaged packet of this version, or claim more than ``max_bytes``.
    """
    device = packet.device
    if packet.data_ptr() % 4 != 0:
        packet = packet.clone()
    with torch.cuda.device_of(packet):
        front = _read_front(packet)
        check_claim(front.shape, front.dtype, max_bytes)
        try:
            out = torch.empty(front.shape, dtype=front.dtype, device=device)
        except RuntimeError as error:  # a constant packet of 80 bytes may claim terabytes
            raise PacketError(f"no memory for the tensor of shape {front.shape} that the packet claims") from error
        task = DecodeTask(packet.data_ptr(), packet.numel(), out.data_ptr(), out.numel(), exact=True)
        dtype, segments = DTYPE_NUMBERS[front.dtype], len(front.records)
        expected = _own_code_bits(front), _takes_runs(front)
        plan = core().DecodePlan(dtype, front.steps, segments, [task], *expected)
        blob = on_device(plan.blob(), device)
        workspace = torch.empty(plan.workspace_bytes(), dtype=torch.uint8, device=device)
        codes = static_codes(device)
        fault = torch.zeros(1, dtype=torch.int32, device=device)
        plan.decode(blob.data_ptr(), codes.data_ptr(), workspace.data_ptr(), fault.data_ptr(), stream(device))
        found = int(fault.item())
    if found != 0:
        raise PacketError(FAULTS[found])
    return out
