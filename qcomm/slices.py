"""How the chunks of a large buffer are cut in slices, which follow each other through a collective.

::

    chunk     | of rank 0                         | of rank 1                         |
    slice     | 0       | 1       | 2       | 3   | 0       | 1       | 2       | 3   |

Slice s of a collective is the s-th part of every chunk, so that each rank owns a part of every slice and all links are
busy with each. A rank's own parts together are its chunk: what it keeps of the means does not depend on the slices.
"""

from collections.abc import Sequence

from qcomm.layout import BucketLayout, Chunk

__all__ = ["MOST_SLICES", "SLICE_ELEMENTS", "Slice", "cut_slices"]

# Below so many elements of a chunk a slice's messages and calls take longer than it saves by waiting less.
SLICE_ELEMENTS = 1 << 17
# Two hide most of what can be hidden, and every further one costs messages: bench/bench_slices.py.
MOST_SLICES = 2

Slice = Sequence[Chunk]  # one part of each rank's chunk, in rank order


def cut_slices(layout: BucketLayout, slice_elements: int) -> tuple[Slice, ...]:
    """The slices of a layout, at least one: a pure function of the arguments, equal on all ranks.

    Args:
        layout: of the buffer.
        slice_elements: fewest elements, on average, that each chunk has in a slice.

    Example:
        >>> from qcomm.layout import TensorSpec
        >>> layout = BucketLayout([TensorSpec("weight", 0, 1000, True)], world_size=2)
        >>> [[chunk.pieces[0].offset for chunk in part] for part in cut_slices(layout, 200)]
        [[0, 512], [256, 768]]
    """
    fitting = layout.elements // (slice_elements * layout.world_size)
    return layout.slices(max(1, min(MOST_SLICES, fitting)))
