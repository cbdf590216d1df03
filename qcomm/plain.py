"""The mean without compression: gloo's own all-reduce, for links on which compression does not pay."""

import torch

from qcomm.agreement import Phase
from qcomm.communicator import Communicator
from qcomm.layout import BucketLayout
from qcomm.mean import MeanTask, attempt, is_zero
from qcomm.statistics import measure
from qcomm.telemetry import Telemetry
from qcomm.transport import Traffic

__all__ = ["count_ring", "plain_mean"]


def plain_mean(task: MeanTask, communicator: Communicator) -> torch.Tensor:
    """Replaces ``task.buffer`` by its mean over all ranks and returns it. Runs on the communicator's thread.

    Values are divided before they are summed, in the buffer's dtype, as DDP does: 16-bit sums overflow no earlier than
    values. What error feedback still keeps of the buffer's parameters is sent along.

    Raises:
        CollectiveError, ConfigMismatchError: as :func:`qcomm.two_phase.two_phase_mean`.
    """
    communicator.begin()
    fault = communicator.pending_fault or task.fault
    if fault is None:
        _, fault = attempt(Phase.ENCODE, _add_residuals, task, communicator.rank)
    nothing = [0] * communicator.world_size
    agreement = communicator.begin_agreement(Phase.ENCODE, task.fields, nothing, nothing, fault, task.own_time)
    late = None
    if fault is None:  # the headers travel meanwhile; where some rank has a fault the values are lost anyway
        _, late = attempt(Phase.ENCODE, _divide, task)
    task.telemetry.mark(task.index, "exchange_1")
    with task.telemetry.timed("communication_seconds"):
        _, overhead = communicator.finish_agreement(agreement, Phase.ENCODE)
        if late is not None:  # the others are on their way into the sum, and see it from the connections
            raise late.error
        communicator.sum(task.buffer)
    task.telemetry.add_traffic("overhead", overhead)
    count_ring(task.telemetry, task.agreed_layout, task.buffer.element_size())
    task.telemetry.mark(task.index, "done")
    return task.buffer


def count_ring(telemetry: Telemetry, layout: BucketLayout, item_bytes: int, times: int = 1) -> None:
    """Counts what a ring sends, which is what gloo runs; each of its two phases carries every element once."""
    ring = layout.elements * item_bytes * (layout.world_size - 1) // layout.world_size
    for phase in (1, 2):
        telemetry.add_traffic(f"phase{phase}", Traffic(times * ring, times * ring))
        telemetry.count_plain(phase, layout, item_bytes, times)


def _add_residuals(task: MeanTask, rank: int) -> None:
    """Adds what other ways have kept of the buffer's parameters."""
    task.telemetry.mark(task.index, "encode")
    layout, feedback = task.agreed_layout, task.feedback
    with task.telemetry.timed("encode_seconds"):
        if feedback is not None:
            feedback.adopt(layout, rank)
            for tensor in layout.tensors:
                if not tensor.compressed or not feedback.keeps(tensor.key):
                    continue
                values = task.buffer[tensor.offset : tensor.offset + tensor.numel]
                # A step that is not finite is thrown away, and so is the mean of a parameter that no rank used.
                if not is_zero(values) and measure(values, num_threads=task.num_threads).finite:
                    values.add_(feedback.take(tensor.key, tensor.numel), alpha=task.scale)


def _divide(task: MeanTask) -> None:
    """Makes the values this rank's share of the mean."""
    with task.telemetry.timed("encode_seconds"):
        task.buffer.div_(task.agreed_layout.world_size)
