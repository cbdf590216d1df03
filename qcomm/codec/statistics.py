"""What one pass over a tensor tells: the input of every grid."""

import math
from dataclasses import dataclass

import torch

from qcomm.codec import _native

__all__ = ["Statistics", "is_zero", "measure"]


@dataclass(frozen=True)
class Statistics:
    """Of ``count`` values: extremes, sum of squares, all finite or not.

    The order in which squares are added, in float64, is part of the packet format.

    Where ``finite`` is False the other figures say nothing.
    """

    count: int
    minimum: float
    maximum: float
    sum_squares: float
    finite: bool

    @property
    def rms(self) -> float:
        """Root mean square; 0 for no values."""
        return math.sqrt(self.sum_squares / self.count) if self.count else 0.0


def measure(
    values: torch.Tensor, residual: torch.Tensor | None = None, inv_scale: float = 1.0, *, num_threads: int = 1
) -> Statistics:
    """Statistics of ``u = values * inv_scale + residual``.

    Args:
        values: contiguous, any shape, float32, float16, bfloat16 or float64.
        residual: contiguous float32 with as many elements, or None. Needs float32 or float64 values.
        inv_scale: a factor, rounded to the arithmetic of the dtype.
        num_threads: most that work at once; the result does not depend on it.

    Example:
        >>> measure(torch.tensor([3.0, -4.0])).sum_squares
        25.0
    """
    return Statistics(values.numel(), *_native.measure(values, residual, inv_scale, num_threads))


def is_zero(values: torch.Tensor) -> bool:
    """Returns whether all values are 0, as the gradient of a parameter that no rank used."""
    # Nearly always the first values tell, and the others need not be read.
    return not values[:256].any() and not values.any()
