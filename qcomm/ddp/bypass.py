"""Buckets that use the process group's own all-reduce, because compression does not pay for them.

Before its first value travels, a collective of this library costs a header to every rank and two changes of thread. On
a slow network this is negligible. On a fast one it is a tenth of the time. Once all ranks have agreed to leave a bucket
uncompressed, they therefore do not repeat the handshake at every step. The next BYPASSED steps of the bucket run as in
DDP without this library: on the program's own process group, without the worker and its transport. Then the ranks agree
again, once.

All ranks must bypass the same steps, without a message. The choice follows from the last agreement on that bucket. That
agreement has ended on every rank before the next step begins, because DDP waits for its buckets.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist

from qcomm.collectives import (
    BYPASSED,
    UNCOMPRESSED,
    BucketLayout,
    ReduceOptions,
    Telemetry,
    UncompressedValues,
    count_rings,
)
from qcomm.communicator import Fault, Group, LateFaultError, Phase, Ticket, failed
from qcomm.ddp.failures import GROUP_IS_BROKEN, TOLD_LATER, LastError
from qcomm.ddp.gloo_exit import CallbackToken
from qcomm.errors import CollectiveError
from qcomm.transport import MpiGroup, can_bypass

__all__ = ["Bypass", "Lane"]


class Passed:
    """Number and seconds of the ended sums that the telemetry has not counted yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = 0, 0.0, 0.0

    def count(self, seconds: float, last: bool) -> None:
        """Counts a sum that has ended well; ``last``: it was the last of its step."""
        with self._lock:
            count, total, total_last = self._numbers
            self._numbers = count + 1, total + seconds, total_last + (seconds if last else 0.0)

    def take(self) -> tuple[int, float, float]:
        """Returns number, seconds, and seconds of the last sums of their steps; sets all to zero."""
        with self._lock:
            numbers, self._numbers = self._numbers, (0, 0.0, 0.0)
        return numbers


class Outcome:
    """The end of a sum."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: Exception | None = None

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the end, well or not; returns False if it has not come after ``seconds``."""
        return self._ended.wait(seconds)

    def exception(self) -> Exception | None:
        """Returns the error; None while the sum is under way and where it succeeded."""
        return self._error

    def end(self, error: Exception | None) -> None:
        """Ends the wait. It is called once."""
        self._error = error
        self._ended.set()


