"""Times of forward and backward, and the time at which each gradient is ready."""

import itertools
import math
from dataclasses import dataclass

from qcomm.planner.errors import PlanError
from qcomm.planner.hardware import Gpu
from qcomm.planner.profiles import ModelProfile

__all__ = ["ComputeTimes", "compute_times"]

# Seconds in which eager PyTorch launches the kernels of one parameter tensor, in forward and again in backward:
# ResNet-50's forward of 161 tensors takes 10.4 ms on a V100 with 1 image and with 4 (NVIDIA DeepLearningExamples,
# resnet50v1.5).
LAUNCH_SECONDS = 65e-6
# Seconds of backward that the exchange of one tensor takes from a GPU, however fast the links are: its hook, copies to
# a bucket and back, a division, and the launches of their kernels.
TENSOR_SECONDS = 75e-6


@dataclass(frozen=True)
class ComputeTimes:
    """Computing times of one GPU that trains alone.

    Args:
        forward: seconds of forward.
        ready: seconds from the beginning of backward until each tensor's gradient is ready, in the profile's order.
    """

    forward: float
    ready: tuple[float, ...]

    @property
    def backward(self) -> float:
        """Returns the seconds of backward."""
        return self.ready[-1]

    @property
    def step(self) -> float:
        """Returns the seconds of forward and backward; the rates behind both include the optimizer."""
        return self.forward + self.backward

    def together(self, tensor_factor: float = 1.0, factor: float = 1.0) -> "ComputeTimes":
        """Returns the times where gradients are exchanged, which takes ``TENSOR_SECONDS`` of backward for each.

        Args:
            tensor_factor: of TENSOR_SECONDS.
            factor: of all times.
        """
        ready = [factor * (at + tensor_factor * TENSOR_SECONDS * i) for i, at in enumerate(self.ready, 1)]
        return ComputeTimes(factor * self.forward, tuple(ready))


def compute_times(
    model: ModelProfile,
    batch: int,
    gpu: Gpu | None,
    precision: str = "fp32",
    samples_per_second: float | None = None,
) -> ComputeTimes:
    """Derives the times from a measured profile, from a measured rate, or from a preset, in this order.

    Args:
        model: profile of the model.
        batch: samples per GPU and step.
        gpu: preset; may be None with a measured profile or rate.
        precision: precision of the preset, "fp32" or "amp".
        samples_per_second: measured training rate of one GPU that trains alone.

    Raises:
        PlanError: a number is not positive, or the speed of a GPU is unknown.
    """
    if batch < 1:
        raise PlanError(f"batch is {batch}; it must be at least 1 sample a GPU")
    if samples_per_second is not None and not (math.isfinite(samples_per_second) and samples_per_second > 0):
        raise PlanError(f"samples_per_second is {samples_per_second}; it must be positive and finite")
    if model.measured_batch:
        gaps = [tensor.backward_seconds for tensor in model.tensors]
        scale = batch / model.measured_batch
        if samples_per_second is not None:
            scale = batch / samples_per_second / (model.measured_forward_seconds + sum(gaps))
        return _times(model.measured_forward_seconds * scale, [gap * scale for gap in gaps])
    if samples_per_second is None:
        if gpu is None:
            raise PlanError(f"gpu must be given for {model.name}, or samples_per_second, or a measured profile")
        step = 3 * batch * model.forward_flops / gpu.flops_per_second(model.family, precision)
        step = max(step, 3 / 2 * LAUNCH_SECONDS * len(model.tensors))
        forward = max(step / 3, LAUNCH_SECONDS * len(model.tensors))
    else:
        step = batch / samples_per_second
        forward = step / 3
    launches = LAUNCH_SECONDS * len(model.tensors) >= 2 * step / 3  # then no tensor takes longer than another
    parts = [1.0 if launches else tensor.forward_flops for tensor in model.tensors]
    return _times(forward, [2 * step / 3 * part / sum(parts) for part in parts])


def _times(forward: float, gaps: list[float]) -> ComputeTimes:
    return ComputeTimes(forward, tuple(itertools.accumulate(gaps)))
