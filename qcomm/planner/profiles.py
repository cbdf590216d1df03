"""What a model asks of a training step: its parameter tensors in the order of backward, and the work behind each."""

from dataclasses import dataclass, replace
from math import prod

from qcomm.planner.errors import PlanError

__all__ = ["ModelProfile", "ParameterTensor"]


@dataclass(frozen=True)
class ParameterTensor:
    """A parameter, and what is computed before its gradient is ready.

    Args:
        name: as in the module.
        shape: of the parameter.
        forward_flops: floating-point operations of one sample's forward pass that use it, a multiply-add counted
            twice; its backward takes twice as many. 0 in a measured profile.
        backward_seconds: of the measured batch, from the gradient before it to its own; 0 in a profile by formula.
    """

    name: str
    shape: tuple[int, ...]
    forward_flops: float = 0.0
    backward_seconds: float = 0.0

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelProfile:
    """A model as the planner sees it.

    Args:
        name: for tables.
        family: "resnet", "vgg" or "transformer", which decides what a GPU reaches, or "measured".
        tensors: in the order in which backward makes their gradients.
        sample: what a batch counts, e.g. ``"images"``.
        sample_values: numbers in one sample.
        sample_bytes: of one stored sample.
        dataset_samples: in an epoch; 0 where that is unknown.
        measured_batch: samples in the measured batch; 0 in a profile by formula.
        measured_forward_seconds: of the measured batch.

    Raises:
        PlanError: there is no parameter to exchange.

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
        """Number of trainable values."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def forward_flops(self) -> float:
        """Of one sample; a training step of it takes three times as many."""
        return sum(tensor.forward_flops for tensor in self.tensors)

    def with_dataset(self, samples: int) -> "ModelProfile":
        """The same model on a data set of so many samples."""
        return replace(self, dataset_samples=samples)
