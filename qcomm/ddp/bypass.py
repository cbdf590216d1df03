"""Buckets that go straight to the process group's own all-reduce, because compression does not pay for them.

What a collective of this library costs before its first value travels, a header to every rank and two changes of
thread, is nothing on a slow network and a tenth of the time on a fast one. So once all ranks have agreed to leave a
bucket uncompressed they do not ask again at every step: the next BYPASSED steps of the bucket are what DDP would do
without this library. Then they agree again, once.

Which steps these are has to be the same on all ranks, without a message. It follows from the last agreement on that
bucket, and that has ended on every rank before its next step begins, because DDP waits for its buckets.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo

from qcomm.collectives import PLAIN, BucketLayout, PlainValues, Telemetry, count_rings
from qcomm.communicator import Fault, Group, Phase, Ticket, failed
from qcomm.ddp.gloo_exit import CallbackToken
from qcomm.errors import CollectiveError
from qcomm.transport import MpiGroup

__all__ = ["BYPASSED", "Bypass", "Lane", "LastError", "can_bypass"]

# Collectives of a bucket between two agreements, which cost up to a tenth of an all-reduce. With the agreement they are
# a prime number of steps, so that a model whose steps take turns is not always agreed on in the same turn.
BYPASSED = 30


class LastError:
    """The last error of a model's steps, for whoever asks."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def note(self, error: Exception) -> None:
        """Replaces the error before it."""
        self.error = error


def can_bypass(group: Group) -> bool:
    """Whether the group has an all-reduce for the CPU that gives all ranks the same bits: gloo's, unwrapped.

    MPI's may add in another order on each rank, and belongs to one thread; NCCL has none for the CPU.
    """
    if isinstance(group, MpiGroup):
        return False
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:  # it has none
        return False
    return isinstance(backend, ProcessGroupGloo)


class Passed:
    """What telemetry does not know yet of the sums that have ended: how many, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = 0, 0.0, 0.0

    def count(self, seconds: float, last: bool) -> None:
        """One that has ended well; ``last``: of its step."""
        with self._lock:
            count, total, total_last = self._numbers
            self._numbers = count + 1, total + seconds, total_last + (seconds if last else 0.0)

    def take(self) -> tuple[int, float, float]:
        """How many, their seconds, and the seconds of those that were the last of their step; counted anew then."""
        with self._lock:
            numbers, self._numbers = self._numbers, (0, 0.0, 0.0)
        return numbers


@dataclass
class Lane:
    """The steps of one bucket since an agreement.

    Attributes:
        group: of torch.
        layout, dtype: of its buffer.
        parameters: of the bucket.
        ticket: of the agreement, until its end has been waited for.
        strategy: what all ranks have settled on then, if it is known. Set before the ticket ends.
        memory: of what is summed, by strategy.
        under_way: the last sum, until it ends.
        started: how many steps have gone past since.
        passed: those of them that have ended.
    """

    group: dist.ProcessGroup
    layout: BucketLayout
    dtype: torch.dtype
    parameters: tuple[weakref.ref[torch.Tensor], ...]
    ticket: Ticket[torch.Tensor] | None = None
    strategy: str = ""
    memory: dict[str, PlainValues] = field(default_factory=dict)
    under_way: torch.futures.Future[torch.Tensor] | None = None
    started: int = 0
    passed: Passed = field(default_factory=Passed)

    def settle(self, strategy: str) -> None:
        """Notes what all ranks have settled on, or "" while ways are being tried."""
        self.strategy = strategy
        for other in set(self.memory).difference([strategy] if strategy else PLAIN):
            del self.memory[other]

    def is_of(self, bucket: dist.GradBucket, group: Group) -> bool:
        """Whether this is still the bucket: DDP rebuilds its buckets once, and models are moved and replaced."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        same = group is self.group and buffer.dtype == self.dtype and buffer.numel() == self.layout.elements
        same = same and buffer.device.type == "cpu" and len(parameters) == len(self.parameters)
        return same and all(known() is other for known, other in zip(self.parameters, parameters, strict=True))


