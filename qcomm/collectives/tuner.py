"""Tuner behind ``strategy="auto"``: it finds the fastest strategy for each kind of collective by trials.

All ranks decide alike without a message of their own. The header of every collective carries the time of the rank's
previous collective of this kind, and every decision follows from these times alone.

Each kind of collective is in one of five stages. The numbers are the edges of :func:`_after`::

             +------------------+
        +--> |   FIRST_TRIALS   |                    runs every candidate ROUNDS times
        +-1--+--------+---------+
                      | 2
                      v
             +------------------+
             |    WARMING_UP    |                    runs the best
             +--------+---------+
                      | 3
                      v
             +------------------+
        +--> |      TRIALS      | <----------+       runs each strategy under trial ROUNDS times
        +-4--+----+--------+----+            |
                  | 5      |                 |
                  v        |                 |
             +--------+    | 6               | 8, 9
             |  DUEL  |    |                 |       runs the close ones DUEL_ROUNDS times
             +----+---+    |                 |
                  | 7      |                 |
                  v        v                 |
             +------------------+            |
        +--> |     SETTLED      | -----------+       runs the best
        +10--+------------------+

======  ===================================================  ======================================
edge    needs                                                effect
======  ===================================================  ======================================
1, 4    no trial left, no candidate has a time               tries every candidate once more
2       no trial left, otherwise                             takes the best as a preliminary choice
3       WARM_UP collectives of this choice                   tries all candidates
5       no trial left, several candidates are close          tries the close ones more often
6       no trial left, otherwise                             chooses the best
7       no trial left                                        chooses the best
8       a check: the choice costs over CLOSE times as much   tries all candidates
        as when it was made
9       a check: patience has run out, and there are rivals  tries the rivals and the choice
10      a check, otherwise                                   counts the check
======  ===================================================  ======================================

- The cost of a strategy is the median of its RECENT last times. Compression multiplies it by WORTH_COMPRESSING.
- The best is the most exact candidate that costs at most TIE times the least. The close ones cost at most CLOSE times
  the least.
- Edges 3, 8 and 9 forget all older times of the strategies that are tried.
- A check happens after every RECHECK collectives.
- A rival is a candidate that costs less than the choice divided by WORTH_A_TRIAL.
- Patience is one check after a new choice. It doubles with each confirmation of the choice, up to MAX_PATIENCE.
"""

import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, NamedTuple, TypeAlias

from qcomm.collectives.uncompressed_values import UNCOMPRESSED
from qcomm.communicator import UNTIMED, Took

__all__ = ["Stage", "Tuner"]

ROUNDS = 3  # their median counts, so one trial may be slow for reasons of its own
# Fresh connections and memory slow the first trials down, some strategies more than others. Without new trials an
# unlucky strategy would never run again.
WARM_UP = 20
# A few trials do not tell strategies apart whose costs differ by less than this factor.
CLOSE = 1.25
DUEL_ROUNDS = 8
RECHECK = 200
RECENT = ROUNDS + DUEL_ROUNDS
WORTH_A_TRIAL = 0.8
MAX_PATIENCE = 16
# An earlier candidate loses less accuracy, which is worth this factor.
TIE = 1.02
# Compression takes accuracy, and cores from backward, and neither shows in the time of a collective.
WORTH_COMPRESSING = 1.25
MAX_KINDS = 1024


class Stage(Enum):
    """Stages of the diagram above."""

    FIRST_TRIALS = "first trials"
    WARMING_UP = "warming up"
    TRIALS = "trials"
    DUEL = "duel"
    SETTLED = "settled"


class _Choice(NamedTuple):
    """A strategy, and the number of checks until its rivals are tried."""

    strategy: str
    patience: int = 1

    def followed_by(self, strategy: str) -> "_Choice":
        """Returns the choice after new trials, which is more patient if it is the same strategy."""
        return _Choice(strategy, min(2 * self.patience, MAX_PATIENCE) if strategy == self.strategy else 1)


@dataclass
class _Queue:
    """Trials that are still to run; each is one collective."""

    queue: deque[str]

    @property
    def strategy(self) -> str:
        """The strategy of the next collective, or "" if no trial is left."""
        return self.queue[0] if self.queue else ""

    def ran(self, count: int) -> None:
        """Removes the trial that has just run; ``count`` does not matter."""
        if self.queue:
            self.queue.popleft()


