"""The task of a collective: the buffer to average, its layout, and the options."""

from dataclasses import dataclass
from functools import cached_property

import torch

from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.layout import BucketLayout
from qcomm.collectives.options import ReduceOptions
from qcomm.collectives.telemetry import Telemetry
from qcomm.communicator import Fields
from qcomm.staging import Staged

__all__ = ["MeanTask", "Scale"]

# The factor by which gradients have been multiplied: a number, or a tensor of one element that stays on its device.
Scale = float | torch.Tensor


@dataclass(frozen=True)
class MeanTask:
    """One collective: the buffer to average, and its options.

    Attributes:
        buffer: flat and contiguous, float32, float16, bfloat16 or float64; finally holds the result. One that is staged
            may be of any shape and strides.
        layout: of the buffer.
        options: for the world of the group, see :meth:`ReduceOptions.for_world`.
        fields: the configuration, which has to be equal on all ranks.
        telemetry: counts bytes, bits and seconds.
        feedback: residuals, or None without error feedback.
        scale: the buffer holds values times this factor, and so will the result; residuals are kept without it.
        index: number of the bucket for the timeline.
        step: of training, for messages; 0 outside of it.
        staged: the way of a buffer on a device to host memory, where it is averaged; None for one that stays.
    """

    buffer: torch.Tensor
    layout: BucketLayout
    options: ReduceOptions
    fields: Fields
    telemetry: Telemetry
    feedback: ErrorFeedback | None = None
    scale: float = 1.0
    index: int = 0
    step: int = 0
    staged: Staged | None = None

    def abandon(self) -> None:
        """Gives back what the task holds for a collective that will not run."""
        if self.staged is not None:
            self.staged.release()

    @cached_property
    def wire_dtype(self) -> torch.dtype:
        """Returns the dtype of values on the wire: float64 for a buffer of float64, otherwise float32.

        Sums need more than 16 bits.
        """
        return torch.float64 if self.buffer.dtype == torch.float64 else torch.float32
