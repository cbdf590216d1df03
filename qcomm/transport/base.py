"""Transport: the interface for messages between the ranks of a group, and the code that all transports share.

Collectives use :class:`Mail`, which keeps the messages of a transport in order.

:class:`~qcomm.transport.gloo.GlooTransport` carries them for a process group of ``torch.distributed``,
:class:`~qcomm.transport.mpi.MpiTransport` for an MPI communicator. The collectives know only this interface, so their
results are the same bits over both.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from qcomm.errors import CollectiveError

__all__ = ["MESSAGE_BYTES", "Exchange", "Mail", "Traffic", "Transfer", "Transport", "TransportError", "host_memory"]

# A collective of two slices sends so many to each rank before it needs an answer.
DEPTH = 4
# Most packets are smaller: a quarter of a bucket of 25 MiB, compressed. Memory that no message fills is not touched.
MESSAGE_BYTES = 1 << 22
# No tags of anything else, up to those of a ring of thousands of ranks. MPI has none above 32767.
MAIL_TAG, TAIL_TAG = 32766, 32765
# Of the front of a message, which says what it is. Memory may hold an earlier one there.
FRONT_BYTES = 128


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
        connections: to each rank.
    """

    def __init__(self, ranks: Sequence[int], rank: int, timeout: timedelta) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank
        self.world_size = len(self.ranks)
        self.timeout = timeout
        self.run = ""
        self.connections = 1
        distances = range(1, self.world_size)
        self.peers = [other for other in range(self.world_size) if other != rank]
        self.targets = [(rank + distance) % self.world_size for distance in distances]
        self.sources = [(rank - distance) % self.world_size for distance in distances]

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Returns True if the connections are closed."""

    def widen(self, connections: int) -> None:
        """Makes more connections to each rank, ``connections`` in all. A collective, while no message is under way.

        Raises:
            ValueError: this transport has one.
            TransportError: a rank did not take part within the timeout.
        """
        if connections != 1:
            raise ValueError(f"connections must be 1 over a {type(self).__name__}, got {connections}")

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
    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """Gives up receives whose messages will not come, before this rank closes its connections."""

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
    def fail(self, reason: str = "") -> None:
        """Closes the connections as a rank that failed where no message can say so: the others name it at once.

        Args:
            reason: that their errors give, where the transport can tell it.
        """

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
            blamed = sorted(self._blame({rank for rank, _ in failures}))
            names = ", ".join(str(self.ranks[rank]) for rank in blamed)
            raise TransportError(
                f"rank {self.ranks[self.rank]}, {what}: no answer from rank(s) {names} (died, closed the connection, "
                f"or silent for {self.timeout.total_seconds():g} s): {failures[0][1]}{self._explained(blamed)}"
            ) from failures[0][1]

    def _blame(self, lost: Collection[int]) -> Collection[int]:
        """Returns the ranks to name where the messages of ``lost`` are missing; none where it cannot know."""
        return lost

    def _explained(self, blamed: Sequence[int]) -> str:
        """Returns what these ranks said of their failures, to follow an error's text; "" where they said nothing."""
        return ""

    def _closed(self) -> TransportError:
        return TransportError(f"rank {self.ranks[self.rank]}: the connections to ranks {list(self.ranks)} are closed")


