"""The mean in two levels: uncompressed inside a node, compressed between nodes.

There are ``a`` ranks per node and ``b`` nodes, W = a * b. Rank ``n * a + l`` is number l of node n. The buffer is cut
in a slices and each slice in b chunks::

    slice     | 0                     | 1                     |        a = 2, b = 3
    chunk     | 0     | 1     | 2     | 3     | 4     | 5     |
    owner     | 0     | 2     | 4     | 1     | 3     | 5     |        chunk l * b + n belongs to rank n * a + l

1. Inside each node the uncompressed values go through a reduce-scatter. Rank l gets its node's sum of slice l.
2. Between the ranks of the same number l on all nodes slice l goes through the exchange of
   :mod:`qcomm.collectives.two_phase`: the sums compressed to the owners of the chunks, the means compressed back.
3. Inside each node the decoded slices go through an all-gather, in the buffer's dtype.

All ranks end with the same bits, because the slices with number l are decoded from the same packets on every node.
Ranks that share a fast link form a node. Any two factors of W are possible, which makes a torus of a x b.

Values inside a node travel in packets, too, which store them as they are: their checksums find damage before it is
added.

There are n elements, of v bytes in float32 or float64 and of d bytes in the buffer's dtype. P are the packets of a
rank's slice and M those of the slice's means. Then per rank::

    bytes inside the node      (a - 1) / a * n * (v + d), and 2 (a - 1) headers and checksums of packets
    bytes between nodes        (b - 1) / b * (P + M), about 1 / a of those of two_phase over the same links
    headers                    4 to each of the W - 1 other ranks
    |result - mean|            <= sum_n(s_n) / (2 W) + t / 2 and rounding

Here s_n is the step of node n's sum for a part of a tensor, and t the owner's. Where gradients are independent, s_n is
sqrt(a) times a rank's step, and the first term sqrt(a) times smaller than in two_phase. On a single node nothing is
compressed.

There are no groups of ranks with connections of their own: all messages travel over the communicator's. Before each
step all W ranks exchange a handshake, so a fault on one rank is raised on all.

Error feedback keeps the loss of quantizing the node's sum of a rank's slice, and that of quantizing its own chunk's
mean. Residuals of other slices, from other strategies, travel uncompressed inside the node and are then zero.
``sum_t result_t = sum_t mean(g_t) - (mean_i(e_i) + o)`` holds in every strategy.

A node's sum has to be a number of its dtype, because it travels as such: with a ranks per node, values beyond 1/a of
the largest number may become NaN. The sum over nodes may be larger, as in the other strategies.

A value that is not finite makes its tensor's part in one chunk NaN on all ranks, and not all of the tensor.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from qcomm.codec import CPU, Coding, Quantizer, Segment, measure
from qcomm.collectives.layout import Chunk, Piece
from qcomm.collectives.packing import (
    Measured,
    choose,
    gather_chunk,
    gather_runs,
    has_overflown,
    is_zero,
    keep_in_range,
    no_bytes,
    pack,
    recover,
    size_limit,
    unpack,
)
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.task import MeanTask
from qcomm.communicator import Phase

__all__ = ["hierarchical_mean"]

T = TypeVar("T")


class _Place(NamedTuple):
    """The position of a rank: number ``local`` of ``ranks_per_node`` on node number ``node`` of ``nodes``."""

    node: int
    nodes: int
    local: int
    ranks_per_node: int

    @classmethod
    def of(cls, rank: int, world_size: int, ranks_per_node: int) -> "_Place":
        return cls(rank // ranks_per_node, world_size // ranks_per_node, rank % ranks_per_node, ranks_per_node)

    @property
    def neighbours(self) -> list[int]:
        """Returns the ranks of the same node, own one included, by their number."""
        return [self.node * self.ranks_per_node + local for local in range(self.ranks_per_node)]

    @property
    def row(self) -> list[int]:
        """Returns the ranks of the same number on all nodes, own one included, by node."""
        return [node * self.ranks_per_node + self.local for node in range(self.nodes)]

    def slice_of(self, task: MeanTask, local: int) -> Sequence[Chunk]:
        """Returns the chunks of slice number ``local``, by node."""
        return task.layout.chunks[local * self.nodes : (local + 1) * self.nodes]

    @property
    def own_chunk(self) -> int:
        """Returns the number of the chunk whose mean this rank makes."""
        return self.local * self.nodes + self.node


def hierarchical_mean(rounds: Rounds) -> None:
    """Replaces the buffer of ``rounds.task`` by its mean over all ranks. Runs on the communicator's thread."""
    task, world_size, dtype = rounds.task, rounds.world_size, rounds.task.wire_dtype
    place = _Place.of(rounds.rank, world_size, task.options.node_size)
    chunks = place.slice_of(task, place.local)
    sizes = [size_limit(chunk, dtype) for chunk in chunks]

    def exchange(
        phase: Phase, kind: str, ranks: Sequence[int], packets: Sequence[torch.Tensor] | None, limits: Sequence[int]
    ) -> list[torch.Tensor]:
        """Exchanges with some of the ranks only, and returns their packets."""
        outgoing = None if packets is None else _spread(ranks, packets, world_size, no_bytes())
        received = rounds.exchange(phase, kind, outgoing, _spread(ranks, limits, world_size, 0))
        return [received[rank] for rank in ranks]

    parts = rounds.compute(Phase.PREPARE, _split, task, place)
    received = exchange(Phase.ENCODE, "inside", place.neighbours, parts, [sum(sizes)] * place.ranks_per_node)

    sums = rounds.compute(Phase.NODE, _encode_sums, task, place, received)
    received = exchange(Phase.NODE, "phase1", place.row, sums, [sizes[place.node]] * place.nodes)

    mean = rounds.compute(Phase.REDUCE, _reduce_chunk, task, place, received)
    outgoing = None if mean is None else [mean] * place.nodes
    means = exchange(Phase.REDUCE, "phase2", place.row, outgoing, sizes)

    decoded = rounds.compute(Phase.DECODE, _decode_slice, task, place, means)
    outgoing = None if decoded is None else [decoded] * place.ranks_per_node
    slices = [place.slice_of(task, local) for local in range(place.ranks_per_node)]
    limits = [sum(size_limit(chunk, task.buffer.dtype) for chunk in each) for each in slices]
    received = exchange(Phase.DECODE, "inside", place.neighbours, outgoing, limits)

    rounds.compute(Phase.DECODE, _join, task, place, received)
    for phase, packets in enumerate((sums or [], means), 1):
        task.telemetry.count_packets(phase, chunks, [packet.numel() for packet in packets], dtype)


