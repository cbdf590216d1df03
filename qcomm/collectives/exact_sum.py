"""The mean of quantized values without any further loss: one grid for all ranks, integers summed exactly.

1. Every rank measures its tensors and tells all others (extremes, sum of squares, bits: 32 bytes a tensor).
2. All ranks compute the same grid for each tensor from that (:mod:`qcomm.collectives.exact_sum_grid`). Every rank
   rounds its values to it once, compresses them chunk by chunk, and sends each chunk to its owner.
3. The owner adds the W packets, which is a sum of integers. It sends the sum to every rank, compressed without loss.
4. Every rank decodes the W packets of sums and divides by W.

Values that are on no grid are divided by the owner, in step 3: a mean is a number where the sum may be none.

So the result is the mean of the ranks' quantized values, rounded once. It does not depend on the chunks or on the
order of the additions, and there is no second quantization::

    |result - mean|       <= step / 2 and rounding, step the shared grid's       two_phase: mean_i(s_i)/2 + t/2
    bytes a rank sends    its packets but its own + (W - 1) * (its sums' packet + its summary + 3 headers)

On the wire both values and sums are ordinary packets. A sum of W symbols has an alphabet W times as large, and about
``log2(W) / 2`` bits more entropy than one of them. Its code is chosen by its own spread: a built-in table for the sum's
ratio of step to RMS, the packet's own table, or plain symbols above 12 bits. Sums outside the alphabet escape with
their exact value. Integers of a fixed width would take 16 bits or more instead of 2 to 4.

Uncompressed tensors are added in rank order without rounding to a grid. So are those whose values reach too far for
exact sums, or whose sums might overflow.

Error feedback keeps ``e = u - Q(u)`` of each rank. There are no means to quantize, so the owner's residuals go into its
next values: ``sum_t result_t = sum_t mean(g_t) - mean_i(e_i)``.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qcomm.codec import CPU, Grid, Quantizer, Segment, measure
from qcomm.collectives.exact_sum_grid import RECORD_FIELDS, SharedGrid, Summary, lossless_quantizer, share, summarize
from qcomm.collectives.layout import Chunk
from qcomm.collectives.packing import (
    Measured,
    gather_runs,
    has_overflown,
    is_zero,
    keep_in_range,
    no_bytes,
    pack,
    pack_chunk,
    recover,
    scatter_chunk,
    scatter_runs,
    size_limit,
    unpack,
)
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.task import MeanTask
from qcomm.communicator import Phase

__all__ = ["exact_sum_mean"]

SUMMARY_SLACK_BYTES = 1 << 8  # bytes of a packet besides its values


class _Own(NamedTuple):
    """This rank's part of the sum.

    Attributes:
        values: in the wire's dtype.
        residuals: of each compressed tensor that takes part.
        summary: the packet that tells the other ranks about the values.
    """

    values: torch.Tensor
    residuals: dict[int, torch.Tensor]
    summary: torch.Tensor


def exact_sum_mean(rounds: Rounds) -> None:
    """Replaces the buffer of ``rounds.task`` by its mean over all ranks. Runs on the communicator's thread."""
    task, rank, world_size = rounds.task, rounds.rank, rounds.world_size
    layout, dtype = task.layout, task.wire_dtype
    numbers = _compressed(task)

    limit = 8 * RECORD_FIELDS * len(numbers) + SUMMARY_SLACK_BYTES if numbers else 0
    measured = rounds.compute(Phase.MEASURE, _measure, task)
    outgoing = None if measured is None else [measured.summary] * world_size
    summaries = rounds.exchange(Phase.ENCODE, "overhead", outgoing, [limit] * world_size)

    grids = rounds.compute(Phase.MEASURE, _share, task, summaries) or []
    # Ranks that computed different grids would add symbols that do not belong together.
    rounds.require_equal("shared grids", hashlib.sha256(repr(grids).encode()).hexdigest()[:16])
    values = rounds.compute(Phase.QUANTIZE, _encode_values, task, measured, grids)
    limits = [size_limit(layout.chunks[rank], dtype)] * world_size
    contributions = rounds.exchange(Phase.QUANTIZE, "phase1", values, limits)

    total = rounds.compute(Phase.REDUCE, _add_chunk, task, rank, grids, contributions)
    limits = [size_limit(chunk, dtype) for chunk in layout.chunks]
    outgoing = None if total is None else [total] * world_size
    totals = rounds.exchange(Phase.REDUCE, "phase2", outgoing, limits)

    rounds.compute(Phase.DECODE, _decode_means, task, totals, grids)
    for phase, packets in enumerate((values or [], totals), 1):
        task.telemetry.count_packets(phase, layout.chunks, [packet.numel() for packet in packets], dtype)


