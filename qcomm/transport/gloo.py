"""Messages between the ranks of a process group, over gloo connections that belong to qcomm.

A communicator must not share its connections. Collectives of one gloo group have to be issued in the same order on all
ranks, and those of a worker thread and of the training thread have no common order. (The training thread itself sends
the messages of :mod:`qcomm.ddp.bypass`, on the program's own group.)

The connections are made directly on the group's store, not with
``torch.distributed.new_group(use_local_synchronization=True)``. That function derives the new group's name from the
number of groups a process belongs to. Ranks that differ in this number wait for each other until the timeout. So do all
ranks when a group is destroyed and made again.
"""

import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo, default_pg_timeout

from qcomm.transport.base import Transfer, Transport, TransportError
from qcomm.transport.gloo_connections import GlooConnections
from qcomm.transport.lost_ranks import LostRanks

__all__ = ["GlooTransport", "Meeting", "break_group", "can_bypass"]

# The tag of a message that is never sent.
ABANDON_TAG = 1 << 30
ABANDON_TIMEOUT = timedelta(milliseconds=1)


class Meeting(NamedTuple):
    """Ranks that meet at a store. Those of a process group do, and those that torch.distributed has no group of.

    Attributes:
        store: of these ranks.
        ranks, rank, timeout: as of a :class:`Transport`.
    """

    store: dist.Store
    ranks: Sequence[int]
    rank: int
    timeout: timedelta


class GlooTransport(Transport):
    """The transport of a process group over gloo, which aborts the process if a message is larger than its buffer.

    Args:
        group: any process group this process belongs to, whatever its backend, or the meeting of ranks without one.

    Raises:
        TransportError: a rank did not take part within the timeout.
    """

    def __init__(self, group: dist.ProcessGroup | Meeting) -> None:
        meeting = group if isinstance(group, Meeting) else _meeting_of(group)
        super().__init__(meeting.ranks, meeting.rank, meeting.timeout)
        self._lost: LostRanks | None = None
        self._has_abandoned = False
        self._gloo: Any = None  # a ProcessGroupGloo; torch's stubs do not know its send and recv
        self._store: Any = None  # of these connections alone; torch's stubs do not know clone
        if self.world_size > 1:
            self._gloo = self._connect(meeting.store)

    def _connect(self, store: dist.Store) -> ProcessGroupGloo:
        # The name must be new to this store, or a rank might find the addresses of closed connections. Each rank counts
        # its own communicators in the store, which outlives a group that is made anew on it. All ranks make them in the
        # same order.
        generation = store.add(f"qcomm/{self.rank}", 1)
        own = dist.PrefixStore(f"qcomm/{generation}", store)
        try:
            self._lost = LostRanks(own, self.rank, self.world_size)
            self.run = own.compare_set("run", "", uuid.uuid4().hex[:16]).decode()  # the first rank's
            self._store = own
            return ProcessGroupGloo(own, self.rank, self.world_size, self.timeout)
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.ranks[self.rank]} could not connect to the other ranks of {list(self.ranks)}; every rank "
                f"of the group has to call attach or its first all_reduce at the same point: {error}"
            ) from error

    def widen(self, connections: int) -> None:
        """Makes more connections to each rank, see :meth:`Transport.widen`."""
        if connections == 1 or self._gloo is None:
            return
        # On connections of their own to the store they do not wait for each other's trips to it.
        has_own = hasattr(self._store, "clone")  # not in older versions of torch

        def connect(number: int) -> ProcessGroupGloo:
            store = self._store.clone() if has_own else self._store
            own = dist.PrefixStore(f"connection {number}", store)
            return ProcessGroupGloo(own, self.rank, self.world_size, self.timeout)

        try:
            with ThreadPoolExecutor(connections - 1 if has_own else 1, "qcomm connects") as threads:
                more = list(threads.map(connect, range(1, connections)))
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.ranks[self.rank]} could not make {connections} connections to each rank of "
                f"{list(self.ranks)}: {error}"
            ) from error
        self._gloo = GlooConnections([self._gloo, *more])
        self.connections = connections

    @property
    def is_closed(self) -> bool:
        """Returns True if there are no connections; a rank that is alone never has any."""
        return self._gloo is None

    def start_send(self, target: int, message: torch.Tensor, tag: int) -> Transfer:
        """Sends a message, see :meth:`Transport.start_send`."""
        return self._start(target, message, tag, "send")

    def start_receive(self, source: int, buffer: torch.Tensor, tag: int) -> Transfer:
        """Receives a message, see :meth:`Transport.start_receive`."""
        return self._start(source, buffer, tag, "recv")

    def _start(self, rank: int, message: torch.Tensor, tag: int, operation: str) -> Transfer:
        if self._gloo is None:
            raise self._closed()
        return Transfer(rank, getattr(self._gloo, operation)([message], rank, tag))

    def _wait(self, transfers: Sequence[Transfer]) -> list[tuple[int, RuntimeError]]:
        # The first timeout closes all connections of the group, so later waits end at once.
        failures = []
        for rank, work in transfers:
            try:
                work.wait()
            except RuntimeError as error:
                failures.append((rank, error))
        return failures

    def abandon(self, transfers: Sequence[Transfer]) -> None:
        """Closes the connections and waits for transfers under way, which then no longer write to their memory."""
        gloo = self._gloo  # another thread may close it meanwhile
        if gloo is None:
            return
        self._has_abandoned = True
        break_connections(gloo, self.peers)
        # A transfer whose bytes were just flowing is not notified, so the wait for it must be short.
        for _, work in transfers:
            try:
                work.wait(ABANDON_TIMEOUT)
            except RuntimeError:  # its connection was closed
                continue

    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """Does nothing: gloo drops receives when their connections close."""

    def sum(self, buffers: Sequence[torch.Tensor], what: str) -> None:
        """Sums by gloo's own all-reduce, of all buffers at once, see :meth:`Transport.sum`."""
        if self.world_size == 1:
            return
        if self._gloo is None:
            raise self._closed()
        reason = self._sum_all(buffers)
        if reason is not None:
            blamed = ", ".join(str(self.ranks[rank]) for rank in sorted(self._blame(())))
            whom = f"rank(s) {blamed}" if blamed else f"some rank of {list(self.ranks)}"
            raise TransportError(
                f"rank {self.ranks[self.rank]}, {what}: no answer from {whom} (died, closed the connection, or silent "
                f"for {self.timeout.total_seconds():g} s): {reason}"
            )

    def _blame(self, lost: Collection[int]) -> Collection[int]:
        """Asks the ranks that closed their connections whom they had lost, see :class:`LostRanks`."""
        if self._lost is None or self._has_abandoned:
            return lost  # a rank that has given up by itself has lost nobody
        return self._lost.note(lost)

    def _sum_all(self, buffers: Sequence[torch.Tensor]) -> str | None:
        """Sums all buffers; returns a failure as text, since a traceback would keep transfers and connections open."""
        reasons, sums = [], []
        for buffer in buffers:
            try:
                sums.append(self._gloo.allreduce([buffer]))
            except RuntimeError as error:
                reasons.append(str(error))
        for work in sums:
            try:
                work.wait()
            except RuntimeError as error:
                reasons.append(str(error))
        return reasons[0] if reasons else None

    def close(self) -> None:
        """Closes the connections, see :meth:`Transport.close`."""
        self._gloo = None

    def _explained(self, blamed: Sequence[int]) -> str:
        """Returns what these ranks wrote to the store when they failed."""
        told = {} if self._lost is None else self._lost.reasons(blamed)
        return "".join(f"; rank {self.ranks[rank]} said: {reason}" for rank, reason in told.items())

    def fail(self, reason: str = "") -> None:
        """Blames this rank on the store and breaks the connections, which transfers under way would keep open."""
        if self._lost is not None and not self._has_abandoned:
            if reason:
                self._lost.give_reason(reason)
            self._lost.note({self.rank})
        self.abandon([])
        self.close()


