"""The steps of a two-phase mean on one rank: encode, reduce, decode, a slice at a time, without messages."""

import math
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

import torch

from qcomm.codec import CPU, Code, Coding, GridKind, Quantizer, Segment, encode
from qcomm.collectives.error_feedback import NO_RESIDUALS
from qcomm.collectives.layout import BucketLayout, Chunk, Piece
from qcomm.collectives.packing import (
    Measured,
    Samples,
    choose,
    chunk_segments,
    gather_runs,
    keep_in_range,
    recover,
    scatter_chunk,
    size_limit,
    unpack,
)
from qcomm.collectives.task import MeanTask
from qcomm.collectives.two_phase_schedule import Slice, Step, cut_slices, schedule
from qcomm.errors import PacketError

__all__ = ["MeanSteps", "Plan", "plan_slices"]


class Plan(NamedTuple):
    """The slices of a buffer, the largest packets that they can have, and the order of the steps.

    Attributes:
        slices: of the layout.
        limits: maximum bytes of each rank's packet, by slice and rank.
        order: of the steps.
        wire_dtype: of the values in packets.
    """

    slices: tuple[Slice, ...]
    limits: list[list[int]]
    order: list[tuple[Step, int]]
    wire_dtype: torch.dtype


def plan_slices(layout: BucketLayout, slice_elements: int, wire_dtype: torch.dtype) -> Plan:
    """Returns the plan of a collective, which follows from the arguments and is equal on all ranks."""
    slices = cut_slices(layout, slice_elements)
    limits = [[size_limit(chunk, wire_dtype) for chunk in part] for part in slices]
    return Plan(slices, limits, schedule(len(slices)), wire_dtype)


