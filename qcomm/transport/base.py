"""Transport: the interface for messages between the ranks of a group, and the code that all transports share.

:class:`~qcomm.transport.gloo.GlooTransport` carries them for a process group of ``torch.distributed``,
:class:`~qcomm.transport.mpi.MpiTransport` for an MPI communicator. The collectives know only this interface, so their
results are the same bits over both.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from qcomm.errors import CollectiveError

__all__ = ["Exchange", "Traffic", "Transfer", "Transport", "TransportError"]


class TransportError(CollectiveError):
    """A peer died, does not answer, or closed its connections. The communicator cannot be used afterwards."""


class Transfer(NamedTuple):
    """A message under way to or from ``rank``. It must be kept until it has been waited for."""

    rank: int
    work: Any  # the transport's own: neither torch's stubs nor mpi4py know a type for both


class Exchange(NamedTuple):
    """Messages of one exchange under way, to be finished by :meth:`Transport.finish_exchange`."""

    incoming: list[torch.Tensor]
    transfers: list[Transfer]
    broken: list[tuple[int, RuntimeError]]


class Traffic(NamedTuple):
    """Bytes of the tensors handed to sends and receives."""

    sent: int
    received: int


class Transport(ABC):
    """Point-to-point messages within a group. Making a transport is a collective of all ranks of the group.

    Messages are received into buffers of exactly their size; ``start_receive`` also takes larger ones. No method waits
    for one message longer than the timeout.

    Args:
        ranks: names of the group's ranks for error messages, their numbers in the whole job.
        rank: this process, within the group.
        timeout: maximum time that this rank waits for a message.

    Attributes:
        peers: the other ranks, as numbers within the group.
        targets: the other ranks in the order of sending: at distance d to rank + d, so that no two senders meet at one
            receiver.
        sources: the other ranks in the order in which they send here.
        run: names these connections, the same on all ranks and another one each time; "" where nothing names them.
    """

    def __init__(self, ranks: Sequence[int], rank: int, timeout: timedelta) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank
        self.world_size = len(self.ranks)
        self.timeout = timeout
        self.run = ""
        distances = range(1, self.world_size)
        self.peers = [other for other in range(self.world_size) if other != rank]
        self.targets = [(rank + distance) % self.world_size for distance in distances]
        self.sources = [(rank - distance) % self.world_size for distance in distances]

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Returns True if the connections are closed."""

    @abstractmethod
    def start_send(self, target: int, message: torch.Tensor, tag: int) -> Transfer:
        """Sends ``message`` to a rank while this thread goes on.

        Raises:
            RuntimeError: the connection is broken.
        """

    @abstractmethod
    def start_receive(self, source: int, buffer: torch.Tensor, tag: int) -> Transfer:
        """Receives the message that ``source`` sends with ``tag``; it may be smaller than ``buffer``, not larger.

        Raises:
            RuntimeError: the connection is broken.
        """

    @abstractmethod
    def abandon(self, transfers: Sequence[Transfer]) -> None:
        """Closes the connections and ensures that no transfer of ``transfers`` writes to its memory any more.

        Another thread that waits for a transfer gets an error.
        """

    @abstractmethod
    def sum(self, buffers: Sequence[torch.Tensor], what: str) -> None:
        """Replaces each of ``buffers`` by its sum over all ranks, the same bits on all and over every transport.

        Raises:
            TransportError: a peer is gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes the connections; peers that wait for this rank get an error at once and not after the timeout."""

    @abstractmethod
    def fail(self) -> None:
        """Closes the connections as a rank that failed where no message can say so: the others name it at once."""

    @abstractmethod
    def _wait(self, transfers: Sequence[Transfer]) -> list[tuple[int, RuntimeError]]:
        """Waits for all of ``transfers``, also after a failure of some; returns the failures, by rank."""

    def exchange_small(self, outgoing: Sequence[torch.Tensor], what: str) -> list[torch.Tensor]:
        """Sends ``outgoing[r]`` to each rank r and returns the messages of all ranks, including this one.

        All messages are under way at once, so this takes one latency and not W - 1. They must have one size, the same
        on all ranks.

        Args:
            outgoing: W tensors of one shape and dtype; the own one is returned unchanged.
            what: for the error message: "waiting for ...".

        Raises:
            TransportError: naming the ranks that did not answer.
        """
        return self.finish_exchange(self.start_exchange(outgoing), what)

    def start_exchange(self, outgoing: Sequence[torch.Tensor]) -> Exchange:
        """Begins :meth:`exchange_small`; the rank may compute until it calls :meth:`finish_exchange`, as it must.

        Raises:
            TransportError: this rank has closed its connections.
        """
        incoming = [torch.empty_like(message) for message in outgoing]
        incoming[self.rank] = outgoing[self.rank]
        return Exchange(incoming, *self._start_all(incoming, outgoing, self.peers, self.peers))

    def finish_exchange(self, exchange: Exchange, what: str) -> list[torch.Tensor]:
        """Waits for an exchange; returns the messages of all ranks, including this one.

        Raises:
            TransportError: naming the ranks that did not answer.
        """
        self.finish(exchange.transfers, what, exchange.broken)
        return exchange.incoming

    def exchange_pairwise(
        self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], what: str
    ) -> Traffic:
        """Sends ``outgoing[r]`` to each rank r and fills ``incoming[r]`` from it, one distance after another.

        At distance d a rank sends to rank + d and receives from rank - d. Both directions of every link are busy, and
        no two senders meet at one receiver. Both sides skip empty messages, since the receiver knows the size. Entries
        of the own rank are ignored.
        """
        sent = received = 0
        for target, source in zip(self.targets, self.sources, strict=True):
            targets = [target] if outgoing[target].numel() else []
            sources = [source] if incoming[source].numel() else []
            self.transfer(incoming, outgoing, sources, targets, what)
            sent += outgoing[target].nbytes
            received += incoming[source].nbytes
        return Traffic(sent, received)

    def transfer(
        self,
        incoming: Sequence[torch.Tensor],
        outgoing: Sequence[torch.Tensor],
        sources: Sequence[int],
        targets: Sequence[int],
        what: str,
    ) -> None:
        """Fills ``incoming[r]`` from each of ``sources`` while ``outgoing[r]`` goes to each of ``targets``.

        Raises:
            TransportError: naming the ranks that did not answer.
        """
        started, broken = self._start_all(incoming, outgoing, sources, targets)
        # This waits even after a failure, so no buffer is freed under way.
        self.finish(started, what, broken)

    def _start_all(
        self,
        incoming: Sequence[torch.Tensor],
        outgoing: Sequence[torch.Tensor],
        sources: Sequence[int],
        targets: Sequence[int],
    ) -> tuple[list[Transfer], list[tuple[int, RuntimeError]]]:
        if not sources and not targets:
            return [], []
        if self.is_closed:
            raise self._closed()
        started: list[Transfer] = []
        broken: list[tuple[int, RuntimeError]] = []
        # Receives start first, so that the buffer is ready when a peer sends at once.
        for start, ends, messages in (
            (self.start_receive, sources, incoming),
            (self.start_send, targets, outgoing),
        ):
            for rank in ends:
                try:
                    started.append(start(rank, messages[rank], 0))
                except RuntimeError as error:
                    broken.append((rank, error))
                except MemoryError:  # of this rank; nothing may write to a buffer after the error
                    self.abandon(started)
                    raise
        return started, broken

    def finish(self, transfers: Sequence[Transfer], what: str, broken: Sequence[tuple[int, RuntimeError]] = ()) -> None:
        """Waits for all of ``transfers``, also after a failure of some, and names the ranks whose messages are missing.

        Args:
            transfers: none of them is under way any more when this returns or raises.
            what: for the error message: "waiting for ...".
            broken: ranks to which no transfer could be started, and the errors.

        Raises:
            TransportError: naming the ranks that did not answer.
        """
        failures = [*broken, *self._wait(transfers)]
        if failures:
            names = ", ".join(str(self.ranks[rank]) for rank in sorted(self._blame({rank for rank, _ in failures})))
            raise TransportError(
                f"rank {self.ranks[self.rank]}, {what}: no answer from rank(s) {names} (died, closed the connection, "
                f"or silent for {self.timeout.total_seconds():g} s): {failures[0][1]}"
            ) from failures[0][1]

    def _blame(self, lost: Collection[int]) -> Collection[int]:
        """Returns the ranks to name where the messages of ``lost`` are missing; none where it cannot know."""
        return lost

    def _closed(self) -> TransportError:
        return TransportError(f"rank {self.ranks[self.rank]}: the connections to ranks {list(self.ranks)} are closed")
