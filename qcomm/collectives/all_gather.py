"""The compressed mean in one exchange: every rank sends all of its values to every other.

1. every rank measures its tensors, compresses all its values once, and sends the packet to every rank;
2. every rank decodes the W packets in rank order into one sum and divides by W: the results are equal bit for bit,
   because all decode the same bytes in the same order.

Nothing is quantized a second time and there is one latency instead of two; in return a rank sends its whole packet, of
P bytes, to everybody and decodes W of them::

    bytes a rank sends       (W - 1) * (P + one header)        two_phase: about 2 (W - 1) / W * P
    |result - mean|          <= mean_i(s_i) / 2 and rounding   two_phase: + t / 2

with s_i the step of rank i's grid for a tensor. So with two ranks it sends what ``two_phase`` does and is more exact;
with more it is for buffers so small that latency counts and not bytes.

Error feedback keeps what each rank's own quantization lost, as in ``two_phase``; there are no means to quantize, so
what an owner kept of them goes into its next values: ``sum_t result_t = sum_t mean(g_t) - mean_i(e_i)``.
"""

from collections.abc import Sequence

import torch

from qcomm.collectives.layout import scatter_chunk
from qcomm.collectives.packing import exchange, measure_tensors, pack_chunk, raise_later, size_limit, unpack, wire_dtype
from qcomm.collectives.task import MeanTask
from qcomm.communicator import Communicator, Phase, attempt

__all__ = ["all_gather_mean"]


def all_gather_mean(task: MeanTask, communicator: Communicator) -> torch.Tensor:
    """Replaces ``task.buffer`` by its mean over all ranks and returns it. Runs on the communicator's thread.

    Raises:
        CollectiveError, ConfigMismatchError: as :func:`qcomm.collectives.two_phase.two_phase_mean`.
    """
    communicator.begin()
    world_size = communicator.world_size
    packet, limit, fault = None, 0, communicator.pending_fault or task.fault
    if fault is None:
        limit = size_limit(task.agreed_layout.whole, wire_dtype(task))
        packet, fault = attempt(Phase.ENCODE, _encode, task)
    outgoing = None if packet is None else [packet] * world_size
    packets = exchange(task, communicator, 1, Phase.ENCODE, "phase1", outgoing, [limit] * world_size, fault)
    _, fault = attempt(Phase.DECODE, _decode, task, packets)
    if fault is not None:
        raise_later(communicator, fault)
    sizes = [packets[communicator.rank].numel()]
    layout = task.agreed_layout
    task.telemetry.count_packets(1, [layout.whole], sizes, wire_dtype(task).itemsize)
    task.telemetry.mark(task.index, "done")
    return task.buffer


def _encode(task: MeanTask) -> torch.Tensor:
    """This rank's values plus residuals, as one packet."""
    task.telemetry.mark(task.index, "encode")
    layout = task.agreed_layout
    with task.telemetry.timed("encode_seconds"):
        if task.feedback is not None:
            task.feedback.adopt(layout, None)
        values = task.buffer.to(wire_dtype(task))
        return pack_chunk(values, layout.whole, measure_tensors(task, values), 1.0 / task.scale, task.num_threads)


def _decode(task: MeanTask, packets: Sequence[torch.Tensor]) -> None:
    """Writes the mean of all packets into the buffer."""
    task.telemetry.mark(task.index, "decode")
    layout = task.agreed_layout
    with task.telemetry.timed("decode_seconds"):
        mean = torch.empty(layout.elements, dtype=wire_dtype(task))
        for sender, packet in enumerate(packets):
            unpack(packet, mean, sender, accumulate=sender > 0, num_threads=task.num_threads)
        mean.div_(layout.world_size)
        if task.scale != 1.0:
            mean.mul_(task.scale)
        scatter_chunk(mean, layout.whole, task.buffer)
