"""Choice by the step: whether the compression that ``"auto"`` has settled on makes training steps shorter.

The tuner compares exchanges by themselves. An exchange that is hidden behind backward costs nothing, however long it
takes, and a codec takes cores from backward, which no clock of an exchange shows. So where the tuner has settled on
strategies that compress, the step decides: its time from the first bucket to the end of the wait for the last one.

::

    WATCHING --> a turn as settled --> uncompressed exchanges alone would take longer than that step? --yes--> RESTING
        ^                                                   | no                                               ^
        |                                                   v                                                  |
        |          COMPARING: turns without compression and with it, TURNS of each, and the shorter steps win -+
        +--------------------------------- rested --------------------------------------------------------------+

A turn has one step in which all buckets agree on their strategies, COUNTED steps whose median counts, and one in which
the ranks agree on it. The ranks take the smallest of their medians: that of the rank that came last and waited for no
other. All ranks know the same numbers and count the same steps, so all decide alike.
"""

import statistics
from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from qcomm.collectives import UNCOMPRESSED, Settled
from qcomm.communicator import Ticket

__all__ = ["StepChoice"]

COUNTED = 5
TURNS = 3
# Compression loses accuracy, which is worth this factor of a step.
TIE = 1.02
REST, MOST_REST = 500, 16_000  # steps until the next look, which doubles with each look that changes nothing


class Stage(Enum):
    """Stages of the diagram above."""

    WATCHING = auto()
    LOOKING = auto()  # a turn as settled
    COMPARING = auto()
    RESTING = auto()


class StepChoice:
    """Decides between the strategies on which buckets have settled and the best of those that do not compress.

    The thread of backward calls :meth:`begin`; the workers of the buckets call :meth:`note`.

    Attributes:
        uncompressed: whether buckets that have settled take a strategy that does not compress.
    """

    def __init__(self) -> None:
        self.uncompressed = False
        self._stage = Stage.WATCHING
        self._settled: dict[int, Settled] = {}
        self._steps = 0  # of the present turn, or of the rest
        self._seen: list[int] = []
        self._told: Ticket[int] | None = None
        self._turns: deque[bool] = deque()
        self._times: dict[bool, list[int]] = {False: [], True: []}
        self._chosen: bool | None = None  # by the last look
        self._rest = REST

    def __reduce__(self) -> tuple[type["StepChoice"], tuple[()]]:
        """Makes copies that begin anew."""
        return StepChoice, ()

    def note(self, index: int, is_last: bool, settled: Settled) -> None:
        """Keeps what bucket ``index`` has settled on, the same on all ranks."""
        if is_last:  # DDP may have had more buckets
            self._settled = {number: kept for number, kept in self._settled.items() if number < index}
        self._settled[index] = settled

    def begin(self, took: int, agree: Callable[[int], Ticket[int]]) -> bool:
        """Begins a step, after all exchanges of the one before it; returns whether all buckets have to agree anew.

        Args:
            took: nanoseconds of the step before; 0 if they are not known.
            agree: begins the agreement on a time: the smallest of all ranks, or 0 if some rank has none.
        """
        before = self.uncompressed
        if self._told is not None:
            self._told.join()
            time = self._told.result() if self._told.exception() is None else 0
            self._told = None
            self._end_turn(time)
        elif self._stage in (Stage.LOOKING, Stage.COMPARING):
            self._seen.append(took)
            if len(self._seen) > COUNTED:
                counted = self._seen[1:]
                self._told = agree(int(statistics.median(counted)) if all(counted) else 0)
        elif self._stage is Stage.RESTING:
            self._steps += 1
            if self._steps >= self._rest:
                self._look_again()
        elif self._compresses:
            self._begin_turn(Stage.LOOKING)
        return self.uncompressed != before

    @property
    def _compresses(self) -> bool:
        """Returns whether all buckets have settled, and some of them on compression."""
        found = self._settled.values()
        return all(each.strategy for each in found) and any(each.strategy not in UNCOMPRESSED for each in found)

    def _begin_turn(self, stage: Stage) -> None:
        self._stage, self._seen = stage, []

    def _end_turn(self, time: int) -> None:
        if self._stage is Stage.LOOKING:
            alone = sum(each.uncompressed_nanoseconds for each in self._settled.values())
            if not time:
                self._stage = Stage.WATCHING
            elif alone > time:
                self._settle(uncompressed=False)
            else:
                self._compare()
            return
        if time:
            self._times[self.uncompressed].append(time)
        if self._turns:
            self.uncompressed = self._turns.popleft()
            self._begin_turn(Stage.COMPARING)
        elif all(self._times.values()):
            with_it, without = (statistics.median(self._times[key]) for key in (False, True))
            self._settle(uncompressed=without < TIE * with_it)
        else:
            self._settle(uncompressed=False)

    def _compare(self) -> None:
        self._times = {False: [], True: []}
        # The way that buckets have now comes last, where it needs no new agreement.
        self._turns = deque([not self.uncompressed, self.uncompressed] * TURNS)
        self.uncompressed = self._turns.popleft()
        self._begin_turn(Stage.COMPARING)

    def _settle(self, *, uncompressed: bool) -> None:
        self._rest = min(2 * self._rest, MOST_REST) if uncompressed == self._chosen else REST
        self._stage, self._steps = Stage.RESTING, 0
        self.uncompressed = self._chosen = uncompressed

    def _look_again(self) -> None:
        if self.uncompressed:
            self._compare()
        else:
            self._stage = Stage.WATCHING
