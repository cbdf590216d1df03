"""The kernels' plans with what they need on a device: their tables, a workspace, the static codes.

A plan holds addresses, of tensors that its owner keeps; it is made once and run again and again, and running it waits
for nothing and takes no memory: a rank that ran out of it half way through a collective would leave the others waiting.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from qcomm.codec import _native_cuda, packet_cuda
from qcomm.codec._native import DTYPE_NUMBERS, WIRE_TABLE, Coding, GridKind, Quantizer
from qcomm.codec.grids import Grid, RangeGrid

__all__ = [
    "Decoder",
    "DeviceTensor",
    "Encoder",
    "RunCopier",
    "Workspace",
    "address",
    "own_code_bits",
    "read_quantizers",
]

RAW = (int(GridKind.NONE), 0, int(Coding.RAW), WIRE_TABLE)
NO_RULE = (6.0, 4, 0.03, 16, 0, False)
QUANTIZER_BYTES = 24  # csrc/include/qcomm/quantize.h
# cuda.h, Account
ACCOUNT = ("packet_bytes", "largest_packet", "dropped_values", "unsent_packets", "nonfinite_tensors")


class DeviceTensor(NamedTuple):
    """What a kernel measures as a whole: ``values * inv_scale + residual``.

    Addresses are of device memory, 0 for none. ``grid`` None: the values travel as they are, and are measured only
    where ``measured`` says so. ``keeps_zero``: where all values are 0, the residual takes no part.
    """

    values: int
    elements: int
    grid: Grid | None = None
    residual: int = 0
    inv_scale: int = 0
    measured: bool = True
    keeps_zero: bool = False

    def described(self) -> tuple[Any, ...]:
        """As the core takes it."""
        request = None if self.grid is None else packet_cuda.request(self.grid)
        quantizer, k, rule = (RAW, 1.0, NO_RULE) if request is None else request
        flags = (self.measured, not self.measured, self.keeps_zero)
        return self.values, self.residual, self.inv_scale, self.elements, quantizer, k, rule, flags


def address(tensor: torch.Tensor | None, element: int = 0) -> int:
    """Of an element; 0 for None.

    Example:
        >>> address(None)
        0
    """
    return 0 if tensor is None else tensor.data_ptr() + element * tensor.element_size()


def own_code_bits(grid: Grid) -> int:
    """Most bits of a symbol in a segment that may bring a code of its own; 0 where none does.

    Example:
        >>> from qcomm import SigmaGrid
        >>> own_code_bits(SigmaGrid(1.0, coding="single")), own_code_bits(RangeGrid())
        (0, 10)
    """
    (_, bits, _, table), _, (*_, choose) = packet_cuda.request(grid)
    if isinstance(grid, RangeGrid):
        return min(grid.num_bits or grid.bits_for(float(grid.entropy_bits)), packet_cuda.MAX_CODED_BITS)
    return bits if bits <= packet_cuda.MAX_CODED_BITS and (choose or table == WIRE_TABLE) else 0


def read_quantizers(found: torch.Tensor) -> list[Quantizer]:
    """Of the bytes that :meth:`Encoder.run` copies out; waits for the device."""
    head = found.cpu().view(-1, QUANTIZER_BYTES)
    rows = zip(head[:, :4].tolist(), head[:, 8:].contiguous().view(torch.float64).tolist(), strict=True)
    return [Quantizer(GridKind(g), n, Coding(c), t, p0, p1) for (g, n, c, t), (p0, p1) in rows]


class Workspace:
    """Memory that plans use one after another, on one stream: as much as the most demanding of them needs.

    Args:
        device: where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._captured: list[torch.Tensor] = []

    def take(self, size: int) -> torch.Tensor:
        """At least ``size`` bytes, until the next call. New memory only if ``size`` is larger than ever before."""
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self._memory.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.append(self._memory)  # whose address the graph has
        return self._memory