def _split(task: MeanTask, place: _Place) -> list[torch.Tensor]:
    """Returns this rank's values without the scale: a packet for each slice, the own one included.

    The slices of other ranks include all their residuals of error feedback.
    """
    task.telemetry.mark(task.index, "encode")
    layout, feedback, dtype = task.layout, task.feedback, task.wire_dtype
    values = task.buffer.to(dtype)
    if task.scale != 1.0:
        values = values * (1.0 / task.scale)
    kept: list[torch.Tensor | None] = [None] * len(layout.tensors)
    if feedback is not None:
        feedback.adopt(layout, place.own_chunk)
        for number, tensor in enumerate(layout.tensors):
            if tensor.compressed and any(feedback.keeps(parameter.key) for parameter in tensor.parameters):
                kept[number] = feedback.local_of(tensor)
    parts = []
    for local in range(place.ranks_per_node):
        chunks = place.slice_of(task, local)
        part = torch.empty(_elements(chunks), dtype=dtype, device=CPU)
        for chunk, into in zip(chunks, part.split([chunk.count for chunk in chunks]), strict=True):
            gather_chunk(values, chunk, into)
        for piece, into in _pieces(chunks, part):
            residual = kept[piece.tensor]
            if local == place.local or residual is None:
                continue
            rest = residual[piece.start : piece.start + piece.length]
            tensor = layout.tensors[piece.tensor]
            if rest.any() and _takes_part(gather_runs(values, tensor.runs)):
                into.add_(rest)
                rest.zero_()
        parts.append(_message(part, task))
    return parts


def _takes_part(values: torch.Tensor) -> bool:
    """Returns whether the mean of a tensor is going to be used, as far as this rank can see."""
    return not is_zero(values) and measure(values).finite


