"""The worker: a background thread for each channel of a group, which runs compressed collectives one after another.

Callbacks cannot chain collectives of several phases. gloo has two threads for them, and callbacks start their work in
no common order on all ranks. So the training thread puts jobs in a queue, and the worker runs each to its end, in
order. The result or the error of a job is delivered through a ``torch.futures.Future`` that DDP understands.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import NamedTuple, TypeVar, cast

import torch

from qcomm.communicator.faults import Fault, Phase
from qcomm.communicator.handshake import UNTIMED, Fields, Handshake, Means, Took
from qcomm.communicator.order import Order
from qcomm.communicator.pipeline import Pipeline
from qcomm.communicator.ticket import Ticket, failed
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.transport import Mail, Traffic, Transport, TransportError

__all__ = ["Communicator", "is_agreed"]

T = TypeVar("T")
CLOSE_SECONDS = 5.0


class _Entry(NamedTuple):
    """A job in the queue: dealt ones have a number in the group's order, and may run alone."""

    job: Callable[[], object]
    ticket: Ticket[object]
    number: int | None = None
    alone: bool = False


class Communicator:
    """Runs jobs in order on a background thread with connections of its own; ``get_communicator`` shares them.

    Args:
        transport: carries its messages alone; it is closed with the communicator.
        first: of the group, on its first channel; None for that one itself.

    Attributes:
        rank: this process within the group.
        world_size: number of ranks in the group.
        name: number of this process in the whole job, for error messages.
        run: names the connections of the first channel, see :class:`~qcomm.transport.base.Transport`.
        turn: is held while a job computes, so that the jobs of a group's channels do so one after another.
        order: of the jobs that are dealt to the group's channels.
        number: of the dealt job under way among all of the group, from 1; 0 where there is none.
        means: that this rank got since the last handshake, for the next one to compare. Only jobs use them.
    """

    def __init__(self, transport: Transport, first: "Communicator | None" = None) -> None:
        self.rank, self.world_size = transport.rank, transport.world_size
        self.run: str = transport.run if first is None else first.run
        self.turn: threading.Lock = threading.Lock() if first is None else first.turn
        self.order: Order = Order() if first is None else first.order
        self._first = first
        self._workers: list[threading.Thread] = [] if first is None else first._workers
        self.name = transport.ranks[transport.rank]
        self._transport = transport
        self._mail = Mail(transport)
        self._sequence = self.number = 0
        # Of all channels, so that the next collective of the group tells it, whichever channel has that.
        self._pending_faults: deque[Fault] = deque(maxlen=1) if first is None else first._pending_faults
        self.means = Means()
        # Not the error itself, whose frames would keep the group, and with it threads and connections, for ever.
        self._broken: str | None = None
        self.lost = ""  # of the first channel: why one of the group's has no connections any more
        self._closed = False
        self._closing = threading.Lock()
        self._jobs: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"qcomm rank {self._transport.rank}", daemon=True)
        self._workers.append(self._thread)
        self._thread.start()

    @property
    def first(self) -> "Communicator":
        """Returns the communicator of the group's first channel, which lives as long as the group."""
        return self if self._first is None else self._first

    @property
    def connections(self) -> int:
        """Returns the number of connections to each rank."""
        return self._transport.connections

    @property
    def collectives(self) -> int:
        """Returns the number of this channel's collectives that have begun, the same on all ranks."""
        return self._sequence

    def submit(
        self,
        job: Callable[[], T],
        told: Callable[[Exception], Exception] | None = None,
        device: torch.device | None = None,
        alone: bool | None = None,
    ) -> Ticket[T]:
        """Queues ``job``. All ranks submit the same jobs in the same order; jobs that do not match are refused.

        Args:
            job: runs on the background thread.
            told, device: of the :class:`Ticket`.
            alone: of a job that was dealt to this channel, whether no other dealt job may run beside it; None for any
                other job, which waits for this channel's earlier jobs alone.
        """
        ticket: Ticket[T] = Ticket(self._workers, told, device)
        entry = _Entry(job, cast(Ticket[object], ticket))
        with self._closing:
            if not self._closed:
                if alone is None:
                    self._jobs.put(entry)
                else:
                    self.order.enqueue(lambda number: self._jobs.put(entry._replace(number=number, alone=alone)))
                return ticket
        return failed(CollectiveError("the communicator is closed: its group was destroyed"))

    def begin(self) -> Fault | None:
        """Begins a collective; returns a fault of an earlier one that the other ranks do not know yet."""
        self._sequence += 1
        with suppress(IndexError):  # there is none, or another channel has just taken it
            return self._pending_faults.pop()
        return None

    def handshake(
        self,
        phase: Phase,
        fields: Fields,
        sizes: Sequence[int],
        limits: Sequence[int],
        fault: Fault | None,
        own_time: Took = UNTIMED,
        packets: Sequence[torch.Tensor] | None = None,
        following: int = 0,
    ) -> Handshake:
        """Sends this rank's headers; until ``finish`` of the result, which has to follow, the job may compute.

        Arguments are those of :class:`Handshake`.
        """
        means, place = self.means.take(), (self._transport, self._mail, self._sequence)
        return Handshake(*place, phase, fields, sizes, limits, fault, own_time, means, packets, following)

    def exchange(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], phase: Phase) -> Traffic:
        """Exchanges packets with every rank, of the sizes that all have agreed on."""
        return self._transport.exchange_pairwise(outgoing, incoming, f"exchanging packets after {phase}")

    def swap(self, partner: int, outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
        """Exchanges a message with one rank, which calls this as well, in both directions at once."""
        ranks = self.world_size
        messages = [incoming] * ranks, [outgoing] * ranks
        self._transport.transfer(*messages, [partner], [partner], "exchanging a message with one rank")

    def pipeline(self, fault: Fault | None, agree: Callable[[], None]) -> Pipeline:
        """Returns the messages of this job, which are under way while it computes; arguments as of the pipeline."""
        return Pipeline(self._transport, self._mail, self._sequence, fault, agree)

    def sum(self, buffers: Sequence[torch.Tensor]) -> None:
        """Replaces each of ``buffers`` by its sum over all ranks."""
        self._transport.sum(buffers, "summing values")

    def announce_later(self, fault: Fault) -> None:
        """Remembers a fault after the last exchange of a job; the next job of the group tells it, on any channel."""
        self._pending_faults.append(fault)

    def interrupt(self) -> None:
        """Closes the connections under a job that waits for other ranks: it fails, and so do all after it."""
        self._transport.abandon([])

    def give_up(self, reason: str) -> None:
        """Closes the connections for good; dealt jobs of the group fail from now on."""
        self.first.lost = reason
        self.interrupt()

    def close(self) -> None:
        """Ends the thread after the jobs in the queue and closes the connections.

        It waits for CLOSE_SECONDS at most. A job that hangs keeps its thread, which ends with the process.
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
                self.number = 0 if entry.number is None else entry.number + 1
                with nullcontext() if entry.number is None else self.order.turn(entry.number, entry.alone):
                    self._run_job(entry.job, entry.ticket, is_dealt=entry.number is not None)
                del entry  # otherwise the buffers of the last job live until the next one
        self._mail.close()

    def _run_job(self, job: Callable[[], object], ticket: Ticket[object], is_dealt: bool) -> None:
        if is_dealt and self._broken is None and self.first.lost:
            # Dealt jobs all fail from then on, and not every fourth. The others may be waiting for this rank already.
            self._broken = self.first.lost
            self._transport.fail(f"an earlier collective left this group without connections: {self._broken}")
            self._mail.abandon()
        if self._broken is not None:
            ticket.complete(
                None, TransportError(f"an earlier collective left this group without connections: {self._broken}")
            )
            return
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001 - any: it belongs to the thread that waits for the ticket
            if not is_agreed(error):
                self._break(error)
            told = error
            if not isinstance(told, Exception):  # SystemExit and the like are meant for the main thread
                told = CollectiveError(f"the collective was ended by {type(error).__name__}: {error}")
                told.__cause__ = error
            ticket.complete(None, told)
        else:
            ticket.complete(result, None)

    def _break(self, error: BaseException) -> None:
        """Closes the connections after an error that the other ranks do not know of.

        The peers may be waiting for this rank. Closed connections give them an error now and not after the timeout.
        """
        self._broken = self.first.lost = f"{type(error).__name__}: {error}"
        if isinstance(error, TransportError):
            # Transfers in the error's traceback would keep connections open, and ranks that wait for this one.
            self._mail.abandon()
            self._transport.close()
        else:
            self._transport.fail()
            self._mail.abandon()


def is_agreed(error: BaseException) -> bool:
    """Returns True if all ranks left the collective at the same point, so that the next one can begin."""
    return isinstance(error, (CollectiveError, ConfigMismatchError)) and not isinstance(error, TransportError)