class Encoder:
    """Encodes the same tensors into the same packets, again and again.

    Args:
        dtype: of the packets, float32 or float64.
        steps: symbols per lane in a block.
        tensors: what is measured.
        segments: (number of the tensor, first value, how many values, address of its new residual or 0).
        packets: (how many of the next segments, address, capacity in bytes).
        workspace: on the device of all of this; other plans that use it do not run between :meth:`run` and
            :meth:`add_own`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        steps: int,
        tensors: Sequence[DeviceTensor],
        segments: Sequence[tuple[int, int, int, int]],
        packets: Sequence[tuple[int, int, int]],
        workspace: Workspace,
    ) -> None:
        device = workspace.device
        described, first = [], 0
        for count, out, capacity in packets:
            elements = sum(segment[2] for segment in segments[first : first + count])
            described.append((count, [elements], out, capacity))
            first += count
        rows = [tensor.described() for tensor in tensors]
        self._plan = _native_cuda.core().EncodePlan(DTYPE_NUMBERS[dtype], steps, True, rows, segments, described)
        self._blob = _native_cuda.on_device(self._plan.blob(), device)
        self._device, self._tensors, self._packets = device, len(tensors), len(packets)
        self._workspace, self._size = workspace, self._plan.workspace_bytes()
        self.sizes = torch.zeros(max(1, len(packets)), dtype=torch.int64, device=device)

    def bound(self) -> int:
        """Bytes that suffice for any of the packets, whatever the values."""
        return max((self._plan.bound(number) for number in range(self._packets)), default=0)

    def reserve(self) -> None:
        """Takes the memory that runs need, so that none of them has to."""
        self._workspace.take(self._size)

    def run(self, account: torch.Tensor, quantizers: torch.Tensor) -> None:
        """Measures and encodes; adds what it came to to the ``account``, and copies the ``quantizers`` out.

        Args:
            account: int64, in the order of ``ACCOUNT``.
            quantizers: uint8 of 24 bytes a tensor.
        """
        workspace = self._workspace.take(self._size)
        codes, stream = _native_cuda.static_codes(self._device), _native_cuda.stream(self._device)
        places = self._blob.data_ptr(), codes.data_ptr(), workspace.data_ptr(), self.sizes.data_ptr()
        self._plan.encode(*places, stream)
        self._plan.count(places[0], places[2], places[3], account.data_ptr(), stream)
        at = self._plan.quantizers(places[2]) - places[2]
        quantizers.copy_(workspace[at : at + QUANTIZER_BYTES * self._tensors])

    def add_own(self, runs: "RunCopier", inv_scale: int, add: bool) -> None:
        """After :meth:`run`: values that stay on this rank, with their residuals, which become 0.

        Args:
            runs: whose ``tensor`` counts as in ``tensors``.
            inv_scale: address of a float64, or 0.
            add: to what is there.
        """
        stream, workspace = _native_cuda.stream(self._device), self._workspace.take(self._size)
        runs.plan.add_own(runs.blob.data_ptr(), self._plan, workspace.data_ptr(), inv_scale, add, stream)


class Decoder:
    """Decodes packets of the same places, again and again.

    Args:
        dtype, steps: of the packets.
        max_segments: most in a packet.
        tasks: (address of the packet, bytes that may be read, address of its values, how many values).
        own_code_bits: see :func:`own_code_bits`.
        workspace: on the device of all of this.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        steps: int,
        max_segments: int,
        tasks: Sequence[tuple[int, int, int, int]],
        own_code_bits: int,
        workspace: Workspace,
    ) -> None:
        device = workspace.device
        described = [(*task, False) for task in tasks]
        plan = _native_cuda.core().DecodePlan(DTYPE_NUMBERS[dtype], steps, max_segments, described, own_code_bits)
        self._plan, self._blob = plan, _native_cuda.on_device(plan.blob(), device)
        self._device, self._workspace, self._size = device, workspace, plan.workspace_bytes()

    def reserve(self) -> None:
        """Takes the memory that runs need, so that none of them has to."""
        self._workspace.take(self._size)

    def decode(self, faults: int) -> None:
        """Each packet to its own values; ``faults``: address of an int32 a packet."""
        self._run(self._plan.decode, faults)

    def decode_sum(self, faults: int, add: bool) -> None:
        """The packets' sum, in their order, to the first one's values, or added to them."""
        self._run(self._plan.decode_sum, faults, add)

    def _run(self, operation: Any, faults: int, *options: bool) -> None:
        workspace = self._workspace.take(self._size)
        codes = _native_cuda.static_codes(self._device)
        stream = _native_cuda.stream(self._device)
        operation(self._blob.data_ptr(), codes.data_ptr(), workspace.data_ptr(), faults, *options, stream)


class RunCopier:
    """Copies many runs of values in one launch.

    Args:
        dtype: of the targets; sources are float32, or float64 for float64.
        runs: (address, address, how many values, first fault, how many faults, number of the tensor, residual).
        device: where all of it is.
    """

    def __init__(
        self, dtype: torch.dtype, runs: Sequence[tuple[int, int, int, int, int, int, int]], device: torch.device
    ) -> None:
        self.plan = _native_cuda.core().RunPlan(DTYPE_NUMBERS[dtype], runs)
        self.blob = _native_cuda.on_device(self.plan.blob(), device)
        self._device = device

    def copy(self, divisor: float = 1.0, factor: int = 0, faults: int = 0) -> None:
        """Values / divisor * factor; NaN where one of the run's faults is not 0."""
        self.plan.copy(self.blob.data_ptr(), divisor, factor, faults, _native_cuda.stream(self._device))