class Mail:
    """The messages between this rank and each other one, in one order, with receives that wait for them.

    gloo sends a message after its receiver has said that there is memory for it. A receive that begins with its message
    therefore costs one trip more than the message takes: on a link between continents most of the time. So receives
    are posted ahead, DEPTH of them for each rank, and a message finds one whatever the collective is. They have one
    size. A packet that is too large for them follows its header by itself, once both ranks know that it will.

    Every rank takes from all others equally many messages. Who takes one posts the receive of a later one.

    Args:
        transport: of a communicator, connected.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._posted: dict[int, deque[tuple[Transfer, torch.Tensor]]] = {peer: deque() for peer in transport.sources}
        self._broken: dict[int, RuntimeError] = {}
        self._sends: list[Transfer] = []
        self._held: list[tuple[int, torch.Tensor]] | None = None
        for source in transport.sources:
            for buffer in [_front_is_zero() for _ in range(DEPTH)]:
                self._posted[source].append((self._started(transport.start_receive, source, buffer, MAIL_TAG), buffer))

    def send(self, target: int, message: torch.Tensor) -> None:
        """Sends at most MESSAGE_BYTES to a rank; ``message`` must not change before :meth:`flush`.

        Raises:
            TransportError: the rank is gone.
        """
        self._sends.append(self._started(self._transport.start_send, target, message, MAIL_TAG))

    def send_tail(self, target: int, packet: torch.Tensor) -> None:
        """Sends a packet whose size a message has told, of any size; later, where tails are held back.

        Raises:
            TransportError: the rank is gone.
        """
        if self._held is not None:
            self._held.append((target, packet))
        else:
            self._sends.append(self._started(self._transport.start_send, target, packet, TAIL_TAG))

    def hold_tails(self) -> None:
        """Keeps tails until :meth:`release_tails`: a rank that runs another collective has no memory for them."""
        self._held = []

    def release_tails(self, wanted: bool) -> None:
        """Sends the tails that were held back, or forgets them if ``wanted`` is False."""
        held, self._held = self._held or [], None
        for target, packet in held if wanted else []:
            self._sends.append(self._started(self._transport.start_send, target, packet, TAIL_TAG))

    def take(self, what: str, sources: Sequence[int] | None = None) -> dict[int, torch.Tensor]:
        """Waits for the next message of each of ``sources``, of all other ranks by default.

        Args:
            what: for the error message: "waiting for ...".
            sources: ranks within the group.

        Returns:
            MESSAGE_BYTES for each rank, of which the message fills the first ones; its front is zero where it is short.

        Raises:
            TransportError: naming the ranks that did not answer.
        """
        sources = self._transport.sources if sources is None else sources
        posted = {source: self._posted[source].popleft() for source in sources if self._posted[source]}
        buffers = {source: buffer for source, (_, buffer) in posted.items()}
        broken = [
            (source, self._broken.get(source) or self._transport._closed())
            for source in sources
            if source not in posted
        ]
        transfers = [transfer for transfer, _ in posted.values()]
        posted.clear()
        later = {source: _front_is_zero() for source in buffers}
        self._finish(transfers, what, broken)
        for source, buffer in later.items():
            try:
                self._posted[source].append((self._transport.start_receive(source, buffer, MAIL_TAG), buffer))
            except RuntimeError as error:  # the rank may have left in good order; whoever takes from it gets this
                self._broken[source] = error
        return buffers

    def take_tails(self, sizes: Mapping[int, int], what: str) -> dict[int, torch.Tensor]:
        """Receives packets that came by themselves; ``sizes``: in bytes, by rank.

        Raises:
            TransportError: naming the ranks that did not answer.
        """
        packets = {source: host_memory(size) for source, size in sizes.items()}
        transfers, broken = [], []
        for source, packet in packets.items():
            try:
                transfers.append(self._transport.start_receive(source, packet, TAIL_TAG))
            except RuntimeError as error:
                broken.append((source, error))
        self._finish(transfers, what, broken)
        return packets

    def flush(self, what: str) -> None:
        """Waits until all messages have been sent.

        Raises:
            TransportError: naming the ranks that did not take them.
        """
        sends, self._sends = self._sends, []
        self._finish(sends, what)

    def abandon(self) -> None:
        """Closes the connections; no message is written to memory, or read from it, any more."""
        under_way = [*self._sends, *self._take_all()]
        self._sends = []
        self._transport.abandon(under_way)

    def close(self) -> None:
        """Gives up the receives that are posted, and closes the connections."""
        self._transport.cancel(self._take_all())
        self._transport.close()

    def _finish(self, transfers: list[Transfer], what: str, broken: Sequence[tuple[int, RuntimeError]] = ()) -> None:
        try:
            self._transport.finish(transfers, what, broken)
        finally:
            # A reference to a transfer, as in the traceback of an error, keeps gloo's connections open.
            transfers.clear()

    def _take_all(self) -> list[Transfer]:
        posted = [transfer for waiting in self._posted.values() for transfer, _ in waiting]
        self._posted = {peer: deque() for peer in self._posted}
        return posted

    def _started(
        self, start: Callable[[int, torch.Tensor, int], Transfer], rank: int, message: torch.Tensor, tag: int
    ) -> Transfer:
        try:
            return start(rank, message, tag)
        except RuntimeError as error:
            self._transport.finish([], "starting a message", [(rank, error)])
            raise


def _front_is_zero() -> torch.Tensor:
    """Returns memory for a message, which may be shorter than its front."""
    buffer = host_memory(MESSAGE_BYTES)
    buffer[:FRONT_BYTES].zero_()
    return buffer


def host_memory(size: int) -> torch.Tensor:
    """Returns ``size`` bytes; raises MemoryError, since a RuntimeError means that a connection is broken."""
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise MemoryError(f"no memory for a message of {size} bytes") from error
