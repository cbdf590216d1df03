"""Slots for packets on a device: their size is fixed, so that no rank waits to learn the sizes of packets.

A slot's capacity is a property of the bucket. It is equal on all ranks and changed by all at the same collective:

::

    collective   0                    1 ... 49   50                      51 ... 99   100
    capacities   any packet fits      nominal    nominal                 nominal     as agreed after 50
    agreement    fields, by message              largest of all ranks                read: it arrived long ago

A sigma grid with error feedback can drop blocks. There a capacity is the size that packets have needed, and a margin.
Blocks that do not fit stay in the residual. A range grid's packets have a bound, which is their capacity. A sigma
grid's packets have no bound that would save anything. So without error feedback the ranks agree on a size each time,
and wait.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcomm.codec import (
    CHECKSUM_BYTES,
    DIMENSION_BYTES,
    PACKET_HEADER_BYTES,
    Grid,
    RangeGrid,
    SigmaGrid,
    codes_runs,
    record_bytes,
)
from qcomm.collectives import Chunk

__all__ = ["PERIOD", "Slots", "adjusted", "is_fixed", "nominal_bytes", "slot_bytes"]

PERIOD = 50  # collectives of a bucket between two agreements
# Blocks beyond a slot are sent later and not lost, while every byte of a slot travels whether or not it is used.
MARGIN = 1.125
SLACK_BYTES = 256
ALIGNMENT = 16
# A slot is kept as long as packets fill it between these fractions.
LEAST_FILLED, MOST_FILLED = 0.75, 0.97
# Bytes of a flat packet and of each segment in it besides values; start windows and the rest of a block, by experience.
PACKET_BYTES = PACKET_HEADER_BYTES + DIMENSION_BYTES
BLOCK_BYTES, LEAST_BLOCK_VALUES = 80, 8192
RUN_BLOCK_VALUES = 4 * LEAST_BLOCK_VALUES  # of all segments together


@dataclass(frozen=True)
class Slots:
    """Capacities in bytes: of each rank's packet for an owner, and of an owner's mean."""

    values: int
    means: int


def is_fixed(grid: Grid, error_feedback: bool) -> bool:
    """Returns whether capacities can be known before a packet is encoded.

    Example:
        >>> is_fixed(SigmaGrid(1.0), error_feedback=False)
        False
    """
    return error_feedback or isinstance(grid, RangeGrid)


def slot_bytes(largest: int, bound: int) -> int:
    """Returns the capacity if packets have needed up to ``largest`` bytes and none can need more than ``bound``.

    Example:
        >>> slot_bytes(1000, 10_000)
        1392
    """
    return min(_align(int(largest * MARGIN) + SLACK_BYTES), _align(bound))


def adjusted(capacity: int, largest: int, bound: int) -> int:
    """Returns the next capacity: the old one unless packets have filled it nearly or only to a small part.

    Example:
        >>> adjusted(1392, 1100, 10_000) == 1392, adjusted(1392, 1390, 10_000) > 1392
        (True, True)
    """
    filled = largest / capacity
    return capacity if LEAST_FILLED <= filled <= MOST_FILLED else slot_bytes(largest, bound)


def nominal_bytes(grids: Sequence[Grid], chunk: Chunk, dtype: torch.dtype, error_feedback: bool) -> int:
    """Returns the size that a packet of ``chunk`` may have by its pieces' grids alone, in whole units of a slot.

    For a sigma grid it is a Gaussian's size, because a Gaussian has the largest entropy at a given RMS. For a range
    grid it is the maximum size of a packet, which is never larger than fixed-width symbols.

    Example:
        >>> chunk = Chunk((), ((0, 100),))
        >>> nominal_bytes([], chunk, torch.float32, error_feedback=True)
        480
    """
    segments = len(chunk.pieces) + bool(chunk.raw_count)
    size = PACKET_BYTES + (record_bytes(dtype) + CHECKSUM_BYTES) * segments + chunk.raw_count * dtype.itemsize
    in_runs = 0  # values whose blocks run across pieces
    for grid, piece in zip(grids, chunk.pieces, strict=True):
        if isinstance(grid, RangeGrid):
            size += -(-piece.length * grid.max_num_bits // 32) * 4
        elif codes_runs(grid, error_feedback):
            in_runs += piece.length
            size += math.ceil(piece.length * gaussian_run_bits(grid) / 8)
        else:
            blocks = 1 + piece.length // LEAST_BLOCK_VALUES
            size += math.ceil(piece.length * gaussian_bits(grid) / 8) + BLOCK_BYTES * blocks
    return _align(size + BLOCK_BYTES * -(-in_runs // RUN_BLOCK_VALUES))


def gaussian_bits(grid: SigmaGrid) -> float:
    """Returns the bits of a Gaussian value on a sigma grid.

    That is log2(sqrt(2 pi e) / k), and no less than Huffman codes of pairs take.

    Example:
        >>> round(gaussian_bits(SigmaGrid(1.0)), 2)
        2.05
    """
    return max(math.log2(math.sqrt(2 * math.pi * math.e) / grid.step), 0.6)


def gaussian_run_bits(grid: SigmaGrid) -> float:
    """Returns the bits of a Gaussian value on a coarse sigma grid that codes runs of zeros.

    A value is not zero with probability p = erfc(k / sqrt(8)). Then its sign takes a bit more than the entropy of p.

    Example:
        >>> round(gaussian_run_bits(SigmaGrid(3.2)), 2)
        0.61
    """
    p = math.erfc(grid.step / math.sqrt(8))
    return p - p * math.log2(p) - (1 - p) * math.log2(1 - p)


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
