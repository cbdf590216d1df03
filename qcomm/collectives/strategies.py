"""Strategies: the algorithms of the mean by name, and the choice between them."""

import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from qcomm.codec import Grid, SigmaGrid
from qcomm.collectives.all_gather import all_gather_mean
from qcomm.collectives.cost_model import PLAUSIBLE, Workload, candidates
from qcomm.collectives.exact_sum import exact_sum_mean
from qcomm.collectives.hierarchical import hierarchical_mean
from qcomm.collectives.layout import BucketLayout
from qcomm.collectives.options import ReduceOptions
from qcomm.collectives.rounds import Rounds, announce_late, refuse
from qcomm.collectives.task import MeanTask
from qcomm.collectives.tuner import Tuner
from qcomm.collectives.two_phase import two_phase_mean
from qcomm.collectives.uncompressed import bf16_mean, uncompressed_mean
from qcomm.collectives.uncompressed_values import UNCOMPRESSED, Bypassing, is_rounded
from qcomm.communicator import UNTIMED, Communicator, Phase, Took, attempt

__all__ = ["Settled", "average", "settled", "uncompressed_strategies"]

MEAN_BY_STRATEGY: Mapping[str, Callable[[Rounds], None]] = {
    "none": uncompressed_mean,
    "bf16": bf16_mean,
    "exact_sum": exact_sum_mean,
    "all_gather": all_gather_mean,
    "hierarchical": hierarchical_mean,
    "two_phase": two_phase_mean,
}
# "auto" chooses between these, the most exact first: of two equally fast strategies the tuner takes the earlier one.
# exact_sum is never the fastest; it is for users who need its exact sums.
AUTOMATIC = (*UNCOMPRESSED, "all_gather", "hierarchical", "two_phase")


class Settled(NamedTuple):
    """The strategies that further tensors of a kind will have, the same on all ranks.

    Attributes:
        strategy: the one that is worth it by the time of the exchange; "" while several are tried.
        uncompressed: the best of those that do not compress.
        uncompressed_nanoseconds: of its exchange; 0 if they are unknown.
    """

    strategy: str
    uncompressed: str = ""
    uncompressed_nanoseconds: int = 0

    def of(self, uncompressed: bool) -> str:
        """Returns the strategy of a caller who does or does not want it to be uncompressed; "" while several are tried.

        Example:
            >>> Settled("two_phase", "none", 7).of(uncompressed=True), Settled("").of(uncompressed=True)
            ('none', '')
        """
        return self.uncompressed if uncompressed and self.strategy and self.uncompressed else self.strategy


_tuners: "weakref.WeakKeyDictionary[Communicator, Tuner]" = weakref.WeakKeyDictionary()


def average(
    task: MeanTask, communicator: Communicator, bypassing: Bypassing | None = None, uncompressed: bool = False
) -> None:
    """Replaces ``task.buffer`` by its mean over all ranks. Runs on the communicator's thread.

    With ``"auto"`` each strategy that may be the fastest is tried a few times for every kind of buffer. Then the
    fastest one that is worth it is taken. All ranks make the same choice, see :mod:`qcomm.collectives.tuner`. A staged
    buffer is averaged in host memory, and its copy back is under way at the end.

    Args:
        task: of the collective.
        communicator: of the group.
        bypassing: collectives of this kind that the caller runs without an agreement; None where it runs none.
        uncompressed: whether ``"auto"``, where it has settled, takes the best strategy that does not compress.

    Raises:
        CollectiveError: on all ranks, naming the rank that failed. The values are lost, with the residuals that were
            added to them, unless it failed before the exchange began.
        LateFaultError: this rank failed after its last message.
        ConfigMismatchError: ``task.fields`` differ between ranks; nothing has changed then.
    """
    begin = time.perf_counter_ns()
    if task.staged is None:
        _average(task, communicator, bypassing, begin, uncompressed)
        return
    try:
        host, fault = attempt(Phase.PREPARE, task.staged.fetch)
        if host is None:
            refuse(fault, communicator)
        copying = task.staged.copy_nanoseconds
        task.telemetry.add(copy_seconds=copying / 1e9)
        # The wait for the tensor's values is no cost of a strategy, and that for their copy is.
        begin = time.perf_counter_ns() - copying
        _average(replace(task, buffer=host), communicator, bypassing, begin, uncompressed)
        _, fault = attempt(Phase.DECODE, task.staged.restore)
        if fault is not None:
            announce_late(fault, communicator)
    finally:
        task.staged.release()


