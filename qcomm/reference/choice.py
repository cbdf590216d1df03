"""Choices of an encoder before the first byte: raw, constant or a grid, the number of bits, and the code."""

import math
from dataclasses import replace

import torch

from qcomm.reference.grids import (
    RANGE_CENTER,
    RANGE_ENDPOINT,
    SIGMA,
    entropy,
    entropy_fixed,
    extremes,
    is_usable,
    quantize,
    range_num_bits,
    rms_num_bits,
    sample_indices,
    sample_size,
    sigma_num_bits,
    sigma_step,
    sum_squares,
)
from qcomm.reference.packet import (
    CONSTANT,
    FIXED,
    NO_TABLE,
    OWN_TABLE,
    PAIR,
    RAW,
    RUNS,
    SINGLE,
    ReferenceSegment,
    static_lengths,
)
from qcomm.reference.static_tables import STATIC_TABLES
from qcomm.reference.zero_runs import MAX_LEVEL, RUNS_BITS

MAX_CODED_BITS = 12
RUNS_STEP = 2.5


def table_step(number: int) -> float:
    """Returns the step that a static table was made for, in RMS, rounded to float32 as in static_tables.h."""
    quarters = number - (65 if STATIC_TABLES[number][1] else 14)
    return float(torch.tensor(2.0 ** (quarters / 4), dtype=torch.float64).float())


def nearest_table(coding: int, num_bits: int, k: float) -> int:
    """Returns the static table of a coding and alphabet with the nearest step by ratio.

    Of two equally near tables it is the one with the lower number. It is 255 if there is no table.
    """
    fitting = [t for t, (bits, pair, _) in STATIC_TABLES.items() if (bits, pair) == (num_bits, coding == PAIR)]
    return min(fitting, key=lambda t: (abs(math.log2(k / table_step(t))), t), default=NO_TABLE)


def static_cost(counts: list[int], table: int, codewords: float) -> float:
    """Returns the bits of ``codewords`` codewords in a static code, distributed like a sample."""
    lengths = static_lengths(table)
    if lengths is None:
        return math.inf
    return codewords * float(sum(c * n for c, n in zip(counts, lengths, strict=True))) / float(sum(counts))


def own_cost(counts: list[int], codewords: float) -> float:
    """Returns the same in a code of the segment's own.

    The cost is the sum of the entropy, Miller's (1955) correction of it, redundancy, and the table.
    """
    used, h = float(sum(c > 0 for c in counts)), entropy_fixed(counts) / float(2**24)
    bias = (used - 1.0) / (2.0 * sum(counts) * math.log(2.0))
    return codewords * max(1.0, h + bias + 0.02) + 6.0 * used