@dataclass
class _FirstTrials(_Queue):
    stage: ClassVar[Stage] = Stage.FIRST_TRIALS


@dataclass
class _Trials(_Queue):
    """Trials that put a choice to the test."""

    stage: ClassVar[Stage] = Stage.TRIALS
    before: _Choice


@dataclass
class _Duel(_Queue):
    """More trials of close strategies, with the choice before all trials."""

    stage: ClassVar[Stage] = Stage.DUEL
    before: _Choice


@dataclass
class _Run:
    """A choice, and the number of collectives that it has run since the last edge."""

    choice: _Choice
    collectives: int = field(default=0, kw_only=True)

    @property
    def strategy(self) -> str:
        """The strategy of the next collective."""
        return self.choice.strategy

    def ran(self, count: int) -> None:
        """Counts collectives."""
        self.collectives += count


@dataclass
class _WarmingUp(_Run):
    stage: ClassVar[Stage] = Stage.WARMING_UP


@dataclass
class _Settled(_Run):
    """A choice with its cost when it was made, and the number of checks since."""

    stage: ClassVar[Stage] = Stage.SETTLED
    cost: float
    checks: int = 0


_State: TypeAlias = _FirstTrials | _WarmingUp | _Trials | _Duel | _Settled


@dataclass
class _Times:
    """Agreed times of the candidates: the only data that stages share.

    Attributes:
        candidates: the most exact first.
        recent: the last times of each strategy.
        awaited: the strategy whose time comes with the next header, or "" if that time does not count.
    """

    candidates: tuple[str, ...]
    recent: dict[str, deque[int]] = field(default_factory=dict)
    awaited: str = ""

    def note(self, agreed_time: int) -> None:
        """Keeps the time of the strategy awaited."""
        if self.awaited and agreed_time > 0:
            self.recent.setdefault(self.awaited, deque(maxlen=RECENT)).append(agreed_time)

    def forget(self, strategies: Sequence[str]) -> None:
        """Forgets the times of these strategies, and the time awaited, which is from before their trials."""
        for name in strategies:
            self.recent.pop(name, None)
        self.awaited = ""

    def cost(self, strategy: str) -> float:
        """Returns the cost of a strategy, 0 if it has no time."""
        median = statistics.median(self.recent.get(strategy) or (0,))
        return median * (1.0 if strategy in UNCOMPRESSED else WORTH_COMPRESSING)

    def known(self) -> list[str]:
        """Returns the candidates that have a time."""
        return [name for name in self.candidates if name in self.recent]

    def within(self, factor: float) -> list[str]:
        """Returns the candidates that cost at most ``factor`` times the least."""
        least = min(map(self.cost, self.known()))
        return [name for name in self.known() if self.cost(name) <= factor * least]

    def best(self) -> str:
        """Returns the most exact candidate of those that are about equally fast."""
        return self.within(TIE)[0]

    def rivals(self, chosen: str) -> list[str]:
        """Returns the other candidates that deserve a trial, those without a time among them."""
        limit = self.cost(chosen)
        return [name for name in self.candidates if name != chosen and WORTH_A_TRIAL * self.cost(name) < limit]


def _after(state: _State, times: _Times) -> _State:
    """Returns the state at the end of the edge that is due, or ``state``; numbers are those of the diagram above."""
    match state:
        case _FirstTrials() | _Trials() | _Duel() if state.queue:
            return state
        case _FirstTrials() | _Trials() if not times.known():
            return replace(state, queue=deque(times.candidates))  # 1, 4
        case _FirstTrials():
            return _WarmingUp(_Choice(times.best()))  # 2
        case _WarmingUp() if state.collectives >= WARM_UP:
            return _begin_trials(times.candidates, state.choice, times)  # 3
        case _Trials() if len(close := times.within(CLOSE)) > 1:
            return _Duel(_in_turns(close, DUEL_ROUNDS), state.before)  # 5
        case _Trials() | _Duel():
            best = times.best()
            return _Settled(state.before.followed_by(best), times.cost(best))  # 6, 7
        case _Settled() if state.collectives >= RECHECK:
            cost, checks, rivals = times.cost(state.strategy), state.checks + 1, times.rivals(state.strategy)
            if cost > CLOSE * state.cost:  # the other strategies may have changed, too
                return _begin_trials(times.candidates, state.choice, times)  # 8
            if checks >= state.choice.patience and rivals:
                return _begin_trials((*rivals, state.strategy), state.choice, times)  # 9
            return replace(state, collectives=0, checks=checks)  # 10
    return state


