"""Profiles of models: the parameter tensors in the order of backward, and the work behind each gradient."""

from dataclasses import dataclass, replace
from math import prod

from qcomm.planner.errors import PlanError

__all__ = ["ModelProfile", "ParameterTensor"]


@dataclass(frozen=True)
class ParameterTensor:
    """A parameter, and the work that precedes its gradient.

    Args:
        name: name in the module.
        shape: shape of the parameter.
        forward_flops: floating-point operations of one sample's forward pass that use it, a multiply-add counted
            twice; its backward takes twice as many. 0 in a measured profile.
        backward_seconds: seconds from the preceding gradient to its own, for the measured batch; 0 in a profile by
            formula.
    """

    name: str
    shape: tuple[int, ...]
    forward_flops: float = 0.0
    backward_seconds: float = 0.0

    @property
    def elements(self) -> int:
        """Returns the number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelProfile:
    """The planner's description of a model.

    Args:
        name: name in tables.
        family: "resnet", "vgg" or "transformer", which determines the rate of a GPU, or "measured".
        tensors: parameters in the order in which backward makes their gradients.
        sample: unit of a batch, e.g. ``"images"``.
        sample_values: number of values in one sample.
        sample_bytes: bytes of one stored sample.
        dataset_samples: samples in an epoch; 0 if unknown.
        measured_batch: samples in the measured batch; 0 in a profile by formula.
        measured_forward_seconds: seconds of forward for the measured batch.

    Raises:
        PlanError: the model has no parameter to exchange.

    Example:
        >>> weight = ParameterTensor("weight", (10, 20), forward_flops=400.0)
        >>> ModelProfile("tiny", "resnet", (weight,), "images", 20, 20).parameters
        200
    """

    name: str
    family: str
    tensors: tuple[ParameterTensor, ...]
    sample: str
    sample_values: int
    sample_bytes: int
    dataset_samples: int = 0
    measured_batch: int = 0
    measured_forward_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.parameters == 0:
            raise PlanError(f"{self.name} has no parameter that needs a gradient: there is nothing to exchange")

    @property
    def parameters(self) -> int:
        """Returns the number of trainable values."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def forward_flops(self) -> float:
        """Returns the operations of one sample's forward; its training step takes three times as many."""
        return sum(tensor.forward_flops for tensor in self.tensors)

    def with_dataset(self, samples: int) -> "ModelProfile":
        """Returns the same model on a data set of ``samples`` samples."""
        return replace(self, dataset_samples=samples)
