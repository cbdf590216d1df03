"""A worker thread for each group that runs compressed collectives one after another.

Collectives of several phases cannot be chained by callbacks: gloo has two threads for them, and what callbacks start
has no common order on all ranks. So the training thread hands jobs to a queue, and the worker runs them to their end,
in order. What a job returns or raises is delivered through a ``torch.futures.Future`` that DDP understands.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Generic, TypeVar, cast

import torch
import torch.distributed as dist

from qcomm.agreement import UNTIMED, Agreement, Fields, Took
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.faults import Fault, Phase
from qcomm.pipeline import Pipeline
from qcomm.transport import GlooTransport, MpiGroup, Traffic, Transport, TransportError

__all__ = [
    "Communicator",
    "Group",
    "Ticket",
    "completed",
    "failed",
    "get_communicator",
    "get_ranks",
    "get_world_size",
    "is_agreed",
    "resolve_group",
]

T = TypeVar("T")
Group = dist.ProcessGroup | MpiGroup
CLOSE_SECONDS = 5.0


class Ticket(Generic[T]):
    """What became of a job: may be waited for from any thread but the one that runs it, any number of times.

    Args:
        worker: the thread that runs the job.

    Attributes:
        future: holds the job's result; its ``wait()`` raises what the job raised.
    """

    def __init__(self, worker: threading.Thread | None = None) -> None:
        self._worker = worker
        self._done = threading.Event()
        self._result: T | None = None
        self._error: Exception | None = None
        self._signal: torch.futures.Future[None] = torch.futures.Future()
        # An exception set on a Future would reach DDP as if it were the result; one raised in a callback arrives as an
        # exception.
        self.future: torch.futures.Future[T] = self._signal.then(lambda _: self.result())

    def is_completed(self) -> bool:
        """Whether the job has ended, well or not."""
        return self._done.is_set()

    def exception(self) -> Exception | None:
        """What the job raised; None while it runs and where it succeeded."""
        return self._error

    def wait(self, timeout: timedelta | float | None = None) -> None:
        """Waits for the end of the job and raises what it raised.

        Raises:
            TimeoutError: the job still runs after ``timeout`` (seconds or a timedelta).
            RuntimeError: called on the worker thread, as by a Future's callback, for a job that is still in the queue.
        """
        if threading.current_thread() is self._worker and not self._done.is_set():
            raise RuntimeError(
                "a callback waits for a collective that can only run after the callback; pass async_op=True and wait "
                "on another thread"
            )
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        if not self._done.wait(seconds):
            raise TimeoutError(f"the collective is still running after {seconds:g} s")
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Waits for the end of the job, well or not."""
        self._done.wait()

    def result(self) -> T:
        """What the job returned."""
        self.wait()
        return cast(T, self._result)

    def complete(self, result: T | None, error: Exception | None) -> None:
        """Ends the wait. Called once."""
        self._result, self._error = result, error
        self._done.set()
        self._signal.set_result(None)


def completed(result: T, future: torch.futures.Future[T] | None = None) -> Ticket[T]:
    """The ticket of a job that had nothing to do, or has done it; ``future``: of a result on a device."""
    ticket: Ticket[T] = Ticket()
    ticket.complete(result, None)
    if future is not None:
        ticket.future = future
    return ticket


def failed(error: Exception) -> Ticket[T]:
    """The ticket of a job that could not even be queued."""
    ticket: Ticket[T] = Ticket()
    ticket.complete(None, error)
    return ticket


