"""Pipeline: the messages of a sliced collective, under way while the rank computes.

In each of two exchanges every rank sends every other exactly one message for each slice. A rank that fails, or hears
that another did, goes on with messages that say so and carry no packet. Every wait therefore ends, and no message is
left for the next collective. In the end all ranks know the same faults.

A message is a header and the packet. The header is eight int64: ``MAGIC, sequence, exchange, slice, condition, bytes of
the packet, 0, checksum of the seven others``. A packet that does not fit in a message of
:class:`~qcomm.transport.Mail` follows it. All ranks send and take the messages of a collective in one order.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch

from qcomm.communicator.faults import Fault, Phase
from qcomm.communicator.handshake import MAGIC, raise_faults
from qcomm.transport import MESSAGE_BYTES, Mail, Traffic, Transport, TransportError

__all__ = ["Pipeline"]

P = ParamSpec("P")
T = TypeVar("T")

HEADER_WORDS = 8  # 64 bytes: the packet behind it is aligned as the codec likes it
HEADER_BYTES = 8 * HEADER_WORDS
ROOM = MESSAGE_BYTES - HEADER_BYTES  # of a message, for a packet
CHECKED_WORDS = struct.Struct(f"<{HEADER_WORDS - 1}q")
# Conditions of a sender, beside the phase in which it failed.
WELL = 0
GIVEN_UP = -1  # some other rank failed
CONDITIONS = frozenset([WELL, GIVEN_UP, *map(int, Phase)])


class Pipeline:
    """The messages of one collective. A context manager: leaving it before its end closes the connections.

    Args:
        transport: of the communicator.
        mail: of the communicator.
        sequence: number of the collective, counted alike on all ranks.
        fault: of this rank before the first message.
        agree: finishes the handshake of the collective, which has been sent before the first message.

    Attributes:
        fault: of this rank, if it has one.
    """

    def __init__(
        self, transport: Transport, mail: Mail, sequence: int, fault: Fault | None, agree: Callable[[], None]
    ) -> None:
        self._transport, self._mail = transport, mail
        self._sequence = sequence
        self._unfinished: Callable[[], None] | None = agree
        self._faults: dict[int, Phase] = {}  # that were announced, here and elsewhere
        self._given_up = False
        self._finished = False
        self.fault = fault
        self._bytes = {kind: {"sent": 0, "received": 0} for kind in ("phase1", "phase2", "overhead")}

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if not self._finished:
            self._mail.abandon()

    def attempt(self, phase: Phase, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Returns the result of ``step``; None where some rank failed, in this step or before it."""
        if self._failing:
            return None
        try:
            return step(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - any: it is raised again, on every rank, when the messages have ended
            # Without this frame, which would keep the pipeline, and with it the connections, as long as the error.
            own = error.__traceback__
            self.fault = Fault(phase, error.with_traceback(None if own is None else own.tb_next))
            return None

    def send(self, exchange: int, slice_number: int, packets: Sequence[torch.Tensor | None]) -> None:
        """Sends packet r, if it is not None, to each rank r; sends the condition alone where some rank failed.

        All messages but the first one wait for the handshake.
        """
        if (exchange, slice_number) != (1, 0):
            self._agree()
        condition = WELL
        if self.fault is not None:
            condition = self._faults[self._transport.rank] = self.fault.phase
        elif self._failing:
            condition = GIVEN_UP
        sent: torch.Tensor | None = None
        message, tail = self._message(exchange, slice_number, condition, None), None
        for target in self._transport.targets:
            packet = packets[target] if condition == WELL else None
            if packet is not sent:  # means are one packet for all
                message, sent = self._message(exchange, slice_number, condition, packet), packet
                tail = packet if packet is not None and message.numel() == HEADER_BYTES else None
            self._count(exchange, 0 if packet is None else packet.numel(), "sent")
            self._mail.send(target, message)
            if tail is not None:
                self._mail.send_tail(target, tail)

    def _agree(self) -> None:
        """Waits for the handshake; raises its error on all ranks."""
        agree, self._unfinished = self._unfinished, None
        if agree is not None:
            self._finished = True  # ranks that do not agree leave no message under way
            agree()
            self._finished = False

    def _message(self, exchange: int, slice_number: int, condition: int, packet: torch.Tensor | None) -> torch.Tensor:
        size = 0 if packet is None else packet.numel()
        words = [MAGIC, self._sequence, exchange, slice_number, condition, size, 0]
        words.append(_checksum(words))
        header = torch.tensor(words, dtype=torch.int64, device="cpu")
        if packet is None or size > ROOM:
            return header.view(torch.uint8)
        return torch.cat([header.view(torch.uint8), packet])

    def receive(self, exchange: int, slice_number: int, limits: Sequence[int]) -> list[torch.Tensor | None]:
        """Returns the packet of each rank, None for this one and where none is due; an empty list if a rank failed.

        Args:
            exchange, slice_number: of the message.
            limits: maximum number of bytes in a packet of each rank; 0 where none is due.
        """
        self._agree()
        what = f"waiting for slice {slice_number} of exchange {exchange}"
        messages, sizes = self._mail.take(what), {}
        for source, message in messages.items():
            header = message[:HEADER_BYTES].view(torch.int64).tolist()
            sizes[source] = self._check(source, header, exchange, slice_number, limits[source])
            self._count(exchange, sizes[source], "received")
        large = {source: size for source, size in sizes.items() if size > ROOM}
        tails = self._mail.take_tails(large, what) if large else {}
        if self._failing:
            return []
        packets: list[torch.Tensor | None] = [None] * self._transport.world_size
        for source, message in messages.items():
            if sizes[source]:
                packets[source] = tails.get(source, message[HEADER_BYTES : HEADER_BYTES + sizes[source]])
        return packets

    def finish(self) -> None:
        """Waits for the last messages, and raises on all ranks the faults of any.

        Raises:
            CollectiveError: a rank failed, and all ranks have heard of it.
            TransportError: a peer is gone.
        """
        self._mail.flush("sending the last slices")
        # Otherwise a rank announced a fault that no rank has.
        self._finished = bool(self._faults) or not self._given_up
        if self._faults:
            raise_faults(self._transport, dict(sorted(self._faults.items())), self.fault)
        if self._given_up:
            raise TransportError("a rank gave up without a fault of any rank")

    def traffic(self) -> dict[str, Traffic]:
        """Returns the bytes of packets, as ``"phase1"`` and ``"phase2"``, and of their headers, as ``"overhead"``."""
        return {kind: Traffic(amounts["sent"], amounts["received"]) for kind, amounts in self._bytes.items()}

    @property
    def _failing(self) -> bool:
        return self.fault is not None or bool(self._faults) or self._given_up

    def _check(self, source: int, header: Sequence[int], exchange: int, slice_number: int, limit: int) -> int:
        """Returns the size of the packet behind a header, whose words are not trusted."""
        if header[-1] != _checksum(header[:-1]):
            raise TransportError(
                f"the header of rank {self._transport.ranks[source]} for slice {slice_number} of exchange {exchange} "
                f"of collective {self._sequence} was damaged on its way (wrong checksum)"
            )
        *position, condition, size = header[:6]
        well_formed = position == [MAGIC, self._sequence, exchange, slice_number] and condition in CONDITIONS
        packet_is_due = limit > 0 and condition == WELL
        if not well_formed or not 0 <= size <= limit or (size > 0) != packet_is_due:
            # The others cannot know. Closing the connections tells them.
            raise TransportError(
                f"rank {self._transport.ranks[source]} sent the header {list(header)} for slice {slice_number} of "
                f"exchange {exchange} of collective {self._sequence}, where a packet of at most {limit} bytes is due"
            )
        if condition == GIVEN_UP:
            self._given_up = True
        elif condition != WELL:
            self._faults[source] = Phase(condition)
        return size

    def _count(self, exchange: int, packet_bytes: int, direction: str) -> None:
        self._bytes[f"phase{exchange}"][direction] += packet_bytes
        self._bytes["overhead"][direction] += HEADER_BYTES


def _checksum(words: Sequence[int]) -> int:
    """Returns the checksum of the other words, by the rule of :func:`qcomm.communicator.handshake.header_checksum`."""
    return zlib.crc32(CHECKED_WORDS.pack(*words))
