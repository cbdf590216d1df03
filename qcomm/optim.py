"""``AbsAdamW``: AdamW for gradients that have crossed a coarse grid.

On a coarse grid with error feedback most values of a mean arrive as zero, and now and then one arrives as a whole step.
Over time their sum is right. A mean ``g`` that comes as steps ``s`` with probability ``|g| / s`` has::

    E out = g              a first moment sees no difference
    E |out| = |g|          nor does a first absolute moment
    E out^2 = s |g|        a second moment is s / |g| times too large

Adam divides by the root of the last, so its steps are too short, most of all for parameters whose gradients are small.
"""

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim.optimizer import ParamsT

__all__ = ["AbsAdamW"]

# Of a normal distribution with mean 0: the root of the mean square, over the mean absolute value.
RMS_OVER_ABS = math.sqrt(math.pi / 2)
AVERAGES = "exp_avg", "exp_avg_abs"  # of a parameter's gradient and of its absolute value, in the optimizer's state


class AbsAdamW(torch.optim.Optimizer):
    """AdamW with ``sqrt(pi / 2) EMA |g|`` in place of ``sqrt(EMA g^2)``.

    The two are equal where gradients follow a normal distribution with mean 0. Learning rates of AdamW therefore are a
    good start. Where one gradient is much larger than the others, this divisor grows less. The state is the same on all
    ranks and has the size of AdamW's. That of 16-bit parameters is in float32, where averages do not stall.

    It takes the second quantization of an exchange away from the divisor, and of the first all but a factor that is at
    most the root of the number of ranks and does not grow with the grid's step. The first few means of a coarse grid
    are almost all zero, so begin with ``warmup_steps`` of :func:`qcomm.attach` where the step is 2 or more.

    Args:
        params: parameters, or groups of them with options of their own, as of any optimizer. Real, dense gradients.
        lr: learning rate, at least 0.
        betas: of the average of g and of its absolute value, each in [0, 1).
        eps: added to the divisor, at least 0.
        weight_decay: decoupled, as in AdamW; at least 0.

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = AbsAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in weight.tolist()]  # a first step is lr / sqrt(pi / 2) long
        [0.92, -1.92]

    AdamW is from Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101. docs/measurements.md
    has the measurements behind this variant.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, see :meth:`torch.optim.Optimizer.add_param_group`; checks its options."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state, see :meth:`torch.optim.Optimizer.load_state_dict`.

        Raises:
            ValueError: it is that of another optimizer, or of other parameters; nothing has changed.
        """
        for saved in state_dict["state"].values():
            if not set(AVERAGES).issubset(saved):
                raise ValueError(
                    f"state_dict must be of AbsAdamW, with {AVERAGES} of each parameter, got {list(saved)}"
                )
        super().load_state_dict(state_dict)
        # torch has rounded the averages to the dtype of their parameters.
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for weight, number in zip(own["params"], saved["params"], strict=True):
                for name in AVERAGES if number in state_dict["state"] else ():
                    value = state_dict["state"][number][name]
                    self.state[weight][name] = value.to(weight.device, _state_dtype(weight), copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: computes the loss and its gradients anew; it is called once.

        Returns:
            The closure's loss.

        Raises:
            ValueError: a gradient is sparse or complex. No parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [[weight for weight in group["params"] if weight.grad is not None] for group in self.param_groups]
        for weight in (weight for weights in due for weight in weights):
            _check_gradient(weight.grad)
        for group, weights in zip(self.param_groups, due, strict=True):
            if weights:
                self._update(group, weights)
        return loss

    def _update(self, group: dict[str, Any], weights: list[torch.Tensor]) -> None:
        states = [self._state_of(weight) for weight in weights]
        for state in states:
            state["step"] += 1
        gradients = [weight.grad.to(_state_dtype(weight)) for weight in weights if weight.grad is not None]
        means, sizes = ([state[name] for state in states] for name in AVERAGES)
        keep_mean, keep_size = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - keep_mean)
        torch._foreach_lerp_(sizes, torch._foreach_abs(gradients), 1 - keep_size)
        # Averages begin at 0. The division by the sum of their weights corrects that.
        scales = [RMS_OVER_ABS / (1 - keep_size ** state["step"]) for state in states]
        divisors = torch._foreach_mul(sizes, scales)
        torch._foreach_add_(divisors, group["eps"])
        rate = float(group["lr"])
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        rates = [-rate / (1 - keep_mean ** state["step"]) for state in states]
        updates = torch._foreach_div(means, divisors)
        torch._foreach_mul_(updates, rates)
        torch._foreach_add_(weights, [update.to(w.dtype) for update, w in zip(updates, weights, strict=True)])

    def _state_of(self, weight: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            state["step"] = 0
            for name in AVERAGES:
                state[name] = torch.zeros_like(weight, dtype=_state_dtype(weight), memory_format=torch.preserve_format)
        return state


def _state_dtype(weight: torch.Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's averages."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check(group: dict[str, Any]) -> None:
    """Checks the options of a group."""
    for name in ("lr", "eps", "weight_decay"):
        if not isinstance(group[name], (int, float, torch.Tensor)) or not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} is {group[name]!r}; it must be a finite number of at least 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas!r}; it must be two numbers of at least 0 and below 1")


def _check_gradient(gradient: torch.Tensor | None) -> None:
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        raise ValueError("a gradient is sparse; AbsAdamW needs dense ones (nn.Embedding has sparse=False for that)")
    if gradient.is_complex():
        raise ValueError("a gradient is complex; AbsAdamW needs real ones: make the parameter torch.view_as_real of it")
