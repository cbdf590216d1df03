"""The ways to a mean, by name, and the choice between them."""

import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace

import torch

from qcomm.codec import Grid, SigmaGrid
from qcomm.collectives.all_gather import all_gather_mean
from qcomm.collectives.cost_model import PLAUSIBLE, Exchange, Profile, candidates
from qcomm.collectives.exact_sum import exact_sum_mean
from qcomm.collectives.hierarchical import hierarchical_mean
from qcomm.collectives.layout import BucketLayout
from qcomm.collectives.task import MeanTask
from qcomm.collectives.tuner import Chooser
from qcomm.collectives.two_phase import two_phase_mean
from qcomm.collectives.uncompressed import bf16_mean, plain_mean
from qcomm.collectives.uncompressed_values import PLAIN, is_rounded
from qcomm.communicator import UNTIMED, Communicator, Took

__all__ = ["average", "plain_ways", "settled"]

WAYS: Mapping[str, Callable[[MeanTask, Communicator], torch.Tensor]] = {
    "none": plain_mean,
    "bf16": bf16_mean,
    "exact_sum": exact_sum_mean,
    "all_gather": all_gather_mean,
    "hierarchical": hierarchical_mean,
    "two_phase": two_phase_mean,
}
# What "auto" chooses between, the most exact first: of two that are equally fast, the chooser takes the earlier one.
# exact_sum is never the fastest; it is for those who want what it computes.
AUTOMATIC = (*PLAIN, "all_gather", "hierarchical", "two_phase")

_choosers: "weakref.WeakKeyDictionary[Communicator, Chooser]" = weakref.WeakKeyDictionary()


def average(task: MeanTask, communicator: Communicator) -> torch.Tensor:
    """Replaces ``task.buffer`` by its mean over all ranks, as ``task.strategy`` says, and returns it.

    With ``"auto"`` each way that may be the fastest is tried a few times for every kind of buffer, then the fastest one
    that is worth it is taken; all ranks decide alike, see :mod:`qcomm.collectives.tuner`. Runs on the communicator's
    thread.

    Raises:
        CollectiveError, ConfigMismatchError: as :func:`qcomm.collectives.two_phase.two_phase_mean`.
    """
    if task.layout is None:  # a fault, which the other ranks hear of whatever they are about to do
        return two_phase_mean(task, communicator)
    if task.strategy != "auto":
        task.telemetry.note_strategy(task.index, task.strategy)
        return WAYS[task.strategy](task, communicator)
    chooser, kind = _chooser(communicator), _kind(task)
    ways = automatic_ways(task.layout, task.buffer.dtype, task.grid, task.ranks_per_node, task.profile)
    strategy = chooser.next(kind, ways)
    fields = task.fields.extended("strategy chosen", strategy)
    task = replace(task, fields=fields, own_time=chooser.own_time(kind))
    agreements, begin, own_time = communicator.agreements, time.perf_counter_ns(), UNTIMED
    try:
        result = WAYS[strategy](task, communicator)
        wait = communicator.time_to_agree
        work = time.perf_counter_ns() - begin - wait
        # What can be bypassed will mostly run without an agreement.
        own_time = Took(work, 0 if strategy in PLAIN and task.can_bypass else wait)
    finally:
        if communicator.agreements > agreements:  # so it is on all ranks, whatever happened afterwards
            chooser.finished(kind, communicator.agreed_time, own_time, 1 + task.bypassed)
    task.telemetry.note_strategy(task.index, strategy)
    return result


def settled(task: MeanTask, communicator: Communicator) -> str:
    """How further tensors like that of ``task`` will be averaged, "" while that is tried; all ranks agree."""
    return _chooser(communicator).settled(_kind(task)) if task.strategy == "auto" else task.strategy


def _chooser(communicator: Communicator) -> Chooser:
    """Returns the chooser of a group's ranks, which is the same object as long as the communicator lives."""
    return _choosers.setdefault(communicator, Chooser())


def _kind(task: MeanTask) -> Hashable:
    """What has to be equal for two collectives to take equally long."""
    layout = task.agreed_layout
    values = layout.elements, layout.compressed_elements, layout.exact_elements, task.buffer.dtype
    # What may be bypassed is timed without its agreement.
    return (*values, task.grid, task.feedback is None, task.ranks_per_node, task.profile, task.can_bypass)


def automatic_ways(
    layout: BucketLayout,
    dtype: torch.dtype,
    grid: Grid,
    ranks_per_node: int = 1,
    profile: Profile | None = None,
) -> tuple[str, ...]:
    """What ``"auto"`` tries for a buffer: a pure function, equal on all ranks.

    Always the plain all-reduce, and in bfloat16 where that is finer than the grid. ``"hierarchical"`` only where there
    are several nodes of several ranks, and no way that the cost model finds slow: on the machine of ``profile``, or
    without one everywhere.
    """
    several = 1 < ranks_per_node < layout.world_size
    plain = plain_ways(layout, dtype, grid)
    names = tuple(name for name in AUTOMATIC if name not in PLAIN and (several or name != "hierarchical"))
    raw = layout.elements - layout.compressed_elements
    exchange = Exchange(layout.elements, layout.world_size, dtype.itemsize, ranks_per_node, raw, layout.exact_elements)
    fast = candidates(exchange, (*plain, *names), PLAUSIBLE if profile is None else (profile,))
    return (*plain, *(name for name in fast if name not in plain))


def plain_ways(layout: BucketLayout, dtype: torch.dtype, grid: Grid) -> tuple[str, ...]:
    """The plain all-reduce, and in bfloat16 where that saves bytes and is finer than the grid."""
    return PLAIN if is_rounded("bf16", layout, dtype) and _coarser_than_bf16(grid) else ("none",)


def _coarser_than_bf16(grid: Grid) -> bool:
    """Whether a grid's steps are wider than most of bfloat16's, which are up to 2^-7 of a value apart."""
    return isinstance(grid, SigmaGrid) and grid.step >= 2**-5