def sigma_code(u: torch.Tensor, dtype: torch.dtype, num_bits: int, step: float, k: float) -> tuple[int, int]:
    """Returns the cheapest (coding, table) by the counts of a sample of neighbouring pairs."""
    if num_bits > MAX_CODED_BITS or u.numel() < 2:
        return SINGLE, NO_TABLE
    n = min(u.numel() // 2, 2**14, (sample_size(u.numel(), 0.03) + 1) // 2)
    at = torch.tensor(sample_indices(u.numel() // 2, n, 0), dtype=torch.int64)
    first, second = (quantize(u[2 * at + i], dtype, SIGMA, num_bits, 0.0, step) for i in (0, 1))
    sampled = {SINGLE: (torch.cat([first, second]), 2**num_bits, float(u.numel()))}
    if num_bits == 4:
        sampled[PAIR] = (first | second << 4, 256, u.numel() / 2)
    static, own = [], []
    for coding, (symbols, size, codewords) in sampled.items():
        counts: list[int] = torch.bincount(symbols, minlength=size).tolist()
        table = nearest_table(coding, num_bits, k)
        static.append((static_cost(counts, table, codewords), coding, table))
        own.append((own_cost(counts, codewords), coding, OWN_TABLE))
    best = min(own)[0] < (1.0 - 0.03) * min(static)[0]  # SINGLE < PAIR, so SINGLE wins a tie
    return min(own if best else static)[1:]


def without_grid(segment: ReferenceSegment) -> ReferenceSegment | None:
    """Returns ``segment`` as raw or constant if its values need no grid, else None."""
    u = segment.u()
    if not u.isfinite().all():
        return segment
    lo, hi = extremes(u)
    return replace(segment, coding=CONSTANT, p0=lo) if lo == hi else None


def checked(segment: ReferenceSegment) -> ReferenceSegment:
    """Returns ``segment``, or its raw form if the grid's arithmetic does not work for it."""
    parameters = segment.grid, segment.num_bits, segment.p0, segment.p1
    plain = ReferenceSegment(segment.values, residual=segment.residual, inv_scale=segment.inv_scale)
    return segment if is_usable(segment.values.dtype, *parameters) else plain


def sigma_segment(
    values: torch.Tensor,
    k: float,
    coding: str = "auto",
    residual: torch.Tensor | None = None,
    inv_scale: float = 1.0,
) -> ReferenceSegment:
    """Returns the segment of a sigma grid; ``coding`` is auto, single, pair (static codes), table, runs or fixed."""
    segment = ReferenceSegment(values, residual=residual, inv_scale=inv_scale)
    if (plain := without_grid(segment)) is not None:
        return plain
    u, num_bits = segment.u(), sigma_num_bits(k)
    step = sigma_step(u, k)
    largest = torch.finfo(values.dtype).max
    if residual is not None and (coding == "runs" or (coding == "auto" and k >= RUNS_STEP)):
        runs = checked(replace(segment, grid=SIGMA, num_bits=RUNS_BITS, coding=RUNS, p1=step))
        if runs.coding == RUNS and MAX_LEVEL * step <= largest:
            return runs
    coding = "auto" if coding == "runs" else coding
    segment = checked(replace(segment, grid=SIGMA, num_bits=num_bits, coding=SINGLE, table=NO_TABLE, p1=step))
    if segment.coding == RAW or coding == "fixed" or num_bits > MAX_CODED_BITS:
        return segment
    if coding == "auto":
        code = sigma_code(u, values.dtype, num_bits, step, k)
    else:
        wanted = PAIR if coding == "pair" else SINGLE
        table = OWN_TABLE if coding == "table" else nearest_table(wanted, num_bits, k)
        code = wanted, (table if table != NO_TABLE else OWN_TABLE)
    return replace(segment, coding=code[0], table=code[1])


def range_segment(
    values: torch.Tensor,
    num_bits: int | None = None,
    c: float = 6.0,
    entropy_bits: int = 4,
    fraction: float = 0.03,
    max_bits: int = 16,
    seed: int = 0,
    center: bool = False,
    residual: torch.Tensor | None = None,
    inv_scale: float = 1.0,
    bits: str = "entropy",
) -> ReferenceSegment:
    """Returns the segment of a range grid, with ``num_bits`` bits or the number that follows from entropy or RMS."""
    segment = ReferenceSegment(values, residual=residual, inv_scale=inv_scale)
    if (plain := without_grid(segment)) is not None:
        return plain
    u = segment.u()
    lo, hi = extremes(u)
    if not math.isfinite(hi - lo):
        return segment
    if bits == "rms":
        num_bits = rms_num_bits(math.sqrt(sum_squares(u) / u.numel()), c, entropy_bits, max_bits)
    elif num_bits is None:
        num_bits = range_num_bits(entropy(u, lo, hi, entropy_bits, fraction, seed), c, entropy_bits, max_bits)
    coding = SINGLE if num_bits <= MAX_CODED_BITS else FIXED
    grid = RANGE_CENTER if center else RANGE_ENDPOINT
    return checked(replace(segment, grid=grid, num_bits=num_bits, coding=coding, p0=lo, p1=hi))
