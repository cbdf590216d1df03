"""Grids and codings by the packet's numbers, segments and statistics: all that encoding needs beside the values."""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch

__all__ = ["WIRE_TABLE", "Coding", "GridKind", "Quantizer", "Segment", "Statistics"]

WIRE_TABLE = 0


class GridKind(IntEnum):
    """Kinds of grid, the values of ``SegmentRecord.grid`` in a packet."""

    NONE = 0
    RANGE_CENTER = 1
    RANGE_ENDPOINT = 2
    SIGMA = 3


class Coding(IntEnum):
    """Codings of a segment, the values of ``SegmentRecord.coding`` in a packet."""

    RAW = 0
    CONSTANT = 1
    FIXED = 2
    SINGLE = 3
    PAIR = 4
    RUNS = 5


class Quantizer(NamedTuple):
    """A measured tensor's grid and code, as in a segment record.

    Encoding needs nothing else besides the values.
    """

    grid: GridKind
    num_bits: int
    coding: Coding
    table: int
    p0: float
    p1: float

    @classmethod
    def raw(cls) -> "Quantizer":
        """Returns the quantizer of values that travel uncompressed."""
        return cls(GridKind.NONE, 0, Coding.RAW, WIRE_TABLE, 0.0, 0.0)

    @classmethod
    def constant(cls, value: float) -> "Quantizer":
        """Returns a quantizer whose values all decode to ``value``, which may be NaN."""
        return cls(GridKind.NONE, 0, Coding.CONSTANT, WIRE_TABLE, value, 0.0)

    @property
    def step(self) -> float:
        """Returns the distance of neighbouring levels; 0 where nothing is lost."""
        if self.grid == GridKind.SIGMA:
            return self.p1
        if self.grid == GridKind.NONE:
            return 0.0
        levels = 1 << self.num_bits
        return (self.p1 - self.p0) / (levels - (self.grid == GridKind.RANGE_ENDPOINT))


class Segment(NamedTuple):
    """One tensor, or a part of one, that becomes a segment of a packet.

    ``values`` are contiguous and of any shape. They are float32 or float64 if there is a residual. ``residual`` is
    contiguous float32 with the same number of elements. It is added before quantization and then replaced by the
    quantization error. ``sample`` is float64 of ``SAMPLE_NUMBERS`` elements, and filled where runs of zeros are coded:
    sums of squares of some scaled values and of their new residuals, their number, and the number of blocks that are
    not finite.
    """

    values: torch.Tensor
    quantizer: Quantizer
    residual: torch.Tensor | None = None
    sample: torch.Tensor | None = None


@dataclass(frozen=True)
class Statistics:
    """Extremes and sum of squares of ``count`` values, and whether all of them are finite.

    The squares are added in float64, in an order that is part of the packet format. The other figures are meaningless
    if ``finite`` is False.
    """

    count: int
    minimum: float
    maximum: float
    sum_squares: float
    finite: bool

    @property
    def rms(self) -> float:
        """Returns the root mean square; 0 for no values."""
        return math.sqrt(self.sum_squares / self.count) if self.count else 0.0
