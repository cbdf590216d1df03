"""The compressed reduce-scatter: each rank gets the sum, or the mean, of its own chunk over all ranks.

It is the first half of :mod:`qcomm.collectives.two_phase`. Every rank compresses its values chunk by chunk, with error
feedback, and sends each chunk to its owner. The owner adds the W - 1 packets and its own values in rank order. What it
gets stays there, and is not quantized again::

    bytes a rank sends    (W - 1) / W * P
    |result - mean|       <= mean_i(s_i) / 2 and rounding

Here P is the bytes of all packets of a rank's values, and s_i the step of rank i's grid for a tensor, 0 where rank i is
the owner. With residuals e_i, 0 in a rank's own chunk, ``sum_t result_t = sum_t mean(g_t) - mean_i(e_i)``.

A rank that fails while it adds, as of a damaged packet, has sent all of its messages. The others have their results,
and learn of it in the next collective.
"""

import math
from collections.abc import Sequence, Set

import torch

from qcomm.collectives.layout import Chunk
from qcomm.collectives.packing import keep_in_range, recover, scatter_runs
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.task import MeanTask
from qcomm.collectives.two_phase import plan_of
from qcomm.collectives.two_phase_schedule import Step
from qcomm.collectives.two_phase_steps import MeanSteps, Plan
from qcomm.communicator import Communicator, Phase, Pipeline

__all__ = ["reduce_scatter"]


def reduce_scatter(task: MeanTask, communicator: Communicator, out: torch.Tensor, factor: float | None = None) -> None:
    """Writes the sum or the mean of this rank's chunk over all ranks to ``out``. Runs on the communicator's thread.

    Args:
        task: whose buffer holds W rows (:func:`qcomm.collectives.shard_layout`) and is only read.
        communicator: of the group.
        out: one row, of the buffer's dtype. Padding is set to zero.
        factor: by which sums are multiplied; None for means.

    Raises:
        CollectiveError, LateFaultError, ConfigMismatchError: as of :func:`qcomm.collectives.average`.
    """
    task.telemetry.note_strategy(task.index, "reduce_scatter")
    with Rounds(task, communicator) as rounds:
        plan = plan_of(task)
        rounds.require_equal("slices", str(len(plan.slices)))
        # The first values need not wait for the others' headers.
        handshake = rounds.start_agreeing(following=1)
        steps = _ScatterSteps(task, rounds.rank, plan, out, factor)
        with rounds.pipeline(handshake) as pipeline:
            _run(rounds, steps, plan, pipeline)
        rounds.take_over(pipeline.fault, pipeline.traffic())
        rounds.compute(Phase.REDUCE, steps.finish)


def _run(rounds: Rounds, steps: "_ScatterSteps", plan: Plan, pipeline: Pipeline) -> None:
    """Runs all steps of this rank; once a rank has failed, only their messages."""
    telemetry = rounds.task.telemetry
    with rounds.turn, telemetry.timed("encode_seconds"):
        pipeline.attempt(Phase.ENCODE, steps.begin)
    for step, number in plan.order:
        limits = plan.limits[number]
        if step is Step.ENCODE:
            with rounds.turn, telemetry.timed("encode_seconds"):
                packets = pipeline.attempt(Phase.ENCODE, steps.encode, number)
            with telemetry.timed("communication_seconds"):
                pipeline.send(1, number, packets or [])
        elif step is Step.REDUCE:
            with telemetry.timed("communication_seconds"):
                received = pipeline.receive(1, number, [limits[steps.rank]] * len(limits))
            with rounds.turn, telemetry.timed("decode_seconds"):
                pipeline.attempt(Phase.REDUCE, steps.reduce, number, received)
    with telemetry.timed("communication_seconds"):
        pipeline.finish()


class _ScatterSteps(MeanSteps):
    """The steps of one reduce-scatter on one rank: those of a mean, whose sums are written to ``out``."""

    averages = False

    def __init__(self, task: MeanTask, rank: int, plan: Plan, out: torch.Tensor, factor: float | None) -> None:
        super().__init__(task, rank, plan)
        self._out, self._factor = out, factor

    def begin(self) -> None:
        """Prepares the collective."""
        super().begin()
        self._out.zero_()

    def reduce(self, number: int, packets: Sequence[torch.Tensor | None]) -> None:
        """Writes the sum or mean of this rank's part of a slice, from the packets of the others."""
        chunk = self._plan.slices[number][self.rank]
        total = self._scratch[: chunk.count]
        self._received = packets
        for sender in range(len(packets)):
            self._add_term(sender, chunk, total, accumulate=sender > 0)
        kept: Set[int] = frozenset()
        is_finite = math.isfinite(float(total.sum()))
        if not is_finite:
            kept = self._lose(chunk, total)
        if self._factor is None:
            total.div_(self._task.layout.world_size)
            if not is_finite and total.isinf().any():
                recover(total, self._task.layout.world_size, self._terms(chunk))
        else:
            total.mul_(self._factor)
        self._received = ()
        self._write(chunk, total)
        self._spend(chunk, kept)

    def _write(self, chunk: Chunk, total: torch.Tensor) -> None:
        if self._task.scale != 1.0:
            total.mul_(self._task.scale)
        keep_in_range(total, chunk, self._out.dtype)
        begin = self.rank * self._out.numel()
        scatter_runs(total, [(offset - begin, length) for offset, length in chunk.places], self._out)
