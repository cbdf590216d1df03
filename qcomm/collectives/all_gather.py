"""The compressed mean in one exchange: every rank sends all of its values to every other.

1. Every rank measures its tensors, compresses all its values once, and sends the packet to every rank.
2. Every rank decodes the W packets in rank order into one sum and divides it by W. The results are equal bit for bit,
   because all ranks decode the same bytes in the same order.

Nothing is quantized a second time, and there is one latency instead of two. The price is that a rank sends its whole
packet, of P bytes, to all ranks and decodes W of them::

    bytes a rank sends       (W - 1) * (P + one header)        two_phase: about 2 (W - 1) / W * P
    |result - mean|          <= mean_i(s_i) / 2 and rounding   two_phase: + t / 2

Here s_i is the step of rank i's grid for a tensor. With two ranks the strategy sends as much as ``two_phase`` and is
more exact. With more ranks it suits buffers so small that latency counts and bytes do not.

Error feedback keeps the loss of each rank's own quantization, as in ``two_phase``. There are no means to quantize, so
the owner's residuals go into its next values: ``sum_t result_t = sum_t mean(g_t) - mean_i(e_i)``.
"""

from collections.abc import Iterator, Sequence

import torch

from qcomm.codec import CPU
from qcomm.collectives.packing import (
    has_overflown,
    keep_in_range,
    measure_tensors,
    pack_chunk,
    recover,
    scatter_chunk,
    size_limit,
    unpack,
)
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.task import MeanTask
from qcomm.communicator import Phase

__all__ = ["all_gather_mean"]


def all_gather_mean(rounds: Rounds) -> None:
    """Replaces the buffer of ``rounds.task`` by its mean over all ranks. Runs on the communicator's thread."""
    task, world_size = rounds.task, rounds.world_size
    limit = size_limit(task.layout.whole, task.wire_dtype)
    packet = rounds.compute(Phase.ENCODE, _encode, task)
    outgoing = None if packet is None else [packet] * world_size
    packets = rounds.exchange(Phase.ENCODE, "phase1", outgoing, [limit] * world_size)
    rounds.compute(Phase.DECODE, _decode, task, packets, rounds.rank)


def _encode(task: MeanTask) -> torch.Tensor:
    """Returns this rank's values plus residuals, as one packet."""
    task.telemetry.mark(task.index, "encode")
    layout = task.layout
    with task.telemetry.timed("encode_seconds"):
        if task.feedback is not None:
            task.feedback.adopt(layout, None)
        values = task.buffer.to(task.wire_dtype)
        return pack_chunk(
            values, layout.whole, measure_tensors(task, values), 1.0 / task.scale, task.options.num_threads
        )


def _decode(task: MeanTask, packets: Sequence[torch.Tensor], rank: int) -> None:
    """Writes the mean of all packets into the buffer."""
    task.telemetry.mark(task.index, "decode")
    layout = task.layout
    with task.telemetry.timed("decode_seconds"):
        total = torch.empty(layout.elements, dtype=task.wire_dtype, device=CPU)
        for sender, packet in enumerate(packets):
            unpack(packet, total, sender, accumulate=sender > 0, num_threads=task.options.num_threads)
        in_place = layout.whole.places == ((0, layout.elements),) and task.buffer.dtype == task.wire_dtype
        mean = torch.div(total, layout.world_size, out=task.buffer if in_place else total)
        if has_overflown(mean):  # on all ranks, which have the same packets
            recover(mean, layout.world_size, _terms(packets, mean, task.options.num_threads))
        if task.scale != 1.0:
            mean.mul_(task.scale)
        keep_in_range(mean, layout.whole, task.buffer.dtype)
        if not in_place:
            scatter_chunk(mean, layout.whole, task.buffer)
    sizes = [packets[rank].numel()]
    task.telemetry.count_packets(1, [layout.whole], sizes, task.wire_dtype)


def _terms(packets: Sequence[torch.Tensor], mean: torch.Tensor, num_threads: int) -> Iterator[torch.Tensor]:
    """Yields the values of each packet, all in the same memory."""
    term = torch.empty_like(mean)
    for sender, packet in enumerate(packets):
        unpack(packet, term, sender, num_threads=num_threads)
        yield term
