"""Which strategy is fastest for a buffer: tried out, remembered, tried again when it has become slower.

All ranks choose alike without a message of their own: the header of every collective carries the nanoseconds that the
rank's last collective of this kind took, and all decide by the smallest, that of the rank which waited for nobody.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from qcomm.plain_values import PLAIN

__all__ = ["Chooser"]

ROUNDS = 3  # of trials; the fastest one counts, so the first may be slow for reasons of its own
# Collectives after the first choice until all ways are tried again: fresh connections and memory slow the first trials
# down, some ways more than others, and what was found then would keep a way from being tried for good.
WARM_UP = 20
RECHECK = 200  # collectives of a kind between two looks at the clock
RECENT = 5  # of them, the last ones are looked at
# A rival is tried again when what was chosen takes more than this fraction of the rival's best time.
WORTH_A_TRIAL = 0.8
# Who comes earlier in the list of candidates loses less accuracy, and is chosen if not slower by more than this.
TIE = 1.05
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
    own_time: int = 0
    since_decision: int = 0
    warm: bool = False  # whether what is known of the ways is not from the first trials

    def fastest(self, strategy: str) -> int:
        return min(self.times.get(strategy) or (0,))

    def decide(self) -> None:
        timed = [name for name in self.candidates if self.times.get(name)]
        if not timed:  # every trial failed
            self.trials.extend(self.candidates)
            return
        best = min(self.fastest(name) for name in timed)
        plain = [name for name in timed if name in PLAIN]
        if plain and (best_plain := min(map(self.fastest, plain))) <= WORTH_COMPRESSING * best:
            timed, best = plain, best_plain
        self.chosen = next(name for name in timed if self.fastest(name) <= TIE * best)
        self.since_decision = 0

    def look_again(self) -> None:
        self.since_decision = 0
        if not self.warm:
            self.warm = True
            self.times.clear()
            self.trials.extend(list(self.candidates) * ROUNDS)
            self.chosen = ""
            return
        now = self.fastest(self.chosen)
        rivals = [s for s in self.candidates if s != self.chosen and WORTH_A_TRIAL * self.fastest(s) < now]
        if rivals:
            self.trials.extend([*rivals, self.chosen] * ROUNDS)
            self.chosen = ""
            for name in rivals:
                self.times[name].clear()


class Chooser:
    """Chooses for one group of ranks, in lockstep on all of them.

    Call, for each collective on each rank: :meth:`next`, :meth:`own_time` for the header, and, if all ranks agreed to
    run it, :meth:`finished`.

    Example:
        >>> chooser, costs = Chooser(), {"none": 30, "two_phase": 20}
        >>> for _ in range(20):
        ...     strategy = chooser.next("bucket 0", ["none", "two_phase"])
        ...     chooser.finished("bucket 0", chooser.own_time("bucket 0"), costs[strategy])
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
            self._new = key, _Kind(tuple(candidates), deque(list(candidates) * ROUNDS))
            return candidates[0]
        if not kind.trials and not kind.chosen:
            kind.decide()
        return kind.trials[0] if kind.trials else kind.chosen

    def own_time(self, key: Hashable) -> int:
        """Nanoseconds of this rank's last collective of this kind; 0 if there was none, or it failed."""
        return self._kinds[key].own_time if key in self._kinds else 0

    def settled(self, key: Hashable) -> str:
        """The strategy that further collectives of this kind will have, or "" while ways are being tried."""
        kind = self._kinds.get(key)
        return kind.chosen if kind is not None and kind.warm else ""

    def finished(self, key: Hashable, agreed_time: int, own_time: int, count: int = 1) -> None:
        """Goes on after a collective that all ranks agreed to run.

        Args:
            key: as in :meth:`next`.
            agreed_time: what the headers said, the smallest ``own_time`` of all ranks.
            own_time: of the collective just finished, in nanoseconds; 0 if it failed.
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