def _compressed(task: MeanTask) -> list[int]:
    return [number for number, tensor in enumerate(task.layout.tensors) if tensor.compressed]


def _measure(task: MeanTask) -> _Own:
    """Measures this rank's values."""
    task.telemetry.mark(task.index, "encode")
    layout, feedback, inv_scale = task.layout, task.feedback, 1.0 / task.scale
    with task.telemetry.timed("encode_seconds"):
        if feedback is not None:
            feedback.adopt(layout, None)
        own = _Own(task.buffer.to(task.wire_dtype), {}, no_bytes())
        records = []
        for number in _compressed(task):
            tensor = layout.tensors[number]
            values = gather_runs(own.values, tensor.runs)
            residual = None if feedback is None else feedback.local_of(tensor)
            if residual is not None and is_zero(values):  # DDP may discard the mean, and with it a residual
                residual = None
            elif residual is not None:
                own.residuals[number] = residual
            statistics = measure(values, residual, inv_scale)
            task.telemetry.add(nonfinite_tensors=not statistics.finite)
            records.append(summarize(statistics, task.options.grid_of(tensor), values, residual, inv_scale))
        record = torch.tensor(records, dtype=torch.float64, device=CPU).flatten()
        return own._replace(summary=pack([Segment(record, Quantizer.raw())])) if records else own


def _share(task: MeanTask, packets: Sequence[torch.Tensor]) -> list[SharedGrid]:
    """Returns the grids of all tensors, the same on every rank; those that are not compressed have none."""
    layout, numbers = task.layout, _compressed(task)
    records = torch.empty(len(packets), len(numbers), RECORD_FIELDS, dtype=torch.float64, device=CPU)
    for sender, packet in enumerate(packets):
        unpack(packet, records[sender].view(-1), sender)
    grids = [SharedGrid()] * len(layout.tensors)
    for column, number in enumerate(numbers):
        summaries = [Summary(*record) for record in records[:, column].tolist()]
        tensor = layout.tensors[number]
        grids[number] = share(task.options.grid_of(tensor), summaries, tensor.numel, task.wire_dtype)
    return grids


def _encode_values(task: MeanTask, own: _Own | None, grids: Sequence[SharedGrid]) -> list[torch.Tensor]:
    """Returns this rank's values on the shared grids, one packet a chunk; the rounding error becomes the residual."""
    if own is None:
        raise ValueError("a rank that could not measure its values has a fault, and does not come here")
    layout = task.layout
    with task.telemetry.timed("encode_seconds"):
        if task.scale != 1.0:
            own.values.mul_(1.0 / task.scale)
        measured = [Measured(Quantizer.raw(), None)] * len(layout.tensors)
        for number in _compressed(task):
            tensor, grid, residual = layout.tensors[number], grids[number], own.residuals.get(number)
            values = gather_runs(own.values, tensor.runs)
            quantizer = _quantize(values, residual, grid, task.options.grid_of(tensor))
            if len(tensor.runs) > 1:  # the values are a copy
                scatter_runs(values, tensor.runs, own.values)
            task.telemetry.note_quantizer(tensor, quantizer)
            measured[number] = Measured(quantizer, None)
        return [pack_chunk(own.values, chunk, measured, 1.0, task.options.num_threads) for chunk in layout.chunks]


