"""Packing: chunks of a buffer to packets and back, and the maximum size of these packets.

**Forecasts.** Coding runs of zeros is one pass over values and residuals. Measuring them first would be another, of
nearly the same cost. While a tensor is coded, a sample of its values g and its new residuals e is squared, and the next
time ``sqrt(mean(g^2) + mean(e^2))`` stands for ``RMS(g + e)``: residuals are known then, and a gradient's size changes
slowly. Decoders do not care where a step comes from, so ranks stay equal bit for bit. A jump of a gradient's size makes
one packet larger or smaller, and is part of the next forecast.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from qcomm.codec import (
    CPU,
    SAMPLE_NUMBERS,
    Code,
    Coding,
    Grid,
    Quantizer,
    Segment,
    SigmaGrid,
    decode_into,
    encode,
    forecast_quantizer,
    measure,
    plan,
)
from qcomm.collectives.layout import Chunk
from qcomm.collectives.task import MeanTask
from qcomm.errors import PacketError

__all__ = [
    "Measured",
    "Samples",
    "choose",
    "chunk_segments",
    "gather_chunk",
    "gather_runs",
    "has_overflown",
    "is_zero",
    "keep_in_range",
    "measure_tensors",
    "no_bytes",
    "pack",
    "pack_chunk",
    "recover",
    "scatter_chunk",
    "scatter_runs",
    "size_limit",
    "unpack",
]

# Maximum bytes of a packet beyond its values: header, and for each segment its record, code lengths and a checksum, and
# for each block, of 32 values at least, its frame. Generous: the limit only prevents absurd allocations.
PACKET_SLACK_BYTES = 1 << 12
SEGMENT_SLACK_BYTES = 1 << 13
VALUES_PER_SLACK_BYTE = 64


class Measured(NamedTuple):
    """A tensor's grid on this rank, and its residual if it takes part: 1-D float32, of the whole tensor."""

    quantizer: Quantizer
    residual: torch.Tensor | None


def choose(
    values: torch.Tensor,
    grid: Grid | None,
    residual: torch.Tensor | None,
    inv_scale: float,
    num_threads: int = 1,
    code: Code | None = None,
    rms: float | None = None,
) -> Measured:
    """Chooses the quantizer of a tensor or a part of one, raw without a grid, and its residual if it takes part.

    ``code`` is that of an earlier choice for a similar tensor, see :func:`qcomm.codec.quantize.plan`. ``rms`` is a
    forecast of value plus residual: where runs of zeros are coded, nothing is measured then.
    """
    if residual is not None and is_zero(values):
        # DDP discards the mean of a parameter that no rank used and leaves its gradient None. A residual in it would be
        # lost.
        return Measured(Quantizer.constant(0.0), None)
    if rms is not None and residual is not None and isinstance(grid, SigmaGrid):
        forecast = forecast_quantizer(grid, rms, values.dtype)
        if forecast is not None:
            return Measured(forecast, residual)
    statistics = measure(values, residual if grid else None, inv_scale, num_threads=num_threads)
    if not statistics.finite:
        # The value travels as a flag, becomes NaN in the sum and so on every rank.
        return Measured(Quantizer.constant(math.nan), None)
    if grid is None:
        return Measured(Quantizer.raw(), residual)
    return Measured(plan(statistics, grid, values, residual, inv_scale, code, num_threads), residual)


