"""Plans of the kernels, with their tables, workspace and static codes on a device.

A plan holds addresses of tensors that its owner keeps. It is made once and run many times. A run waits for nothing and
allocates no memory: a rank that ran out of memory inside a collective would leave the others waiting.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from qcomm.codec import _native, _native_cuda
from qcomm.codec._native import MAX_CODED_BITS, NO_TABLE, QUANTIZER_BYTES, RUNS_BITS
from qcomm.codec._native_cuda import CodedRange, DecodeTask, KernelTensor, PacketSlot, QuantizerHead, Run, SampleRule
from qcomm.codec.checks import DTYPE_NUMBERS, memory_address
from qcomm.codec.grids import Grid, RangeGrid, SigmaGrid
from qcomm.codec.quantizers import WIRE_TABLE, Coding, GridKind, Quantizer

__all__ = [
    "Decoder",
    "DeviceTensor",
    "Encoder",
    "KernelGrid",
    "RunCopier",
    "Workspace",
    "address",
    "codes_runs",
    "kernel_grid",
    "own_code_bits",
    "read_quantizers",
]

# Fields of Account in cuda.h, in its order.
ACCOUNT = ("packet_bytes", "largest_packet", "dropped_values", "unsent_packets", "nonfinite_tensors")


class KernelGrid(NamedTuple):
    """A grid in the kernels' terms; uncompressed values by default."""

    quantizer: QuantizerHead = QuantizerHead()
    k: float = 1.0
    sample: SampleRule = SampleRule()


def codes_runs(grid: Grid, has_residual: bool) -> bool:
    """Returns whether tensors on ``grid`` are coded as runs of zeros, as :func:`qcomm.codec.plan` decides on the CPU.

    Example:
        >>> codes_runs(SigmaGrid(3.2), has_residual=True), codes_runs(SigmaGrid(3.2), has_residual=False)
        (True, False)
    """
    return has_residual and isinstance(grid, SigmaGrid) and grid.codes_runs


def kernel_grid(grid: Grid, has_residual: bool = False) -> KernelGrid:
    """Translates a grid into the kernels' terms, for tensors with a residual or without.

    Example:
        >>> kernel_grid(SigmaGrid(0.5, coding="table")).quantizer.coding.name
        'SINGLE'
    """
    if isinstance(grid, SigmaGrid):
        if codes_runs(grid, has_residual):
            return KernelGrid(QuantizerHead(GridKind.SIGMA, RUNS_BITS, Coding.RUNS, WIRE_TABLE), grid.step)
        bits, coding, table = grid.num_bits, Coding.SINGLE, NO_TABLE
        if bits <= MAX_CODED_BITS and grid.coding == "table":
            table = WIRE_TABLE
        elif bits <= MAX_CODED_BITS and grid.coding in ("single", "pair"):
            coding = Coding.PAIR if grid.coding == "pair" else Coding.SINGLE
            table = _native.nearest_static_table(coding, bits, grid.step)
            table = table if table != NO_TABLE else WIRE_TABLE  # very fine steps have no built-in table
        rule = SampleRule(choose_code=grid.coding in ("auto", "runs") and bits <= MAX_CODED_BITS)
        return KernelGrid(QuantizerHead(GridKind.SIGMA, bits, coding, table), grid.step, rule)
    if isinstance(grid, RangeGrid):
        if grid.bits != "entropy":
            text = f"bits must be 'entropy' on a CUDA device, the only rule of its kernels, got {grid.bits!r}"
            raise ValueError(text)
        kind = GridKind.RANGE_CENTER if grid.reconstruction == "center" else GridKind.RANGE_ENDPOINT
        bits = grid.num_bits or 0  # 0: the sample decides
        coding = Coding.SINGLE if bits <= MAX_CODED_BITS else Coding.FIXED
        rule = SampleRule(grid.c, grid.entropy_bits, grid.sample_fraction, grid.max_bits, grid.seed)
        return KernelGrid(QuantizerHead(kind, bits, coding, WIRE_TABLE), sample=rule)
    raise TypeError(f"grid must be a SigmaGrid or a RangeGrid, got {type(grid).__name__}")


