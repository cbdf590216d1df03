"""Sealed messages: a transport that encrypts and authenticates every message of another one.

Each direction of each connection has a key of its own (:mod:`qcomm.transport.secure`). A message is sealed with
AES-256-GCM, in segments of at most SEGMENT_BYTES, and travels as::

    bytes of the message, 8 | segment 0, its tag of 16 | segment 1, its tag of 16 | ...

The nonce of a segment is its place in the conversation: the message's tag, its number among those of that tag in that
direction, and the number of the segment. Sender and receiver count by themselves, in the order in which they start
messages, and that order is the same for each tag over gloo and MPI. So no nonce is used twice with one key. A message
opens only as the one that is due: whoever alters, repeats, swaps, withholds or sends back messages gets an error. Each
connection begins with keys that never were before, so messages of an earlier one do not open either.

Sums go around a ring of sealed messages (:mod:`qcomm.transport.ring_sum`), in the order of gloo's own.
"""

import struct
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from qcomm.transport.base import Transfer, Transport, TransportError, host_memory
from qcomm.transport.ring_sum import ring_sum

__all__ = ["KEY_BYTES", "Direction", "SealedTransport"]

KEY_BYTES = 32
TAG_BYTES = 16
LENGTH = struct.Struct("<Q")
NONCE = struct.Struct(">IQ")
# The ciphers of OpenSSL take less than 2^31 bytes at once.
SEGMENT_BYTES = 1 << 30
SEGMENT_BITS = 16  # of the number in a nonce: a message has fewer than 2^16 segments


