"""The compressed mean of one flat buffer over all ranks, in two phases.

Variable-length codes cannot be added, so there is no ring. With W ranks and the buffer cut in W chunks, one a rank:

1. every rank measures its tensors, compresses its values chunk by chunk, and sends each chunk to its owner;
2. the owner adds the W - 1 packets of its chunk and its own values, in rank order, divides by W, compresses the mean on
   a grid of its own, at least as fine (this error is not averaged), and sends it to every rank;
3. every rank, the owner too, decodes the same W packets: the results are equal bit for bit.

With s_i the step of rank i's grid for a tensor, 0 where rank i is the owner, and t the owner's,
``|result - mean| <= mean_i(s_i)/2 + t/2`` and rounding.

A large buffer goes through this in slices, so that codec and network work at the same time::

    rank computes   encode 0  encode 1  encode 2  reduce 0  encode 3  reduce 1  reduce 2  decode 0  reduce 3 ...
    link carries              values 0  values 1  values 2  mean 0    values 3  mean 1    mean 2              ...

:mod:`qcomm.collectives.two_phase_schedule` cuts, :mod:`qcomm.collectives.two_phase_schedule` orders the steps,
:mod:`qcomm.collectives.two_phase_steps` computes them and :mod:`qcomm.communicator.messages` carries the messages.
"""

import torch

from qcomm.collectives.packing import size_limit
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.task import MeanTask
from qcomm.collectives.two_phase_schedule import SLICE_ELEMENTS, Slice, Step, cut_slices, schedule
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator import Phase, Pipeline

__all__ = ["two_phase_mean"]


def two_phase_mean(rounds: Rounds) -> None:
    """Replaces the buffer of ``rounds.task`` by its mean over all ranks. Runs on the communicator's thread."""
    task = rounds.task
    slices = cut_slices(task.layout, SLICE_ELEMENTS)
    rounds.require_equal("slices", str(len(slices)))
    rounds.agree()
    steps = MeanSteps(task, rounds.rank, slices)
    with rounds.pipeline() as pipeline:
        _run(task, steps, slices, pipeline)
    for kind, traffic in pipeline.traffic().items():
        task.telemetry.add_traffic(kind, traffic)
    rounds.take_over(pipeline.fault)
    if pipeline.fault is None:
        steps.finish()


def _run(task: MeanTask, steps: MeanSteps, slices: tuple[Slice, ...], pipeline: Pipeline) -> None:
    """All steps of this rank, in the order of the schedule; once a rank has failed, only their messages."""

    def receive(exchange: int, number: int) -> list[torch.Tensor | None]:
        task.telemetry.mark(task.index, f"exchange_{exchange}")
        with task.telemetry.timed("communication_seconds"):
            return pipeline.receive(exchange, number)

    pipeline.attempt(Phase.ENCODE, steps.begin)
    for step, number in schedule(len(slices)):
        limits = [size_limit(chunk, steps.wire_dtype) for chunk in slices[number]]
        if step is Step.ENCODE:
            pipeline.expect(1, number, [limits[steps.rank]] * len(limits))
            packets = pipeline.attempt(Phase.ENCODE, steps.encode, number)
            pipeline.send(1, number, packets or [])
        elif step is Step.REDUCE:
            pipeline.expect(2, number, limits)
            mean = pipeline.attempt(Phase.REDUCE, steps.reduce, number, receive(1, number))
            pipeline.send(2, number, [mean] * len(limits))
        else:
            pipeline.attempt(Phase.DECODE, steps.decode, number, receive(2, number))
    with task.telemetry.timed("communication_seconds"):
        pipeline.finish()
