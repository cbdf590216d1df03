"""Which step of training a bucket belongs to, what its gradients were scaled by, and what went wrong in it."""

from collections.abc import Callable

import torch

from qcomm.collectives import Scale
from qcomm.communicator import Fault
from qcomm.ddp.checks import check_scale

__all__ = ["GradScale", "LastError", "Steps"]

GradScale = Scale | Callable[[], Scale] | None


class LastError:
    """The last error of a model's steps, for whoever asks."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def note(self, error: Exception) -> None:
        """Replaces the error before it."""
        self.error = error


class Steps:
    """Counts steps by the buckets of which they consist, on the thread that backward runs on.

    Attributes:
        number: of the present step, as a checkpoint has it.
        serial: of the present step among those of this object, which a loaded checkpoint does not change: jobs of a
            step that failed may still be in the queue while the step that a checkpoint goes on with has its number.
        failed_serial: the last one that failed on all ranks, whose remaining buckets are left out.
        error_serial: the last one in which this rank saw an error.
        scale: what the present step's gradients were multiplied by: a number, or a tensor that stays on its device.
        last_error: of any step.
        owed: a fault that the other ranks have not been told of.
    """

    def __init__(self) -> None:
        self.number = 0
        self.serial = 0
        self.failed_serial = 0
        self.error_serial = 0
        self.scale: Scale = 1.0
        self.last_error = LastError()
        self.owed: Fault | None = None
        self._last_index = -1

    def __getstate__(self) -> dict[str, object]:
        """Without what belongs to the process: errors, and a scale that may be on a device."""
        return {**self.__dict__, "scale": 1.0, "last_error": LastError(), "owed": None}

    def begin(self, index: int) -> bool:
        """Begins bucket ``index``, and a new step if it is a step's first; returns whether it is."""
        # Buckets come in ascending order, so an index that does not ascend is a new step, also where the last ones of
        # a step were left out.
        first = index <= self._last_index or self._last_index < 0
        self._last_index = index
        if first:
            self.number += 1
            self.serial += 1
        return first

    def set_scale(self, grad_scale: GradScale) -> None:
        """Reads the present step's scale; raises ValueError or TypeError where it is not one."""
        scale = grad_scale() if callable(grad_scale) else grad_scale
        # The value of a tensor on the device stays there: to look at it would be to wait.
        if isinstance(scale, torch.Tensor) and scale.numel() == 1 and scale.is_cuda:
            self.scale = scale
        else:
            self.scale = 1.0 if scale is None else check_scale(scale)

    def owe(self, fault: Fault) -> None:
        """Keeps a fault, if there is none yet, for the next agreement."""
        self.owed = self.owed or fault

    def take_owed(self) -> Fault | None:
        """The fault that is to be told now."""
        fault, self.owed = self.owed, None
        return fault
