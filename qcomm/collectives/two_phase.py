"""The compressed mean of one flat buffer over all ranks, in two phases.

Variable-length codes cannot be added, so there is no ring. There are W ranks, and the buffer is cut in W chunks, one
per rank:

1. Every rank measures its tensors, compresses its values chunk by chunk, and sends each chunk to its owner.
2. The owner adds the W - 1 packets of its chunk and its own values, in rank order, and divides by W. It compresses the
   mean on a grid of its own (``mean_step``) and sends it to every rank.
3. Every rank, the owner included, decodes the same W packets. The results are equal bit for bit.

Let s_i be the step of rank i's grid for a tensor, 0 where rank i is the owner, and t the owner's. Then
``|result - mean| <= mean_i(s_i)/2 + t/2`` and rounding.

A large buffer is processed in slices, so that codec and network work at the same time::

    rank computes   encode 0  encode 1  encode 2  reduce 0  encode 3  reduce 1  reduce 2  decode 0  reduce 3 ...
    link carries              values 0  values 1  values 2  mean 0    values 3  mean 1    mean 2              ...

:mod:`qcomm.collectives.two_phase_schedule` cuts the slices and orders the steps.
:mod:`qcomm.collectives.two_phase_steps` computes them and :mod:`qcomm.communicator.pipeline` carries the messages.
"""

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from qcomm.collectives.rounds import Rounds
from qcomm.collectives.task import MeanTask
from qcomm.collectives.two_phase_schedule import SLICE_ELEMENTS, Step
from qcomm.collectives.two_phase_steps import MeanSteps, Plan, plan_slices
from qcomm.communicator import Phase, Pipeline

__all__ = ["plan_of", "two_phase_mean"]

P = ParamSpec("P")
T = TypeVar("T")


def two_phase_mean(rounds: Rounds) -> None:
    """Replaces the buffer of ``rounds.task`` by its mean over all ranks. Runs on the communicator's thread."""
    task = rounds.task
    plan = plan_of(task)
    rounds.require_equal("slices", str(len(plan.slices)))
    # The first values need not wait for the others' headers.
    handshake = rounds.start_agreeing(following=1)
    steps = MeanSteps(task, rounds.rank, plan)
    with rounds.pipeline(handshake) as pipeline:
        _run(rounds, steps, plan, pipeline)
    rounds.take_over(pipeline.fault, pipeline.traffic())
    if pipeline.fault is None:
        with rounds.turn:
            steps.finish()


def plan_of(task: MeanTask) -> Plan:
    """Returns the slices of a task's layout, which keeps them for its next collective."""
    key = SLICE_ELEMENTS, task.buffer.dtype
    plan: Plan | None = task.layout.plans.get(key)
    if plan is None:
        plan = task.layout.plans[key] = plan_slices(task.layout, SLICE_ELEMENTS, task.wire_dtype)
    return plan


def _run(rounds: Rounds, steps: MeanSteps, plan: Plan, pipeline: Pipeline) -> None:
    """Runs all steps of this rank, in the order of the plan; once a rank has failed, only their messages."""
    task, telemetry = rounds.task, rounds.task.telemetry
    is_observed = telemetry.timeline is not None or telemetry.observer is not None
    seconds = {"encode_seconds": 0.0, "decode_seconds": 0.0, "communication_seconds": 0.0}

    def timed(kind: str, event: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if is_observed and event:
            telemetry.mark(task.index, event)
        begin = time.perf_counter()
        try:
            return action(*args, **kwargs)
        finally:
            seconds[f"{kind}_seconds"] += time.perf_counter() - begin

    def compute(
        kind: str, event: str, phase: Phase, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        with rounds.turn:  # before the clock starts
            return timed(kind, event, lambda: pipeline.attempt(phase, action, *args, **kwargs))

    try:
        compute("encode", "", Phase.ENCODE, steps.begin)
        for step, number in plan.order:
            limits = plan.limits[number]
            if step is Step.ENCODE:
                packets = compute("encode", "encode", Phase.ENCODE, steps.encode, number)
                if number == 0:
                    pipeline.send(1, number, packets or [])
                else:  # it waits for the others' headers
                    timed("communication", "", pipeline.send, 1, number, packets or [])
            elif step is Step.REDUCE:
                own = [limits[steps.rank]] * len(limits)
                received = timed("communication", "exchange_1", pipeline.receive, 1, number, own)
                compute("decode", "reduce", Phase.REDUCE, steps.reduce, number, received)
                mean = compute("encode", "", Phase.REDUCE, steps.encode_mean, number)
                pipeline.send(2, number, [mean] * len(limits))
            else:
                means = timed("communication", "exchange_2", pipeline.receive, 2, number, limits)
                compute("decode", "decode", Phase.DECODE, steps.decode, number, means)
        timed("communication", "", pipeline.finish)
    finally:
        telemetry.add(**seconds)
