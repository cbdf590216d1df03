"""What one rank computes of a two-phase mean: encode, reduce, decode, a slice at a time; no messages."""

import math
from collections.abc import Sequence

import torch

from qcomm.codec import Code, GridKind, Quantizer, Segment, encode
from qcomm.collectives.layout import Chunk, Piece
from qcomm.collectives.options import owner_grid
from qcomm.collectives.packing import Measured, choose, chunk_segments, gather_runs, scatter_chunk, size_limit, unpack
from qcomm.collectives.task import MeanTask
from qcomm.collectives.two_phase_schedule import Slice
from qcomm.errors import PacketError

__all__ = ["MeanSteps"]


class MeanSteps:
    """The steps of one collective on one rank.

    A slice is encoded before it is reduced, and reduced before it is decoded; before any of it the rank begins. A
    tensor is measured whole when the first slice needs it, which is before any part of it is overwritten.

    Args:
        task: without a fault.
        rank: this one, owner of ``task.layout.chunks[rank]``.
        slices: of the layout.

    Attributes:
        wire_dtype: sums need more than 16 bits, so what they are made of travels in float32, or in float64 if it is
            float64.
    """

    def __init__(self, task: MeanTask, rank: int, slices: Sequence[Slice]) -> None:
        self.rank = rank
        self.wire_dtype = task.wire_dtype
        self._task = task
        self._slices = slices
        self._inv_scale = 1.0 / task.scale
        self._values = self._scratch = task.buffer
        self._own_pieces: dict[int, Piece] = {}  # by tensor
        self._spent: set[int] = set()  # tensors without a local residual for the own piece
        self._travelling: set[int] = set()  # tensors of which some part is another rank's to reduce
        self._choices: dict[int, Measured] = {}  # by tensor
        self._mean_codes: dict[int, Code] = {}  # by tensor
        self._means: dict[int, torch.Tensor | None] = {}  # by slice
        self._packets: dict[int, list[tuple[Chunk, int]]] = {1: [], 2: []}

    def begin(self) -> None:
        """Gets ready; the residuals change hands where the layout is a new one."""
        task, layout = self._task, self._task.layout
        self._values = task.buffer.to(self.wire_dtype)
        largest = max(chunk.count for part in self._slices for chunk in part)
        self._scratch = torch.empty(largest, dtype=self.wire_dtype)
        if task.feedback is not None:
            task.feedback.adopt(layout, self.rank)
        for piece in layout.chunks[self.rank].pieces:
            self._own_pieces[piece.tensor] = piece
            key = layout.tensors[piece.tensor].key
            if task.feedback is None or task.feedback.is_spent(key, piece.start, piece.length):
                self._spent.add(piece.tensor)
        others = (chunk for owner, chunk in enumerate(layout.chunks) if owner != self.rank)
        self._travelling = {piece.tensor for chunk in others for piece in chunk.pieces}

    def encode(self, number: int) -> list[torch.Tensor | None]:
        """This rank's values plus residuals: a packet for each owner, None where there is nothing to send."""
        task = self._task
        task.telemetry.mark(task.index, "encode")
        with task.telemetry.timed("encode_seconds"):
            packets: list[torch.Tensor | None] = []
            for owner, chunk in enumerate(self._slices[number]):
                segments = [] if owner == self.rank else self._segments(chunk)
                packets.append(self._packet(1, chunk, segments, self._inv_scale))
        return packets

    def reduce(self, number: int, packets: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """The packet of the mean over all ranks of this rank's part; None if it owns nothing of the slice."""
        task, chunk = self._task, self._slices[number][self.rank]
        task.telemetry.mark(task.index, "reduce")
        mean = self._scratch[: chunk.count]
        with task.telemetry.timed("decode_seconds"):
            for sender, packet in enumerate(packets):
                if sender == self.rank:
                    self._add_own(chunk, mean, accumulate=sender > 0)
                elif packet is not None:
                    self._decode(packet, mean, sender, accumulate=sender > 0)
            mean.div_(task.layout.world_size)
        with task.telemetry.timed("encode_seconds"):
            self._means[number] = self._packet(2, chunk, self._mean_segments(chunk, mean), 1.0)
        return self._means[number]

    def decode(self, number: int, means: Sequence[torch.Tensor | None]) -> None:
        """Writes the slice's means into the buffer."""
        task = self._task
        task.telemetry.mark(task.index, "decode")
        with task.telemetry.timed("decode_seconds"):
            for owner, chunk in enumerate(self._slices[number]):
                packet = self._means.pop(number) if owner == self.rank else means[owner]
                if packet is None:
                    continue
                self._packets[2].append((chunk, packet.numel()))
                in_place = len(chunk.places) == 1 and task.buffer.dtype == self.wire_dtype
                if in_place:
                    offset = chunk.places[0][0]
                    values = task.buffer[offset : offset + chunk.count]
                else:
                    values = self._scratch[: chunk.count]
                self._decode(packet, values, owner, accumulate=False)
                if task.scale != 1.0:
                    values.mul_(task.scale)
                if not in_place:
                    scatter_chunk(values, chunk, task.buffer)

    def finish(self) -> None:
        """After the end: counts what was sent and decoded."""
        feedback = self._task.feedback
        for number, piece in self._own_pieces.items():
            # Residuals that took no part are as they were.
            if feedback is not None and (number in self._spent or self._choices[number][1] is not None):
                feedback.spend(self._task.layout.tensors[number].key, piece.start, piece.length)
        for phase, packets in self._packets.items():
            self._task.telemetry.count_packets(
                phase, [chunk for chunk, _ in packets], [size for _, size in packets], self.wire_dtype.itemsize
            )

    def _packet(self, phase: int, chunk: Chunk, segments: Sequence[Segment], inv_scale: float) -> torch.Tensor | None:
        if not segments:
            return None
        packet = encode(segments, inv_scale=inv_scale, num_threads=self._task.options.num_threads)
        limit = size_limit(chunk, self.wire_dtype)
        if packet.numel() > limit:
            raise PacketError(f"a packet of {packet.numel()} bytes, where the others expect at most {limit}")
        if phase == 1:
            self._packets[1].append((chunk, packet.numel()))
        return packet

    def _segments(self, chunk: Chunk) -> list[Segment]:
        """This rank's values of a chunk."""
        for piece in chunk.pieces:
            self._choice(piece.tensor)
        return chunk_segments(self._values, chunk, self._choices)

    def _mean_segments(self, chunk: Chunk, mean: torch.Tensor) -> list[Segment]:
        """The mean of a part of the own chunk, each piece measured anew, with the owner's residuals."""
        task, segments, position = self._task, [], 0
        for piece in chunk.pieces:
            values = mean[position : position + piece.length]
            position += piece.length
            key, whole = task.layout.tensors[piece.tensor].key, self._own_pieces[piece.tensor]
            residual = None
            if task.feedback is not None:
                kept = task.feedback.owner(key, whole.start, whole.length)
                residual = kept[piece.start - whole.start :][: piece.length]
            # Slices of a tensor are alike: one sample of them chooses the code for all.
            code = self._mean_codes.get(piece.tensor)
            quantizer, residual = choose(
                values, owner_grid(task.options.grid), residual, 1.0, task.options.num_threads, code
            )
            if quantizer.grid == GridKind.SIGMA:
                self._mean_codes[piece.tensor] = quantizer.coding, quantizer.table
            if piece.tensor not in self._travelling:
                task.telemetry.note_quantizer(key, quantizer)
            segments.append(Segment(values, quantizer, residual))
        if chunk.raw_count:
            segments.append(Segment(mean[position:], Quantizer.raw()))
        return segments

    def _add_own(self, chunk: Chunk, mean: torch.Tensor, accumulate: bool) -> None:
        """This rank's share of the own chunk, which need not be quantized."""
        position = 0
        for piece in chunk.pieces:
            quantizer, residual = self._choice(piece.tensor)
            part = mean[position : position + piece.length]
            position += piece.length
            if math.isnan(quantizer.p0):
                part.fill_(math.nan)
                continue
            self._add(part, self._part(piece), accumulate)
            if residual is not None and piece.tensor not in self._spent:
                kept = residual[piece.start : piece.start + piece.length]
                part.add_(kept)
                kept.zero_()
        if chunk.raw_runs:
            self._add(mean[position:], gather_runs(self._values, chunk.raw_runs), accumulate)

    def _add(self, total: torch.Tensor, values: torch.Tensor, accumulate: bool) -> None:
        if accumulate:
            total.add_(values, alpha=self._inv_scale)
        else:
            torch.mul(values, self._inv_scale, out=total)

    def _choice(self, number: int) -> Measured:
        """The quantizer for a tensor of this rank, and its residual if it takes part."""
        if number not in self._choices:
            task, tensor = self._task, self._task.layout.tensors[number]
            values = self._values[tensor.offset : tensor.offset + tensor.numel]
            residual = None if task.feedback is None else task.feedback.local(tensor.key, tensor.numel)
            # What stays here whole is not quantized.
            grid = task.options.grid if number in self._travelling else None
            self._choices[number] = choose(values, grid, residual, self._inv_scale, task.options.num_threads)
            quantizer = self._choices[number][0]
            if number in self._travelling:
                task.telemetry.note_quantizer(tensor.key, quantizer)
            task.telemetry.add(nonfinite_tensors=math.isnan(quantizer.p0))
        return self._choices[number]

    def _part(self, piece: Piece) -> torch.Tensor:
        return self._values[piece.offset : piece.offset + piece.length]

    def _decode(self, packet: torch.Tensor, out: torch.Tensor, sender: int, accumulate: bool) -> None:
        unpack(packet, out, sender, accumulate, self._task.options.num_threads)