def _encode_sums(task: MeanTask, place: _Place, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the node's sums of this rank's slice, one packet a chunk.

    Each part of a tensor in a chunk has its own grid.
    """
    chunks, dtype = place.slice_of(task, place.local), task.wire_dtype
    with task.telemetry.timed("encode_seconds"):
        total = torch.empty(_elements(chunks), dtype=dtype, device=CPU)
        for number, (rank, message) in enumerate(zip(place.neighbours, received, strict=True)):
            unpack(message, total, rank, accumulate=number > 0, num_threads=task.options.num_threads)
        return [
            _pack(task, place, chunk, values, owner=False)
            for chunk, values in zip(chunks, total.split([chunk.count for chunk in chunks]), strict=True)
        ]


def _reduce_chunk(task: MeanTask, place: _Place, packets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the packet of the mean over all ranks of this rank's chunk."""
    task.telemetry.mark(task.index, "reduce")
    layout = task.layout
    chunk = layout.chunks[place.own_chunk]
    mean = torch.empty(chunk.count, dtype=task.wire_dtype, device=CPU)
    with task.telemetry.timed("decode_seconds"):
        for number, (rank, packet) in enumerate(zip(place.row, packets, strict=True)):
            unpack(packet, mean, rank, accumulate=number > 0, num_threads=task.options.num_threads)
        mean.div_(layout.world_size)
        if has_overflown(mean):
            recover(mean, layout.world_size, _terms(task, place, packets, mean))
    with task.telemetry.timed("encode_seconds"):
        return _pack(task, place, chunk, mean, owner=True)


def _terms(
    task: MeanTask, place: _Place, packets: Sequence[torch.Tensor], mean: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yields each node's sum of a chunk, all in the same memory."""
    term = torch.empty_like(mean)
    for rank, packet in zip(place.row, packets, strict=True):
        unpack(packet, term, rank, num_threads=task.options.num_threads)
        yield term


def _pack(task: MeanTask, place: _Place, chunk: Chunk, values: torch.Tensor, owner: bool) -> torch.Tensor:
    """Returns the packet of a chunk's ``values``, which lie as in a packet, with the residuals of sums or of means."""
    layout, feedback, segments = task.layout, task.feedback, []
    for piece, part in _pieces([chunk], values):
        tensor, residual = layout.tensors[piece.tensor], None
        if feedback is not None and owner:
            residual = feedback.owner_of(tensor, piece.start, piece.length)
        elif feedback is not None:
            residual = feedback.local_of(tensor)[piece.start : piece.start + piece.length]
        grid = task.options.mean_grid_of(tensor) if owner else task.options.grid_of(tensor)
        measured = choose(part, grid, residual, 1.0, task.options.num_threads)
        if place.nodes == 1 and measured.quantizer.coding != Coding.CONSTANT:
            measured = Measured(Quantizer.raw(), residual)  # there is no slow link to save bytes on
        if not owner:
            task.telemetry.note_quantizer(tensor, measured.quantizer)
            task.telemetry.add(nonfinite_tensors=measured.quantizer.p0 != measured.quantizer.p0)
        segments.append(Segment(part, *measured))
    if chunk.raw_count:
        segments.append(Segment(values[chunk.compressed_count :], Quantizer.raw()))
    return pack(segments, num_threads=task.options.num_threads)


def _decode_slice(task: MeanTask, place: _Place, packets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the means of this rank's slice in the buffer's dtype, as a packet."""
    task.telemetry.mark(task.index, "decode")
    chunks = place.slice_of(task, place.local)
    with task.telemetry.timed("decode_seconds"):
        means = torch.empty(_elements(chunks), dtype=task.wire_dtype, device=CPU)
        parts = means.split([chunk.count for chunk in chunks])
        for rank, packet, part in zip(place.row, packets, parts, strict=True):
            unpack(packet, part, rank, num_threads=task.options.num_threads)
        if task.scale != 1.0:
            means.mul_(task.scale)
        for chunk, part in zip(chunks, parts, strict=True):
            keep_in_range(part, chunk, task.buffer.dtype)
        return _message(means.to(task.buffer.dtype), task)


def _join(task: MeanTask, place: _Place, received: Sequence[torch.Tensor]) -> None:
    """Writes all slices into the buffer."""
    for local, (rank, message) in enumerate(zip(place.neighbours, received, strict=True)):
        places = [run for chunk in place.slice_of(task, local) for run in chunk.places]
        if places:
            unpack(message, task.buffer, rank, places=places, num_threads=task.options.num_threads)


def _elements(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.count for chunk in chunks)


def _pieces(chunks: Sequence[Chunk], values: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Yields each piece of ``chunks`` with its part of ``values``, which lie as in packets, one after another."""
    position = 0
    for chunk in chunks:
        for piece in chunk.pieces:
            yield piece, values[position : position + piece.length]
            position += piece.length
        position += chunk.raw_count


def _spread(ranks: Sequence[int], items: Sequence[T], world_size: int, nothing: T) -> list[T]:
    """Returns one item for each rank of the group: those of ``ranks``, and ``nothing`` for all others."""
    spread = [nothing] * world_size
    for rank, item in zip(ranks, items, strict=True):
        spread[rank] = item
    return spread


def _message(values: torch.Tensor, task: MeanTask) -> torch.Tensor:
    """Returns the packet of values that are not quantized."""
    if not values.numel():
        return no_bytes()
    return pack([Segment(values, Quantizer.raw())], num_threads=task.options.num_threads)
