"""The layout of a flat buffer of tensors, cut into one chunk per rank.

::

    buffer      | conv1.weight | bn.weight bn.bias | conv2.weight        | fc.bias | fc2.bias |
    compressed  | conv1.weight | conv2.weight        | bn.weight bn.bias fc.bias |   cut into W parts
    raw         | fc2.bias |                                                         cut into W parts
    chunk r     = r-th part of the compressed values, then r-th part of the raw ones

Tensors that are compressed are laid end to end, and so are the others, and each of the two rows is cut evenly. Every
rank owns as many bytes as the next one, in any order of the tensors, unless links differ
(:mod:`qcomm.collectives.owner_shares`). One packet carries one chunk.

Small tensors may be merged (:func:`merge_small`): they are then one tensor of the layout, with one grid and one segment
of a packet, and lie in several runs of the buffer. Here these are bn.weight, bn.bias and fc.bias; fc2.bias is excluded.
"""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

__all__ = ["BucketLayout", "Chunk", "Piece", "TensorSpec", "cut_points", "merge_small"]

# Cuts fall on multiples of the codec's lanes, so that no block but a tensor's last has lanes without work.
CUT_ALIGNMENT = 32
# Approximate ratio of the wire bytes of a raw element to those of a compressed one.
RAW_BYTES_TO_COMPRESSED = 16

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """Elements ``[offset, offset + numel)`` of a flat buffer; ``key`` names them to error feedback and statistics.

    ``may_round``: whether elements of a tensor that is not compressed may be rounded to bfloat16, by that strategy.
    ``members``: of a merged tensor, the tensors that it consists of, one after another. It has their number of elements
    and begins at the first of them. ``places``: (offset, length) of its elements where they lie in several runs.
    """

    key: str
    offset: int
    numel: int
    compressed: bool
    may_round: bool = False
    members: tuple["TensorSpec", ...] = ()
    places: tuple[tuple[int, int], ...] = ()

    @cached_property
    def parameters(self) -> tuple["TensorSpec", ...]:
        """Returns the tensors that error feedback and statistics know: the members, or the tensor itself."""
        return self.members or (self,)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Returns the (offset, length) of all elements in the flat buffer."""
        return _join_runs(self.places or [(part.offset, part.numel) for part in self.parameters])

    def parts(self, start: int, length: int) -> list[tuple[str, int, int]]:
        """Returns the parts of parameters in elements [start, start + length): name, first element and length of each.

        Example:
            >>> members = TensorSpec("a", 0, 3, True), TensorSpec("b", 9, 2, True)
            >>> TensorSpec("small", 0, 5, True, members=members).parts(1, 3)
            [('a', 1, 2), ('b', 0, 1)]
        """
        lengths = [part.numel for part in self.parameters]
        found = _between(self.parameters, lengths, start, start + length)
        return [(part.key, first, count) for part, first, count in found]


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, start + length)`` of tensor number ``tensor``.

    ``runs`` are their (offset, length) in the flat buffer, several only of a merged tensor.
    """

    tensor: int
    start: int
    length: int
    runs: tuple[tuple[int, int], ...]

    @cached_property
    def offset(self) -> int:
        """Returns the position of the first element in the flat buffer."""
        return self.runs[0][0]

    def part(self, first: int, length: int) -> "Piece":
        """Returns elements [first, first + length) of the piece as a piece."""
        return Piece(self.tensor, self.start + first, length, _part_of_runs(self.runs, first, length))


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
        """Returns the number of elements in pieces."""
        return sum(piece.length for piece in self.pieces)

    @cached_property
    def raw_count(self) -> int:
        """Returns the number of elements in raw runs."""
        return sum(length for _, length in self.raw_runs)

    @cached_property
    def count(self) -> int:
        """Returns the number of all elements.

        It is 0 where there are fewer elements than ranks; then there is no packet either.
        """
        return self.compressed_count + self.raw_count

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Returns the positions of the packet's elements, in order.

        Each is (offset, length) in the flat buffer, and neighbours are joined.
        """
        return _join_runs([*(run for piece in self.pieces for run in piece.runs), *self.raw_runs])

    def cut(self, parts: int) -> tuple["Chunk", ...]:
        """Cuts the chunk into ``parts`` nearly equal parts; some are empty where there are too few elements.

        A few raw elements all belong to the first part: the others may then be decoded straight into the buffer.
        """
        compressed_cuts, raw_cuts = cut_points(self.compressed_count, parts), cut_points(self.raw_count, parts)
        if self.raw_count * parts * RAW_BYTES_TO_COMPRESSED < self.compressed_count:
            raw_cuts = [0] + [self.raw_count] * parts
        cut = []
        for part in range(parts):
            lengths = [piece.length for piece in self.pieces]
            pieces = [
                piece.part(first, length)
                for piece, first, length in _between(self.pieces, lengths, *compressed_cuts[part : part + 2])
            ]
            raw_begin, raw_end = raw_cuts[part : part + 2]
            cut.append(Chunk(tuple(pieces), _part_of_runs(self.raw_runs, raw_begin, raw_end - raw_begin)))
        return tuple(cut)


def merge_small(tensors: Sequence[TensorSpec], is_small: Callable[[TensorSpec], bool]) -> list[TensorSpec]:
    """Returns ``tensors`` with those that are small replaced by one merged tensor, the last.

    Example:
        >>> tensors = [TensorSpec("bn", 0, 4, True), TensorSpec("conv", 4, 100, True), TensorSpec("bias", 104, 2, True)]
        >>> [(tensor.key, tensor.runs) for tensor in merge_small(tensors, lambda tensor: tensor.numel < 10)]
        [('conv', ((4, 100),)), ('small tensors', ((0, 4), (104, 2)))]
    """
    small = tuple(replace(tensor, compressed=True) for tensor in tensors if is_small(tensor))
    if not small:
        return list(tensors)
    numel = sum(tensor.numel for tensor in small)
    merged = TensorSpec("small tensors", small[0].offset, numel, True, may_round=True, members=small)
    return [*(tensor for tensor in tensors if not is_small(tensor)), merged]


def cut_points(count: int, parts: int, shares: Sequence[float] | None = None) -> list[int]:
    """Returns ``parts + 1`` ascending positions from 0 to ``count``, inner ones multiples of 32.

    Parts are nearly equal, or nearly ``shares`` of ``count``.

    Example:
        >>> cut_points(100, 3), cut_points(5, 3), cut_points(1000, 3, [0.6, 0.4, 0.0])
        ([0, 32, 64, 100], [0, 0, 0, 5], [0, 608, 1000, 1000])
    """
    units = -(-count // CUT_ALIGNMENT)
    if shares is None:
        return [min(count, CUT_ALIGNMENT * (units * part // parts)) for part in range(parts + 1)]
    ends = [min(count, CUT_ALIGNMENT * round(units * total)) for total in accumulate(shares)]
    # Sums of shares are not exact; those who own nothing after the last owner still own nothing.
    return [0, *(count if sum(shares[part + 1 :]) == 0 else end for part, end in enumerate(ends))]


def _between(items: Sequence[T], lengths: Sequence[int], begin: int, end: int) -> list[tuple[T, int, int]]:
    """Returns the parts of items, laid end to end, that cover elements [begin, end).

    Each is (item, its first element, number of elements).
    """
    found, position = [], 0
    for item, length in zip(items, lengths, strict=True):
        first, last = max(begin, position), min(end, position + length)
        if first < last:
            found.append((item, first - position, last - first))
        position += length
    return found


def _part_of_runs(runs: Sequence[tuple[int, int]], begin: int, length: int) -> tuple[tuple[int, int], ...]:
    """Returns the runs of elements [begin, begin + length) of ``runs``."""
    parts = _between(runs, [run_length for _, run_length in runs], begin, begin + length)
    return tuple((run[0] + first, run_length) for run, first, run_length in parts)


def _join_runs(runs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Joins each run, given as (offset, length), with the one before it where it begins at its end."""
    joined: list[tuple[int, int]] = []
    for offset, length in runs:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((offset, length))
    return tuple(joined)


