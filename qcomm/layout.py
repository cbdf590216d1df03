"""How a flat buffer of tensors is cut into one chunk a rank.

::

    buffer      | conv1.weight | bn.weight bn.bias | conv2.weight        | fc.bias |
    compressed  | conv1.weight | conv2.weight        |          cut into W parts
    raw         | bn.weight bn.bias | fc.bias |                 cut into W parts
    chunk r     = r-th part of the compressed values, then r-th part of the raw ones

Tensors that are compressed are laid end to end, and so are the others, and each of the two rows is cut evenly: every
rank owns as many bytes as its neighbours whatever the order of the tensors. A chunk is what one packet carries.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = ["BucketLayout", "Chunk", "Piece", "TensorSpec", "cut_points"]

# Cuts fall on multiples of the codec's lanes, so that no block but a tensor's last has lanes without work.
CUT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorSpec:
    """Elements ``[offset, offset + numel)`` of a flat buffer; ``key`` names them to error feedback and statistics."""

    key: str
    offset: int
    numel: int
    compressed: bool


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, start + length)`` of tensor number ``tensor``; they begin at ``offset`` of the flat buffer."""

    tensor: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Chunk:
    """One rank's part: compressed pieces, then runs of raw elements as (offset, length) in the flat buffer.

    A packet holds a segment for each piece and, if there are raw elements, one segment for all of them. A tensor has at
    most one piece in a chunk.
    """

    pieces: tuple[Piece, ...]
    raw_runs: tuple[tuple[int, int], ...]

    @cached_property
    def compressed_count(self) -> int:
        """Elements in pieces."""
        return sum(piece.length for piece in self.pieces)

    @cached_property
    def raw_count(self) -> int:
        """Elements in raw runs."""
        return sum(length for _, length in self.raw_runs)

    @property
    def count(self) -> int:
        """All elements; 0 where there are fewer elements than ranks, and then no packet either."""
        return self.compressed_count + self.raw_count


def cut_points(count: int, parts: int) -> list[int]:
    """``parts + 1`` ascending positions from 0 to ``count``, inner ones multiples of 32, parts nearly equal.

    Example:
        >>> cut_points(100, 3), cut_points(5, 3)
        ([0, 32, 64, 100], [0, 0, 0, 5])
    """
    units = -(-count // CUT_ALIGNMENT)
    return [min(count, CUT_ALIGNMENT * (units * part // parts)) for part in range(parts + 1)]


def _cut(specs: Sequence[tuple[int, TensorSpec]], begin: int, end: int) -> list[Piece]:
    """The pieces that cover elements [begin, end) of ``specs`` (numbered tensors) laid end to end."""
    pieces, position = [], 0
    for number, spec in specs:
        first, last = max(begin, position), min(end, position + spec.numel)
        if first < last:
            start = first - position
            pieces.append(Piece(number, start, last - first, spec.offset + start))
        position += spec.numel
    return pieces


def _join_runs(pieces: Sequence[Piece]) -> tuple[tuple[int, int], ...]:
    """Raw pieces as (offset, length), neighbours in the buffer joined: raw values do not care where a tensor ends."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and sum(runs[-1]) == piece.offset:
            runs[-1] = runs[-1][0], runs[-1][1] + piece.length
        else:
            runs.append((piece.offset, piece.length))
    return tuple(runs)


class BucketLayout:
    """Tensors of a flat buffer and the chunks they are cut into: a pure function of the arguments, equal on all ranks.

    Args:
        tensors: in any order, not overlapping.
        world_size: number of chunks.

    Example:
        >>> tensors = [TensorSpec("weight", 0, 100, True), TensorSpec("bias", 100, 10, False)]
        >>> layout = BucketLayout(tensors, world_size=2)
        >>> [(chunk.compressed_count, chunk.raw_runs) for chunk in layout.chunks]
        [(64, ()), (36, ((100, 10),))]
    """

    def __init__(self, tensors: Sequence[TensorSpec], world_size: int) -> None:
        self.tensors = tuple(tensors)
        self.world_size = world_size
        numbered = list(enumerate(self.tensors))
        compressed = [(number, spec) for number, spec in numbered if spec.compressed]
        raw = [(number, spec) for number, spec in numbered if not spec.compressed]
        self.compressed_elements = sum(spec.numel for _, spec in compressed)
        self.elements = self.compressed_elements + sum(spec.numel for _, spec in raw)
        compressed_cuts = cut_points(self.compressed_elements, world_size)
        raw_cuts = cut_points(self.elements - self.compressed_elements, world_size)
        self.chunks = tuple(
            Chunk(
                tuple(_cut(compressed, compressed_cuts[part], compressed_cuts[part + 1])),
                _join_runs(_cut(raw, raw_cuts[part], raw_cuts[part + 1])),
            )
            for part in range(world_size)
        )

    @cached_property
    def whole(self) -> Chunk:
        """All chunks as one: every compressed tensor in one piece, then the raw elements."""
        return BucketLayout(self.tensors, 1).chunks[0]

    @cached_property
    def description(self) -> str:
        """One line that two ranks share only if their layouts are equal."""
        listing = "\n".join(f"{t.key} {t.offset} {t.numel} {t.compressed:d}" for t in self.tensors)
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        return (
            f"{len(self.tensors)} tensors of {self.elements} elements, {self.compressed_elements} of them compressed "
            f"(digest {digest})"
        )


def gather_runs(buffer: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Elements of ``runs`` as one 1-D tensor: a view where there is one run, otherwise a copy."""
    parts = [buffer[offset : offset + length] for offset, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gather_chunk(buffer: torch.Tensor, chunk: Chunk, out: torch.Tensor) -> None:
    """Copies a chunk's elements, pieces then raw runs, from where they are in ``buffer`` into the 1-D ``out``."""
    places = [(piece.offset, piece.length) for piece in chunk.pieces] + list(chunk.raw_runs)
    for target, (offset, length) in zip(out.split([length for _, length in places]), places, strict=True):
        target.copy_(buffer[offset : offset + length])


def scatter_chunk(values: torch.Tensor, chunk: Chunk, buffer: torch.Tensor) -> None:
    """Copies a chunk's decoded ``values``, pieces then raw runs, to where they belong in ``buffer``."""
    places = [(piece.offset, piece.length) for piece in chunk.pieces] + list(chunk.raw_runs)
    for source, (offset, length) in zip(values.split([length for _, length in places]), places, strict=True):
        buffer[offset : offset + length].copy_(source)
