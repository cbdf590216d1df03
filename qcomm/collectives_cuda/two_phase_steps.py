"""The steps of a two-phase mean on a device on one rank: encode, reduce, decode, without messages or waiting.

The steps compute the same values as :mod:`qcomm.collectives.two_phase_steps` on the CPU, bit for bit, in one slice. The
arguments of the kernels are prepared when the object is made. Afterwards a collective is the same few launches,
whatever the bucket holds.
"""

from collections.abc import Sequence, Set

import torch

from qcomm.codec import (
    ACCOUNT,
    QUANTIZER_BYTES,
    TOTAL_BYTES_AT,
    CodedRange,
    Decoder,
    DecodeTask,
    DeviceTensor,
    Encoder,
    Grid,
    PacketSlot,
    Quantizer,
    Run,
    RunCopier,
    SigmaGrid,
    Workspace,
    address,
    codes_runs,
    default_block_steps,
    own_code_bits,
    read_quantizers,
)
from qcomm.collectives import BucketLayout, Chunk, MeanTask, ReduceOptions, TensorSpec
from qcomm.collectives_cuda.slots import Slots

__all__ = ["Accounts", "DeviceSteps", "Workspaces", "packet_bounds"]

LARGEST = ACCOUNT.index("largest_packet")
BLOCK_SPLIT = 2  # of the default's size, see _block_steps


