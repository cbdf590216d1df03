"""Several gloo connections to each rank in the place of one, for long paths that lose packets.

A TCP connection takes a lost packet for a full link and slows down. Over a round trip of R seconds with a share p of
lost packets it carries about 1.22 segments / (R sqrt(p)), however fast the link is: 6 Mb/s for 80 ms and 0.1 %. Several
connections share the losses, so together they carry a multiple.

M. Mathis et al., "The macroscopic behavior of the TCP congestion avoidance algorithm", ACM CCR 27(3), 1997.
"""

import itertools
import struct
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from qcomm.transport.base import host_memory

__all__ = ["GlooConnections"]

LENGTH = struct.Struct("<q")


class GlooConnections:
    """The messages of several ``ProcessGroupGloo`` of the same ranks, with the methods of one.

    A message is cut into a part for each. The first part begins with the length of the message, as its receiver may
    have a larger buffer. Sums are those of the first group, because cutting a buffer would change their bits.

    Args:
        groups: with the same ranks in the same order, at least one.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = tuple(groups)

    def send(self, tensors: Sequence[torch.Tensor], rank: int, tag: int) -> "_Parts":
        """Sends the message ``tensors[0]`` in parts."""
        (message,) = tensors
        flat = _bytes_of(message)
        length = torch.frombuffer(bytearray(LENGTH.pack(flat.numel())), dtype=torch.uint8)
        parts = [flat[begin:end] for begin, end in _bounds(flat.numel(), len(self._groups))]
        parts[0] = torch.cat([length, parts[0]])
        # An empty message would have no receive, and a receive that is posted ahead needs its message.
        parts = [part if part.numel() else length[:1] for part in parts]
        return _Parts([group.send([part], rank, tag) for group, part in zip(self._groups, parts, strict=True)], parts)

    def recv(self, tensors: Sequence[torch.Tensor], rank: int, tag: int) -> "_Parts":
        """Receives into ``tensors[0]``, which may be larger than the message."""
        (buffer,) = tensors
        most = -(-buffer.nbytes // len(self._groups))
        parts = [host_memory(LENGTH.size + most), *(host_memory(max(most, 1)) for _ in self._groups[1:])]
        works = [group.recv([part], rank, tag) for group, part in zip(self._groups, parts, strict=True)]
        return _Parts(works, parts, buffer)

    def allreduce(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Sums as the first group does."""
        return self._groups[0].allreduce(tensors)


class _Parts:
    """The parts of one message under way, with ``wait`` as that of a ``Work``."""

    def __init__(self, works: list[Any], parts: list[torch.Tensor], buffer: torch.Tensor | None = None) -> None:
        self._works, self._parts, self._buffer = works, parts, buffer

    def wait(self, timeout: timedelta | None = None) -> None:
        """Waits for all parts, and puts a message that was received together.

        Raises:
            RuntimeError: a part did not come, so that no other one is waited for, or the message is larger than its
                buffer.
        """
        failure: RuntimeError | None = None
        for work in self._works:
            try:
                if failure is not None:
                    work.wait(timedelta(milliseconds=1))  # which closes the connections
                elif timeout is not None:
                    work.wait(timeout)
                else:
                    work.wait()
            except RuntimeError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        if self._buffer is not None:
            self._join(self._buffer)

    def _join(self, buffer: torch.Tensor) -> None:
        target = _bytes_of(buffer)
        (length,) = LENGTH.unpack(bytes(self._parts[0][: LENGTH.size].tolist()))
        if not 0 <= length <= target.numel():
            raise RuntimeError(f"the message has {length} bytes, where at most {target.numel()} are due")
        parts = [self._parts[0][LENGTH.size :], *self._parts[1:]]
        for part, (begin, end) in zip(parts, _bounds(length, len(parts)), strict=True):
            target[begin:end] = part[: end - begin]


def _bounds(size: int, parts: int) -> list[tuple[int, int]]:
    """Returns the bounds of the parts of ``size`` bytes, none of which has more than ceil(size / parts)."""
    cuts = [size * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(cuts))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
