"""Slices of a large buffer, and the order of a rank's steps on them, so that codec and network work at the same time.

::

    chunk     | of rank 0                         | of rank 1                         |
    slice     | 0       | 1       | 2       | 3   | 0       | 1       | 2       | 3   |

Slice s of a collective is the s-th part of every chunk. Each rank owns a part of every slice, and each slice uses all
links. A rank's own parts together are its chunk: the means it keeps do not depend on the slices.

::

    tick            0   1   2   3   4   5   6   7 ...
    encode slice    0   1   2   3   4   5   6   7
    reduce slice            0   1   2   3   4   5          sent by encode two ticks ago
    decode slice                    0   1   2   3          sent by reduce two ticks ago

Every message has two ticks to arrive while the rank computes. A link slower than the codec always has one more message
waiting besides the current one. The order is fixed and the same on all ranks: no rank has to find out
which messages have arrived, and no two ranks can wait for each other.
"""

from collections.abc import Sequence
from enum import Enum

from qcomm.collectives.layout import BucketLayout, Chunk

__all__ = ["MOST_SLICES", "SLICE_ELEMENTS", "Slice", "Step", "cut_slices", "schedule"]

# In a chunk of fewer elements a slice's messages and calls take longer than the waiting it saves.
SLICE_ELEMENTS = 1 << 17
# Two hide nearly all that can be hidden, and every further one costs messages: bench/bench_slices.py.
MOST_SLICES = 2

Slice = Sequence[Chunk]  # one part of each rank's chunk, in rank order


def cut_slices(layout: BucketLayout, slice_elements: int) -> tuple[Slice, ...]:
    """Returns the slices of a layout, at least one.

    The result is a pure function of the arguments, equal on all ranks.

    Args:
        layout: of the buffer.
        slice_elements: minimum number of elements, on average, that each chunk has in a slice.

    Example:
        >>> from qcomm.collectives.layout import TensorSpec
        >>> layout = BucketLayout([TensorSpec("weight", 0, 1000, True)], world_size=2)
        >>> [[chunk.pieces[0].offset for chunk in part] for part in cut_slices(layout, 200)]
        [[0, 512], [256, 768]]
    """
    fitting = layout.elements // (slice_elements * layout.world_size)
    return layout.slices(max(1, min(MOST_SLICES, fitting)))


LAG = 2  # ticks between sending a message and needing it


class Step(Enum):
    """An operation of a rank on a slice."""

    ENCODE = "encode"
    REDUCE = "reduce"
    DECODE = "decode"


def schedule(slices: int) -> list[tuple[Step, int]]:
    """Returns the steps of a collective of ``slices`` slices, in order.

    Example:
        >>> [f"{step.value} {number}" for step, number in schedule(2)]
        ['encode 0', 'encode 1', 'reduce 0', 'reduce 1', 'decode 0', 'decode 1']
    """
    ticks = range(slices + 2 * LAG)
    steps = [(step, tick - behind * LAG) for tick in ticks for behind, step in enumerate(Step)]
    return [(step, number) for step, number in steps if 0 <= number < slices]