class Bypass:
    """The lanes of a model's buckets.

    :meth:`enter`, :meth:`begin` and :meth:`reduce` are for the thread that backward runs on, the others for any.

    Args:
        telemetry: counts what passes.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._lanes: dict[int, Lane] = {}
        self._lock = threading.Lock()  # of the table
        self._broken: tuple[dist.ProcessGroup, Exception] | None = None

    def __reduce__(self) -> tuple[type["Bypass"], tuple[Telemetry]]:
        """A copy knows of no agreement."""
        return Bypass, (self._telemetry,)

    def enter(self, bucket: dist.GradBucket, group: Group) -> Lane | None:
        """The lane of a bucket if this step of it needs no agreement: the same answer on all ranks."""
        lane = self._lanes.get(bucket.index())
        if lane is None or lane.started == BYPASSED or not lane.is_of(bucket, group):
            return None
        if lane.ticket is not None:
            lane.ticket.join()
            lane.ticket = None
        if lane.strategy not in PLAIN:
            return None
        lane.started += 1
        return lane

    def started(self, index: int) -> int:
        """How many steps of bucket ``index`` have gone past since its last agreement."""
        return self._lanes[index].started if index in self._lanes else 0

    def begin(self, bucket: dist.GradBucket, layout: BucketLayout | None, group: Group) -> Lane | None:
        """A new lane for a bucket that is to be agreed on, None where it cannot pass; the caller sets its ticket.

        Args:
            bucket: from DDP.
            layout: of its buffer; None where a fault keeps this rank from agreeing.
            group: to average over.
        """
        self.flush()
        index, lane = bucket.index(), None
        if layout is not None and not isinstance(group, MpiGroup) and can_bypass(group):
            lane = Lane(group, layout, bucket.buffer().dtype, tuple(map(weakref.ref, bucket.parameters())))
        with self._lock:
            before = self._lanes
            if lane is not None and index in before and before[index].layout is lane.layout:
                lane.memory = before[index].memory
            # There were more before DDP rebuilt its buckets.
            last = index if bucket.is_last() else max(before, default=0)
            self._lanes = {number: kept for number, kept in before.items() if number != index and number <= last}
            if lane is not None:
                self._lanes[index] = lane
        return lane

    def reduce(
        self,
        lane: Lane,
        bucket: dist.GradBucket,
        last_error: LastError,
        owe: Callable[[Fault], None],
    ) -> torch.futures.Future[torch.Tensor]:
        """Starts the mean of torch's own hooks, ``allreduce_hook`` and ``bf16_compress_hook``.

        Args:
            lane: what :meth:`enter` returned.
            bucket: its buffer holds the mean in the end.
            last_error: is told of the error if there is one, which the Future then raises.
            owe: called with what the others are to be told when ranks next agree.
        """
        index, buffer, begin = bucket.index(), bucket.buffer(), time.perf_counter()
        last, passed, telemetry = bucket.is_last(), lane.passed, weakref.ref(self._telemetry)

        # gloo's thread calls this and frees it. Were it then the last to hold the group, it would wait for itself, and
        # the process would end; so nothing that this holds has a group, nor an observer, who might have one.
        def finish(future: torch.futures.Future[list[torch.futures.Future[list[torch.Tensor]]]]) -> torch.Tensor:
            _ = token  # held, and so counted, until this function is freed
            try:
                for summed in future.value():
                    summed.value()
                with torch.no_grad():
                    values.store(buffer)
            except RuntimeError as error:
                text = f"bucket {index} was not averaged: {error}"
                last_error.note(CollectiveError(text))  # not the one that is raised, whose traceback has the token
                raise CollectiveError(text) from error
            passed.count(time.perf_counter() - begin, last)
            if (observed := telemetry()) is not None:
                observed.mark(index, "done")
            return buffer

        try:
            self._telemetry.mark(index, "exchange_1")
            if self._broken is not None and self._broken[0] is lane.group:
                raise CollectiveError(f"bucket {index} was not averaged, as an earlier one was not: {self._broken[1]}")
            if lane.strategy not in lane.memory:
                lane.memory[lane.strategy] = PlainValues(lane.strategy, lane.layout, lane.dtype)
            values = lane.memory[lane.strategy]
            with torch.no_grad():
                sums = [lane.group.allreduce([part]).get_future() for part in values.load(buffer)]
        except Exception as error:  # noqa: BLE001 - any: DDP could not go on after it, so the Future raises it
            # The others sum, and wait for this rank: no other sum of its may meet that one.
            self._broken = lane.group, error
            owe(Fault(Phase.ENCODE, error))
            last_error.note(error)
            return failed(error).future
        token = CallbackToken()
        lane.under_way = cast(torch.futures.Future[torch.Tensor], torch.futures.collect_all(sums).then(finish))
        return lane.under_way

    def drain(self) -> None:
        """Waits for the sums under way.

        After a failure backward returns before they end, and their memory may be that of the next step's gradients.
        """
        with self._lock:
            under_way = [lane.under_way for lane in self._lanes.values() if lane.under_way is not None]
        for future in under_way:
            with contextlib.suppress(RuntimeError):  # DDP hears of it from the Future itself
                future.wait()

    def flush(self) -> None:
        """Counts what has passed. Not done at every step, which would take as long as sending a small bucket."""
        with self._lock:
            for index, lane in self._lanes.items():
                if lane.under_way is not None and lane.under_way.done():
                    lane.under_way = None  # it holds the buffer
                count, seconds, last_seconds = lane.passed.take()
                if not count:
                    continue
                self._telemetry.note_strategy(index, lane.strategy)
                self._telemetry.count_bucket(lane.layout, lane.dtype.itemsize, count)
                count_rings(self._telemetry, lane.strategy, lane.layout, lane.dtype, count)
                self._telemetry.add(communication_seconds=seconds, wait_seconds=last_seconds)
