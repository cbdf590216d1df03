"""The hook's buckets on a device: a separate stream averages them while backward goes on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from qcomm.collectives import Scale, Telemetry
from qcomm.collectives_cuda import DeviceChoice, DevicePart
from qcomm.communicator import Communicator, Group, device_future, is_agreed
from qcomm.errors import CollectiveError
from qcomm.transport import TransportError

__all__ = ["DeviceHook"]


class DeviceHook:
    """Averages the buckets of one model and one device, in the order in which backward fills them.

    Args:
        group, communicator, telemetry, device: as of :class:`DeviceChoice`.
    """

    def __init__(
        self,
        group: Group,
        communicator: Communicator | None,
        telemetry: Telemetry,
        device: torch.device,
    ) -> None:
        self._choice = DeviceChoice(group, communicator, telemetry, device)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._failed_serial = 0
        self._broken: Exception | None = None

    def reduce(self, part: DevicePart, scale: Scale, serial: int) -> torch.futures.Future[torch.Tensor]:
        """Starts averaging a bucket; the host waits only as DeviceChoice does.

        Args:
            part: of this rank in the bucket.
            scale: the gradients' factor: a number, or a tensor of one element on the device.
            serial: of the step, whose remaining buckets are not exchanged after a failure.
        """
        if part.buffer.device != self._device:
            text = f"gradients must be on {self._device} like those before, got device {part.buffer.device}"
            raise ValueError(text)
        if self._broken is not None:
            text = f"an earlier collective ended half way on this rank, and the others wait for it: {self._broken}"
            raise TransportError(text)
        if serial == self._failed_serial:
            text = "an earlier bucket of this step failed"
            raise CollectiveError(text)
        with torch.no_grad(), self._beside():
            part.telemetry.mark(part.index, "launch")
            if self._stream is not None:
                part.buffer.record_stream(self._stream)
            try:
                fault = self._choice.average(part, scale)
            except Exception as error:
                if not is_agreed(error):
                    self._broken = error  # the next exchange would meet the others' part of this collective
                raise
            if fault is not None:  # this rank took part nevertheless
                raise fault.error
            part.telemetry.mark(part.index, "launched")
            return device_future(part.buffer)

    def serves(self, group: Group) -> bool:
        """Returns True if this is the group for which the hook was made."""
        return self._choice.serves(group)

    def fail(self, serial: int) -> None:
        """Skips the rest of a step that failed on all ranks."""
        self._failed_serial = serial

    def flush(self) -> None:
        """Waits for the device and adds its counters to the telemetry."""
        with torch.no_grad(), self._beside():
            self._choice.flush()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device):
            outside = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(outside)
            with ExitStack() as failing:
                # Launched kernels may still use the gradients, to which a handler of the error may write.
                failing.callback(outside.wait_stream, self._stream)
                with torch.cuda.stream(self._stream):
                    yield
                failing.pop_all()