def _average(
    task: MeanTask, communicator: Communicator, bypassing: Bypassing | None, begin: int, uncompressed: bool
) -> None:
    """Averages a buffer in host memory; ``begin``: of the work for it, in nanoseconds of ``time.perf_counter_ns``."""
    strategy = task.options.strategy
    if strategy == "auto" and uncompressed:
        strategy = settled(task, communicator, bypassing).of(uncompressed) or "auto"
    if strategy == "auto":
        _average_by_tuner(task, communicator, bypassing, begin)
        return
    task.telemetry.note_strategy(task.index, strategy)
    rounds = Rounds(task, communicator, bypassing=bypassing)
    if strategy != task.options.strategy:
        rounds.require_equal("strategy chosen", strategy)
    with rounds:
        _run(strategy, rounds)


def _average_by_tuner(task: MeanTask, communicator: Communicator, bypassing: Bypassing | None, begin: int) -> None:
    tuner, kind = _tuner(communicator), _kind(task, bypassing)
    strategy = tuner.next(kind, automatic_strategies(task.layout, task.buffer.dtype, task.options))
    own_time = UNTIMED
    rounds = Rounds(task, communicator, tuner.own_time(kind), bypassing)
    rounds.require_equal("strategy chosen", strategy)
    try:
        with rounds:
            _run(strategy, rounds)
        work = time.perf_counter_ns() - begin - rounds.waited
        # Collectives that may be bypassed mostly run without an agreement.
        own_time = Took(work, 0 if strategy in UNCOMPRESSED and bypassing is not None else rounds.waited)
    finally:
        if rounds.agreed is not None:  # so it is on all ranks, even if a later step failed
            bypassed = 0 if bypassing is None else bypassing.count
            tuner.finished(kind, rounds.agreed.last_time, own_time, 1 + bypassed)
    task.telemetry.note_strategy(task.index, strategy)


def _run(strategy: str, rounds: Rounds) -> None:
    MEAN_BY_STRATEGY[strategy](rounds)
    options = rounds.task.options
    if strategy in options.verified:
        rounds.note_mean()
    if options.verify == "step":
        rounds.agree()


def settled(task: MeanTask, communicator: Communicator, bypassing: Bypassing | None = None) -> Settled:
    """Returns the strategies of further tensors like that of ``task``, on which all ranks agree."""
    if task.options.strategy != "auto":
        return Settled(task.options.strategy)
    tuner, kind = _tuner(communicator), _kind(task, bypassing)
    strategy = tuner.settled(kind)
    return Settled(strategy, *tuner.uncompressed(kind)) if strategy else Settled("")


def _tuner(communicator: Communicator) -> Tuner:
    """Returns the tuner of a group's ranks, the same one for all channels as long as the communicators live."""
    return _tuners.setdefault(communicator.first, Tuner())


def _kind(task: MeanTask, bypassing: Bypassing | None) -> Hashable:
    """Returns a key that two collectives share if they should take equally long."""
    layout, options = task.layout, task.options
    values = layout.elements, layout.compressed_elements, layout.exact_elements, task.buffer.dtype
    # A collective that may be bypassed is timed without its agreement.
    staged = task.staged is not None
    return (*values, options.grid, task.feedback is None, options.node_size, options.machine, bypassing is None, staged)


def automatic_strategies(layout: BucketLayout, dtype: torch.dtype, options: ReduceOptions) -> tuple[str, ...]:
    """Returns the strategies that ``"auto"`` tries for a buffer: a pure function, equal on all ranks.

    These are always the uncompressed all-reduce, and that in bfloat16 where it is finer than the grid.
    ``"hierarchical"`` is tried only where there are several nodes of several ranks with equal links. A strategy
    that the cost model finds slow is left out: slow on the machine of the profile, or without a profile on every
    machine.
    """
    several = 1 < options.node_size < layout.world_size and options.link_rates is None
    always = uncompressed_strategies(layout, dtype, options.grid)
    names = tuple(name for name in AUTOMATIC if name not in UNCOMPRESSED and (several or name != "hierarchical"))
    raw, exact = layout.elements - layout.compressed_elements, layout.exact_elements
    workload = Workload(layout.elements, layout.world_size, dtype.itemsize, options.node_size, raw, exact)
    machines = PLAUSIBLE if options.machine is None else (options.machine,)
    fast = candidates(workload, (*always, *names), machines)
    return (*always, *(name for name in fast if name not in always))


def uncompressed_strategies(layout: BucketLayout, dtype: torch.dtype, grid: Grid) -> tuple[str, ...]:
    """Returns the uncompressed all-reduce, and that in bfloat16 if it saves bytes and is finer than the grid."""
    return UNCOMPRESSED if is_rounded("bf16", layout, dtype) and _coarser_than_bf16(grid) else ("none",)


def _coarser_than_bf16(grid: Grid) -> bool:
    """Returns whether a grid's steps are wider than nearly all of bfloat16's, which are up to 2^-7 of a value apart."""
    return isinstance(grid, SigmaGrid) and grid.step >= 2**-5
