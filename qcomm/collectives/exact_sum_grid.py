"""One grid for a tensor on all ranks, on which sums of quantized values are exact.

The levels are the multiples of one step, which all ranks compute from the statistics of all. The step is rounded down
to few significant bits, eight unless something else requires fewer::

    step      = m * 2^e                      m < 2^8
    value     = q * step                     one float32, for |q| < 2^16
    sum       = (q_1 + ... + q_W) * step     one float32, for |q_1 + ... + q_W| < 2^16

So the float32 additions of the codec's decoder are additions of integers, without rounding in any order. Where values
reach further the step gets fewer bits, down to a power of two. Where that does not suffice (values of 2^22 / W steps)
the tensor is not quantized at all. float64 has 53 bits in place of 24.

A packet then carries values and sums without loss, on the grids that the format has. A SigmaGrid uses sigma segments,
whose alphabet is centred at zero and whose escapes carry exact values. A RangeGrid uses range segments.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qcomm.codec import (
    MAX_CODED_BITS,
    NO_TABLE,
    WIRE_TABLE,
    Coding,
    Grid,
    GridKind,
    Quantizer,
    RangeGrid,
    SigmaGrid,
    Statistics,
    histogram_entropy,
    is_usable,
    measure,
    plan_step,
)

__all__ = ["RECORD_FIELDS", "SharedGrid", "Summary", "lossless_quantizer", "share", "summarize"]

STEP_BITS = 8  # a step is at most 1/128 finer than requested
MAX_RANGE_BITS = 16


class Summary(NamedTuple):
    """The statistics of a tensor on one rank: extremes, sum of squares, and bits on a range grid.

    The extremes are NaN if the tensor is not finite.
    """

    minimum: float
    maximum: float
    sum_squares: float
    num_bits: float


RECORD_FIELDS = len(Summary._fields)


class SharedGrid(NamedTuple):
    """The treatment of a tensor on all ranks: they quantize it to multiples of ``step``.

    Where ``step`` is 0 they send ``constant``, which is NaN if some rank's tensor is not finite. Where that is None
    they send uncompressed values.
    """

    step: float = 0.0
    constant: float | None = None

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the nearest multiples of the step: ``|error| <= step / 2`` and rounding.

        Example:
            >>> SharedGrid(step=0.5).round(torch.tensor([0.3, -1.1]))
            tensor([ 0.5000, -1.0000])
        """
        return values.mul(1.0 / self.step).round_().mul_(self.step)


def summarize(
    statistics: Statistics, grid: Grid, values: torch.Tensor, residual: torch.Tensor | None, inv_scale: float
) -> Summary:
    """Returns the statistics of ``u = values * inv_scale + residual`` that the other ranks need."""
    if not statistics.finite:
        return Summary(math.nan, math.nan, math.nan, 0.0)
    lo, hi = statistics.minimum, statistics.maximum
    bits = 0
    if isinstance(grid, RangeGrid) and lo < hi and math.isfinite(hi - lo):
        bits = grid.num_bits or grid.bits_for(
            histogram_entropy(
                values, residual, inv_scale, lo, hi, grid.entropy_bits, grid.sample_fraction, grid.seed, num_threads=1
            )
        )
    return Summary(lo, hi, statistics.sum_squares, bits)


def share(grid: Grid, summaries: Sequence[Summary], count: int, dtype: torch.dtype) -> SharedGrid:
    """Returns the grid that follows from the summaries of all ranks, for a tensor of ``count`` elements.

    The summaries are in rank order. A SigmaGrid's step is relative to the RMS over all ranks. A RangeGrid takes the
    largest number of bits that a rank asks for, and its levels spread over the range of all ranks. All arithmetic is
    that of float64.

    Example:
        >>> ranks = [Summary(-1.0, 1.0, 3.0, 0.0), Summary(-2.0, 0.5, 5.0, 0.0)]
        >>> share(SigmaGrid(step=2.0), ranks, 2, torch.float32)
        SharedGrid(step=2.828125, constant=None)
    """
    lo, hi = min(s.minimum for s in summaries), max(s.maximum for s in summaries)
    if any(math.isnan(s.minimum) for s in summaries):  # which min and max may miss
        return SharedGrid(constant=math.nan)
    if lo == hi:
        return SharedGrid(constant=lo)
    if isinstance(grid, SigmaGrid):
        wanted = grid.step * math.sqrt(sum(s.sum_squares for s in summaries) / (len(summaries) * count))
    else:
        # A peer's number is a number of bits only after this.
        bits = int(min(max(s.num_bits for s in summaries), MAX_RANGE_BITS)) or (grid.num_bits or 1)
        wanted = (hi - lo) / (2**bits - (grid.reconstruction == "endpoint"))
    if not 0.0 < wanted < math.inf or len(summaries) * (max(-lo, hi) + wanted) > torch.finfo(dtype).max:
        return SharedGrid()
    digits = round(-math.log2(torch.finfo(dtype).eps)) + 1
    for step_bits in range(STEP_BITS, 0, -1):
        step = _round_down(wanted, step_bits)
        # One more than the largest level: rounding may go up.
        if step and len(summaries) * (max(-lo, hi) / step + 1.0) < 2.0 ** (digits - step_bits):
            on_grid = Quantizer(GridKind.SIGMA, 4, Coding.SINGLE, NO_TABLE, 0.0, step)
            return SharedGrid(step) if is_usable(on_grid, dtype) else SharedGrid()
    return SharedGrid()


def lossless_quantizer(values: torch.Tensor, step: float, grid: Grid) -> Quantizer:
    """Returns the quantizer of multiples of ``step``, values or sums, without loss and in the code that suits them."""
    statistics = measure(values)
    if not statistics.finite:  # a sum has overflown
        return Quantizer.constant(math.nan)
    if statistics.minimum == statistics.maximum:
        return Quantizer.constant(statistics.minimum)
    if isinstance(grid, SigmaGrid):
        quantizer = plan_step(statistics, step, grid.coding, values)
    else:
        lo = statistics.minimum
        bits = round((statistics.maximum - lo) / step).bit_length()
        if bits > MAX_RANGE_BITS:
            return Quantizer.raw()
        coding = Coding.SINGLE if bits <= MAX_CODED_BITS else Coding.FIXED
        quantizer = Quantizer(GridKind.RANGE_ENDPOINT, bits, coding, WIRE_TABLE, lo, lo + step * (2**bits - 1))
    return quantizer if is_usable(quantizer, values.dtype) else Quantizer.raw()


def _round_down(value: float, bits: int) -> float:
    """Rounds ``value``, which is positive, down to ``bits`` significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(math.ldexp(mantissa, bits)), exponent - bits)