class Communicator:
    """Runs jobs in order on a thread with connections of its own; :func:`get_communicator` shares one for each group.

    Args:
        transport: carries its messages, and nobody else's; it is closed with the communicator.

    Attributes:
        agreements: how many collectives all ranks agreed to run.
        agreed_time: nanoseconds of the last collective of its kind, as all ranks said in the last agreement; or 0.
        time_to_agree: nanoseconds of this rank's last job that were for an agreement, not for its values.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sequence = 0
        self.agreements = 0
        self.agreed_time = 0
        self.time_to_agree = 0
        self._pending_fault: Fault | None = None
        self._broken: BaseException | None = None
        self._closed = False
        self._closing = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], Ticket[object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"qcomm rank {self._transport.rank}", daemon=True)
        self._thread.start()

    @property
    def rank(self) -> int:
        """This process within the group."""
        return self._transport.rank

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return self._transport.world_size

    def submit(self, job: Callable[[], T]) -> Ticket[T]:
        """Queues ``job``. All ranks submit the same jobs in the same order; jobs that do not match are refused."""
        ticket: Ticket[T] = Ticket(self._thread)
        with self._closing:
            if not self._closed:
                self._jobs.put(cast(tuple[Callable[[], object], Ticket[object]], (job, ticket)))
                return ticket
        return failed(CollectiveError("the communicator is closed: its group was destroyed"))

    @property
    def pending_fault(self) -> Fault | None:
        """What went wrong at the end of an earlier job, which the other ranks will hear of in the next exchange."""
        return self._pending_fault

    def begin(self) -> None:
        """Called by a job at its start: counts it."""
        self._sequence += 1

    def agree(
        self,
        phase: Phase,
        fields: Fields,
        sizes: Sequence[int],
        limits: Sequence[int],
        fault: Fault | None,
        own_time: Took = UNTIMED,
    ) -> tuple[list[int], Traffic]:
        """What :meth:`qcomm.agreement.Agreement.finish` says of this job: sizes to come, bytes of the headers."""
        return self.finish_agreement(self.begin_agreement(phase, fields, sizes, limits, fault, own_time), phase)

    def begin_agreement(
        self,
        phase: Phase,
        fields: Fields,
        sizes: Sequence[int],
        limits: Sequence[int],
        fault: Fault | None,
        own_time: Took = UNTIMED,
    ) -> Agreement:
        """Sends this rank's headers; until :meth:`finish_agreement`, which has to follow, the job may compute."""
        self._pending_fault = None
        return Agreement(self._transport, self._sequence, phase, fields, sizes, limits, fault, own_time)

    def finish_agreement(self, agreement: Agreement, phase: Phase) -> tuple[list[int], Traffic]:
        """The second half of :meth:`agree`."""
        begin = time.perf_counter_ns()
        incoming, agreed_time, traffic = agreement.finish()
        if phase == Phase.ENCODE:
            self.agreements += 1
            self.agreed_time, self.time_to_agree = agreed_time, time.perf_counter_ns() - begin
        return incoming, traffic

    def exchange(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], phase: Phase) -> Traffic:
        """Packets to and from every rank, of the sizes that were agreed on."""
        return self._transport.exchange_in_rounds(outgoing, incoming, f"exchanging packets after {phase}")

    def pipeline(self) -> Pipeline:
        """The messages of this job, under way while it computes."""
        return Pipeline(self._transport, self._sequence)

    def sum(self, buffers: Sequence[torch.Tensor]) -> None:
        """Replaces each of ``buffers`` by its sum over all ranks."""
        self._transport.sum(buffers, "summing values")

    def announce_later(self, fault: Fault) -> None:
        """Remembers a fault after the last exchange of a job; the other ranks hear of it in the next job's first."""
        self._pending_fault = fault

    def close(self) -> None:
        """Ends the thread after the jobs in the queue and closes the connections.

        Does not wait for long: a job that hangs keeps its thread, which ends with the process.
        """
        with self._closing:
            if not self._closed:
                self._jobs.put(None)
            self._closed = True
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        with torch.no_grad():
            while (entry := self._jobs.get()) is not None:
                self._run_job(*entry)
                del entry  # or the buffers of the last job live until the next one
        self._transport.close()

    def _run_job(self, job: Callable[[], object], ticket: Ticket[object]) -> None:
        if self._broken is not None:
            ticket.complete(
                None, CollectiveError(f"an earlier collective left this group without connections: {self._broken}")
            )
            return
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001 - any: it belongs to the thread that waits for the ticket
            if not is_agreed(error):
                # The peers may be waiting for this rank: with the connections gone they get an error now and not
                # after the timeout.
                self._broken = error
                self._transport.close()
            told = error
            if not isinstance(told, Exception):  # SystemExit and the like are meant for the main thread
                told = CollectiveError(f"the collective was ended by {type(error).__name__}: {error}")
                told.__cause__ = error
            ticket.complete(None, told)
        else:
            ticket.complete(result, None)


def is_agreed(error: BaseException) -> bool:
    """Whether all ranks left the collective at the same point, so that the next one can begin."""
    return isinstance(error, (CollectiveError, ConfigMismatchError)) and not isinstance(error, TransportError)


class _Place:
    """Where a group's communicator is, or is being made: that waits for other ranks, and no other group may."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.communicator: Communicator | None = None


_places: "weakref.WeakKeyDictionary[Group, _Place]" = weakref.WeakKeyDictionary()
_places_lock = threading.Lock()


def resolve_group(group: Group | None) -> Group:
    """``group`` or the default group, after checking that this process belongs to it.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: this process is not a member, or the group was destroyed.
    """
    if isinstance(group, MpiGroup):
        if group.is_closed:
            raise ValueError("group is closed; make a new MpiGroup")
        return group
    if type(group).__module__.startswith("mpi4py"):
        raise ValueError(f"group must be wrapped, once and on all ranks: qcomm.MpiGroup(comm), got {group!r}")
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a process group that this rank belongs to, got {group!r}")
    if not _is_registered(group):
        raise ValueError("group was destroyed; make a new process group")
    return group


def get_world_size(group: Group) -> int:
    """Number of ranks in a group."""
    return group.size if isinstance(group, MpiGroup) else dist.get_world_size(group)


def get_ranks(group: Group) -> list[int]:
    """The group's ranks by their numbers in the whole job."""
    return list(group.transport.ranks) if isinstance(group, MpiGroup) else dist.get_process_group_ranks(group)


def get_communicator(group: Group) -> Communicator:
    """The communicator of a group, made at the first call.

    Making it is a collective, which all ranks of the group reach in the same order. It ends with its group, or with the
    process.
    """
    with _places_lock:
        ended = [_places.pop(known) for known in list(_places) if not _is_registered(known)]
        place = _places.setdefault(group, _Place())
    for other in ended:
        if other.communicator is not None:
            other.communicator.close()
    with place.lock:
        if place.communicator is None:
            communicator = Communicator(group.transport if isinstance(group, MpiGroup) else GlooTransport(group))
            place.communicator = communicator
            weakref.finalize(group, communicator.close)
            if isinstance(group, MpiGroup):
                group.before_close(communicator.close)
        return place.communicator


def _is_registered(group: Group) -> bool:
    if isinstance(group, MpiGroup):
        return not group.is_closed
    try:
        return len(dist.get_process_group_ranks(group)) > 0
    except (KeyError, ValueError, RuntimeError):
        return False