class Samples:
    """The samples of a collective's segments, summed up by tensor.

    Example:
        >>> from qcomm.codec import encode, measure, plan
        >>> values, residual = torch.randn(4096), torch.zeros(4096)
        >>> quantizer = plan(measure(values, residual), SigmaGrid(step=3.0), values, residual)
        >>> samples = Samples()
        >>> packet = encode([samples.of(0, Segment(values, quantizer, residual))])
        >>> 1.2 < samples.forecasts()[0] < 1.5
        True
    """

    def __init__(self) -> None:
        self._found: dict[int, list[torch.Tensor]] = {}

    def of(self, number: int, segment: Segment) -> Segment:
        """Returns the segment of tensor ``number``, with memory for a sample where encoding takes one."""
        if segment.quantizer.coding != Coding.RUNS:
            return segment
        sample = torch.zeros(SAMPLE_NUMBERS, dtype=torch.float64, device=CPU)
        self._found.setdefault(number, []).append(sample)
        return segment._replace(sample=sample)

    def forecasts(self) -> Mapping[int, float]:
        """Returns the forecast RMS of each tensor that has one, once all of its segments are encoded."""
        found = {}
        for number, samples in self._found.items():
            values, residuals, count, not_finite = torch.stack(samples).sum(0).tolist()
            if count and not not_finite and 0.0 < values + residuals < math.inf:
                found[number] = math.sqrt((values + residuals) / count)
        return found

    def not_finite(self) -> frozenset[int]:
        """Returns the tensors with a block that could not be coded."""
        return frozenset(n for n, samples in self._found.items() if any(sample[3] for sample in samples))


def measure_tensors(task: MeanTask, values: torch.Tensor) -> list[Measured]:
    """Measures each tensor of the layout whole; those that are not compressed get a raw quantizer."""
    measured = []
    for tensor in task.layout.tensors:
        found = Measured(Quantizer.raw(), None)
        if tensor.compressed:
            residual = None if task.feedback is None else task.feedback.local_of(tensor)
            whole, grid = gather_runs(values, tensor.runs), task.options.grid_of(tensor)
            found = choose(whole, grid, residual, 1.0 / task.scale, task.options.num_threads)
            task.telemetry.note_quantizer(tensor, found.quantizer)
            task.telemetry.add(nonfinite_tensors=math.isnan(found.quantizer.p0))
        measured.append(found)
    return measured


def pack_chunk(
    values: torch.Tensor, chunk: Chunk, measured: Sequence[Measured], inv_scale: float, num_threads: int = 1
) -> torch.Tensor:
    """Encodes a chunk of the flat ``values``, each tensor as it was measured. Residuals are replaced."""
    return pack(chunk_segments(values, chunk, measured), inv_scale, num_threads)


def chunk_segments(
    values: torch.Tensor,
    chunk: Chunk,
    measured: Sequence[Measured] | Mapping[int, Measured],
    samples: "Samples | None" = None,
) -> list[Segment]:
    """Returns the segments of a chunk of the flat ``values``.

    They are its pieces, as their tensors were measured, and then the raw elements. ``samples`` takes theirs.
    """
    segments = []
    for piece in chunk.pieces:
        quantizer, residual = measured[piece.tensor]
        part = None if residual is None else residual[piece.start : piece.start + piece.length]
        segment = Segment(gather_runs(values, piece.runs), quantizer, part)
        segments.append(segment if samples is None else samples.of(piece.tensor, segment))
    if chunk.raw_runs:
        segments.append(Segment(gather_runs(values, chunk.raw_runs), Quantizer.raw()))
    return segments


def pack(segments: Sequence[Segment], inv_scale: float = 1.0, num_threads: int = 1) -> torch.Tensor:
    """Encodes segments as a packet; the result has no bytes if there are no segments."""
    return encode(segments, inv_scale=inv_scale, num_threads=num_threads) if segments else no_bytes()


def no_bytes() -> torch.Tensor:
    """Returns the empty message, which stands for no packet."""
    return torch.empty(0, dtype=torch.uint8, device=CPU)


