"""The compressed mean of one flat buffer over all ranks, in two phases.

Variable-length codes cannot be added, so there is no ring. With W ranks and the buffer cut in W chunks, one a rank:

1. every rank measures its tensors, compresses its values chunk by chunk, and sends each chunk to its owner;
2. the owner decodes the W packets of its chunk in rank order into one sum, divides by W, compresses the mean on a grid
   of its own, at least as fine (this error is not averaged), and sends it to every rank;
3. every rank, the owner too, decodes the same W packets: the results are equal bit for bit.

With s_i the step of rank i's grid for a tensor and t the owner's, ``|result - mean| <= mean_i(s_i)/2 + t/2`` and
rounding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import torch

from qcomm.agreement import Fault, Fields, Phase
from qcomm.codec import Segment, decode_into, encode
from qcomm.communicator import Communicator
from qcomm.error_feedback import ErrorFeedback
from qcomm.errors import CollectiveError, PacketError
from qcomm.grids import Grid, SigmaGrid
from qcomm.layout import BucketLayout, Chunk, gather_runs, scatter_chunk
from qcomm.quantize import Quantizer, plan
from qcomm.statistics import measure
from qcomm.telemetry import Telemetry

__all__ = ["MeanTask", "two_phase_mean"]

P = ParamSpec("P")
T = TypeVar("T")

# Most that a packet takes beyond its values: header, and for each segment its record, code lengths and a checksum, and
# for each block its frame. Generous: the limit only keeps nonsense from being allocated.
PACKET_SLACK_BYTES = 1 << 16
SEGMENT_SLACK_BYTES = 1 << 13


@dataclass
class MeanTask:
    """One collective: what to average, and how.

    Attributes:
        buffer: flat and contiguous, float32, float16, bfloat16 or float64; holds the result in the end.
        layout: of the buffer; None where finding it out failed (then there is a fault).
        grid: of the first phase.
        fields: the configuration, which has to be equal on all ranks.
        telemetry: counts what happens.
        feedback: residuals, or None for none.
        scale: the buffer holds values times this factor, and the result will; residuals are kept without it.
        index: number of the bucket for the timeline.
        fault: what went wrong before the task was queued; it is announced to the other ranks in place of the exchange.
    """

    buffer: torch.Tensor
    layout: BucketLayout | None
    grid: Grid
    fields: Fields
    telemetry: Telemetry
    feedback: ErrorFeedback | None = None
    scale: float = 1.0
    index: int = 0
    fault: Fault | None = None


def two_phase_mean(task: MeanTask, communicator: Communicator) -> torch.Tensor:
    """Replaces ``task.buffer`` by its mean over all ranks and returns it. Runs on the communicator's thread.

    Raises:
        CollectiveError: on all ranks, naming the rank that failed. The values are lost, with the residuals that were
            added to them.
        ConfigMismatchError: ``task.fields`` differ between ranks.
    """
    communicator.begin()
    rank, fault = communicator.rank, communicator.pending_fault or task.fault
    values: list[torch.Tensor] | None = None
    if fault is None:
        values, fault = _attempt(Phase.ENCODE, _encode_values, task, rank)
    contributions = _exchange(task, communicator, 1, values, fault)
    mean, fault = _attempt(Phase.REDUCE, _reduce_chunk, task, rank, contributions)
    means = _exchange(task, communicator, 2, None if mean is None else [mean] * communicator.world_size, fault)
    _, fault = _attempt(Phase.DECODE, _decode_means, task, means)
    if fault is not None:
        communicator.announce_later(fault)
        text = f"this rank failed while {fault.phase}: {fault.error}; the others are told in the next collective"
        raise CollectiveError(text) from fault.error
    for phase, packets in enumerate((values or [], means), 1):
        sizes = [packet.numel() for packet in packets]
        task.telemetry.count_packets(phase, _layout(task), sizes, _wire_dtype(task).itemsize)
    task.telemetry.mark(task.index, "done")
    return task.buffer


def owner_grid(grid: Grid) -> Grid:
    """The grid for means: no coarser than the RMS, because nothing averages its error away."""
    return replace(grid, step=min(grid.step, 1.0)) if isinstance(grid, SigmaGrid) else grid


def _attempt(phase: Phase, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T | None, Fault | None]:
    """Runs a step of this rank; what it raises is kept for the other ranks, who would wait for its packets in vain."""
    try:
        return step(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001 - any: it is raised again, on every rank, by the next exchange
        return None, Fault(phase, error)


def _layout(task: MeanTask) -> BucketLayout:
    if task.layout is None:
        raise ValueError("a task without a fault needs a layout")
    return task.layout


def _wire_dtype(task: MeanTask) -> torch.dtype:
    """Sums need more than 16 bits, so what they are made of travels in float32, or in float64 if it is float64."""
    return torch.float64 if task.buffer.dtype == torch.float64 else torch.float32


def _encode_values(task: MeanTask, rank: int) -> list[torch.Tensor]:
    """This rank's values plus residuals, one packet a chunk. A tensor's grid is measured over all of it."""
    task.telemetry.mark(task.index, "encode")
    layout, feedback = _layout(task), task.feedback
    with task.telemetry.timed("encode_seconds"):
        values = task.buffer.to(_wire_dtype(task))
        if feedback is not None:
            feedback.adopt(layout, rank)
        residuals: list[torch.Tensor | None] = []
        quantizers: list[Quantizer] = []
        for tensor in layout.tensors:
            residual = feedback.local(tensor.key, tensor.numel) if feedback is not None and tensor.compressed else None
            quantizer = Quantizer.raw()
            if tensor.compressed:
                whole = values[tensor.offset : tensor.offset + tensor.numel]
                quantizer, residual = _choose(whole, task.grid, residual, 1.0 / task.scale)
                task.telemetry.note_quantizer(tensor.key, quantizer)
                task.telemetry.add(nonfinite_tensors=math.isnan(quantizer.p0))
            residuals.append(residual)
            quantizers.append(quantizer)
        packets = []
        for chunk in layout.chunks:
            segments = []
            for piece in chunk.pieces:
                residual = residuals[piece.tensor]
                part = None if residual is None else residual[piece.start : piece.start + piece.length]
                segments.append(
                    Segment(values[piece.offset : piece.offset + piece.length], quantizers[piece.tensor], part)
                )
            if chunk.raw_runs:
                segments.append(Segment(gather_runs(values, chunk.raw_runs), Quantizer.raw()))
            packets.append(_packet(segments, 1.0 / task.scale))
    return packets


def _reduce_chunk(task: MeanTask, rank: int, packets: Sequence[torch.Tensor]) -> torch.Tensor:
    """The packet of the mean over all ranks of this rank's chunk."""
    task.telemetry.mark(task.index, "reduce")
    layout, feedback = _layout(task), task.feedback
    chunk = layout.chunks[rank]
    mean = torch.empty(chunk.count, dtype=_wire_dtype(task))
    if chunk.count:
        with task.telemetry.timed("decode_seconds"):
            for sender, packet in enumerate(packets):
                _decode(packet, mean, sender, accumulate=sender > 0)
            mean.div_(layout.world_size)
    with task.telemetry.timed("encode_seconds"):
        grid, segments, position = owner_grid(task.grid), [], 0
        for piece in chunk.pieces:
            values = mean[position : position + piece.length]
            key = layout.tensors[piece.tensor].key
            residual = None if feedback is None else feedback.owner(key, piece.start, piece.length)
            segments.append(Segment(values, *_choose(values, grid, residual, 1.0)))
            position += piece.length
        if chunk.raw_count:
            segments.append(Segment(mean[position:], Quantizer.raw()))
        return _packet(segments, 1.0)


