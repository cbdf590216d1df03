"""Workers of data-parallel training, simulated in one process: their gradients, and the exchange of these.

The exchange is that of strategy two_phase, without its cut into chunks: values are quantized with error feedback, their
mean is quantized once more with a residual of its own, and all workers get the same.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

import qcomm
from qcomm.codec import CPU, Grid, SigmaGrid
from qcomm.recipes import Split

Gradients = dict[str, Tensor]
# As in the hook, whose small tensors take a finer grid. Here they are not quantized.
MIN_ELEMENTS = 1024


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Gradients:
    """Returns the gradient of the mean loss by parameter name."""
    parameters = dict(model.named_parameters())
    loss = functional.cross_entropy(model(images), labels)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def drawn(split: Split, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns a batch, drawn with replacement."""
    chosen = torch.randint(len(split), (count,), dtype=torch.int64, device=CPU, generator=generator)
    return split.images[chosen], split.labels[chosen]


def step(model: nn.Module, mean: Gradients, learning_rate: float) -> None:
    """Takes a step of SGD."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(mean[name], alpha=learning_rate)


class Exchange:
    """The mean of all workers' gradients, exact or quantized.

    Args:
        grid: None for the exact mean.
        workers: number of them.
    """

    def __init__(self, grid: Grid | None, workers: int) -> None:
        self._grid = grid
        self._residuals: list[Gradients] = [{} for _ in range(workers + 1)]  # the last one is the mean's

    def mean(self, gradients: list[Gradients]) -> Gradients:
        """Returns the mean that every worker gets."""
        return {name: self._mean_of(name, [each[name] for each in gradients]) for name in gradients[0]}

    def _mean_of(self, name: str, values: list[Tensor]) -> Tensor:
        if self._grid is None or values[0].numel() < MIN_ELEMENTS:
            return torch.stack(values).mean(0)
        sent = [self._quantized(name, value, self._grid, worker) for worker, value in enumerate(values)]
        return self._quantized(name, torch.stack(sent).mean(0), _mean_grid(self._grid), -1)

    def _quantized(self, name: str, values: Tensor, grid: Grid, owner: int) -> Tensor:
        wanted = values + self._residuals[owner].get(name, torch.zeros_like(values))
        got = qcomm.decompress(qcomm.compress(wanted, grid))
        self._residuals[owner][name] = wanted - got
        return got


def _mean_grid(grid: Grid) -> Grid:
    """Returns the grid of means, as the hook chooses it."""
    return replace(grid, step=min(grid.step, 1.0)) if isinstance(grid, SigmaGrid) and grid.step <= 2 else grid