class BucketLayout:
    """Tensors of a flat buffer and the chunks they are cut into.

    The layout is a pure function of the arguments, equal on all ranks.

    Args:
        tensors: in any order, not overlapping.
        world_size: number of chunks.
        chunks: where others have cut the tensors; by default they are cut evenly.
        shares: what each chunk has of all elements, in place of equal parts; their sum is 1.

    Attributes:
        elements, compressed_elements: number of all elements, and of those that are compressed.
        parameters: the tensors, each member of a merged one by itself.
        plans: results that collectives derive from this layout and reuse.
        exact_elements: number of elements neither compressed nor ever rounded; ``exact_runs`` are their runs.

    Example:
        >>> tensors = [TensorSpec("weight", 0, 100, True), TensorSpec("bias", 100, 10, False)]
        >>> layout = BucketLayout(tensors, world_size=2)
        >>> [(chunk.compressed_count, chunk.raw_runs) for chunk in layout.chunks]
        [(64, ()), (36, ((100, 10),))]
    """

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        world_size: int,
        chunks: Sequence[Chunk] | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.tensors = tuple(tensors)
        self.parameters = tuple(parameter for tensor in self.tensors for parameter in tensor.parameters)
        self.world_size = world_size
        self._slices: dict[int, tuple[tuple[Chunk, ...], ...]] = {}
        self.plans: dict[Hashable, Any] = {}
        compressed = [number for number, spec in enumerate(self.tensors) if spec.compressed]
        raw = [number for number, spec in enumerate(self.tensors) if not spec.compressed]
        self.compressed_elements = sum(self.tensors[number].numel for number in compressed)
        self.elements = sum(spec.numel for spec in self.tensors)
        exact = [spec.runs for spec in self.tensors if not (spec.compressed or spec.may_round)]
        self.exact_runs = _join_runs([run for runs in exact for run in runs])
        self.exact_elements = sum(length for _, length in self.exact_runs)
        if chunks is not None:
            self.chunks = tuple(chunks)
            return
        compressed_cuts = cut_points(self.compressed_elements, world_size, shares)
        raw_cuts = cut_points(self.elements - self.compressed_elements, world_size, shares)
        self.chunks = tuple(
            Chunk(
                tuple(self._pieces(compressed, *compressed_cuts[part : part + 2])),
                # Raw values may be cut anywhere, also inside a tensor.
                _join_runs([run for p in self._pieces(raw, *raw_cuts[part : part + 2]) for run in p.runs]),
            )
            for part in range(world_size)
        )

    def slices(self, count: int) -> tuple[tuple[Chunk, ...], ...]:
        """Returns ``count`` slices, each the same part of every chunk.

        See :mod:`qcomm.collectives.two_phase_schedule`.
        """
        if count not in self._slices:
            self._slices[count] = tuple(zip(*[chunk.cut(count) for chunk in self.chunks], strict=True))
        return self._slices[count]

    def _pieces(self, numbers: Sequence[int], begin: int, end: int) -> list[Piece]:
        """Returns the pieces that cover elements [begin, end) of the tensors ``numbers`` laid end to end."""
        lengths = [self.tensors[number].numel for number in numbers]
        return [
            Piece(number, start, length, _part_of_runs(self.tensors[number].runs, start, length))
            for number, start, length in _between(numbers, lengths, begin, end)
        ]

    @cached_property
    def owned_parts(self) -> tuple[dict[str, tuple[int, int]], ...]:
        """Returns the part of each parameter in each chunk, as (first element, length)."""
        parts = ([self.tensors[p.tensor].parts(p.start, p.length) for p in chunk.pieces] for chunk in self.chunks)
        return tuple({key: (start, count) for of_piece in found for key, start, count in of_piece} for found in parts)

    @cached_property
    def whole(self) -> Chunk:
        """Returns all chunks as one: every compressed tensor in one piece, then the raw elements."""
        return BucketLayout(self.tensors, 1).chunks[0]

    @cached_property
    def description(self) -> str:
        """Returns one line that two ranks share only if their layouts are equal."""
        listing = "\n".join(
            f"{p.key} {p.offset} {p.numel} {t.compressed:d} {t.may_round:d} {len(t.members)} {list(t.places)}"
            for t in self.tensors
            for p in t.parameters
        )
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        return (
            f"{len(self.parameters)} tensors of {self.elements} elements, {self.compressed_elements} of them "
            f"compressed (digest {digest})"
        )
