"""Volume of training traffic without a simulation: data against gradients.

A data set has N samples of n values, a model M parameters, and each of P workers a batch of b. In an epoch every worker
reads N n / P values. In a step it sends 2 (P - 1) / P M gradient values in a ring, in an epoch N / (P b) times as many.
More workers reduce the data of each, but not its gradients. Per worker::

    gradient values / data values = 2 M (P - 1) / (P b n)          1 where b = 2 M (P - 1) / (P n)

For ResNet-50, M = 25.6 million, on images of n = 150,528 values, that is a batch of 340 per worker. Below it, and so at
usual batches, gradients are the larger part. In bytes, float32 against uint8, they are so up to a batch four times as
large.
"""

from dataclasses import dataclass

from qcomm.planner.errors import PlanError
from qcomm.planner.profiles import ModelProfile

__all__ = ["Estimate", "estimate"]

VALUE_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """Volumes of one worker unless named otherwise. Figures per epoch are 0 if the size of the data set is unknown."""

    workers: int
    parameters: int
    steps_per_epoch: float
    data_values_per_step: int
    data_bytes_per_step: int
    data_values_per_epoch: float
    data_bytes_per_epoch: float
    gradient_values_per_step: float
    gradient_bytes_per_step: float
    gradient_values_per_epoch: float
    gradient_bytes_per_epoch: float
    values_ratio: float
    bytes_ratio: float
    equal_values_batch: float
    equal_bytes_batch: float


def estimate(model: ModelProfile, batch: int, workers: int) -> Estimate:
    """Estimates data and float32 gradients in a ring, without compression.

    Args:
        model: profile of the model.
        batch: samples per worker and step.
        workers: number of GPUs.

    Raises:
        PlanError: a number is not positive.

    Example:
        >>> from qcomm.planner.models import built_in
        >>> round(estimate(built_in("resnet50"), 32, 1024).equal_values_batch)
        339
    """
    for name, value in (("batch", batch), ("gpus", workers)):
        if value < 1:
            raise PlanError(f"{name} is {value}; it must be at least 1")
    steps = model.dataset_samples / (workers * batch)
    data_values, data_bytes = batch * model.sample_values, batch * model.sample_bytes
    sent = 2 * (workers - 1) / workers * model.parameters
    return Estimate(
        workers=workers,
        parameters=model.parameters,
        steps_per_epoch=steps,
        data_values_per_step=data_values,
        data_bytes_per_step=data_bytes,
        data_values_per_epoch=steps * data_values,
        data_bytes_per_epoch=steps * data_bytes,
        gradient_values_per_step=sent,
        gradient_bytes_per_step=VALUE_BYTES * sent,
        gradient_values_per_epoch=steps * sent,
        gradient_bytes_per_epoch=steps * VALUE_BYTES * sent,
        values_ratio=sent / data_values,
        bytes_ratio=VALUE_BYTES * sent / data_bytes,
        equal_values_batch=sent / model.sample_values,
        equal_bytes_batch=VALUE_BYTES * sent / model.sample_bytes,
    )
