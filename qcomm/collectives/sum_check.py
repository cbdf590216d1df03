"""A check of sums over all ranks: their values have to add up to what the ranks' own values add up to.

gloo adds values on their way, and a value that is damaged before it is added gives all ranks the same wrong sum, which
no comparison between them finds. So each rank adds up its values ``t`` in float64, segment by segment, and the ranks
sum these numbers as well, over the same connections::

    A = sum_r sum_i t(r, i)      B = sum_r sum_i |t(r, i)|      S = sum_i s(i), of the sums s that came back

With W ranks, segments of n values, and ``u`` and ``v = 2^-53`` half the distance of 1.0 to the next number of the
values' dtype and of float64:

- ``s(i)`` is rounded W - 1 times, in whatever order, so it is within ``g |t|`` of exact, ``g = (1 + u)^(W-1) - 1``.
- A, B and S are rounded n + W times at most, in whatever order.

Together ``|S - A| <= (g + 3 (n + W) v) B`` to first order. :data:`HIGHER_ORDERS` is more than all others together,
for W up to 2^16. A processor may take numbers below the smallest normal one for 0, where values are read and where they
are added: less than 4 n W such numbers. Whatever is farther apart was damaged: the check raises no false alarm.

It finds any damage that moves S by more than twice that bound, about ``2 (W - 1) u`` of the sum of all ranks'
magnitudes in the segment, and every sum that is not finite where it has to be. Smaller damage is no larger than what
rounding itself may do, and damage in two places of a segment may cancel. The numbers take 16 bytes a segment.

K.-H. Huang, J. A. Abraham, "Algorithm-based fault tolerance for matrix operations", IEEE Trans. Comput. C-33, 1984.
"""

import math
from collections.abc import Sequence

import torch

from qcomm.codec import CPU
from qcomm.errors import CollectiveError

__all__ = ["SumCheck", "segment_size"]

# A factor on bounds of first order.
HIGHER_ORDERS = 1.001
# 16-bit numbers are rounded coarsely, and a short segment has a tighter bound.
SEGMENT_BYTES = {2: 1 << 10, 4: 1 << 14, 8: 1 << 15}
FLOAT64_UNIT = 2.0**-53
# Values at once, which stay in a processor's cache in float64; whole segments of every dtype.
BLOCK_VALUES = 1 << 16


class SumCheck:
    """What the values of all ranks add up to, before and after they are summed.

    Args:
        values: of this rank, 1-D tensors, before they are summed in place.
        world_size: number of ranks.

    Attributes:
        totals: float64; to be summed over all ranks with the values.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 3.0])
        >>> check = SumCheck([values], world_size=2)
        >>> _ = values.mul_(2), check.totals.mul_(2)  # as the sum with another rank that has the same
        >>> check.compare([values])
        >>> values[1] += 1
        >>> check.compare([values])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        qcomm.errors.CollectiveError: values 0 to 2 of a sum were damaged on their way or in memory: they add up to ...
    """

    def __init__(self, values: Sequence[torch.Tensor], world_size: int) -> None:
        self._world_size = world_size
        self.totals = torch.cat([_add_up(tensor).reshape(-1) for tensor in values])

    def compare(self, sums: Sequence[torch.Tensor]) -> None:
        """Checks the sums of all ranks' values against the sums of ``totals``.

        Raises:
            CollectiveError: some value was damaged before it was added, or on its way back.
        """
        parts = self.totals.split([2 * _segments(tensor) for tensor in sums])
        for tensor, part in zip(sums, parts, strict=True):
            self._compare(tensor, *part.view(2, -1))

    def _compare(self, sums: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
        found, limits, size = _add_up(sums)[0], torch.finfo(sums.dtype), segment_size(sums.dtype)
        rounding = math.expm1((self._world_size - 1) * math.log1p(limits.eps / 2))
        rounding += 3 * (size + self._world_size) * FLOAT64_UNIT
        flushed = 4 * size * self._world_size * torch.finfo(_arithmetic(sums.dtype)).tiny
        bound = magnitude * (HIGHER_ORDERS * rounding) + flushed
        # NaN is within no bound. A value that is not finite on some rank is no damage, nor is a sum that overflows.
        is_known = expected.isfinite() & magnitude.isfinite() & (found.isfinite() | (magnitude <= limits.max / 2))
        wrong = is_known & ~((found - expected).abs() <= bound)
        if not wrong.any():
            return
        first = int(wrong.nonzero()[0])
        last = min((first + 1) * size, sums.numel()) - 1
        raise CollectiveError(
            f"values {first * size} to {last} of a sum were damaged on their way or in memory: they add up to "
            f"{float(found[first]):.9g}, and those of all ranks to {float(expected[first]):.9g}, more than the "
            f"{float(bound[first]):.3g} apart that rounding explains"
        )


def segment_size(dtype: torch.dtype) -> int:
    """Returns the number of values whose sums are compared together.

    Example:
        >>> segment_size(torch.float32), segment_size(torch.bfloat16)
        (4096, 512)
    """
    return SEGMENT_BYTES[dtype.itemsize] // dtype.itemsize


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which values are added; 16-bit ones are rounded afterwards."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _segments(values: torch.Tensor) -> int:
    return -(-values.numel() // segment_size(values.dtype))


def _add_up(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each segment, and that of its magnitudes, in float64; the last segment may be short."""
    size = segment_size(values.dtype)
    sums = torch.empty(2, _segments(values), dtype=torch.float64, device=CPU)
    memory = torch.empty(BLOCK_VALUES, dtype=torch.float64, device=CPU)
    for first in range(0, values.numel(), BLOCK_VALUES):
        part = values[first : first + BLOCK_VALUES]
        block = memory[: _segments(part) * size]
        block[: part.numel()].copy_(part)
        block[part.numel() :].zero_()
        segments = block.view(-1, size)
        of_block = sums[:, first // size : first // size + len(segments)]
        torch.sum(segments, 1, out=of_block[0])
        torch.sum(segments.abs_(), 1, out=of_block[1])
    return sums