class DeviceTensor(NamedTuple):
    """A tensor that the kernels measure as a whole: ``values * inv_scale + residual``.

    Where there is a residual, each :class:`CodedRange` of the tensor has one to write, too.
    Addresses are of device memory, 0 for none. If ``grid`` is None, the values travel uncompressed, and are measured
    only if ``measured`` is True. If ``keeps_zero`` is True, the residual is not added where all values are 0.
    """

    values: int
    elements: int
    grid: Grid | None = None
    residual: int = 0
    inv_scale: int = 0
    measured: bool = True
    keeps_zero: bool = False

    def described(self) -> KernelTensor:
        """Returns the record that the core takes."""
        return KernelTensor(
            self.values,
            self.elements,
            self.residual,
            self.inv_scale,
            *(KernelGrid() if self.grid is None else kernel_grid(self.grid, self.residual != 0)),
            nonfinite_is_constant=self.measured,
            as_it_is=not self.measured,
            zero_keeps_residual=self.keeps_zero,
        )


def address(tensor: torch.Tensor | None, element: int = 0) -> int:
    """Returns the address of an element; 0 for None.

    Example:
        >>> address(None)
        0
    """
    return 0 if tensor is None else memory_address("tensor", tensor) + element * tensor.element_size()


def own_code_bits(grid: Grid, has_residual: bool = False) -> int:
    """Returns the maximum number of bits of a symbol in a segment with its own code; 0 without such segments.

    Example:
        >>> from qcomm import SigmaGrid
        >>> own_code_bits(SigmaGrid(1.0, coding="single")), own_code_bits(RangeGrid())
        (0, 10)
    """
    if isinstance(grid, RangeGrid):
        return min(grid.max_num_bits, MAX_CODED_BITS)
    asked = kernel_grid(grid, has_residual)
    if asked.quantizer.coding == Coding.RUNS:
        return 0
    brings_code = asked.sample.choose_code or asked.quantizer.table == WIRE_TABLE
    return grid.num_bits if brings_code and grid.num_bits <= MAX_CODED_BITS else 0


def read_quantizers(found: torch.Tensor) -> list[Quantizer]:
    """Reads the quantizers in the bytes that :meth:`Encoder.run` copies out, and waits for the device."""
    head = found.cpu().view(-1, QUANTIZER_BYTES)
    rows = zip(head[:, :4].tolist(), head[:, 8:].contiguous().view(torch.float64).tolist(), strict=True)
    return [Quantizer(GridKind(g), n, Coding(c), t, p0, p1) for (g, n, c, t), (p0, p1) in rows]


class Workspace:
    """Memory that plans use one after another on one stream, as large as the largest of them needs.

    The static codes, which all plans read, are part of it and are freed with it.

    Args:
        device: device of the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._captured: list[torch.Tensor] = []
        self._codes: torch.Tensor | None = None  # plans that are only asked for their bounds need none

    def codes(self) -> torch.Tensor:
        """Returns the static codes on the device, always as the same tensor. The first call copies them there."""
        if self._codes is None:
            self._codes = _native_cuda.static_codes(self.device)
        return self._codes

    def reserve(self, size: int) -> None:
        """Allocates ``size`` bytes and the codes, so that later runs allocate nothing."""
        self.codes()
        self.take(size)

    def take(self, size: int) -> torch.Tensor:
        """Returns at least ``size`` bytes, valid until the next call.

        New memory is allocated only if ``size`` is larger than ever before.
        """
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self._memory.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.append(self._memory)  # the graph holds its address
        return self._memory


class Encoder:
    """A plan that encodes the same tensors into the same packets, any number of times.

    Args:
        dtype: dtype of the packets, float32 or float64.
        steps: symbols per lane in a block.
        tensors: tensors, each of which is measured as a whole.
        segments: ranges of the tensors, in the order in which the packets carry them.
        packets: memory of the packets. Their dimensions are ignored: a packet is flat.
        workspace: memory on the same device. Other plans that use it must not run between :meth:`run` and
            :meth:`add_own`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        steps: int,
        tensors: Sequence[DeviceTensor],
        segments: Sequence[CodedRange],
        packets: Sequence[PacketSlot],
        workspace: Workspace,
    ) -> None:
        device = workspace.device
        flat, first = [], 0
        for packet in packets:
            last = first + packet.segments
            flat.append(packet._replace(dims=(sum(segment.elements for segment in segments[first:last]),)))
            first = last
        described = [tensor.described() for tensor in tensors]
        self._plan = _native_cuda.core().EncodePlan(DTYPE_NUMBERS[dtype], steps, True, described, segments, flat)
        self._blob = _native_cuda.on_device(self._plan.blob(), device)
        self._device, self._tensors, self._packets = device, len(tensors), len(packets)
        self._workspace, self._size = workspace, self._plan.workspace_bytes()
        self.sizes = torch.zeros(max(1, len(packets)), dtype=torch.int64, device=device)

    def bound(self) -> int:
        """Returns a number of bytes that suffices for each of the packets, for all values."""
        return max((self._plan.bound(number) for number in range(self._packets)), default=0)

    def reserve(self) -> None:
        """Allocates the memory that runs need, so that runs allocate nothing."""
        self._workspace.reserve(self._size)

    def run(self, account: torch.Tensor, quantizers: torch.Tensor) -> None:
        """Measures and encodes, adds the counts to ``account``, and copies the quantizers to ``quantizers``.

        Args:
            account: int64, in the order of ``ACCOUNT``.
            quantizers: uint8, 24 bytes per tensor.
        """
        workspace = self._workspace.take(self._size)
        codes, stream = self._workspace.codes(), _native_cuda.stream(self._device)
        places = self._blob.data_ptr(), codes.data_ptr(), workspace.data_ptr(), self.sizes.data_ptr()
        self._plan.encode(*places, stream)
        self._plan.count(places[0], places[2], places[3], account.data_ptr(), stream)
        at = self._plan.quantizers(places[2]) - places[2]
        quantizers.copy_(workspace[at : at + QUANTIZER_BYTES * self._tensors])

    def add_own(self, runs: "RunCopier", inv_scale: int, add: bool) -> None:
        """Copies values that stay on this rank, after :meth:`run`, with their residuals, which become 0.

        Args:
            runs: runs of values, whose ``tensor`` is a number in ``tensors``.
            inv_scale: address of a float64, or 0.
            add: add to the target instead of overwriting it.
        """
        stream, workspace = _native_cuda.stream(self._device), self._workspace.take(self._size)
        runs.plan.add_own(runs.blob.data_ptr(), self._plan, workspace.data_ptr(), inv_scale, add, stream)


