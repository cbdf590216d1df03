"""The mean without compression: the transport's own sum, for links on which compression does not pay."""

import time
from collections.abc import Sequence
from typing import cast

import torch

from qcomm.codec import measure
from qcomm.collectives.packing import is_zero
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.sum_check import SumCheck
from qcomm.collectives.task import MeanTask
from qcomm.collectives.uncompressed_values import Bypassing, UncompressedValues, count_rings
from qcomm.communicator import Fault, Phase
from qcomm.transport import Traffic

__all__ = ["bf16_mean", "uncompressed_mean"]


def uncompressed_mean(rounds: Rounds) -> None:
    """Replaces the buffer of ``rounds.task`` by its mean over all ranks. Runs on the communicator's thread.

    Values are divided before they are summed, in the buffer's dtype, as DDP does: 16-bit sums overflow no earlier than
    values. The residuals that error feedback keeps of the buffer's parameters are sent along. With ``verify="step"``
    the sums are checked (:mod:`qcomm.collectives.sum_check`).
    """
    _mean("none", rounds)


def bf16_mean(rounds: Rounds) -> None:
    """Computes :func:`uncompressed_mean` of float32 values rounded to bfloat16, those of excluded parameters excepted.

    Rounding loses at most 2^-8 of a value and of each partial sum, also with error feedback.
    """
    _mean("bf16", rounds)


def _mean(strategy: str, rounds: Rounds) -> None:
    task, begin = rounds.task, time.perf_counter_ns()
    rounds.compute(Phase.ENCODE, _add_residuals, task, rounds.rank)
    rounds.waited += time.perf_counter_ns() - begin  # only the first of many collectives has residuals to add
    handshake = rounds.start_agreeing()
    # The headers travel meanwhile. If some rank has a fault the values are lost anyway.
    loaded = rounds.compute(Phase.ENCODE, _load, task, strategy, rounds.bypassing)
    task.telemetry.mark(task.index, "exchange_1")
    with task.telemetry.timed("communication_seconds"):
        rounds.finish_agreeing(handshake)
        if loaded is None:  # the others are already summing, and see it from the connections
            raise cast(Fault, rounds.fault).error
        values, parts, check = loaded
        rounds.sum(parts if check is None else [*parts, check.totals])
    rounds.compute(Phase.DECODE, _store, task, values, parts, check)
    if check is not None:
        ring = 2 * check.totals.nbytes * (rounds.world_size - 1) // rounds.world_size
        task.telemetry.add_traffic("overhead", Traffic(ring, ring))
    count_rings(task.telemetry, strategy, task.layout, task.buffer.dtype)


def _add_residuals(task: MeanTask, rank: int) -> None:
    """Adds the residuals that other strategies have kept of the buffer's parameters."""
    task.telemetry.mark(task.index, "encode")
    layout, feedback = task.layout, task.feedback
    with task.telemetry.timed("encode_seconds"):
        if feedback is not None:
            feedback.adopt(layout, rank)
            for tensor in layout.parameters:
                if not tensor.compressed or not feedback.keeps(tensor.key):
                    continue
                values = task.buffer[tensor.offset : tensor.offset + tensor.numel]
                # A step that is not finite is discarded, and so is the mean of a parameter that no rank used.
                if not is_zero(values) and measure(values, num_threads=task.options.num_threads).finite:
                    values.add_(feedback.take(tensor.key, tensor.numel), alpha=task.scale)


def _load(
    task: MeanTask, strategy: str, bypassing: Bypassing | None
) -> tuple[UncompressedValues, Sequence[torch.Tensor], SumCheck | None]:
    """Returns this rank's share of the mean, which is to be summed, and a check of the sum where one is wanted."""
    memory = {} if bypassing is None else bypassing.memory
    with task.telemetry.timed("encode_seconds"):
        if strategy not in memory:
            memory[strategy] = UncompressedValues(strategy, task.layout, task.buffer.dtype)
        values = memory[strategy]
        parts = values.load(task.buffer)
        check = SumCheck(parts, task.layout.world_size) if task.options.verify == "step" else None
        return values, parts, check


def _store(task: MeanTask, values: UncompressedValues, parts: Sequence[torch.Tensor], check: SumCheck | None) -> None:
    """Writes the sums back to the buffer, unless their check finds that they are wrong."""
    with task.telemetry.timed("decode_seconds"):
        if check is not None:
            check.compare(parts)
        values.store(task.buffer)
