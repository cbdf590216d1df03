"""Gradient noise from the gradients of all ranks: the formulas that the hook's estimates are compared with.

S. McCandlish, J. Kaplan, D. Amodei and the OpenAI Dota team, "An empirical model of large-batch training",
arXiv:1812.06162, appendix A.1, have those of two batch sizes.
"""

import math
from collections.abc import Sequence

import torch


def two_batch_figures(small_norm: float, big_norm: float, small_batch: float, big_batch: float) -> tuple[float, float]:
    """Returns (trace, squared norm) from the mean squared norms of gradients of two batch sizes.

    Example:
        >>> two_batch_figures(small_norm=5.0, big_norm=3.0, small_batch=10, big_batch=20)
        (40.0, 1.0)
    """
    squared_norm = (big_batch * big_norm - small_batch * small_norm) / (big_batch - small_batch)
    return (small_norm - big_norm) / (1 / small_batch - 1 / big_batch), squared_norm


def noise_figures(
    gradients: Sequence[torch.Tensor], mean: torch.Tensor, rank: int, batch_size: int
) -> tuple[float, float, float]:
    """Returns rank ``rank``'s (trace, squared norm, quantization) of a step, from the inner products of its definition.

    With ``a = |g|^2``, ``c = <g, m>`` and ``d = |m|^2`` they are ``(a - c) b W / (W - 1)``, ``c - trace / (W b)`` and
    ``d - c``.

    Args:
        gradients: of all ranks, each of ``batch_size`` samples; only their number and this rank's count.
        mean: after the exchange.
    """
    g, m, world_size = gradients[rank].double().flatten(), mean.double().flatten(), len(gradients)
    a, c, d = float(g @ g), float(g @ m), float(m @ m)
    trace = (a - c) * batch_size * world_size / (world_size - 1)
    return trace, c - trace / (world_size * batch_size), d - c


def tail_index(values: torch.Tensor, group: int) -> float:
    """Returns the tail index from sums of ``group`` values, whose number is a multiple of it."""
    x = values.double().flatten()
    y = x.view(group, -1).sum(0)
    return math.log(group) / float(y.abs().log().mean() - x.abs().log().mean())
