"""A warning about optimizers that divide by the root of a second moment, such as Adam, behind a coarse grid.

The rounding noise of a coarse grid cancels over time in the sum of gradients, and so in a first moment. In a second
moment it adds up: of steps s much longer than a mean gradient g, the mean square is about ``s |g|`` in place of
``g^2``. Such an optimizer therefore takes smaller steps than it should. SGD and its momentum do not.

A hook does not know the optimizer. :func:`watch_optimizers` looks at the first steps of all optimizers until it has
seen the one of the model, and warns once.
"""

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from qcomm.codec import Grid, SigmaGrid
from qcomm.collectives.telemetry import Telemetry
from qcomm.collectives.uncompressed_values import UNCOMPRESSED

__all__ = ["watch_optimizers"]

# Up to this step the guide does not advise against Adam.
HARMLESS_STEP = 0.5
# Names that optimizers of torch and others give to second moments, or to norms in their place.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum", "row_var", "state2"})


class _Watched:
    """A model whose optimizer has not been seen yet."""

    def __init__(self, model: torch.nn.Module, grid: SigmaGrid, telemetry: Telemetry, exact: str) -> None:
        self.parameters = {id(parameter) for parameter in model.parameters()}
        self.grid, self.telemetry, self.exact = grid, telemetry, exact
        self.harmless: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


_watched: "weakref.WeakKeyDictionary[torch.nn.Module, _Watched]" = weakref.WeakKeyDictionary()
_hooks: list[Any] = []  # one for the process: torch cannot remove a hook while it runs


def watch_optimizers(model: torch.nn.Module, grid: Grid, telemetry: Telemetry, exact: str = "strategy='none'") -> None:
    """Warns once, after a step of the model's optimizer, if that has a second moment and the grid is coarse.

    Args:
        model: whose gradients are compressed.
        grid: of the gradients.
        telemetry: of the hook, which knows if gradients really are compressed.
        exact: option of the hook with which they are not.
    """
    _watched.pop(model, None)
    if not isinstance(grid, SigmaGrid) or grid.step <= HARMLESS_STEP:
        return
    _watched[model] = _Watched(model, grid, telemetry, exact)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
    for model, watched in list(_watched.items()):
        if optimizer in watched.harmless or not watched.telemetry.strategies() - set(UNCOMPRESSED):
            continue
        state = _state_of(optimizer, watched.parameters)
        if SECOND_MOMENTS.intersection(state):
            del _watched[model]
            warnings.warn(_text(type(optimizer).__name__, watched), stacklevel=3)
        elif state:
            watched.harmless.add(optimizer)


def _state_of(optimizer: torch.optim.Optimizer, parameters: set[int]) -> Mapping[str, Any]:
    """Returns an optimizer's state of one of these parameters; empty if it has none yet."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in parameters and optimizer.state.get(parameter):
                found: Mapping[str, Any] = optimizer.state[parameter]
                return found
    return {}


def _text(name: str, watched: _Watched) -> str:
    return (
        f"{name} divides by the root of a second moment, which the rounding noise of a SigmaGrid of step "
        f"{watched.grid.step:g} makes larger, so the model learns more slowly than with exact gradients: begin with "
        f"qcomm.SigmaGrid(step={HARMLESS_STEP:g}) and compare the loss with that of {watched.exact}, or use SGD with "
        "momentum; see 'Which optimizer?' in docs/guide.md"
    )
