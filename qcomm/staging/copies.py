"""The way of one tensor through host memory and back.

::

    caller's stream   compute | ready                                          | wait, use
    stream "out"                      | copy out | arrived
    worker thread                                          average | launch
    stream "back"                                                            | copy back | Future

The thread that computes the tensor launches and never waits. The worker waits for the copy out, and a Future that knows
the device makes the caller's stream wait for the copy back.
"""

import time
import weakref

import torch

from qcomm.communicator import Communicator
from qcomm.staging.buffers import HostBuffers
from qcomm.staging.devices import current, event_of

__all__ = ["Staged", "Staging", "stage"]


class Staging:
    """The streams and buffers of one device for the tensors of one communicator.

    Args:
        device: of the tensors, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        # Two, so that a copy back does not wait behind a copy of what is not computed yet.
        self.out, self.back = torch.Stream(device), torch.Stream(device)
        self.buffers = HostBuffers()


class Staged:
    """A tensor that is on its way to host memory and back.

    The thread whose current stream computes the tensor makes this object. The worker thread calls the functions.

    Args:
        tensor: on a device, of any strides. Nothing may write to it before the way has ended.
        staging: of its device.

    Attributes:
        copy_nanoseconds: for which :meth:`fetch` has waited for a copy, after the tensor was computed.
    """

    def __init__(self, tensor: torch.Tensor, staging: Staging) -> None:
        self._tensor, self._staging = tensor.detach(), staging
        self._ready = event_of(torch.accelerator.current_stream(tensor.device))
        self._arrived: torch.Event | None = None
        self.copy_nanoseconds = 0
        self._memory = staging.buffers.take_ahead(tensor.nbytes)
        if self._memory is not None:
            try:
                self._arrived = self._copy_out(self._memory)
            except RuntimeError:
                self.release()
                raise

    def fetch(self) -> torch.Tensor:
        """Waits for the tensor's values and returns them in host memory: flat, of the same dtype."""
        self._ready.synchronize()
        begin = time.perf_counter_ns()
        if self._memory is None:
            self._memory = self._staging.buffers.take(self._tensor.nbytes)
        if self._arrived is None:
            self._arrived = self._copy_out(self._memory)
        self._arrived.synchronize()
        self.copy_nanoseconds = time.perf_counter_ns() - begin
        return self._values(self._memory)

    def restore(self) -> None:
        """Starts copying the values that :meth:`fetch` has returned back to the tensor, and gives their memory back.

        The stream that copies stays the current one of this thread, for the Future that the caller completes with the
        tensor. It also keeps the tensor's memory until the stream has done its work.
        """
        if self._memory is None:
            raise RuntimeError("restore was called before fetch")
        back, self._arrived = self._staging.back, None
        torch.accelerator.set_stream(back)
        self._tensor.copy_(self._values(self._memory).view(self._tensor.shape), non_blocking=True)
        self._arrived = event_of(back)
        self.release()

    def release(self) -> None:
        """Gives the host memory back if there is some. It is dropped where a copy has failed."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._staging.buffers.give_back(memory, self._arrived)

    def _copy_out(self, memory: torch.Tensor) -> torch.Event:
        """Starts the copy; returns the event behind it."""
        out = self._staging.out
        out.wait_event(self._ready)
        with current(out):
            self._values(memory).view(self._tensor.shape).copy_(self._tensor, non_blocking=True)
        return event_of(out)

    def _values(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[: self._tensor.nbytes].view(self._tensor.dtype)


_stagings: "weakref.WeakKeyDictionary[Communicator, dict[torch.device, Staging]]" = weakref.WeakKeyDictionary()


def stage(tensor: torch.Tensor, communicator: Communicator) -> Staged:
    """Sends a tensor on its way to host memory, behind all work of the calling thread's current stream.

    Args:
        tensor: on a device, of any strides; nothing may write to it before the way has ended.
        communicator: whose worker thread fetches it.
    """
    of_device = _stagings.setdefault(communicator, {})
    if tensor.device not in of_device:
        of_device[tensor.device] = Staging(tensor.device)
    return Staged(tensor, of_device[tensor.device])
