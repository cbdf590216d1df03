"""The outer optimizer of DiLoCo, and the anchor that it moves: a copy of the model's parameters in host memory."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qcomm.codec import CPU

__all__ = ["MakeOuter", "Outer", "nesterov"]

MakeOuter = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def nesterov(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the outer optimizer of the DiLoCo paper: SGD with a rate of 0.7 and a Nesterov momentum of 0.9."""
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


class Outer:
    """The anchor by the names of the parameters, and an optimizer of it.

    The anchor is float32, float64 of a float64 parameter: the movements of 16-bit weights are not rounded away. It is
    in host memory whatever the parameters' device, so that all ranks compute the same bits.

    Args:
        named: the parameters, which are copied.
        make: returns a ``torch.optim.Optimizer`` of the copies.

    Raises:
        TypeError, ValueError: ``make`` returns something else, or an optimizer of other tensors.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> outer = Outer([("weight", layer.weight)], lambda parameters: torch.optim.SGD(parameters, lr=0.5))
        >>> before = outer.anchor["weight"].clone()
        >>> outer.move({"weight": torch.ones(1, 2)})  # where the ranks have gone on average
        >>> bool((outer.anchor["weight"] - before - 0.5).abs().max() < 1e-6)
        True
    """

    def __init__(self, named: Sequence[tuple[str, torch.Tensor]], make: MakeOuter) -> None:
        self._parameters = {name: torch.nn.Parameter(_wide(tensor)) for name, tensor in named}
        if not callable(make):
            raise TypeError(
                "outer must be a function of the anchor's parameters that returns their optimizer, such as "
                f"lambda parameters: torch.optim.SGD(parameters, lr=0.7), got {type(make).__name__}"
            )
        self.optimizer = make(list(self._parameters.values()))
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(f"outer must return a torch.optim.Optimizer, got {type(self.optimizer).__name__}")
        optimized = [id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]]
        if sorted(optimized) != sorted(id(parameter) for parameter in self._parameters.values()):
            raise ValueError(
                f"outer must return an optimizer of the {len(self._parameters)} parameters that it is given and of no "
                f"others, got one of {len(optimized)}"
            )

    @property
    def anchor(self) -> dict[str, torch.Tensor]:
        """Returns the anchor itself, which moves with the optimizer."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def move(self, movements: Mapping[str, torch.Tensor]) -> None:
        """Takes an optimizer's step on the named parameters; their gradient is against the movement of the ranks."""
        try:
            for name, movement in movements.items():
                parameter = self._parameters[name]
                parameter.grad = movement.neg().to(parameter.dtype)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """Sets named parameters to other values, without what the optimizer knows of them."""
        for name, value in values.items():
            self._parameters[name].detach().copy_(value)
            self.optimizer.state.pop(self._parameters[name], None)

    def describe(self) -> str:
        """Returns the kind of the optimizer and its settings as text, for the comparison between ranks."""
        groups = [
            {name: value for name, value in sorted(group.items()) if name not in ("params", "param_names")}
            for group in self.optimizer.param_groups
        ]
        return f"{type(self.optimizer).__name__} {groups}"

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the optimizer's state."""
        return copy.deepcopy(self.optimizer.state_dict())

    def check(self, saved: object) -> None:
        """Checks a result of :meth:`state_dict` by loading it into a copy of the optimizer, and taking a step there.

        Raises:
            ValueError: it does not fit.
        """
        trial = copy.deepcopy(self.optimizer)
        fits, reason = False, "it is not a dictionary"
        if isinstance(saved, Mapping):
            try:
                trial.load_state_dict(copy.deepcopy(dict(saved)))
                for group in trial.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = torch.zeros_like(parameter)
                trial.step()
                fits, reason = _is_finite(trial), "it holds values that are not finite"
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
        if not fits:
            raise ValueError(
                f"state_dict is damaged, or of another outer optimizer than {type(trial).__name__}: {reason}"
            )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Adopts a result of :meth:`state_dict` that :meth:`check` has passed."""
        self.optimizer.load_state_dict(copy.deepcopy(dict(saved)))


def _is_finite(optimizer: torch.optim.Optimizer) -> bool:
    return all(bool(parameter.isfinite().all()) for group in optimizer.param_groups for parameter in group["params"])


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    # Row-major, as in the flat buffer.
    return tensor.detach().to(device=CPU, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