@dataclass
class Lane:
    """The steps of one bucket since an agreement.

    Attributes:
        group: of torch.
        layout, dtype: of its buffer.
        parameters: of the bucket.
        ticket: of the agreement, until its end has been waited for.
        strategy: the one on which all ranks have settled then, if it is known. Set before the ticket ends.
        memory: of the summed values, by strategy.
        under_way: the last sum, until it ends.
        outcome: of the last sum; None where it did not begin.
        started: number of steps that have bypassed the worker since.
        passed: counts those of them that have ended.
        means: fingerprints of their means, by step.
    """

    group: dist.ProcessGroup
    layout: BucketLayout
    dtype: torch.dtype
    parameters: tuple[weakref.ref[torch.Tensor], ...]
    ticket: Ticket[torch.Tensor] | None = None
    strategy: str = ""
    memory: dict[str, UncompressedValues] = field(default_factory=dict)
    under_way: torch.futures.Future[torch.Tensor] | None = None
    outcome: Outcome | None = None
    started: int = 0
    passed: Passed = field(default_factory=Passed)
    means: dict[str, int] = field(default_factory=dict)
    _named: tuple[ReduceOptions, ReduceOptions] | None = None

    def named(self, options: ReduceOptions) -> ReduceOptions:
        """Returns the options of the bucket's mean with the strategy that the ranks have settled on."""
        if self._named is None or self._named[0] is not options:
            self._named = options, replace(options, strategy=self.strategy, profile=None)
        return self._named[1]

    def settle(self, strategy: str) -> None:
        """Notes the strategy on which all ranks have settled, or "" while strategies are being tried."""
        self.strategy = strategy
        for other in set(self.memory).difference([strategy] if strategy else UNCOMPRESSED):
            del self.memory[other]

    def is_of(self, bucket: dist.GradBucket, group: Group) -> bool:
        """Returns True if the bucket is unchanged: DDP rebuilds its buckets once, and models are moved and replaced."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        same = group is self.group and buffer.dtype == self.dtype and buffer.numel() == self.layout.elements
        same = same and buffer.device.type == "cpu" and len(parameters) == len(self.parameters)
        return same and all(known() is other for known, other in zip(self.parameters, parameters, strict=True))


class Bypass:
    """The lanes of a model's buckets.

    The thread of backward calls :meth:`enter`, :meth:`begin` and :meth:`reduce`. Any thread may call the others.

    Args:
        telemetry: counts the bypassed buckets.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._lanes: dict[int, Lane] = {}
        self._lock = threading.Lock()  # of the table
        self._broken: tuple[dist.ProcessGroup, Exception] | None = None

    def __reduce__(self) -> tuple[type["Bypass"], tuple[Telemetry]]:
        """Makes copies without agreements."""
        return Bypass, (self._telemetry,)

    def enter(self, bucket: dist.GradBucket, group: Group) -> Lane | None:
        """Returns the lane of a bucket if this step of it needs no agreement on a strategy; the same on all ranks."""
        lane = self._lanes.get(bucket.index())
        if lane is None or lane.started == BYPASSED or not lane.is_of(bucket, group):
            return None
        if lane.ticket is not None:
            lane.ticket.join()
            lane.ticket = None
        if not lane.strategy:
            return None
        lane.started += 1
        return lane

    def bypassing(self, index: int) -> tuple[int, dict[str, int]]:
        """Returns the number of steps of bucket ``index`` since its last agreement, and fingerprints of their means."""
        lane = self._lanes.get(index)
        return (0, {}) if lane is None else (lane.started, lane.means)

    def begin(self, bucket: dist.GradBucket, layout: BucketLayout | None, group: Group) -> Lane | None:
        """Makes a new lane for a bucket before its agreement, None where it cannot bypass; the caller sets its ticket.

        Args:
            bucket: from DDP.
            layout: of its buffer; None where a fault keeps this rank from agreeing.
            group: to average over.
        """
        self.flush()
        index, lane = bucket.index(), None
        on_cpu = bucket.buffer().is_cpu  # gloo's sum of tensors on a device would make backward wait for them
        if layout is not None and on_cpu and not isinstance(group, MpiGroup) and can_bypass(group):
            lane = Lane(group, layout, bucket.buffer().dtype, tuple(map(weakref.ref, bucket.parameters())))
        with self._lock:
            before = self._lanes
            if lane is not None and index in before and before[index].layout is lane.layout:
                lane.memory = before[index].memory
            # There were more buckets before DDP rebuilt them.
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
        verified: str = "",
    ) -> torch.futures.Future[torch.Tensor]:
        """Starts the mean of torch's own hooks, ``allreduce_hook`` and ``bf16_compress_hook``.

        Args:
            lane: from :meth:`enter`.
            bucket: its buffer holds the mean in the end.
            last_error: keeps the error if there is one, which the Future then raises.
            owe: called with the fault that the others learn at the next agreement.
            verified: the mean's name in errors where ranks compare it, otherwise "".
        """
        index, buffer, begin = bucket.index(), bucket.buffer(), time.perf_counter()
        outcome, lane.outcome = Outcome(), None
        last, passed, telemetry = bucket.is_last(), lane.passed, weakref.ref(self._telemetry)
        means = lane.means

        # gloo's thread calls this function and frees it. If that released the last reference to the group, the thread
        # would wait for itself, and the process would end. So this function holds no group, and no observer that might
        # have one.
        def finish(future: torch.futures.Future[Any]) -> torch.Tensor:
            _ = token  # held, and so counted, until this function is freed
            failure: CollectiveError | None = None
            try:
                try:
                    found = future.value()
                    for summed in found if several else ():
                        summed.value()
                except RuntimeError as error:
                    text = f"bucket {index} was not averaged: {error}. {GROUP_IS_BROKEN}."
                    failure = CollectiveError(text)  # not the one that is raised, whose traceback has the token
                    raise CollectiveError(text) from error
                try:
                    with torch.no_grad():
                        if verified:
                            means[verified] = values.fingerprint(buffer)
                        values.store(buffer)
                except Exception as error:
                    owe(Fault(Phase.DECODE, error.with_traceback(None)))  # it has the token, too
                    text = (
                        f"bucket {index} was averaged, but not stored on this rank: {type(error).__name__}: {error}. "
                        f"{TOLD_LATER}."
                    )
                    failure = LateFaultError(text)
                    raise LateFaultError(text) from error
            finally:
                if failure is not None:
                    last_error.note(failure)
                outcome.end(failure)  # whatever happened: backward waits for it
            passed.count(time.perf_counter() - begin, last)
            if (observed := telemetry()) is not None:
                observed.mark(index, "done")
            return buffer

        try:
            self._telemetry.mark(index, "exchange_1")
            if self._broken is not None and self._broken[0] is lane.group:
                raise CollectiveError(f"bucket {index} was not averaged, as an earlier one was not: {self._broken[1]}")
            if lane.strategy not in lane.memory:
                lane.memory[lane.strategy] = UncompressedValues(lane.strategy, lane.layout, lane.dtype)
            values = lane.memory[lane.strategy]
            with torch.no_grad():
                sums = [lane.group.allreduce([part]).get_future() for part in values.load(buffer)]
        except Exception as error:  # noqa: BLE001 - any: DDP could not go on after it, so the Future raises it
            # The others wait in their sum for this rank. No other sum of this rank may meet that one.
            self._broken = lane.group, error
            owe(Fault(Phase.ENCODE, error))
            last_error.note(error)
            return failed(error).future
        token, lane.outcome = CallbackToken(), outcome
        several = len(sums) > 1
        ended = torch.futures.collect_all(sums) if several else sums[0]
        lane.under_way = cast(torch.futures.Future[torch.Tensor], ended.then(finish))
        return lane.under_way

    def forget(self) -> None:
        """Ends all lanes, so that every bucket is agreed on anew; a group whose sums have failed stays known."""
        self.flush()
        with self._lock:
            self._lanes = {}

    def leave(self, index: int) -> None:
        """Ends the lane of bucket ``index``, if there is one."""
        if index in self._lanes:
            self.flush()
            with self._lock:
                self._lanes = {number: lane for number, lane in self._lanes.items() if number != index}

    def drain(self) -> None:
        """Waits for the sums under way.

        After a failure backward returns before they end, and their memory may hold the next step's gradients.
        """
        with self._lock:
            under_way = [lane.under_way for lane in self._lanes.values() if lane.under_way is not None]
        for future in under_way:
            with contextlib.suppress(RuntimeError):  # the Future itself tells DDP
                future.wait()

    def flush(self) -> None:
        """Counts the bypassed buckets. Counting at every step would take as long as sending a small bucket."""
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
