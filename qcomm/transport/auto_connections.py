"""Number of connections to each rank that ``connections="auto"`` takes, by the time of a round trip.

A TCP connection that takes a lost packet for a full link carries about 1.22 segments / (R sqrt(p)) over a round trip of
R seconds that loses a share p of packets. R shows in a few messages, and p does not: at 0.1 % of losses nine tries in
ten see none of a hundred packets lost. So the rule presumes that some are lost. R / 10 ms connections carry together
what one carries over 10 ms, whatever p is. BBR does not slow down for a lost packet, so one connection of it is enough.

All ranks take the largest number that one of them wants: a sender's congestion control rules what it sends, and the
others cannot know it.

M. Mathis et al., "The macroscopic behavior of the TCP congestion avoidance algorithm", ACM CCR 27(3), 1997.
"""

import socket
import struct
import time
import zlib

import torch

from qcomm.transport.base import Transport, TransportError

__all__ = ["AUTO", "MOST_AUTOMATIC", "agree_on_connections", "congestion_control", "wanted_connections"]

AUTO = "auto"
TRIP_SECONDS = 0.010  # of which each connection is for one
MOST_AUTOMATIC = 8  # 16 carried no more than 8 where both were measured, see docs/measurements.md
ROUNDS = 3  # of which the shortest counts: in others, a rank had no processor
WISH = struct.Struct("<q")
CHECKSUM = struct.Struct("<q")
NAME_BYTES = 16  # of a congestion control, with a zero at its end


def wanted_connections(seconds: float, control: str) -> int:
    """Returns how many connections to each rank are wanted.

    Args:
        seconds: of a round trip, not negative.
        control: name of TCP's congestion control; "" where it is not known, which is taken for one that losses slow.

    Example:
        >>> [wanted_connections(seconds, "cubic") for seconds in (0.0002, 0.019, 0.02, 0.045, 0.3)]
        [1, 1, 2, 4, 8]
        >>> wanted_connections(0.3, "bbr")
        1
    """
    if control.startswith("bbr"):
        return 1
    return int(min(max(seconds / TRIP_SECONDS, 1), MOST_AUTOMATIC))


def congestion_control() -> str:
    """Returns the name of TCP's congestion control of new connections; "" where the system does not tell it."""
    option = getattr(socket, "TCP_CONGESTION", None)
    if option is None:
        return ""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as unconnected:
            name = unconnected.getsockopt(socket.IPPROTO_TCP, option, NAME_BYTES)
    except OSError:
        return ""
    return name.split(b"\0")[0].decode(errors="replace")


def agree_on_connections(transport: Transport) -> int:
    """Returns the number of connections for all ranks. A collective of four small messages, one after another.

    Args:
        transport: connected, without a message under way.

    Raises:
        TransportError: a rank does not answer, or its message was damaged.
    """
    own = WISH.pack(wanted_connections(_trip_seconds(transport), congestion_control()))
    message = torch.frombuffer(bytearray(own + CHECKSUM.pack(zlib.crc32(own))), dtype=torch.uint8)
    received = transport.exchange_small([message] * transport.world_size, "agreeing on the number of connections")
    wishes: list[int] = []
    for rank, answer in zip(transport.ranks, received, strict=True):
        data = bytes(answer.tolist())
        (wish,), (checksum,) = WISH.unpack_from(data), CHECKSUM.unpack_from(data, WISH.size)
        if checksum != zlib.crc32(data[: WISH.size]) or not 1 <= wish <= MOST_AUTOMATIC:
            raise TransportError(
                f"rank {transport.ranks[transport.rank]}: the number of connections that rank {rank} wants was damaged"
            )
        wishes.append(wish)
    return max(wishes)


def _trip_seconds(transport: Transport) -> float:
    """Returns the time of a round trip to the farthest rank.

    In a round every rank sends to all others and waits for all of them. A message leaves when its receiver has said
    that there is memory for it, so a round has one trip in each direction. The greetings have made ranks begin at about
    the same time.
    """
    message = torch.zeros(1, dtype=torch.uint8, device="cpu")
    shortest = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        transport.exchange_small([message] * transport.world_size, "measuring the time of a round trip")
        shortest = min(shortest, time.perf_counter() - begin)
    return shortest