class Decoder:
    """A plan that decodes packets from the same addresses, any number of times.

    Args:
        dtype, steps: dtype and block size of the packets.
        max_segments: maximum number of segments in a packet.
        tasks: one for each packet.
        own_code_bits: see :func:`own_code_bits`.
        workspace: memory on the device of the packets.
        takes_runs: packets may have segments that are coded as runs of zeros, see :func:`codes_runs`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        steps: int,
        max_segments: int,
        tasks: Sequence[DecodeTask],
        own_code_bits: int,
        workspace: Workspace,
        takes_runs: bool = False,
    ) -> None:
        device, core = workspace.device, _native_cuda.core()
        plan = core.DecodePlan(DTYPE_NUMBERS[dtype], steps, max_segments, tasks, own_code_bits, takes_runs)
        self._plan, self._blob = plan, _native_cuda.on_device(plan.blob(), device)
        self._device, self._workspace, self._size = device, workspace, plan.workspace_bytes()

    def reserve(self) -> None:
        """Allocates the memory that runs need, so that runs allocate nothing."""
        self._workspace.reserve(self._size)

    def decode(self, faults: int) -> None:
        """Decodes each packet to its own values.

        Args:
            faults: address of one int32 per packet.
        """
        self._run(self._plan.decode, faults)

    def decode_sum(self, faults: int, add: bool) -> None:
        """Writes the sum of the packets, in their order, to the first one's values, or adds it to them."""
        self._run(self._plan.decode_sum, faults, add)

    def _run(self, operation: Any, faults: int, *options: bool) -> None:
        workspace = self._workspace.take(self._size)
        codes, stream = self._workspace.codes(), _native_cuda.stream(self._device)
        operation(self._blob.data_ptr(), codes.data_ptr(), workspace.data_ptr(), faults, *options, stream)


class RunCopier:
    """A plan that copies many runs of values in one launch.

    Args:
        dtype: dtype of the targets. Sources are float64 for float64 targets, and float32 otherwise.
        runs: runs of values, all of them on ``device``.
    """

    def __init__(self, dtype: torch.dtype, runs: Sequence[Run], device: torch.device) -> None:
        self.plan = _native_cuda.core().RunPlan(DTYPE_NUMBERS[dtype], runs)
        self.blob = _native_cuda.on_device(self.plan.blob(), device)
        self._device = device

    def copy(self, divisor: float = 1.0, factor: int = 0, faults: int = 0) -> None:
        """Copies values / divisor * factor, and NaN where one of the run's faults is not 0."""
        self.plan.copy(self.blob.data_ptr(), divisor, factor, faults, _native_cuda.stream(self._device))
