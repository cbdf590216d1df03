"""Buckets that go straight to the process group's own all-reduce, because compression does not pay for them.

What a collective of this library costs before its first value travels, a header to every rank and two changes of
thread, is nothing on a slow network and a tenth of the time on a fast one. So once all ranks have agreed to leave a
bucket uncompressed they do not ask again at every step: the next BYPASSED steps of the bucket are what DDP would do
without a hook. Then they agree again, once.

Which steps these are has to be the same on all ranks, without a message. It follows from the last agreement on that
bucket, and that has ended on every rank before its next step begins, because DDP waits for its buckets.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo

from qcomm.agreement import Fault
from qcomm.communicator import Group, Ticket, failed
from qcomm.errors import CollectiveError
from qcomm.layout import BucketLayout
from qcomm.mean import MeanTask
from qcomm.mpi_group import MpiGroup
from qcomm.plain import count_ring
from qcomm.telemetry import Telemetry

__all__ = ["BYPASSED", "Bypass", "Lane", "can_bypass"]

# Collectives of a bucket between two agreements. An agreement costs up to a tenth of an all-reduce, so this is 0.3 %.
BYPASSED = 31


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


@dataclass
class Lane:
    """The steps of one bucket since an agreement.

    Attributes:
        group: of torch, if it was granted.
        layout, dtype: of the buffer.
        ticket: of the agreement.
        granted: whether it ended with all ranks leaving the bucket uncompressed. Set before the ticket ends.
        passed: how many steps have gone past since.
        counted: how many of them the telemetry knows of.
        seconds, last_seconds: that those took which it does not know of, and what of it the last buckets of steps took.
    """

    group: dist.ProcessGroup
    layout: BucketLayout
    dtype: torch.dtype
    ticket: Ticket[torch.Tensor] | None = None
    granted: bool = False
    passed: int = 0
    counted: int = 0
    seconds: float = 0.0
    last_seconds: float = 0.0


class Bypass:
    """The lanes of a model's buckets; on the thread that backward runs on.

    Args:
        telemetry: counts what passes.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._lanes: dict[int, Lane] = {}

    def enter(self, index: int, buffer: torch.Tensor) -> Lane | None:
        """The lane of bucket ``index`` if this step of it needs no agreement: the same answer on all ranks."""
        lane = self._lanes.get(index)
        if lane is None or lane.ticket is None or lane.passed == BYPASSED:
            return None
        if (lane.layout.elements, lane.dtype) != (buffer.numel(), buffer.dtype):  # DDP has rebuilt its buckets
            return None
        if lane.passed == 0:
            lane.ticket.join()
        if not lane.granted:
            return None
        lane.passed += 1
        return lane

    def passed(self, index: int) -> int:
        """How many steps of bucket ``index`` have gone past since its last agreement."""
        return self._lanes[index].passed if index in self._lanes else 0

    def begin(self, task: MeanTask, group: Group) -> Lane | None:
        """A new lane for a bucket that is to be agreed on, None where it cannot pass; the caller sets its ticket."""
        self.flush()
        self._lanes.pop(task.index, None)
        if task.layout is None or not task.can_bypass or isinstance(group, MpiGroup):
            return None
        lane = self._lanes[task.index] = Lane(group, task.layout, task.buffer.dtype)
        return lane

    def reduce(
        self, lane: Lane, bucket: dist.GradBucket, fault: Fault | None, fail: Callable[[Exception], None]
    ) -> torch.futures.Future[torch.Tensor]:
        """Starts DDP's own mean: values are divided, then summed in their dtype.

        Args:
            lane: what :meth:`enter` returned.
            bucket: its buffer holds the mean in the end.
            fault: what went wrong on this rank. The others hear of it when they next agree; until then the rank must
                not be missing here.
            fail: called with the error if there is one, which the Future then raises.
        """
        index, buffer, begin = bucket.index(), bucket.buffer(), time.perf_counter()
        last = bucket.is_last()

        def finish(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            seconds = time.perf_counter() - begin
            lane.seconds += seconds
            lane.last_seconds += seconds if last else 0.0
            self._telemetry.mark(index, "done")
            try:
                result = future.value()[0]
            except RuntimeError as error:
                failure = CollectiveError(f"bucket {index} was not averaged: {error}")
                fail(failure)
                raise failure from error
            if fault is not None:
                fail(fault.error)
                raise fault.error
            return result

        self._telemetry.mark(index, "exchange_1")
        buffer.div_(lane.layout.world_size)
        try:
            work = lane.group.allreduce([buffer])
        except (RuntimeError, ValueError) as error:  # the group was destroyed, or its connections are gone
            fail(error)
            return failed(error).future
        return cast(torch.futures.Future[torch.Tensor], work.get_future().then(finish))

    def flush(self) -> None:
        """Counts what has passed. Not done at every step, which would take as long as sending a small bucket."""
        for index, lane in self._lanes.items():
            count, lane.counted = lane.passed - lane.counted, lane.passed
            if count:
                self._telemetry.note_strategy(index, "none")
                self._telemetry.count_bucket(lane.layout, lane.dtype.itemsize, count)
                count_ring(self._telemetry, lane.layout, lane.dtype.itemsize, count)
                self._telemetry.add(communication_seconds=lane.seconds, wait_seconds=lane.last_seconds)
                lane.seconds = lane.last_seconds = 0.0
