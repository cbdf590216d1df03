"""Shards: the layout of a buffer of W rows, of which row r is rank r's shard of every tensor.

::

    buffer      | row of rank 0                 | row of rank 1                 |
                | a[0:5]  | b[0:2]  | c[0:1]    | a[5:9] .| b[2:4]  | .         |
    chunk r     = row r without its padding (the dots)

Frameworks that shard parameters cut each of them in W parts, and pad the last ones. All parts of a tensor together are
one tensor of the layout, so it has one grid on a rank, and one residual, whatever W is.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qcomm.collectives.layout import BucketLayout, Chunk, Piece, TensorSpec

__all__ = ["ShardedTensor", "shard_layout", "shard_lengths"]


class ShardedTensor(NamedTuple):
    """A tensor by its shards.

    Attributes:
        key: names it to error feedback and statistics.
        lengths: number of elements of each rank's shard.
        padded: number of elements that each shard has in its row.
        compressed: whether it is quantized.
    """

    key: str
    lengths: tuple[int, ...]
    padded: int
    compressed: bool


def shard_lengths(rows: int, row_elements: int, world_size: int) -> tuple[tuple[int, ...], int]:
    """Returns the number of elements of each rank's shard, where a tensor is cut along its first dimension as by torch.

    The second result is the number in each shard with its padding.

    Example:
        >>> shard_lengths(rows=5, row_elements=10, world_size=4)
        ((20, 20, 10, 0), 20)
    """
    per_rank = -(-rows // world_size)
    lengths = tuple(max(0, min(per_rank, rows - rank * per_rank)) * row_elements for rank in range(world_size))
    return lengths, per_rank * row_elements


def shard_layout(tensors: Sequence[ShardedTensor], world_size: int) -> BucketLayout:
    """Returns the layout of a buffer of ``world_size`` rows; tensors lie in a row in the order given.

    Example:
        >>> layout = shard_layout([ShardedTensor("a", (5, 4), 5, True), ShardedTensor("b", (2, 1), 2, False)], 2)
        >>> [chunk.places for chunk in layout.chunks]
        [((0, 7),), ((7, 4), (12, 1))]
        >>> layout.tensors[0].runs, layout.elements
        (((0, 5), (7, 4)), 12)
    """
    row = sum(tensor.padded for tensor in tensors)
    placed = [(tensor, offset) for tensor, offset in _offsets(tensors) if sum(tensor.lengths)]
    runs = [[(rank * row + offset, length) for rank, length in enumerate(tensor.lengths)] for tensor, offset in placed]
    specs = [
        TensorSpec(tensor.key, offset, sum(tensor.lengths), tensor.compressed, places=tuple(r for r in of if r[1]))
        for (tensor, offset), of in zip(placed, runs, strict=True)
    ]
    chunks = []
    for rank in range(world_size):
        pieces, raw = [], []
        for number, (tensor, _) in enumerate(placed):
            run = runs[number][rank]
            if run[1] and tensor.compressed:
                pieces.append(Piece(number, sum(tensor.lengths[:rank]), run[1], (run,)))
            elif run[1]:
                raw.append(run)
        chunks.append(Chunk(tuple(pieces), tuple(raw)))
    return BucketLayout(specs, world_size, chunks)


def _offsets(tensors: Sequence[ShardedTensor]) -> Iterator[tuple[ShardedTensor, int]]:
    """Yields each tensor with its place in a row."""
    offset = 0
    for tensor in tensors:
        yield tensor, offset
        offset += tensor.padded