def _quantize(values: torch.Tensor, residual: torch.Tensor | None, grid: SharedGrid, asked_grid: Grid) -> Quantizer:
    """Adds the residual to ``values`` and rounds them, both in place, and returns their quantizer for a packet.

    ``asked_grid`` is the tensor's grid in the options.
    """
    if grid.constant is not None and math.isnan(grid.constant):
        return Quantizer.constant(math.nan)
    if residual is not None:
        values.add_(residual)
    if not grid.step:
        if residual is not None:
            residual.zero_()
        return Quantizer.raw() if grid.constant is None else Quantizer.constant(grid.constant)
    rounded = grid.round(values)
    if residual is not None:
        residual.copy_(values.sub_(rounded))
    values.copy_(rounded)
    return lossless_quantizer(values, grid.step, asked_grid)


def _add_chunk(task: MeanTask, rank: int, grids: Sequence[SharedGrid], packets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the packet of the sum over all ranks of this rank's chunk."""
    task.telemetry.mark(task.index, "reduce")
    chunk = task.layout.chunks[rank]
    total = torch.empty(chunk.count, dtype=task.wire_dtype, device=CPU)
    with task.telemetry.timed("decode_seconds"):
        for sender, packet in enumerate(packets):
            unpack(packet, total, sender, accumulate=sender > 0, num_threads=task.options.num_threads)
    with task.telemetry.timed("encode_seconds"):
        _divide(task, total, _parts(chunk, grids, on_grid=False), packets)
        segments, position = [], 0
        for piece in chunk.pieces:
            sums, grid = total[position : position + piece.length], grids[piece.tensor]
            quantizer = Quantizer.raw()
            if grid.step:
                asked_grid = task.options.grid_of(task.layout.tensors[piece.tensor])
                quantizer = lossless_quantizer(sums, grid.step, asked_grid)
            elif grid.constant is not None:
                quantizer = Quantizer.constant(float(sums[0]))
            segments.append(Segment(sums, quantizer))
            position += piece.length
        if chunk.raw_count:
            segments.append(Segment(total[position:], Quantizer.raw()))
        return pack(segments, num_threads=task.options.num_threads)


def _parts(chunk: Chunk, grids: Sequence[SharedGrid], on_grid: bool) -> list[slice]:
    """Returns the places, in a packet's values, of the sums on a shared grid, or of all others."""
    parts, position = [], 0
    for piece in chunk.pieces:
        if bool(grids[piece.tensor].step) == on_grid:
            parts.append(slice(position, position + piece.length))
        position += piece.length
    if chunk.raw_count and not on_grid:
        parts.append(slice(position, chunk.count))
    return parts


def _divide(task: MeanTask, total: torch.Tensor, parts: Sequence[slice], packets: Sequence[torch.Tensor]) -> None:
    """Divides the sums that are on no grid by the number of ranks, before they travel, because they may overflow."""
    world_size = task.layout.world_size
    for part in parts:
        total[part].div_(world_size)
    if any(has_overflown(total[part]) for part in parts):
        terms = torch.empty(len(packets), total.numel(), dtype=total.dtype, device=CPU)
        for sender, packet in enumerate(packets):
            unpack(packet, terms[sender], sender, num_threads=task.options.num_threads)
        for part in parts:
            recover(total[part], world_size, terms[:, part])


def _decode_means(task: MeanTask, packets: Sequence[torch.Tensor], grids: Sequence[SharedGrid]) -> None:
    """Divides the sums of every chunk by the number of ranks and writes it into the buffer."""
    task.telemetry.mark(task.index, "decode")
    layout = task.layout
    with task.telemetry.timed("decode_seconds"):
        for owner, (chunk, packet) in enumerate(zip(layout.chunks, packets, strict=True)):
            values = torch.empty(chunk.count, dtype=task.wire_dtype, device=CPU)
            unpack(packet, values, owner, num_threads=task.options.num_threads)
            for part in _parts(chunk, grids, on_grid=True):
                values[part].div_(layout.world_size)
            if task.scale != 1.0:
                values.mul_(task.scale)
            keep_in_range(values, chunk, task.buffer.dtype)
            scatter_chunk(values, chunk, task.buffer)
