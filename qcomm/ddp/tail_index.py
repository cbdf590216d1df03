"""The tail index of gradient noise: 2 for Gaussian values, less for values with heavier tails, 1 for Cauchy's.

Sums of ``k`` independent values of an alpha-stable law are ``k ** (1 / alpha)`` times as wide as one of them. So for
values X and their sums Y in groups of k::

    1 / alpha = (mean log |Y| - mean log |X|) / log k

Source: M. Mohammadi, A. Mohammadpour and H. Ogata, "On estimating the tail index and the spectral measure of
multivariate alpha-stable distributions", Metrika 78, 2015; used for gradients by U. Simsekli, L. Sagun and
M. Gurbuzbalaban, "A tail-index analysis of stochastic gradient noise in deep neural networks", ICML 2019.

The rule holds for values of one width. Values of several widths, each Gaussian, look heavy-tailed to it, because a
group's sum follows its widest values. The elements of a gradient are such values. :class:`TailMeter` therefore applies
the rule twice: to sums over elements, as the source does, and to sums of each element over steps.
"""

import math

import torch

__all__ = ["ELEMENTS", "MIN_VALUES", "STEPS", "TailMeter", "from_sums", "tail_index"]

ELEMENTS = 32  # in a group of elements
STEPS = 16  # in a group of steps
# Fewer values than this are 8 groups of elements or less.
MIN_VALUES = 256


def tail_index(values: torch.Tensor, group: int = ELEMENTS) -> float:
    """Returns the tail index of independent values around zero.

    Zeros are left out. Its standard error is about ``4.4 sqrt(group / n) / log(group)`` for n Gaussian values, and a
    quarter of that for Cauchy's.

    Args:
        values: any shape, floating-point, finite.
        group: number of values that are added. Larger groups see more of the tail, and are fewer.

    Raises:
        ValueError: fewer than 256 values other than 0, or a ``group`` below 2 or beyond half of their number.

    Example:
        >>> values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> round(tail_index(values), 1), round(tail_index(values / values.roll(1)), 1)
        (2.0, 1.0)
    """
    kept = values.reshape(-1)
    kept = kept[kept != 0]
    if kept.numel() < MIN_VALUES:
        raise ValueError(f"values must have at least {MIN_VALUES} elements other than 0, got {kept.numel()}")
    if not 2 <= group <= kept.numel() // 2:
        raise ValueError(f"group must be in 2..{kept.numel() // 2} for these values, got {group}")
    return 1.0 / _inverse(kept, group)


def _inverse(values: torch.Tensor, group: int) -> float:
    """Returns 1 / alpha of values that are not 0. A group has elements from all over the tensor.

    Neighbours in a tensor are correlated, which would widen their sums.
    """
    groups = values.numel() // group
    values = values[: groups * group]
    sums = values.view(group, groups).sum(0)
    sums = sums[sums != 0]
    return float(sums.abs().log().mean() - values.abs().log().mean()) / math.log(group)


class TailMeter:
    """Measures ``1 / alpha`` of several tensors, of which each step brings a sample.

    Args:
        count: number of tensors.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._sums: torch.Tensor | None = None
        self._logs: torch.Tensor | None = None
        self._added = 0

    def add(self, sample: torch.Tensor) -> list[list[float]]:
        """Adds a step.

        Args:
            sample: ``[count, n]``, the same elements of each tensor in every step, n a multiple of ``ELEMENTS``.

        Returns:
            For each tensor 1 / alpha over elements and the number of measurements, 0 or 1, and the same over steps. The
            latter comes once in ``STEPS`` steps.
        """
        logs = sample.abs().log()
        found = [[*pair, 0.0, 0.0] for pair in self._over_elements(sample, logs)]
        if self._sums is None or self._logs is None:
            self._sums, self._logs = torch.zeros_like(sample), torch.zeros_like(sample)
        self._sums += sample
        self._logs += logs  # minus infinity for an element that is 0 in one of the steps
        self._added += 1
        if self._added == STEPS:
            for row, pair in zip(found, _over_steps(self._sums.abs().log(), self._logs / STEPS), strict=True):
                row[2:] = pair
            self._sums, self._logs, self._added = None, None, 0
        return found

    def _over_elements(self, sample: torch.Tensor, logs: torch.Tensor) -> list[tuple[float, float]]:
        sums = sample.view(self._count, ELEMENTS, -1).sum(1)
        inverses = ((sums.abs().log().mean(1) - logs.mean(1)) / math.log(ELEMENTS)).tolist()
        return [
            (inverse, 1.0) if math.isfinite(inverse) else _without_zeros(sample[number])
            for number, inverse in enumerate(inverses)
        ]


def _without_zeros(values: torch.Tensor) -> tuple[float, float]:
    kept = values[values != 0]
    return (_inverse(kept, ELEMENTS), 1.0) if kept.numel() >= MIN_VALUES else (0.0, 0.0)


def _over_steps(sums: torch.Tensor, logs: torch.Tensor) -> list[tuple[float, float]]:
    found = []
    for inverses in (sums - logs) / math.log(STEPS):
        kept = inverses[inverses.isfinite()]
        found.append((float(kept.mean()), 1.0) if kept.numel() >= MIN_VALUES else (0.0, 0.0))
    return found


def from_sums(total: float, number: float) -> float | None:
    """Returns the tail index from a sum of ``1 / alpha`` and their number; None for none, and where it is not positive.

    Example:
        >>> from_sums(1.0, 2.0), from_sums(0.0, 0.0)
        (2.0, None)
    """
    return number / total if number and total > 0 else None