def break_connections(gloo: Any, peers: Sequence[int]) -> None:
    """Closes the connections of a ``ProcessGroupGloo``. Threads that wait for a peer get an error, and so do the peers.

    gloo keeps connections open while a reference to one of their transfers exists, but closes them when a wait times
    out. Its ``abort`` leaves sums under way until the timeout.
    """
    for peer in peers:
        try:
            gloo.recv([torch.empty(1, dtype=torch.float32, device="cpu")], peer, ABANDON_TAG).wait(ABANDON_TIMEOUT)
        except RuntimeError:  # the timeout, or the connection to this peer is broken already
            continue


def break_group(group: dist.ProcessGroup) -> None:
    """Closes the connections of the program's own gloo group: its sums fail on all ranks, those to come as well."""
    break_connections(
        group._get_backend(torch.device("cpu")), [rank for rank in range(group.size()) if rank != group.rank()]
    )


def can_bypass(group: object) -> bool:
    """Returns True if the group has an all-reduce for the CPU that gives all ranks the same bits: gloo's, unwrapped.

    MPI's may add in another order on each rank, and belongs to one thread; NCCL has none for the CPU.
    """
    if not isinstance(group, dist.ProcessGroup):
        return False
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:  # it has none
        return False
    return isinstance(backend, ProcessGroupGloo)


def _meeting_of(group: dist.ProcessGroup) -> Meeting:
    ranks = dist.get_process_group_ranks(group)
    return Meeting(_group_store(group), ranks, dist.get_rank(group), _group_timeout(group))


def _group_timeout(group: dist.ProcessGroup) -> timedelta:
    """Returns the timeout with which a group was made; torch has no public function for it."""
    for device in getattr(group, "_device_types", []):
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return default_pg_timeout


def _group_store(group: dist.ProcessGroup) -> dist.Store:
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return dist.distributed_c10d._get_process_group_store(group)  # torch before ProcessGroup had the method