class MeanSteps:
    """The steps of one collective on one rank.

    A slice is encoded before it is reduced, and reduced before its mean is encoded and decoded. :meth:`begin` comes
    first. A tensor is measured whole when the first slice needs it, before any part of it is overwritten.

    Args:
        task: of the collective.
        rank: this process, owner of ``task.layout.chunks[rank]``.
        plan: slices of the layout, with the maximum sizes of their packets.
    """

    averages = True  # the owners' sums are quantized as means

    def __init__(self, task: MeanTask, rank: int, plan: Plan) -> None:
        self.rank = rank
        self._task, self._plan = task, plan
        self._inv_scale = 1.0 / task.scale
        # Multiplying by the inverse of a power of two is dividing by it, bit for bit. The encoder does so on the way.
        world_size = task.layout.world_size
        self._share = 1.0 / world_size if world_size & (world_size - 1) == 0 else 1.0
        self._values = self._scratch = task.buffer
        self._own_pieces: dict[int, Piece] = {}  # by tensor
        self._residuals = NO_RESIDUALS
        self._travelling: set[int] = set()  # tensors of which some part is another rank's to reduce
        self._choices: dict[int, Measured] = {}  # by tensor
        self._mean_codes: dict[int, Code] = {}  # by tensor
        self._means: dict[int, torch.Tensor | None] = {}  # by slice
        self._quantizers: dict[int, Quantizer] = {}  # by tensor, for telemetry
        self._nonfinite = 0
        self._not_finite: set[int] = set()  # tensors whose own part is not, and was not measured
        self._received: Sequence[torch.Tensor | None] = ()  # packets of the slice that was reduced last
        self._averaged: set[int] = set()  # tensors whose owner residual took part
        self._local_samples, self._owner_samples = Samples(), Samples()
        self._packets: dict[int, list[tuple[Chunk, int]]] = {1: [], 2: []}

    def begin(self) -> None:
        """Prepares the collective; residuals move to their new owners where the layout is a new one."""
        task, layout = self._task, self._task.layout
        self._values = task.buffer.to(self._plan.wire_dtype)
        largest = max([chunk.count for part in self._plan.slices for chunk in part])
        self._scratch = torch.empty(largest, dtype=self._plan.wire_dtype, device=CPU)
        if task.feedback is not None:
            self._residuals = task.feedback.for_two_phase(layout, self.rank, self.averages)
        self._own_pieces = {piece.tensor: piece for piece in layout.chunks[self.rank].pieces}
        others = [chunk for owner, chunk in enumerate(layout.chunks) if owner != self.rank]
        self._travelling = {piece.tensor for chunk in others for piece in chunk.pieces}

    def encode(self, number: int) -> list[torch.Tensor | None]:
        """Returns a packet for each owner of this rank's values plus residuals, None where nothing is to be sent."""
        packets: list[torch.Tensor | None] = []
        for owner, chunk in enumerate(self._plan.slices[number]):
            segments = [] if owner == self.rank else self._segments(chunk)
            packets.append(self._packet(segments, self._inv_scale, self._plan.limits[number][owner]))
            if (packet := packets[-1]) is not None:
                self._packets[1].append((chunk, packet.numel()))
        return packets

    def reduce(self, number: int, packets: Sequence[torch.Tensor | None]) -> None:
        """Sums this rank's part of a slice over all ranks, from the packets of the others.

        What is left to do for the mean is a multiplication by ``_share``.
        """
        chunk = self._plan.slices[number][self.rank]
        mean = self._scratch[: chunk.count]
        self._received = packets
        for sender in range(len(packets)):
            self._add_term(sender, chunk, mean, accumulate=sender > 0)
        if self._share == 1.0:
            mean.div_(self._task.layout.world_size)

    def encode_mean(self, number: int) -> torch.Tensor | None:
        """Returns the packet of the mean that :meth:`reduce` has computed; None for a part without elements."""
        chunk, limits = self._plan.slices[number][self.rank], self._plan.limits[number]
        mean, share = self._scratch[: chunk.count], self._share
        segments = self._mean_segments(chunk, mean, share)
        kept: Set[int] = frozenset()
        if any(_may_be_infinite(segment) for segment in segments):
            kept = self._divide_again(chunk, mean)
            share = 1.0
            segments = self._mean_segments(chunk, mean, share)
        self._means[number] = self._packet(segments, share, limits[self.rank])
        self._received = ()
        self._spend(chunk, kept)
        return self._means[number]

    def decode(self, number: int, means: Sequence[torch.Tensor | None]) -> None:
        """Writes the slice's means into the buffer."""
        task = self._task
        for owner, chunk in enumerate(self._plan.slices[number]):
            packet = self._means.pop(number) if owner == self.rank else means[owner]
            if packet is None:
                continue
            self._packets[2].append((chunk, packet.numel()))
            num_threads = task.options.num_threads
            if task.buffer.dtype == self._plan.wire_dtype:
                unpack(packet, task.buffer, owner, num_threads=num_threads, places=chunk.places)
                if task.scale != 1.0:
                    for offset, length in chunk.places:
                        task.buffer[offset : offset + length].mul_(task.scale)
            else:
                values = self._scratch[: chunk.count]
                unpack(packet, values, owner, num_threads=num_threads)
                if task.scale != 1.0:
                    values.mul_(task.scale)
                keep_in_range(values, chunk, task.buffer.dtype)
                scatter_chunk(values, chunk, task.buffer)

    def finish(self) -> None:
        """Ends a collective in which no rank failed.

        Residuals of the own part are marked as spent, and packets are counted.
        """
        feedback, layout = self._task.feedback, self._task.layout
        if feedback is not None:
            # Residuals that took no part are unchanged.
            spent = [
                (layout.tensors[number].key, piece)
                for number, piece in self._own_pieces.items()
                if number in self._residuals.spent or (self._took_part(number) and number not in self._not_finite)
                if not layout.tensors[number].members
            ]
            feedback.spend(spent)
            feedback.forecast(*self._forecasts())
        dtype = self._plan.wire_dtype
        nonfinite = self._nonfinite + len(self._not_finite | self._local_samples.not_finite())
        quantizers = [(layout.tensors[number], quantizer) for number, quantizer in self._quantizers.items()]
        self._task.telemetry.count_two_phases(self._packets, dtype, quantizers, nonfinite)

    def _forecasts(self) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the forecasts for the next time, of local values and of means, by name.

        Those of tensors that took no part are still right.
        """
        tensors, residuals = self._task.layout.tensors, self._residuals
        local = {n: rms for n, rms in residuals.local_rms.items() if not self._took_part(n)}
        owner = {n: rms for n, rms in residuals.owner_rms.items() if n not in self._averaged}
        local.update(self._local_samples.forecasts())
        owner.update(self._owner_samples.forecasts())
        return (
            {tensors[n].key: rms for n, rms in local.items()},
            {tensors[n].key: rms for n, rms in owner.items()},
        )

    def _took_part(self, number: int) -> bool:
        return number in self._choices and self._choices[number].residual is not None

    def _packet(self, segments: Sequence[Segment], inv_scale: float, limit: int) -> torch.Tensor | None:
        if not segments:
            return None
        packet = encode(segments, inv_scale=inv_scale, num_threads=self._task.options.num_threads)
        if packet.numel() > limit:
            raise PacketError(f"a packet of {packet.numel()} bytes, where the others expect at most {limit}")
        return packet

    def _segments(self, chunk: Chunk) -> list[Segment]:
        """Returns the segments of this rank's values of a chunk."""
        for piece in chunk.pieces:
            self._choice(piece.tensor)
        return chunk_segments(self._values, chunk, self._choices, self._local_samples)

    def _mean_segments(self, chunk: Chunk, mean: torch.Tensor, share: float) -> list[Segment]:
        """Returns the segments of the mean of a part of the own chunk, which is ``mean`` times ``share``.

        Each piece is measured anew, with the owner's residuals.
        """
        task, segments, position = self._task, [], 0
        num_threads = task.options.num_threads
        for piece in chunk.pieces:
            tensor = task.layout.tensors[piece.tensor]
            values = mean[position : position + piece.length]
            position += piece.length
            residual = self._residuals.owner.get(piece.tensor)
            if residual is not None:
                residual = residual[piece.start - self._own_pieces[piece.tensor].start :][: piece.length]
            rms = self._residuals.owner_rms.get(piece.tensor)
            # Slices of a tensor are alike: one sample of them chooses the code for all.
            code = self._mean_codes.get(piece.tensor)
            grid = task.options.mean_grids[bool(tensor.members)]
            quantizer, residual = choose(values, grid, residual, share, num_threads, code, rms)
            if residual is not None:
                self._averaged.add(piece.tensor)
            if quantizer.grid == GridKind.SIGMA:
                self._mean_codes[piece.tensor] = quantizer.coding, quantizer.table
            if piece.tensor not in self._travelling:
                self._quantizers[piece.tensor] = quantizer
            segments.append(self._owner_samples.of(piece.tensor, Segment(values, quantizer, residual)))
        if chunk.raw_count:
            segments.append(Segment(mean[position:], Quantizer.raw()))
        return segments

    def _divide_again(self, chunk: Chunk, mean: torch.Tensor) -> Set[int]:
        """Completes a mean that holds infinities or NaN: of own values, which nothing has measured, or of sums.

        It returns the tensors whose own values are not finite.
        """
        lost = self._lose(chunk, mean)
        if self._share != 1.0:
            mean.mul_(self._share)
        if mean.isinf().any():
            recover(mean, self._task.layout.world_size, self._terms(chunk))
        return lost

    def _lose(self, chunk: Chunk, total: torch.Tensor) -> Set[int]:
        """Fills with NaN, and returns, the tensors whose own values in a sum are not finite and were not measured."""
        lost, position = set(), 0
        for piece in chunk.pieces:
            part = total[position : position + piece.length]
            position += piece.length
            if self._choice(piece.tensor).quantizer.coding == Coding.RUNS and not self._part(piece).isfinite().all():
                lost.add(piece.tensor)
                part.fill_(math.nan)
        self._not_finite |= lost
        return lost

    def _terms(self, chunk: Chunk) -> Iterator[torch.Tensor]:
        """Yields the terms of the sum that was reduced last, in rank order, all in the same memory."""
        term = torch.empty(chunk.count, dtype=self._plan.wire_dtype, device=CPU)
        for sender in range(len(self._received)):
            self._add_term(sender, chunk, term, accumulate=False)
            yield term

    def _add_term(self, sender: int, chunk: Chunk, total: torch.Tensor, accumulate: bool) -> None:
        packet = self._received[sender]
        if sender == self.rank:
            self._add_own(chunk, total, accumulate)
        elif packet is not None:
            unpack(packet, total, sender, accumulate, self._task.options.num_threads)

    def _spend(self, chunk: Chunk, kept: Set[int]) -> None:
        """Sets the residuals to zero that are in the mean of the own chunk, those of the tensors ``kept`` excepted."""
        for piece in chunk.pieces:
            quantizer, residual = self._choice(piece.tensor)
            if residual is None or math.isnan(quantizer.p0) or piece.tensor in kept:
                continue
            if piece.tensor not in self._residuals.spent:
                residual[piece.start : piece.start + piece.length].zero_()

    def _add_own(self, chunk: Chunk, mean: torch.Tensor, accumulate: bool) -> None:
        """Adds this rank's share of the own chunk, which need not be quantized."""
        position = 0
        for piece in chunk.pieces:
            quantizer, residual = self._choice(piece.tensor)
            part = mean[position : position + piece.length]
            position += piece.length
            if math.isnan(quantizer.p0):
                part.fill_(math.nan)
                continue
            self._add(part, self._part(piece), accumulate)
            if residual is not None and piece.tensor not in self._residuals.spent:
                part.add_(residual[piece.start : piece.start + piece.length])
        if chunk.raw_runs:
            self._add(mean[position:], gather_runs(self._values, chunk.raw_runs), accumulate)

    def _add(self, total: torch.Tensor, values: torch.Tensor, accumulate: bool) -> None:
        if accumulate:
            total.add_(values, alpha=self._inv_scale)
        else:
            torch.mul(values, self._inv_scale, out=total)

    def _choice(self, number: int) -> Measured:
        """Returns the quantizer for a tensor of this rank, and its residual if it takes part."""
        if number not in self._choices:
            task, tensor = self._task, self._task.layout.tensors[number]
            values = gather_runs(self._values, tensor.runs)
            # A tensor that stays here whole is not quantized.
            grid = task.options.value_grids[bool(tensor.members)] if number in self._travelling else None
            residual, rms = self._residuals.local.get(number), self._residuals.local_rms.get(number)
            chosen = choose(values, grid, residual, self._inv_scale, task.options.num_threads, rms=rms)
            self._choices[number] = chosen
            if number in self._travelling:
                self._quantizers[number] = chosen.quantizer
            self._nonfinite += math.isnan(chosen.quantizer.p0)
        return self._choices[number]

    def _part(self, piece: Piece) -> torch.Tensor:
        if len(piece.runs) > 1:
            return gather_runs(self._values, piece.runs)
        return self._values[piece.offset : piece.offset + piece.length]


def _may_be_infinite(segment: Segment) -> bool:
    """Returns whether values of a mean may be infinite or NaN, without another look at those that were measured."""
    if segment.quantizer.coding in (Coding.RAW, Coding.RUNS):
        return not math.isfinite(float(segment.values.sum()))
    return math.isnan(segment.quantizer.p0)
