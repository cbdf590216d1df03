"""Which strategy is fastest for a buffer: tried out, remembered, tried again when it has become slower.

All ranks choose alike without a message of their own: the header of every collective carries how long the rank's last
collective of this kind took, and all decide by what follows from these times.
"""

import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from qcomm.collectives.uncompressed_values import PLAIN
from qcomm.communicator import UNTIMED, Took

__all__ = ["Chooser"]

ROUNDS = 3  # of trials; the middle one counts, so one may be slow for reasons of its own
# Collectives after the first choice until all ways are tried again: fresh connections and memory slow the first trials
# down, some ways more than others, and what was found then would keep a way from being tried for good.
WARM_UP = 20
# Ways within this factor of the best are tried more often before one is chosen: a few trials do not tell them apart.
CLOSE = 1.25
DUEL_ROUNDS = 8
RECHECK = 200  # collectives of a kind between two looks at the clock
RECENT = ROUNDS + DUEL_ROUNDS  # times of a way that are kept
# A rival is tried again when what was chosen costs more than this fraction of what the rival did.
WORTH_A_TRIAL = 0.8
# Looks at the clock after which rivals are tried again, although nothing has become slower: one at first, twice as many
# each time that the choice stays the same.
MOST_PATIENCE = 16
# Who comes earlier in the list of candidates loses less accuracy, and is chosen if not slower by more than this.
TIE = 1.02
# A way that compresses has to be so many times as fast as those that do not: it takes cores from backward, which is not
# seen here, and accuracy.
WORTH_COMPRESSING = 1.25
MOST_KINDS = 1024


@dataclass
class _Kind:
    """Collectives that should take equally long."""

    candidates: Sequence[str]
    trials: deque[str]
    times: dict[str, deque[int]] = field(default_factory=dict)
    chosen: str = ""
    last: str = ""  # the strategy whose time comes with the next header
    own_time: Took = UNTIMED
    since_decision: int = 0
    looks: int = 0  # since the decision
    patience: int = 1  # looks until rivals are tried again
    chosen_before: str = ""
    cost_when_chosen: float = 0.0
    warm: bool = False  # whether what is known of the ways is not from the first trials
    duelled: bool = False  # whether ways that are close have been tried more often since the trials began

    def typical(self, strategy: str) -> float:
        """What a way takes; 0 if that is not known."""
        return statistics.median(self.times.get(strategy) or (0,))

    def cost(self, strategy: str) -> float:
        """What a way takes, and as much again as compression has to save."""
        return self.typical(strategy) * (1.0 if strategy in PLAIN else WORTH_COMPRESSING)

    def decide(self) -> None:
        """Chooses, or asks for more trials."""
        timed = [name for name in self.candidates if self.times.get(name)]
        if not timed:  # every trial failed
            self.trials.extend(self.candidates)
            return
        best = min(map(self.cost, timed))
        close = [name for name in timed if self.cost(name) <= CLOSE * best]
        if self.warm and not self.duelled and len(close) > 1:
            self.duelled = True
            self.trials.extend(_in_turns(close, DUEL_ROUNDS))
            return
        self.chosen = next(name for name in timed if self.cost(name) <= TIE * best)
        self.patience = min(2 * self.patience, MOST_PATIENCE) if self.chosen == self.chosen_before else 1
        self.cost_when_chosen, self.looks, self.since_decision = self.cost(self.chosen), 0, 0

    def look_again(self) -> None:
        """Tries ways again, if it is time to."""
        self.since_decision = 0
        if not self.warm:
            self.warm = True
            self.try_out(self.candidates)
            return
        now, self.looks = self.cost(self.chosen), self.looks + 1
        if now > CLOSE * self.cost_when_chosen:  # something has changed, and may have for all
            self.try_out(self.candidates)
        elif self.looks >= self.patience:
            rivals = [s for s in self.candidates if s != self.chosen and WORTH_A_TRIAL * self.cost(s) < now]
            if rivals:
                self.try_out((*rivals, self.chosen))

    def try_out(self, strategies: Sequence[str]) -> None:
        """Begins trials of these."""
        for name in strategies:
            self.times.pop(name, None)
        self.trials.extend(_in_turns(strategies, ROUNDS))
        self.chosen_before, self.chosen, self.duelled = self.chosen, "", False
        self.last = ""  # its time, which is still to come, is from before


def _in_turns(strategies: Sequence[str], rounds: int) -> list[str]:
    """Trials; one more at the end, because the time of a trial is known only with the header of the next."""
    return [*list(strategies) * rounds, strategies[0]]


class Chooser:
    """Chooses for one group of ranks, in lockstep on all of them.

    Call, for each collective on each rank: :meth:`next`, :meth:`own_time` for the header, and, if all ranks agreed to
    run it, :meth:`finished`.

    Example:
        >>> chooser, costs = Chooser(), {"none": 30, "two_phase": 20}
        >>> for _ in range(20):
        ...     strategy = chooser.next("bucket 0", ["none", "two_phase"])
        ...     chooser.finished("bucket 0", chooser.own_time("bucket 0").work, Took(costs[strategy]))
        >>> chooser.next("bucket 0", ["none", "two_phase"])
        'two_phase'
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._new: tuple[Hashable, _Kind] | None = None

    def next(self, key: Hashable, candidates: Sequence[str]) -> str:
        """The strategy for the next collective of kind ``key``; ``candidates``, the most exact first."""
        kind = self._kinds.get(key)
        if kind is None:
            # Not remembered before all ranks have agreed to run the collective.
            self._new = key, _Kind(tuple(candidates), deque(_in_turns(candidates, ROUNDS)))
            return candidates[0]
        if not kind.trials and not kind.chosen:
            kind.decide()
        return kind.trials[0] if kind.trials else kind.chosen

    def own_time(self, key: Hashable) -> Took:
        """What this rank's last collective of this kind took, for the next header."""
        return self._kinds[key].own_time if key in self._kinds else UNTIMED

    def settled(self, key: Hashable) -> str:
        """The strategy that further collectives of this kind will have, or "" while ways are being tried."""
        kind = self._kinds.get(key)
        return kind.chosen if kind is not None and kind.warm else ""

    def finished(self, key: Hashable, agreed_time: int, own_time: Took, count: int = 1) -> None:
        """Goes on after a collective that all ranks agreed to run.

        Args:
            key: as in :meth:`next`.
            agreed_time: nanoseconds of the collective before, which all ranks know from the headers; 0 if unknown.
            own_time: of the collective just finished.
            count: how many have run since the last call, this one and those without an agreement.
        """
        if key not in self._kinds:
            if self._new is None or self._new[0] != key:
                raise KeyError(f"next was not called for {key!r}")
            if len(self._kinds) == MOST_KINDS:  # somebody averages tensors of ever new sizes
                del self._kinds[next(iter(self._kinds))]
            self._kinds[key] = self._new[1]
        kind = self._kinds[key]
        if kind.last and agreed_time > 0:
            kind.times.setdefault(kind.last, deque(maxlen=RECENT)).append(agreed_time)
        kind.last, kind.own_time = (kind.trials.popleft() if kind.trials else kind.chosen), own_time
        kind.since_decision += count
        if kind.chosen and kind.since_decision >= (RECHECK if kind.warm else WARM_UP):
            kind.look_again()