def _begin_trials(strategies: Sequence[str], before: _Choice, times: _Times) -> _Trials:
    """Returns trials of these strategies, of which nothing older counts."""
    times.forget(strategies)
    return _Trials(_in_turns(strategies, ROUNDS), before)


def _in_turns(strategies: Sequence[str], rounds: int) -> deque[str]:
    """Returns rounds of trials and one trial more, because a trial's time comes with the header of the next."""
    return deque([*list(strategies) * rounds, strategies[0]])


@dataclass
class _Kind:
    """Collectives that should take equally long."""

    times: _Times
    state: _State
    own_time: Took = UNTIMED


class Tuner:
    """Chooses strategies for one group of ranks, in lockstep on all of them.

    Each rank calls, for each collective, :meth:`next`, then :meth:`own_time` for the header. If all ranks agreed to run
    the collective, it calls :meth:`finished`.

    Example:
        >>> tuner, costs = Tuner(), {"none": 30, "two_phase": 20}
        >>> for _ in range(20):
        ...     strategy = tuner.next("bucket 0", ["none", "two_phase"])
        ...     tuner.finished("bucket 0", tuner.own_time("bucket 0").work, Took(costs[strategy]))
        >>> tuner.next("bucket 0", ["none", "two_phase"])
        'two_phase'
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._new: dict[Hashable, _Kind] = {}

    def next(self, key: Hashable, candidates: Sequence[str]) -> str:
        """Returns the strategy for the next collective of kind ``key``; ``candidates``, the most exact first."""
        kind = self._kinds.get(key)
        if kind is None:
            # It is remembered once all ranks have agreed to run the collective.
            kind = _Kind(_Times(tuple(candidates)), _FirstTrials(_in_turns(candidates, ROUNDS)))
            self._new[key] = kind
            if len(self._new) > MAX_KINDS:
                del self._new[next(iter(self._new))]
        # Trials end here and not in finished: the choice is not settled before a collective of it begins.
        if isinstance(kind.state, _Queue):
            kind.state = _after(kind.state, kind.times)
        return kind.state.strategy

    def own_time(self, key: Hashable) -> Took:
        """Returns the time of this rank's last collective of this kind, for the next header."""
        return self._kinds[key].own_time if key in self._kinds else UNTIMED

    def stage(self, key: Hashable) -> Stage:
        """Returns the stage of this kind of collective."""
        return self._kinds[key].state.stage if key in self._kinds else Stage.FIRST_TRIALS

    def settled(self, key: Hashable) -> str:
        """Returns the strategy that further collectives of this kind will have, or "" before that is settled."""
        return self._kinds[key].state.strategy if self.stage(key) is Stage.SETTLED else ""

    def uncompressed(self, key: Hashable) -> tuple[str, int]:
        """Returns the best strategy that does not compress, and its nanoseconds; "" and 0 if none has a time."""
        times = self._kinds[key].times
        known = [name for name in times.known() if name in UNCOMPRESSED]
        best = min(known, key=times.cost, default="")
        return best, int(times.cost(best))

    def finished(self, key: Hashable, agreed_time: int, own_time: Took, count: int = 1) -> None:
        """Takes note of a collective that all ranks agreed to run.

        Args:
            key: as in :meth:`next`.
            agreed_time: nanoseconds of the collective before, which all ranks know from the headers; 0 if unknown.
            own_time: of the collective just finished.
            count: number of collectives since the last call: this one and those without an agreement.
        """
        if key not in self._kinds:
            if key not in self._new:
                raise KeyError(f"next was not called for {key!r}")
            if len(self._kinds) == MAX_KINDS:  # the caller averages tensors of ever new sizes
                del self._kinds[next(iter(self._kinds))]
            self._kinds[key] = self._new.pop(key)
        kind = self._kinds[key]
        kind.times.note(agreed_time)
        kind.times.awaited, kind.own_time = kind.state.strategy, own_time
        kind.state.ran(count)
        if isinstance(kind.state, _Run):
            kind.state = _after(kind.state, kind.times)
