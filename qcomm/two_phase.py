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
from collections.abc import Sequence
from dataclasses import replace

import torch

from qcomm.agreement import Fault, Phase
from qcomm.codec import Segment, decode_into, encode
from qcomm.communicator import Communicator
from qcomm.errors import CollectiveError, PacketError
from qcomm.grids import Grid, SigmaGrid
from qcomm.layout import Chunk, gather_runs, scatter_chunk
from qcomm.mean import MeanTask, attempt, is_zero
from qcomm.quantize import Quantizer, plan
from qcomm.statistics import measure

__all__ = ["two_phase_mean"]

# Most that a packet takes beyond its values: header, and for each segment its record, code lengths and a checksum, and
# for each block its frame. Generous: the limit only keeps nonsense from being allocated.
PACKET_SLACK_BYTES = 1 << 16
SEGMENT_SLACK_BYTES = 1 << 13


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
        values, fault = attempt(Phase.ENCODE, _encode_values, task, rank)
    contributions = _exchange(task, communicator, 1, values, fault)
    mean, fault = attempt(Phase.REDUCE, _reduce_chunk, task, rank, contributions)
    means = _exchange(task, communicator, 2, None if mean is None else [mean] * communicator.world_size, fault)
    _, fault = attempt(Phase.DECODE, _decode_means, task, means)
    if fault is not None:
        communicator.announce_later(fault)
        text = f"this rank failed while {fault.phase}: {fault.error}; the others are told in the next collective"
        raise CollectiveError(text) from fault.error
    for phase, packets in enumerate((values or [], means), 1):
        sizes = [packet.numel() for packet in packets]
        task.telemetry.count_packets(phase, task.agreed_layout, sizes, _wire_dtype(task).itemsize)
    task.telemetry.mark(task.index, "done")
    return task.buffer


def owner_grid(grid: Grid) -> Grid:
    """The grid for means: no coarser than the RMS, because nothing averages its error away."""
    return replace(grid, step=min(grid.step, 1.0)) if isinstance(grid, SigmaGrid) else grid


def _wire_dtype(task: MeanTask) -> torch.dtype:
    """Sums need more than 16 bits, so what they are made of travels in float32, or in float64 if it is float64."""
    return torch.float64 if task.buffer.dtype == torch.float64 else torch.float32


def _encode_values(task: MeanTask, rank: int) -> list[torch.Tensor]:
    """This rank's values plus residuals, one packet a chunk. A tensor's grid is measured over all of it."""
    task.telemetry.mark(task.index, "encode")
    layout, feedback = task.agreed_layout, task.feedback
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
    layout, feedback = task.agreed_layout, task.feedback
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
    layout = task.agreed_layout
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
            chunks = task.agreed_layout.chunks
            limits = [
                _limit(chunks[own] if number == 1 else chunks[rank], _wire_dtype(task)) for rank in range(world_size)
            ]
        sizes, overhead = communicator.agree(
            phase, task.fields, [packet.numel() for packet in packets], limits, fault, task.own_time
        )
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
    if residual is not None and is_zero(values):
        # The mean of a parameter that no rank used is thrown away by DDP, which leaves its gradient None: a residual in
        # it would be lost.
        return Quantizer.constant(0.0), None
    statistics = measure(values, residual, inv_scale)
    if not statistics.finite:
        # Travels as a flag, becomes NaN in the sum and so on every rank.
        return Quantizer.constant(math.nan), None
    return plan(statistics, grid, values, residual, inv_scale), residual


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
