"""The compressed all-gather: every rank gets the shards of all ranks, all the same bits.

Each rank compresses its own shards, every tensor on a grid of its own, and sends one packet to all others. Every rank
decodes the W packets, its own as well, so that all ranks have the same values. Whoever keeps the exact shards loses
nothing over time: an error is that of one exchange, half a level at most.
"""

from collections.abc import Sequence

import torch

from qcomm.codec import CPU, Quantizer, Segment, measure, plan
from qcomm.collectives.layout import Chunk
from qcomm.collectives.packing import gather_runs, keep_in_range, no_bytes, pack, scatter_chunk, size_limit, unpack
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.task import MeanTask
from qcomm.communicator import Communicator, Phase

__all__ = ["gather_shards"]


def gather_shards(task: MeanTask, communicator: Communicator) -> None:
    """Replaces every row of a buffer by the shards of its rank, decoded. Runs on the communicator's thread.

    Args:
        task: whose buffer has W rows (:func:`qcomm.collectives.shard_layout`), of which this rank's own is filled. No
            padding is written. Error feedback is not used: the error of a weight is not missing from its next value.
        communicator: of the group.

    Raises:
        CollectiveError, LateFaultError, ConfigMismatchError: as of :func:`qcomm.collectives.average`.
    """
    task.telemetry.note_strategy(task.index, "gather_shards")
    with Rounds(task, communicator) as rounds:
        limits = [size_limit(chunk, task.wire_dtype) for chunk in task.layout.chunks]
        packet = rounds.compute(Phase.ENCODE, _encode, task, rounds.rank)
        outgoing = None if packet is None else [packet] * rounds.world_size
        packets = rounds.exchange(Phase.ENCODE, "phase2", outgoing, limits)
        rounds.compute(Phase.DECODE, _decode, task, packets)


def _encode(task: MeanTask, rank: int) -> torch.Tensor:
    """Returns this rank's shards as one packet; of no bytes if it has none."""
    chunk, options = task.layout.chunks[rank], task.options
    with task.telemetry.timed("encode_seconds"):
        segments = []
        for piece in chunk.pieces:
            values = task.buffer[piece.offset : piece.offset + piece.length].to(task.wire_dtype)
            # Values that are not finite stay as they are: a quantizer for them is raw.
            quantizer = plan(
                measure(values, num_threads=options.num_threads),
                options.grid,
                values,
                num_threads=options.num_threads,
            )
            task.telemetry.note_quantizer(task.layout.tensors[piece.tensor], quantizer)
            segments.append(Segment(values, quantizer))
        if chunk.raw_runs:
            raw = gather_runs(task.buffer, chunk.raw_runs).to(task.wire_dtype)
            segments.append(Segment(raw, Quantizer.raw()))
        return pack(segments, num_threads=options.num_threads) if chunk.count else no_bytes()


def _decode(task: MeanTask, packets: Sequence[torch.Tensor]) -> None:
    """Writes the values of all packets into the buffer."""
    with task.telemetry.timed("decode_seconds"):
        for sender, (chunk, packet) in enumerate(zip(task.layout.chunks, packets, strict=True)):
            _decode_row(task, chunk, packet, sender)
    sizes = [packet.numel() for packet in packets]
    task.telemetry.count_packets(2, task.layout.chunks, sizes, task.wire_dtype)


def _decode_row(task: MeanTask, chunk: Chunk, packet: torch.Tensor, sender: int) -> None:
    if not chunk.count:
        return
    num_threads = task.options.num_threads
    if task.buffer.dtype == task.wire_dtype:
        unpack(packet, task.buffer, sender, num_threads=num_threads, places=chunk.places)
        return
    values = torch.empty(chunk.count, dtype=task.wire_dtype, device=CPU)
    unpack(packet, values, sender, num_threads=num_threads)
    keep_in_range(values, chunk, task.buffer.dtype)
    scatter_chunk(values, chunk, task.buffer)
