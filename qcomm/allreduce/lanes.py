"""Lanes: calls that need no agreement, because ``"auto"`` has settled on how their kind of tensor is averaged.

Before its first value travels, a call costs a header to every rank and two changes of thread. For a small tensor on a
fast link these take as long again as the sum. So once all ranks have settled, the next BYPASSED calls of the kind do
without an agreement on the strategy. If they do not compress they are the process group's own all-reduce, by the
calling thread; if they compress, several may be under way. The call after them agrees again, with the checks and the
clock.

A kind is a shape, a dtype and the options. All ranks are in the same lane without a message, because their last
agreement on the kind has ended before the next call of the kind begins, and they count the same calls.
"""

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from qcomm.allreduce.work import DirectSum
from qcomm.collectives import BYPASSED, UNCOMPRESSED, BucketLayout, Bypassing, UncompressedValues
from qcomm.communicator import Fault, Group, LateFaultError, Phase, Ticket, find_communicator, give_up
from qcomm.errors import CollectiveError
from qcomm.transport import break_group

__all__ = ["Lane", "Lanes", "lanes_of"]

MOST_LANES = 256
GROUP_IS_BROKEN = "This process group cannot be used further: end all ranks"


@dataclass
class Lane:
    """The calls of one kind since an agreement.

    Attributes:
        ticket: of the agreement, until its end has been waited for.
        strategy: the one on which all ranks have settled then, "" if they have not. Set before the ticket ends.
        started: number of calls since.
        calls: number of calls that the group's own sum has served.
        means: fingerprints of their means.
        free: memory for the values of calls to come.
    """

    ticket: Ticket[torch.Tensor] | None = None
    strategy: str = ""
    started: int = 0
    calls: int = 0
    means: dict[str, int] = field(default_factory=dict)
    free: list[UncompressedValues] = field(default_factory=list)

    def enter(self) -> str:
        """Returns the strategy of a call that needs no agreement, "" for one that does; the same on all ranks."""
        if self.ticket is not None:
            self.ticket.join()
            self.ticket = None
        if not self.strategy or self.started == BYPASSED:
            return ""
        self.started += 1
        return self.strategy

    def agree(self) -> Bypassing:
        """Begins an agreement; returns what it tells of the calls before."""
        told = Bypassing(self.started, {}, self.means)
        self.strategy, self.started, self.means, self.free = "", 0, {}, []
        return told


class Lanes:
    """The lanes of one group, used by the thread that calls ``all_reduce``.

    Attributes:
        kinds: calls that were prepared before.
    """

    def __init__(self) -> None:
        self.kinds: dict[Hashable, Any] = {}
        self._lanes: dict[Hashable, Lane] = {}
        self._broken = ""

    def find(self, key: Hashable) -> Lane | None:
        """Returns the lane of a kind; None where there are too many."""
        if key not in self._lanes and len(self._lanes) < MOST_LANES:
            self._lanes[key] = Lane()
        return self._lanes.get(key)

    def give_up(self, group: Group) -> None:
        """Breaks the group, if others may be in a sum that this rank cannot enter and headers cannot call off."""
        if not isinstance(group, dist.ProcessGroup):
            return
        if any(lane.strategy in UNCOMPRESSED and lane.started < BYPASSED for lane in self._lanes.values()):
            self._broken = "a call of this rank could not take part"
            break_group(group)
            give_up(group, self._broken)

    def sum(
        self,
        lane: Lane,
        group: dist.ProcessGroup,
        tensor: torch.Tensor,
        buffer: torch.Tensor,
        layout: BucketLayout,
        verified: bool,
    ) -> DirectSum:
        """Starts the group's own sum of a tensor's values.

        Args:
            lane: that the call has entered.
            group: of torch.
            tensor: that holds the mean in the end.
            buffer: its values, flat and detached; perhaps its own memory.
            layout: of the buffer.
            verified: whether the mean is compared at the next agreement.
        """
        if self._broken:
            raise CollectiveError(f"the tensor was not averaged, as an earlier one was not: {self._broken}")
        lane.calls += 1
        name = f"call {lane.calls} without an agreement, of {tuple(tensor.shape)}"
        means, strategy = lane.means, lane.strategy

        def store() -> None:
            try:
                if verified:
                    means[name] = values.fingerprint(buffer)
                values.store(buffer)
                if buffer.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(buffer.view(tensor.shape))
            except Exception as error:
                communicator = find_communicator(group)
                if communicator is not None:
                    communicator.announce_later(Fault(Phase.DECODE, error))
                raise LateFaultError(
                    f"the tensor was averaged, but not stored on this rank: {type(error).__name__}: {error}. The other "
                    "ranks go on, and are told when ranks next agree"
                ) from error
            if lane.strategy == strategy:
                lane.free.append(values)

        def lost(error: RuntimeError) -> CollectiveError:
            self._broken = str(error)
            return CollectiveError(f"the tensor was not averaged: {error}. {GROUP_IS_BROKEN}")

        entered = False
        try:
            values = lane.free.pop() if lane.free else UncompressedValues(strategy, layout, buffer.dtype)
            works = [group.allreduce([part]) for part in values.load(buffer)]
            entered = True
        finally:
            if not entered:  # the others wait in their sum for this rank, and no other of its sums may meet that one
                self._broken = "this rank could not begin its sum"
                break_group(group)
        return DirectSum(tensor, works, store, lost)


_lanes: "weakref.WeakKeyDictionary[Group, Lanes]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def lanes_of(group: Group) -> Lanes:
    """Returns the lanes of a group."""
    found = _lanes.get(group)
    if found is None:
        with _lock:
            found = _lanes.setdefault(group, Lanes())
    return found