def packet_bounds(layout: BucketLayout, options: ReduceOptions, dtype: torch.dtype, device: torch.device) -> Slots:
    """Returns bytes that suffice for any packet of a phase, whatever the values: equal on all ranks."""
    sizes = []
    for grid_of in (options.grid_of, options.mean_grid_of):
        tensors = [DeviceTensor(0, tensor.numel, grid_of(tensor)) for tensor in layout.tensors]
        segments, packets = [], []
        for chunk in layout.chunks:
            if not chunk.count:
                continue
            segments += [CodedRange(piece.tensor, 0, piece.length) for piece in chunk.pieces]
            if chunk.raw_count:
                segments.append(CodedRange(len(tensors), 0, chunk.raw_count))
                tensors.append(DeviceTensor(0, chunk.raw_count, measured=False))
            packets.append(PacketSlot(_segment_count(chunk)))
        sizes.append(
            Encoder(dtype, _block_steps(layout, options), tensors, segments, packets, Workspace(device)).bound()
        )
    return Slots(-(-sizes[0] // 16) * 16, -(-sizes[1] // 16) * 16)


class Accounts:
    """A device's counts of a bucket until the host reads them.

    Attributes:
        values, means: int64, see ``ACCOUNT``: of the packets of values and of the own mean.
        mean_bytes: int64 0-dim, of the packets of all means.
        faults: int64 0-dim, the largest Fault (csrc/include/qcomm/cuda.h).
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(ACCOUNT), dtype=torch.int64, device=device)
        self.means = torch.zeros_like(self.values)
        self.mean_bytes, self.faults = torch.zeros_like(self.values[0]), torch.zeros_like(self.values[0])

    def for_agreement(self) -> tuple[torch.Tensor, ...]:
        """Returns views of the numbers that ranks agree on: the largest packets of both phases, and the fault.

        The caller clears them after the agreement.
        """
        return self.values[LARGEST], self.means[LARGEST], self.faults

    def take(self) -> tuple[dict[str, int], dict[str, int], int]:
        """Returns the accounts of values and of means by name, and ``mean_bytes``, as numbers.

        Their counts restart at zero. Waits for the device. The numbers for the agreement stay.
        """
        found = self.values.tolist(), self.means.tolist(), int(self.mean_bytes)
        for account in (self.values, self.means):
            account[:LARGEST].zero_()
            account[LARGEST + 1 :].zero_()
        self.mean_bytes.zero_()
        return dict(zip(ACCOUNT, found[0], strict=True)), dict(zip(ACCOUNT, found[1], strict=True)), found[2]


class Workspaces:
    """Workspaces of a bucket's plans, of encoders and of decoders. Encoders keep data there until ``add_own``."""

    def __init__(self, device: torch.device) -> None:
        self.encode, self.decode = Workspace(device), Workspace(device)


class DeviceSteps:
    """The steps of one bucket on one rank.

    Args:
        task: its layout, grid, feedback and the address of its buffer are kept.
        rank: this process, owner of ``task.layout.chunks[rank]``.
        slots: capacities.
        factors: None, or two float64 on the device: the inverse of the gradient scale, and the scale.
        accounts: the counts that the steps add to.
        workspaces: may be shared by buckets that are averaged one after another.

    Attributes:
        outgoing, incoming: uint8 [W, capacity]: this rank's packet for each owner, each rank's packet for this owner.
        mean: uint8 [capacity]: the packet of this owner's mean; ``means``: uint8 [W, capacity], those of all.
    """

    def __init__(
        self,
        task: MeanTask,
        rank: int,
        slots: Slots,
        factors: torch.Tensor | None,
        accounts: "Accounts",
        workspaces: "Workspaces",
    ) -> None:
        self.slots, self._rank, self._task_dtype = slots, rank, task.buffer.dtype
        self._layout, self._options, self._feedback = task.layout, task.options, task.feedback
        self._buffer, self._factors = task.buffer, factors
        self._accounts, self._workspaces = accounts, workspaces
        self._dtype, self._device = task.wire_dtype, task.buffer.device
        self._steps = _block_steps(self._layout, self._options)
        self._chunk = self._layout.chunks[rank]
        world_size = self._layout.world_size
        self.outgoing = self._bytes(world_size, slots.values)
        self.incoming = self._bytes(world_size, slots.values)
        self.mean, self.means = self._bytes(slots.means), self._bytes(world_size, slots.means)
        self._values = self._buffer if self._buffer.dtype == self._dtype else self._floats(self._layout.elements)
        self._mean = self._floats(self._chunk.count)
        others = (chunk for owner, chunk in enumerate(self._layout.chunks) if owner != rank)
        self._travelling = {piece.tensor for chunk in others for piece in chunk.pieces}
        self._gathered: dict[int, torch.Tensor] = {}  # values of merged tensors
        self._make_encoder()
        self._make_reducer()
        self._make_decoder()
        for plan in (self._encoder, self._mean_encoder, self._before, self._after, self._decoder):
            if plan is not None:
                plan.reserve()

    @staticmethod
    def residuals(task: MeanTask, rank: int) -> tuple[int, ...]:
        """Returns the addresses of the residuals that the steps use; new residuals need new steps."""
        feedback, layout, device = task.feedback, task.layout, task.buffer.device
        if feedback is None:
            return ()
        tensors = [tensor for tensor in layout.tensors if tensor.compressed]
        local = [feedback.local_of(tensor, device).data_ptr() for tensor in tensors]
        pieces = layout.chunks[rank].pieces
        owned = [feedback.owner_of(layout.tensors[p.tensor], p.start, p.length, device).data_ptr() for p in pieces]
        return *local, *owned

    def encode(self) -> None:
        """Encodes this rank's values plus residuals: a packet for each other owner, in ``outgoing``."""
        if self._values is not self._buffer:
            self._values.copy_(self._buffer)
        self._clear(self.outgoing)
        self._gather.copy()
        self._encoder.run(self._accounts.values, self._value_quantizers)

    def reduce(self) -> None:
        """Computes the mean over all ranks of the own chunk, from ``incoming``, and its packet in ``mean``."""
        if self._before is not None:
            self._before.decode_sum(address(self._value_faults), add=False)
        inv_scale = address(self._factors)
        self._encoder.add_own(self._own, inv_scale, add=self._before is not None)
        if self._after is not None:
            self._after.decode_sum(address(self._value_faults, self._first_after), add=True)
        self._divide.copy(float(self._layout.world_size), faults=address(self._value_faults))
        self._note(self._value_faults)
        self._clear(self.mean)
        if self._mean_encoder is not None:
            self._mean_encoder.run(self._accounts.means, self._mean_quantizers)

    def decode(self) -> None:
        """Writes ``means`` into the buffer, and NaN in the place of a chunk whose packet is damaged."""
        self._decoder.decode(address(self._mean_faults))
        factor = 0 if self._factors is None else address(self._factors, 1)
        self._scatter.copy(factor=factor, faults=address(self._mean_faults))
        sizes = self.means.view(torch.int64)[:, TOTAL_BYTES_AT // 8]
        self._accounts.mean_bytes += sizes.clamp(0, self.slots.means).sum()  # a damaged packet may claim any size
        self._note(self._mean_faults)

    def largest(self, phase: int) -> torch.Tensor:
        """Returns the maximum bytes of this rank's packets in the last collective, int64 [1]."""
        encoder = self._encoder if phase == 1 else self._mean_encoder
        return self._integers(1) if encoder is None else encoder.sizes.max().abs().reshape(1)

    def quantizers(self) -> list[tuple[TensorSpec, Quantizer]]:
        """Returns the last quantizer of each compressed tensor.

        It is that of the values if they travelled, otherwise that of the mean.
        """
        compressed = [number for number, tensor in enumerate(self._layout.tensors) if tensor.compressed]
        values = dict(zip(compressed, read_quantizers(self._value_quantizers), strict=False))
        means = zip(self._chunk.pieces, read_quantizers(self._mean_quantizers), strict=False)
        found = {piece.tensor: quantizer for piece, quantizer in means}
        found |= {number: quantizer for number, quantizer in values.items() if number in self._travelling}
        return [(self._layout.tensors[number], quantizer) for number, quantizer in found.items()]

    def _make_encoder(self) -> None:
        layout, feedback = self._layout, self._feedback
        inv_scale, keeps_zero = address(self._factors), feedback is not None
        tensors: list[DeviceTensor] = []
        gather: list[Run] = []
        numbers: dict[int, int] = {}  # of the compressed tensors, among those that are measured
        for number, tensor in enumerate(layout.tensors):
            if not tensor.compressed:
                continue
            numbers[number] = len(tensors)
            travels = number in self._travelling  # a tensor that stays here whole is not quantized
            residual = self._local(number) if travels else 0
            if tensor.members:
                self._gathered[number], position = self._floats(tensor.numel), 0
                for offset, length in tensor.runs:
                    target = address(self._gathered[number], position)
                    gather.append(Run(address(self._values, offset), target, length))
                    position += length
            grid, at = self._options.grid_of(tensor) if travels else None, self._at(number)
            tensors.append(DeviceTensor(at, tensor.numel, grid, residual, inv_scale, keeps_zero=keeps_zero))
        others = [chunk for owner, chunk in enumerate(layout.chunks) if owner != self._rank]
        self._raw = self._floats(sum(chunk.raw_count for chunk in others))
        self._value_quantizers = self._bytes(QUANTIZER_BYTES * (len(tensors) + sum(bool(c.raw_count) for c in others)))
        segments: list[CodedRange] = []
        packets, raw = [], 0
        for owner, chunk in enumerate(layout.chunks):
            if owner == self._rank or not chunk.count:
                continue
            for piece in chunk.pieces:
                residual = 0 if feedback is None else self._local(piece.tensor, piece.start)
                segments.append(CodedRange(numbers[piece.tensor], piece.start, piece.length, residual))
            if chunk.raw_count:
                segments.append(CodedRange(len(tensors), 0, chunk.raw_count))
                tensors.append(
                    DeviceTensor(address(self._raw, raw), chunk.raw_count, inv_scale=inv_scale, measured=False)
                )
            for offset, length in chunk.raw_runs:
                gather.append(Run(address(self._values, offset), address(self._raw, raw), length))
                raw += length
            packets.append(PacketSlot(_segment_count(chunk), address(self.outgoing[owner]), self.slots.values))
        self._gather = RunCopier(self._dtype, gather, self._device)
        self._encoder = Encoder(self._dtype, self._steps, tensors, segments, packets, self._workspaces.encode)
        own, position = [], 0
        for piece in self._chunk.pieces:
            residual = 0 if feedback is None else self._local(piece.tensor, piece.start)
            source, target = self._at(piece.tensor, piece.start), address(self._mean, position)
            own.append(Run(source, target, piece.length, tensor=numbers[piece.tensor], residual=residual))
            position += piece.length
        for offset, length in self._chunk.raw_runs:
            own.append(Run(address(self._values, offset), address(self._mean, position), length))
            position += length
        self._own = RunCopier(self._dtype, own, self._device)

    def _make_reducer(self) -> None:
        """Prepares the sum of the packets before and after the own values, in rank order, and the mean's packet."""
        chunk = self._chunk
        senders = [rank for rank in range(self._layout.world_size) if rank != self._rank and chunk.count]
        self._value_faults = self._fault_words(len(senders))
        self._first_after = sum(rank < self._rank for rank in senders)
        self._before = self._adder([rank for rank in senders if rank < self._rank])
        self._after = self._adder([rank for rank in senders if rank > self._rank])
        whole = Run(address(self._mean), address(self._mean), chunk.count, faults=len(senders))
        self._divide = RunCopier(self._dtype, [whole], self._device)
        tensors: list[DeviceTensor] = []
        segments, position = [], 0
        keeps_zero = self._feedback is not None
        for number, piece in enumerate(chunk.pieces):
            tensor, residual = self._layout.tensors[piece.tensor], 0
            if self._feedback is not None:
                residual = address(self._feedback.owner_of(tensor, piece.start, piece.length, self._device))
            at, grid = address(self._mean, position), self._options.mean_grid_of(tensor)
            tensors.append(DeviceTensor(at, piece.length, grid, residual, keeps_zero=keeps_zero))
            segments.append(CodedRange(number, 0, piece.length, residual))
            position += piece.length
        if chunk.raw_count:
            segments.append(CodedRange(len(tensors), 0, chunk.raw_count))
            tensors.append(DeviceTensor(address(self._mean, position), chunk.raw_count, measured=False))
        self._mean_quantizers = self._bytes(QUANTIZER_BYTES * len(tensors))
        self._mean_encoder: Encoder | None = None
        if chunk.count:
            packet = PacketSlot(len(segments), address(self.mean), self.slots.means)
            self._mean_encoder = Encoder(self._dtype, self._steps, tensors, segments, [packet], self._workspaces.encode)

    def _adder(self, senders: Sequence[int]) -> Decoder | None:
        if not senders:
            return None
        tasks = [
            DecodeTask(address(self.incoming[rank]), self.slots.values, address(self._mean), self._chunk.count)
            for rank in senders
        ]
        grids = {self._options.grid_of(tensor) for tensor in self._layout.tensors}
        return self._decoder_of(tasks, grids, _segment_count(self._chunk))

    def _decoder_of(self, tasks: Sequence[DecodeTask], grids: Set[Grid], segments: int) -> Decoder:
        has_residual = self._feedback is not None
        bits = max(own_code_bits(grid, has_residual) for grid in grids)
        runs = any(codes_runs(grid, has_residual) for grid in grids)
        return Decoder(self._dtype, self._steps, segments, tasks, bits, self._workspaces.decode, runs)

    def _make_decoder(self) -> None:
        """Prepares the decoders of the means.

        Chunks with contiguous elements are decoded into the buffer, the others by way of a scratch.
        """
        present = [(owner, chunk) for owner, chunk in enumerate(self._layout.chunks) if chunk.count]
        in_place = [
            len(chunk.places) == 1 and self._buffer.dtype == self._dtype and self._factors is None
            for _, chunk in present
        ]
        scattered = sum(chunk.count for (_, chunk), here in zip(present, in_place, strict=True) if not here)
        self._scratch = self._floats(scattered)
        self._mean_faults = self._fault_words(len(present))
        tasks, runs, position = [], [], 0
        for number, ((owner, chunk), here) in enumerate(zip(present, in_place, strict=True)):
            source = address(self._buffer, chunk.places[0][0]) if here else address(self._scratch, position)
            tasks.append(DecodeTask(address(self.means[owner]), self.slots.means, source, chunk.count))
            for offset, length in chunk.places:
                runs.append(Run(source, address(self._buffer, offset), length, first_fault=number, faults=1))
                source += length * self._dtype.itemsize
            position += 0 if here else chunk.count
        segments = max((_segment_count(chunk) for _, chunk in present), default=1)
        grids = {self._options.mean_grid_of(tensor) for tensor in self._layout.tensors}
        self._decoder = self._decoder_of(tasks, grids, segments)
        self._scatter = RunCopier(self._task_dtype, runs, self._device)

    def _at(self, number: int, start: int = 0) -> int:
        """Returns the address of an element of a tensor's values."""
        if number in self._gathered:
            return address(self._gathered[number], start)
        return address(self._values, self._layout.tensors[number].offset + start)

    def _local(self, number: int, start: int = 0) -> int:
        """Returns the address of an element of a tensor's local residual, 0 if there is none."""
        if self._feedback is None:
            return 0
        return address(self._feedback.local_of(self._layout.tensors[number], self._device), start)

    def _note(self, faults: torch.Tensor) -> None:
        torch.maximum(self._accounts.faults, faults.max(), out=self._accounts.faults)

    def _clear(self, slots: torch.Tensor) -> None:
        """Clears slots: one that is not written to must not hold the packet of an earlier collective."""
        slots.view(torch.int32)[..., :1].zero_()

    def _bytes(self, *shape: int) -> torch.Tensor:
        # Zeros: slots are sent whole, and the bytes behind a packet must not reveal old memory.
        return torch.zeros(shape, dtype=torch.uint8, device=self._device)

    def _integers(self, shape: int | tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def _fault_words(self, count: int) -> torch.Tensor:
        return torch.zeros(max(1, count), dtype=torch.int32, device=self._device)

    def _floats(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=self._dtype, device=self._device)


def _segment_count(chunk: Chunk) -> int:
    return len(chunk.pieces) + bool(chunk.raw_count)


def _block_steps(layout: BucketLayout, options: ReduceOptions) -> int:
    """Returns the number of symbols per lane in a block.

    A warp codes a block, and a bucket has too few blocks for the schedulers of a GPU: half blocks take half the time,
    and 1.1 % more bytes. Blocks of zero runs, on which several warps work, would take more bytes than that.
    """
    steps = default_block_steps(max(chunk.count for chunk in layout.chunks))
    grids = {grid_of(tensor) for tensor in layout.tensors for grid_of in (options.grid_of, options.mean_grid_of)}
    runs = any(isinstance(grid, SigmaGrid) and grid.codes_runs for grid in grids)
    return steps if runs else steps // BLOCK_SPLIT
