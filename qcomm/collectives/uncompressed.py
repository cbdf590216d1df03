"""The mean without compression: gloo's own all-reduce, for links on which compression does not pay."""

import time
from collections.abc import Sequence
from typing import cast

import torch

from qcomm.codec import is_zero, measure
from qcomm.collectives.packing import raise_later
from qcomm.collectives.task import MeanTask
from qcomm.collectives.uncompressed_values import PlainValues, count_rings
from qcomm.communicator import Communicator, Fault, Phase, attempt

__all__ = ["bf16_mean", "plain_mean"]


def plain_mean(task: MeanTask, communicator: Communicator) -> torch.Tensor:
    """Replaces ``task.buffer`` by its mean over all ranks and returns it. Runs on the communicator's thread.

    Values are divided before they are summed, in the buffer's dtype, as DDP does: 16-bit sums overflow no earlier than
    values. What error feedback still keeps of the buffer's parameters is sent along.

    Raises:
        CollectiveError, ConfigMismatchError: as :func:`qcomm.collectives.two_phase.two_phase_mean`.
    """
    return _mean("none", task, communicator)


def bf16_mean(task: MeanTask, communicator: Communicator) -> torch.Tensor:
    """:func:`plain_mean` of float32 values rounded to bfloat16, those of excluded parameters excepted.

    What rounding loses, at most 2^-8 of a value and of each partial sum, is lost also with error feedback.
    """
    return _mean("bf16", task, communicator)


def _mean(strategy: str, task: MeanTask, communicator: Communicator) -> torch.Tensor:
    begin = time.perf_counter_ns()
    communicator.begin()
    fault = communicator.pending_fault or task.fault
    if fault is None:
        _, fault = attempt(Phase.ENCODE, _add_residuals, task, communicator.rank)
    residual_time = time.perf_counter_ns() - begin
    nothing = [0] * communicator.world_size
    agreement = communicator.begin_agreement(Phase.ENCODE, task.fields, nothing, nothing, fault, task.own_time)
    loaded: tuple[PlainValues, Sequence[torch.Tensor]] | None = None
    late = None
    if fault is None:  # the headers travel meanwhile; where some rank has a fault the values are lost anyway
        loaded, late = attempt(Phase.ENCODE, _load, task, strategy)
    task.telemetry.mark(task.index, "exchange_1")
    with task.telemetry.timed("communication_seconds"):
        _, overhead = communicator.finish_agreement(agreement, Phase.ENCODE)
        communicator.time_to_agree += residual_time
        if loaded is None:  # the others are on their way into the sum, and see it from the connections
            raise cast(Fault, late).error
        values, parts = loaded
        communicator.sum(parts)
    task.telemetry.add_traffic("overhead", overhead)
    count_rings(task.telemetry, strategy, task.agreed_layout, task.buffer.dtype)
    _, fault = attempt(Phase.DECODE, _store, task, values)
    if fault is not None:
        raise_later(communicator, fault)
    task.telemetry.mark(task.index, "done")
    return task.buffer


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


def _load(task: MeanTask, strategy: str) -> tuple[PlainValues, Sequence[torch.Tensor]]:
    """This rank's share of the mean: what is to be summed."""
    with task.telemetry.timed("encode_seconds"):
        if strategy not in task.memory:
            task.memory[strategy] = PlainValues(strategy, task.agreed_layout, task.buffer.dtype)
        return task.memory[strategy], task.memory[strategy].load(task.buffer)


def _store(task: MeanTask, values: PlainValues) -> None:
    """Puts the sums where they belong."""
    with task.telemetry.timed("decode_seconds"):
        values.store(task.buffer)
