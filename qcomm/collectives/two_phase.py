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
from qcomm.collectives.task import MeanTask
from qcomm.collectives.two_phase_schedule import SLICE_ELEMENTS, Slice, Step, cut_slices, schedule
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator import Communicator, Phase, Pipeline
from qcomm.errors import CollectiveError

__all__ = ["two_phase_mean"]


def two_phase_mean(task: MeanTask, communicator: Communicator) -> torch.Tensor:
    """Replaces ``task.buffer`` by its mean over all ranks and returns it. Runs on the communicator's thread.

    Raises:
        CollectiveError: on all ranks, naming the rank that failed. The values are lost, with the residuals that were
            added to them, unless it failed before the exchange began.
        ConfigMismatchError: ``task.fields`` differ between ranks; nothing has changed then.
    """
    communicator.begin()
    slices: tuple[Slice, ...] = ()
    fields, nothing = task.fields, [0] * communicator.world_size
    if task.layout is not None:
        slices = cut_slices(task.layout, SLICE_ELEMENTS)
        fields = fields.extended("slices", str(len(slices)))
    with task.telemetry.timed("communication_seconds"):
        fault = communicator.pending_fault or task.fault
        _, overhead = communicator.agree(Phase.ENCODE, fields, nothing, nothing, fault, task.own_time)
    task.telemetry.add_traffic("overhead", overhead)
    steps = MeanSteps(task, communicator.rank, slices)
    with communicator.pipeline() as pipeline:
        _run(task, steps, slices, pipeline)
    for kind, traffic in pipeline.traffic().items():
        task.telemetry.add_traffic(kind, traffic)
    if pipeline.fault is not None:
        fault = pipeline.fault
        communicator.announce_later(fault)
        text = f"this rank failed while {fault.phase}: {fault.error}; the others are told in the next collective"
        raise CollectiveError(text) from fault.error
    steps.finish()
    task.telemetry.mark(task.index, "done")
    return task.buffer


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