def _decode_means(task: MeanTask, packets: Sequence[torch.Tensor]) -> None:
    """Writes every chunk's mean into the buffer."""
    task.telemetry.mark(task.index, "decode")
    layout = _layout(task)
    with task.telemetry.timed("decode_seconds"):
        for owner, (chunk, packet) in enumerate(zip(layout.chunks, packets, strict=True)):
            if chunk.count:
                values = torch.empty(chunk.count, dtype=_wire_dtype(task))
                _decode(packet, values, owner, accumulate=False)
                if task.scale != 1.0:
                    values.mul_(task.scale)
                scatter_chunk(values, chunk, task.buffer)


def _exchange(
    task: MeanTask, communicator: Communicator, number: int, packets: Sequence[torch.Tensor] | None, fault: Fault | None
) -> list[torch.Tensor]:
    """Sends packet r to each rank r and returns what each rank sent here; raises on all ranks if any has a fault."""
    task.telemetry.mark(task.index, f"exchange_{number}")
    own, world_size = communicator.rank, communicator.world_size
    phase = Phase.ENCODE if number == 1 else Phase.REDUCE
    if packets is None:
        packets = [_no_bytes()] * world_size
    with task.telemetry.timed("communication_seconds"):
        limits = [0] * world_size
        if fault is None:
            chunks = _layout(task).chunks
            limits = [
                _limit(chunks[own] if number == 1 else chunks[rank], _wire_dtype(task)) for rank in range(world_size)
            ]
        sizes, overhead = communicator.agree(phase, task.fields, [packet.numel() for packet in packets], limits, fault)
        incoming = [
            torch.empty(size, dtype=torch.uint8) if rank != own else packets[own] for rank, size in enumerate(sizes)
        ]
        traffic = communicator.exchange(packets, incoming, phase)
    task.telemetry.add_traffic("overhead", overhead)
    task.telemetry.add_traffic(f"phase{number}", traffic)
    return incoming


def _choose(
    values: torch.Tensor, grid: Grid, residual: torch.Tensor | None, inv_scale: float
) -> tuple[Quantizer, torch.Tensor | None]:
    """The quantizer of a tensor or a part of a mean, and its residual if it takes part."""
    if residual is not None and _is_zero(values):
        # The mean of a parameter that no rank used is thrown away by DDP, which leaves its gradient None: a residual in
        # it would be lost.
        return Quantizer.constant(0.0), None
    statistics = measure(values, residual, inv_scale)
    if not statistics.finite:
        # Travels as a flag, becomes NaN in the sum and so on every rank.
        return Quantizer.constant(math.nan), None
    return plan(statistics, grid, values, residual, inv_scale), residual


def _is_zero(values: torch.Tensor) -> bool:
    # Nearly always the first values tell, and the others need not be read.
    return not values[:256].any() and not values.any()


def _packet(segments: Sequence[Segment], inv_scale: float) -> torch.Tensor:
    return encode(segments, inv_scale=inv_scale) if segments else _no_bytes()


def _no_bytes() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _decode(packet: torch.Tensor, out: torch.Tensor, sender: int, accumulate: bool) -> None:
    try:
        decode_into(packet, out, accumulate=accumulate)
    except PacketError as error:
        raise PacketError(f"packet of rank {sender} of the group: {error}") from error


def _limit(chunk: Chunk, dtype: torch.dtype) -> int:
    """Most bytes a packet of ``chunk`` can have; 0 for an empty chunk, which has none."""
    if not chunk.count:
        return 0
    return 2 * chunk.count * dtype.itemsize + SEGMENT_SLACK_BYTES * (len(chunk.pieces) + 1) + PACKET_SLACK_BYTES