def unpack(
    packet: torch.Tensor,
    out: torch.Tensor,
    sender: int,
    accumulate: bool = False,
    num_threads: int = 1,
    places: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Decodes a packet into ``out`` or ``places`` of it, or adds it.

    One that is damaged, or not of the size that its receiver expects, is an error that names its sender.
    """
    if not out.numel():
        return
    try:
        decode_into(packet, out, places=places, accumulate=accumulate, num_threads=num_threads)
    except (PacketError, ValueError) as error:
        raise PacketError(f"packet of rank {sender} of the group: {error}") from error


def size_limit(chunk: Chunk, dtype: torch.dtype) -> int:
    """Returns the maximum bytes of a packet of ``chunk``; 0 for an empty chunk, which has none."""
    if not chunk.count:
        return 0
    segments = SEGMENT_SLACK_BYTES * (len(chunk.pieces) + 1)
    return chunk.count * dtype.itemsize + chunk.count // VALUES_PER_SLACK_BYTE + segments + PACKET_SLACK_BYTES


def gather_runs(buffer: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Returns the elements of ``runs`` as one 1-D tensor: a view if there is one run, otherwise a copy."""
    parts = [buffer[offset : offset + length] for offset, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scatter_runs(values: torch.Tensor, runs: Sequence[tuple[int, int]], buffer: torch.Tensor) -> None:
    """Copies the elements of 1-D ``values`` to where ``runs`` are in ``buffer``, the inverse of :func:`gather_runs`."""
    for source, (offset, length) in zip(values.split([length for _, length in runs]), runs, strict=True):
        buffer[offset : offset + length].copy_(source)


def gather_chunk(buffer: torch.Tensor, chunk: Chunk, out: torch.Tensor) -> None:
    """Copies a chunk's elements, pieces then raw runs, from where they are in ``buffer`` into the 1-D ``out``."""
    for target, (offset, length) in zip(out.split([length for _, length in chunk.places]), chunk.places, strict=True):
        target.copy_(buffer[offset : offset + length])


def has_overflown(total: torch.Tensor) -> bool:
    """Returns whether a sum of finite terms has left the range of its dtype: some value is infinite.

    Example:
        >>> has_overflown(torch.tensor([3e38]) + torch.tensor([3e38])), has_overflown(torch.tensor([3e38, 3e38]))
        (True, False)
    """
    # One number tells, unless finite values overflow it.
    return not math.isfinite(float(total.sum())) and bool(total.isinf().any())


def recover(mean: torch.Tensor, world_size: int, terms: Iterable[torch.Tensor]) -> None:
    """Replaces the infinite values of a mean, whose sum has overflown, by the mean of ``terms``, added in float64.

    All other values keep their bits. The terms may share one memory.

    Example:
        >>> mean = torch.tensor([math.inf, 1.0])
        >>> recover(mean, 2, [torch.tensor([3e38, 0.5]), torch.tensor([2e38, 1.5])])
        >>> mean
        tensor([2.5000e+38, 1.0000e+00])
    """
    exact = torch.zeros(mean.shape, dtype=torch.float64, device=CPU)
    for term in terms:
        exact.add_(term.to(torch.float64).div_(world_size))
    mean.copy_(torch.where(mean.isinf(), exact.to(mean.dtype), mean))


def keep_in_range(values: torch.Tensor, chunk: Chunk, dtype: torch.dtype) -> None:
    """Limits decoded values to those of a narrower ``dtype``; values that were not quantized are in its range already.

    A level may lie beyond the largest number of the dtype, to which the mean is nearest. NaN stays NaN.
    """
    if dtype.itemsize < values.dtype.itemsize:
        largest = torch.finfo(dtype).max
        values[: chunk.compressed_count].clamp_(-largest, largest)


def scatter_chunk(values: torch.Tensor, chunk: Chunk, buffer: torch.Tensor) -> None:
    """Copies a chunk's decoded ``values``, pieces then raw runs, to where they belong in ``buffer``."""
    scatter_runs(values, chunk.places, buffer)


def is_zero(values: torch.Tensor) -> bool:
    """Returns whether all values are 0, as the gradient of a parameter that no rank used."""
    # The initial values nearly always decide, and the others need not be read.
    return not values[:256].any() and not values.any()
