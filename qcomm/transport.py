"""Messages between the ranks of a group, over gloo connections of qcomm's own.

A communicator must not share connections with anyone: collectives of one gloo group have to be issued in the same order
on all ranks, and those of a worker thread and of the training thread have no common order. The connections are made
directly on the group's store and not with ``torch.distributed.new_group(use_local_synchronization=True)``, because that
derives the new group's name from the number of groups a process belongs to: ranks that differ in it wait for each other
until the timeout, and so do all ranks when a group is destroyed and made again.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo, default_pg_timeout

from qcomm.errors import CollectiveError

__all__ = ["Traffic", "Transport", "TransportError"]

# Of a message that nobody sends; two_phase's tags begin at 1.
ABANDON_TAG = 1 << 30
ABANDON_TIMEOUT = timedelta(milliseconds=1)


class TransportError(CollectiveError):
    """A peer died, does not answer, or closed its connections: final for a communicator."""


class Transfer(NamedTuple):
    """A message under way to or from ``rank``. It must not be let go before it has been waited for."""

    rank: int
    work: Any  # torch's stubs do not know what a ProcessGroupGloo returns


class Traffic(NamedTuple):
    """Bytes of the tensors handed to sends and receives."""

    sent: int
    received: int


class Transport:
    """Point-to-point messages within a process group. Making one is a collective: every rank of the group has to.

    Messages are received into buffers of exactly their size: gloo aborts the process when a message is larger than the
    buffer. Nothing here waits for one message longer than the group's timeout.

    Args:
        group: any process group this process belongs to, whatever its backend.

    Raises:
        TransportError: a rank did not take part within the timeout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.rank = dist.get_rank(group)
        self.world_size = len(self.ranks)
        self.timeout = _group_timeout(group)
        self._gloo: Any = None  # a ProcessGroupGloo; torch's stubs do not know its send and recv
        if self.world_size > 1:
            self._gloo = self._connect(group)

    def _connect(self, group: dist.ProcessGroup) -> ProcessGroupGloo:
        store = _group_store(group)
        # A name that was never used on this store before, or a rank might find the addresses of connections that are
        # gone. Each rank counts its own communicators in the store itself: all make them in the same order, and the
        # store outlives a group that is made anew on it.
        generation = store.add(f"qcomm/{self.rank}", 1)
        try:
            return ProcessGroupGloo(
                dist.PrefixStore(f"qcomm/{generation}", store), self.rank, self.world_size, self.timeout
            )
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.ranks[self.rank]} could not connect to the other ranks of {list(self.ranks)}; every rank "
                f"of the group has to call attach or its first all_reduce at the same point: {error}"
            ) from error

    @property
    def peers(self) -> list[int]:
        """The other ranks, as numbers within the group."""
        return [rank for rank in range(self.world_size) if rank != self.rank]

    @property
    def targets(self) -> list[int]:
        """The other ranks in the order of sending: round d to rank + d, so that no two senders meet at one receiver."""
        return [(self.rank + distance) % self.world_size for distance in range(1, self.world_size)]

    @property
    def sources(self) -> list[int]:
        """The other ranks in the order in which they send here."""
        return [(self.rank - distance) % self.world_size for distance in range(1, self.world_size)]

    def exchange_small(self, outgoing: Sequence[torch.Tensor], what: str) -> list[torch.Tensor]:
        """Sends ``outgoing[r]`` to each rank r and returns what each rank sent here, own message included.

        All messages are under way at once, so this takes one latency and not W - 1. They must be of one size, the same
        on all ranks.

        Args:
            outgoing: W tensors of one shape and dtype; the own one is returned as it is.
            what: for the error message: "waiting for ...".
        """
        incoming = [torch.empty_like(message) for message in outgoing]
        incoming[self.rank] = outgoing[self.rank]
        self._transfer(incoming, outgoing, self.peers, self.peers, what)
        return incoming

    def exchange_in_rounds(
        self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], what: str
    ) -> Traffic:
        """Sends ``outgoing[r]`` to each rank r and fills ``incoming[r]`` from it, in W - 1 rounds.

        In round d a rank sends to rank + d and receives from rank - d: both directions of every link are busy and no
        two senders meet at one receiver. Empty messages are left out, by both sides, since the receiver knows the size.
        Entries of the own rank are not looked at.
        """
        sent = received = 0
        for target, source in zip(self.targets, self.sources, strict=True):
            targets = [target] if outgoing[target].numel() else []
            sources = [source] if incoming[source].numel() else []
            self._transfer(incoming, outgoing, sources, targets, what)
            sent += outgoing[target].nbytes
            received += incoming[source].nbytes
        return Traffic(sent, received)

    def start_send(self, target: int, message: torch.Tensor, tag: int) -> Transfer:
        """Sends ``message`` to a rank while this thread goes on.

        Raises:
            RuntimeError: the connection is broken.
        """
        return self._start(target, message, tag, "send")

    def start_receive(self, source: int, buffer: torch.Tensor, tag: int) -> Transfer:
        """Receives the message that ``source`` sends with ``tag``; it may be smaller than ``buffer``, not larger.

        Raises:
            RuntimeError: the connection is broken.
        """
        return self._start(source, buffer, tag, "recv")

    def _start(self, rank: int, message: torch.Tensor, tag: int, operation: str) -> Transfer:
        if self._gloo is None:
            raise self._closed()
        return Transfer(rank, getattr(self._gloo, operation)([message], rank, tag))

    def finish(self, transfers: Sequence[Transfer], what: str, broken: Sequence[tuple[int, RuntimeError]] = ()) -> None:
        """Waits for all of ``transfers``, also after a failure of some: what has arrived is told from what is missing.

        Args:
            transfers: none of them is under way any more when this returns or raises.
            what: for the error message: "waiting for ...".
            broken: ranks to which not even a transfer could be started, and why.

        Raises:
            TransportError: naming the ranks that did not answer.
        """
        failures = list(broken)
        for rank, work in transfers:
            try:
                work.wait()
            except RuntimeError as error:
                failures.append((rank, error))
        if failures:
            names = ", ".join(str(self.ranks[rank]) for rank in sorted({rank for rank, _ in failures}))
            raise TransportError(
                f"rank {self.ranks[self.rank]}, {what}: no answer from rank(s) {names} (died, closed the connection, "
                f"or silent for {self.timeout.total_seconds():g} s): {failures[0][1]}"
            ) from failures[0][1]

    def abandon(self, transfers: Sequence[Transfer]) -> None:
        """Closes the connections and waits for what is under way, so that nobody writes to its memory any more."""
        if self._gloo is None:
            return
        # gloo keeps connections open as long as anybody holds one of their transfers, but closes them when a wait times
        # out. It does not tell this to a transfer whose bytes were just flowing, so nobody may wait for that one long.
        for peer in self.peers:
            try:
                self._gloo.recv([torch.empty(1)], peer, ABANDON_TAG).wait(ABANDON_TIMEOUT)
            except RuntimeError:  # the timeout, or the connection to this peer is broken already
                continue
        for _, work in transfers:
            try:
                work.wait(ABANDON_TIMEOUT)
            except RuntimeError:  # its connection was closed
                continue

    def sum(self, buffer: torch.Tensor, what: str) -> None:
        """Replaces ``buffer`` by its sum over all ranks, the same bits on all."""
        if self.world_size == 1:
            return
        if self._gloo is None:
            raise self._closed()
        try:
            self._gloo.allreduce([buffer]).wait()
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.ranks[self.rank]}, {what}: no answer from some rank of {list(self.ranks)} (died, closed "
                f"the connection, or silent for {self.timeout.total_seconds():g} s): {error}"
            ) from error

    def _closed(self) -> TransportError:
        return TransportError(f"rank {self.ranks[self.rank]}: the connections to ranks {list(self.ranks)} are closed")

    def _transfer(
        self,
        incoming: Sequence[torch.Tensor],
        outgoing: Sequence[torch.Tensor],
        sources: Sequence[int],
        targets: Sequence[int],
        what: str,
    ) -> None:
        if not sources and not targets:
            return
        if self._gloo is None:
            raise self._closed()
        started: list[Transfer] = []
        broken: list[tuple[int, RuntimeError]] = []
        # Receives first: whatever a peer sends at once then finds its buffer waiting.
        for start, ends, messages in (
            (self.start_receive, sources, incoming),
            (self.start_send, targets, outgoing),
        ):
            for rank in ends:
                try:
                    started.append(start(rank, messages[rank], 0))
                except RuntimeError as error:
                    broken.append((rank, error))
        # No buffer is freed under way. The first timeout closes all connections of the group, so later waits end at
        # once.
        self.finish(started, what, broken)

    def close(self) -> None:
        """Closes the connections; peers that wait for this rank get an error at once and not after the timeout."""
        self._gloo = None


def _group_timeout(group: dist.ProcessGroup) -> timedelta:
    """The timeout a group was made with; there is no public way to ask for it."""
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
