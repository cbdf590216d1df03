"""Buffers in page-locked host memory, which devices read and write by themselves; pooled, and few."""

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qcomm.codec import CPU

__all__ = ["LIMIT", "HostBuffers"]

# One for the tensor that is being averaged, one for that before it, which is being copied back, and one for that after
# it, which is being copied out.
LIMIT = 3
# A buffer more than twice as large as this many tensors is not kept. DDP's first bucket is the whole model.
RECENT = 64


class Returned(NamedTuple):
    """A buffer that no tensor has, and the event behind which the device does not use it any more."""

    memory: torch.Tensor
    left: torch.Event


class HostBuffers:
    """At most LIMIT buffers of bytes, each of one tensor from when it is taken until it is given back.

    One thread calls :meth:`take`; any thread may call the other functions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for a moment: no thread waits for the device, or for memory, with it
        self._returned: list[Returned] = []  # the oldest first
        self._taken = 0
        self._recent: deque[int] = deque(maxlen=RECENT)

    def take_ahead(self, size: int) -> torch.Tensor | None:
        """Returns a buffer of at least ``size`` bytes; None where that needs a wait for the device, or the last buffer.

        The last one is left for :meth:`take`, so that no tensor ever waits for one behind it.
        """
        with self._lock:
            if self._taken >= LIMIT - 1:
                return None
            found = self._pick(size, [buffer for buffer in self._returned if buffer.left.query()])
            if found is None and self._is_full:
                return None
            self._taken += 1
        return self._allocate(size) if found is None else found.memory

    def take(self, size: int) -> torch.Tensor:
        """Returns a buffer of at least ``size`` bytes; waits for the device if it still uses all that there may be."""
        with self._lock:
            found = self._pick(size, [buffer for buffer in self._returned if buffer.left.query()])
            if found is None and self._is_full and self._returned:
                found = self._pick(size, self._returned) or self._returned.pop(0)
            self._taken += 1
        if found is not None:
            found.left.synchronize()
            if found.memory.numel() >= size:
                return found.memory
        return self._allocate(size)

    def give_back(self, memory: torch.Tensor, left: torch.Event | None) -> None:
        """Gives a buffer to later tensors, once the event ``left`` has passed.

        Without an event it is dropped: whether the device uses it is not known.
        """
        with self._lock:
            self._taken -= 1
            if left is not None:
                self._returned.append(Returned(memory, left))

    @property
    def _is_full(self) -> bool:
        return self._taken + len(self._returned) >= LIMIT

    def _pick(self, size: int, among: Sequence[Returned]) -> Returned | None:
        """Removes and returns the smallest buffer that is large enough, and drops those that are too large to keep."""
        self._recent.append(size)
        largest = 2 * max(self._recent)
        fitting = [buffer for buffer in among if size <= buffer.memory.numel() <= largest]
        best = min(fitting, key=lambda buffer: buffer.memory.numel(), default=None)
        dropped = [buffer for buffer in among if buffer is best or buffer.memory.numel() > largest]
        self._returned = [buffer for buffer in self._returned if not any(buffer is other for other in dropped)]
        return best

    def _allocate(self, size: int) -> torch.Tensor:
        try:
            with torch.inference_mode(False):  # whatever mode the caller is in: others will write to it
                return torch.empty(size, dtype=torch.uint8, device=CPU, pin_memory=True)
        except RuntimeError:
            with self._lock:
                self._taken -= 1
            raise