class Direction:
    """One direction of a connection: seals its messages, or opens them.

    Args:
        key: KEY_BYTES, of this direction of this connection alone.
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(key)
        self._numbers: Counter[int] = Counter()

    def next_number(self, tag: int) -> int:
        """Returns the number of the next message with a tag. Each message takes one, when it is started."""
        self._numbers[tag] += 1
        return self._numbers[tag]

    def seal(self, message: torch.Tensor, tag: int) -> torch.Tensor:
        """Returns the next message with ``tag``, sealed; ``message``: contiguous, on the CPU."""
        number, length = self.next_number(tag), LENGTH.pack(message.nbytes)
        plain = _bytes_of(message)
        sealed = host_memory(sealed_bytes(message.nbytes))
        target = _bytes_of(sealed)
        target[: LENGTH.size] = length
        for segment, (begin, end) in enumerate(_segments(message.nbytes)):
            place = LENGTH.size + begin + TAG_BYTES * segment
            part = self._cipher.encrypt(_nonce(tag, number, segment), plain[begin:end], length)
            target[place : place + len(part)] = part
        return sealed

    def open(self, sealed: torch.Tensor, buffer: torch.Tensor, tag: int, number: int) -> bool:
        """Writes a message to ``buffer``, which may be larger.

        Returns:
            False if ``sealed`` is not message ``number`` with ``tag`` of this direction. Of one with several segments
            the first ones may be written then, none of them altered.
        """
        from cryptography.exceptions import InvalidTag

        source, target = _bytes_of(sealed), _bytes_of(buffer)
        (length,) = LENGTH.unpack_from(source)
        if length > len(target):  # so all segments are within the sealed bytes, too
            return False
        for segment, (begin, end) in enumerate(_segments(length)):
            place = LENGTH.size + begin + TAG_BYTES * segment
            try:
                part = self._cipher.decrypt(
                    _nonce(tag, number, segment), source[place : place + end - begin + TAG_BYTES], LENGTH.pack(length)
                )
            except InvalidTag:
                return False
            target[begin:end] = part
        return True


class _Started(NamedTuple):
    """A sealed message under way, and what opens it where it is received."""

    inner: Transfer
    sealed: torch.Tensor
    direction: Direction | None = None
    buffer: torch.Tensor | None = None
    tag: int = 0
    number: int = 0

    def open(self) -> bool:
        """Opens a message that has arrived; True for one that was sent, too."""
        if self.direction is None or self.buffer is None:
            return True
        return self.direction.open(self.sealed, self.buffer, self.tag, self.number)


class SealedTransport(Transport):
    """The messages of another transport, sealed.

    Args:
        inner: carries the sealed messages, and is used by this transport alone from now on.
        sending, receiving: by rank, for all but the own one.
    """

    def __init__(self, inner: Transport, sending: dict[int, Direction], receiving: dict[int, Direction]) -> None:
        super().__init__(inner.ranks, inner.rank, inner.timeout)
        self.run, self.connections = inner.run, inner.connections
        self._inner = inner
        self._sending, self._receiving = sending, receiving

    @property
    def is_closed(self) -> bool:
        """Returns True if the connections are closed."""
        return self._inner.is_closed

    def widen(self, connections: int) -> None:
        """Makes more connections to each rank, see :meth:`Transport.widen`."""
        self._inner.widen(connections)
        self.connections = self._inner.connections

    def start_send(self, target: int, message: torch.Tensor, tag: int) -> Transfer:
        """Seals and sends a message, see :meth:`Transport.start_send`."""
        sealed = self._sending[target].seal(message, tag)
        return Transfer(target, _Started(self._inner.start_send(target, sealed, tag), sealed))

    def start_receive(self, source: int, buffer: torch.Tensor, tag: int) -> Transfer:
        """Receives a message, which :meth:`finish` opens, see :meth:`Transport.start_receive`."""
        direction = self._receiving[source]
        number = direction.next_number(tag)
        sealed = host_memory(sealed_bytes(buffer.nbytes))
        inner = self._inner.start_receive(source, sealed, tag)
        return Transfer(source, _Started(inner, sealed, direction, buffer, tag, number))

    def finish(self, transfers: Sequence[Transfer], what: str, broken: Sequence[tuple[int, RuntimeError]] = ()) -> None:
        """Waits for all of ``transfers`` and opens those that were received, see :meth:`Transport.finish`.

        Raises:
            TransportError: naming the ranks that did not answer, or whose messages do not open. The connections are
                closed in that case, as the others cannot know.
        """
        strangers = self.finish_and_open(transfers, what, broken)
        if strangers:
            self._blame(strangers)  # so that the others do not take this rank for the first that was lost
            self.abandon(transfers)
            names = ", ".join(str(self.ranks[rank]) for rank in strangers)
            raise TransportError(
                f"rank {self.ranks[self.rank]}, {what}: the message of rank(s) {names} is not the one that was sealed "
                "for this place: it was altered, repeated, or sent by somebody else"
            )

    def finish_and_open(
        self, transfers: Sequence[Transfer], what: str, broken: Sequence[tuple[int, RuntimeError]] = ()
    ) -> list[int]:
        """Waits for all of ``transfers`` and opens those that were received.

        Returns:
            The ranks whose messages do not open.

        Raises:
            TransportError: naming the ranks that did not answer.
        """
        super().finish(transfers, what, broken)
        return sorted({rank for rank, started in transfers if not started.open()})

    def abandon(self, transfers: Sequence[Transfer]) -> None:
        """Closes the connections, see :meth:`Transport.abandon`."""
        self._inner.abandon([started.inner for _, started in transfers])

    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """Gives up receives, see :meth:`Transport.cancel`."""
        self._inner.cancel([started.inner for _, started in transfers])

    def sum(self, buffers: Sequence[torch.Tensor], what: str) -> None:
        """Sums around a ring, so that no value travels open, see :meth:`Transport.sum`."""
        for buffer in buffers:
            ring_sum(self, buffer, what)

    def close(self) -> None:
        """Closes the connections, see :meth:`Transport.close`."""
        self._inner.close()

    def fail(self, reason: str = "") -> None:
        """Closes the connections and blames this rank, see :meth:`Transport.fail`.

        Its reason is not told: it would travel openly.
        """
        self._inner.fail()

    def _wait(self, transfers: Sequence[Transfer]) -> list[tuple[int, RuntimeError]]:
        return self._inner._wait([started.inner for _, started in transfers])

    def _blame(self, lost: Collection[int]) -> Collection[int]:
        return self._inner._blame(lost)


def sealed_bytes(size: int) -> int:
    """Returns the bytes of a sealed message of ``size`` bytes.

    Example:
        >>> sealed_bytes(0), sealed_bytes(100)
        (24, 124)
    """
    return LENGTH.size + size + TAG_BYTES * len(_segments(size))


def _segments(size: int) -> list[tuple[int, int]]:
    """Returns the bounds of a message's segments, of which an empty one has one, too."""
    return [(begin, min(begin + SEGMENT_BYTES, size)) for begin in range(0, max(size, 1), SEGMENT_BYTES)]


def _nonce(tag: int, number: int, segment: int) -> bytes:
    return NONCE.pack(tag, number << SEGMENT_BITS | segment)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the CPU; numpy has no bfloat16."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
