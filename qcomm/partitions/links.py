"""Links between neighbouring partitions: a queue of bounded length, one way, with credits the other way.

A partition may have as many batches on their way as the queue is long, wherever these are: in the sender's memory, in
the network, or with the receiver. Each batch that the receiver takes out of the queue sends a credit back. So a slow
partition stops the one before it, and no message waits for memory. Two threads carry the messages while the partition
computes; they live for one epoch.

A receive is posted before its message is awaited: of a credit when its batch is sent, of a header while the payload
before it arrives, of a payload when its header has told its size.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from qcomm.codec import CPU
from qcomm.errors import CollectiveError, PacketError
from qcomm.partitions.messages import HEADER_BYTES, Header, Kind, control, decoded, end_header, parsed
from qcomm.partitions.stage import Batch
from qcomm.transport import Transfer, Transport

__all__ = ["Inbox", "Outbox", "Wire"]

HEADER_TAG, PAYLOAD_TAG, CONTROL_TAG = 1, 2, 3
JOIN_SECONDS = 5.0
Posted = tuple[Transfer, torch.Tensor]


class Wire:
    """Messages to and from one rank, over a transport that several threads of this process share.

    Args:
        transport: of the pipeline.
        peer: the rank at the other end, within the group.
        starting: held while a message is started, the same for all wires of the transport.
    """

    def __init__(self, transport: Transport, peer: int, starting: threading.Lock) -> None:
        self._transport, self._peer, self._starting = transport, peer, starting
        self.name = f"rank {transport.ranks[peer]}"

    def send(self, message: torch.Tensor, tag: int) -> Transfer:
        """Starts a message; raises TransportError if the peer is gone."""
        return self._started(self._transport.start_send, message, tag)

    def post(self, size: int, tag: int) -> Posted:
        """Posts a receive of ``size`` bytes; raises TransportError if the peer is gone, MemoryError without memory."""
        try:
            buffer = torch.empty(size, dtype=torch.uint8, device=CPU)
        except RuntimeError as error:
            raise MemoryError(f"no memory for a batch of {size} bytes from {self.name}") from error
        return self._started(self._transport.start_receive, buffer, tag), buffer

    def finish(self, transfers: list[Transfer], what: str) -> None:
        """Waits for transfers; raises TransportError, naming who is gone. The list is empty then, see :class:`Mail`."""
        try:
            self._transport.finish(transfers, what)
        finally:
            transfers.clear()

    def _started(
        self, start: Callable[[int, torch.Tensor, int], Transfer], message: torch.Tensor, tag: int
    ) -> Transfer:
        try:
            with self._starting:
                return start(self._peer, message, tag)
        except RuntimeError as error:
            self._transport.finish([], "starting a message", [(self._peer, error)])
            raise


class Outbox:
    """The sending end of a link, for one epoch.

    Args:
        wire: to the next partition.
        queue_batches: maximum number of batches on their way.
        epoch: counted from 0.
    """

    def __init__(self, wire: Wire, queue_batches: int, epoch: int) -> None:
        self._wire, self._length, self._epoch = wire, queue_batches, epoch
        self._messages: queue.SimpleQueue[tuple[tuple[torch.Tensor, int], ...] | None] = queue.SimpleQueue()
        self._credits: deque[Posted] = deque()
        self._sent = self._credited = 0
        self._error: Exception | None = None
        self.sent_bytes = 0
        self.waiting_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="qcomm partition sender", daemon=True)
        self._thread.start()

    def wait_for_room(self) -> None:
        """Waits until the queue has room for a batch.

        Raises:
            TransportError: the next partition is gone.
        """
        if len(self._credits) == self._length:
            self._take_credit()

    def put(self, header: torch.Tensor, payload: torch.Tensor) -> None:
        """Sends a batch, for which there is room, while this thread goes on.

        Raises:
            TransportError: the next partition is gone.
        """
        self._check()
        self._credits.append(self._wire.post(HEADER_BYTES, CONTROL_TAG))
        self._messages.put(((header, HEADER_TAG), (payload, PAYLOAD_TAG)))
        self._sent += 1
        self.sent_bytes += header.numel() + payload.numel()

    def end(self) -> None:
        """Sends the end of the epoch, and waits until all partitions behind have reached it.

        Raises:
            TransportError: one of them is gone, or has failed.
        """
        self._check()
        done = self._wire.post(HEADER_BYTES, CONTROL_TAG)
        header = end_header(self._epoch, self._sent)
        self._messages.put(((header, HEADER_TAG),))
        self.sent_bytes += header.numel()
        while self._credits:
            self._take_credit()
        self._wait_for(done, Kind.DONE, self._sent)
        self.stop()
        self._check()

    def stop(self) -> None:
        """Ends the thread, after its messages or with an error that nobody asks for any more."""
        self._messages.put(None)
        self._thread.join(JOIN_SECONDS)
        self._credits.clear()

    def _take_credit(self) -> None:
        self._wait_for(self._credits.popleft(), Kind.CREDIT, self._credited)
        self._credited += 1

    def _wait_for(self, posted: Posted, kind: Kind, number: int) -> None:
        begin = time.perf_counter()
        transfer, message = posted
        del posted
        waiting = [transfer]
        del transfer
        self._wire.finish(waiting, f"waiting for {kind.name} {number} of epoch {self._epoch}")
        self.waiting_seconds += time.perf_counter() - begin
        _read(self._wire, message, (kind,), self._epoch, number, 0)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        number = 0
        while (parts := self._messages.get()) is not None:
            try:
                transfers = [self._wire.send(message, tag) for message, tag in parts]
                self._wire.finish(transfers, f"sending message {number} of epoch {self._epoch}")
            except (CollectiveError, MemoryError) as error:
                self._error = error
                return
            number += 1
            del parts  # otherwise the last payload lives until the next one


class Inbox:
    """The receiving end of a link, for one epoch.

    Args:
        wire: to the partition before.
        queue_batches: maximum number of batches on their way.
        epoch: counted from 0.
        max_batch_bytes: maximum of a batch as tensors.
    """

    def __init__(self, wire: Wire, queue_batches: int, epoch: int, max_batch_bytes: int) -> None:
        self._wire, self._length, self._epoch = wire, queue_batches, epoch
        self._max_batch_bytes = max_batch_bytes
        self._batches: queue.SimpleQueue[Batch | Header | Exception] = queue.SimpleQueue()
        self._replies: deque[Transfer] = deque()
        self._taken = 0
        self.waiting_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="qcomm partition receiver", daemon=True)
        self._thread.start()

    def take(self) -> Batch | None:
        """Waits for the next batch, and lets the sender send another one; returns None at the end of the epoch.

        Raises:
            TransportError: the partition before is gone.
            PacketError: it sent damaged bytes.
        """
        begin = time.perf_counter()
        item = self._batches.get()
        self.waiting_seconds += time.perf_counter() - begin
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Header):
            return None
        self._reply(Kind.CREDIT, self._taken)
        self._taken += 1
        return item

    def done(self) -> None:
        """Tells the partition before that the epoch has ended here and behind."""
        self._reply(Kind.DONE, self._taken)
        while self._replies:
            self._wire.finish([self._replies.popleft()], "sending the end of the epoch")

    def stop(self) -> None:
        """Waits for the thread, which ends with the epoch or with its connection."""
        self._thread.join(JOIN_SECONDS)
        self._replies.clear()

    def _reply(self, kind: Kind, number: int) -> None:
        self._replies.append(self._wire.send(control(kind, self._epoch, number), CONTROL_TAG))
        if len(self._replies) > self._length:  # its receive was posted before the batch was sent
            self._wire.finish([self._replies.popleft()], "sending a credit")

    def _run(self) -> None:
        try:
            posted = self._wire.post(HEADER_BYTES, HEADER_TAG)
            number = 0
            while True:
                header = self._header(posted, number)
                if header.kind == Kind.END:
                    self._batches.put(header)
                    return
                payload = self._wire.post(header.payload_bytes, PAYLOAD_TAG)
                posted = self._wire.post(HEADER_BYTES, HEADER_TAG)
                self._batches.put(self._batch(header, payload))
                del payload
                number += 1
        except (CollectiveError, PacketError, MemoryError) as error:
            self._batches.put(error)

    def _header(self, posted: Posted, number: int) -> Header:
        waiting = [posted[0]]
        self._wire.finish(waiting, f"waiting for batch {number} of epoch {self._epoch}")
        return _read(self._wire, posted[1], (Kind.BATCH, Kind.END), self._epoch, number, self._max_batch_bytes)

    def _batch(self, header: Header, posted: Posted) -> Batch:
        waiting = [posted[0]]
        self._wire.finish(waiting, f"receiving batch {header.number} of epoch {self._epoch}")
        try:
            return decoded(header, posted[1])
        except PacketError as error:
            raise PacketError(f"from {self._wire.name}: {error}") from error


def _read(wire: Wire, message: torch.Tensor, kinds: tuple[Kind, ...], epoch: int, number: int, limit: int) -> Header:
    try:
        return parsed(message, kinds, epoch, number, limit)
    except PacketError as error:
        raise PacketError(f"from {wire.name}: {error}") from error
