"""How long forward and backward take, and when which gradient is ready."""

import itertools
import math
from dataclasses import dataclass

from qcomm.planner.errors import PlanError
from qcomm.planner.hardware import Gpu
from qcomm.planner.profiles import ModelProfile

__all__ = ["ComputeTimes", "compute_times"]

# Seconds in which eager PyTorch starts what one parameter tensor stands for, in forward as in backward: ResNet-50's
# forward of 161 tensors takes 10.4 ms on a V100 with 1 image as with 4 (NVIDIA DeepLearningExamples, resnet50v1.5).
LAUNCH_SECONDS = 65e-6


@dataclass(frozen=True)
class ComputeTimes:
    """Of one GPU that is alone.

    Args:
        forward: seconds.
        ready: seconds from the beginning of backward until each tensor's gradient is there, in the profile's order.
    """

    forward: float
    ready: tuple[float, ...]

    @property
    def backward(self) -> float:
        """Seconds."""
        return self.ready[-1]

    @property
    def step(self) -> float:
        """Seconds of forward and backward; the optimizer's are in the rates that both come from."""
        return self.forward + self.backward


def compute_times(
    model: ModelProfile,
    batch: int,
    gpu: Gpu | None,
    precision: str = "fp32",
    samples_per_second: float | None = None,
) -> ComputeTimes:
    """From a measured profile, from a measured rate, or from a preset, in this order.

    Args:
        model: profile.
        batch: samples a GPU and step.
        gpu: preset; may be None with a measured profile or rate.
        precision: of the preset, "fp32" or "amp".
        samples_per_second: of a training step of one GPU that is alone, as measured.

    Raises:
        PlanError: a number is not positive, or nothing says how fast a GPU is.
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
