"""Filters of samples: the first partition trains on a whole batch and hands over those samples that still teach.

Source: the thesis behind ``RangeGrid``, on partition-wise learning: a loss filter that drops the fraction of a batch
with the lowest loss of the first partition, and a k-filter on large batches with a cap on what is dropped.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch

__all__ = ["KFilter", "LossFilter", "SampleFilter"]


class SampleFilter(Protocol):
    """Chooses the samples of a batch that the next partition gets."""

    def kept(self, losses: torch.Tensor, epoch: int) -> torch.Tensor:
        """Returns the places of these samples, int64, ascending.

        Args:
            losses: of the first partition, float, one per sample.
            epoch: counted from 0.
        """


@dataclass(frozen=True)
class LossFilter:
    """Drops the ``floor(fraction * n)`` samples of a batch with the lowest loss.

    Of samples with equal losses the earlier ones are dropped first. A NaN counts as the highest loss.

    Args:
        fraction: in [0, 1).
        from_epoch: the first epoch that is filtered, counted from 0.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> LossFilter(0.5).kept(torch.tensor([0.3, 0.1, 0.1, 0.2]), epoch=0)
        tensor([0, 3])
    """

    fraction: float = 0.25
    from_epoch: int = 0

    def __post_init__(self) -> None:
        _check_share("fraction", self.fraction)
        _check_epoch(self.from_epoch)

    def kept(self, losses: torch.Tensor, epoch: int) -> torch.Tensor:
        """Returns the places of the samples that are kept, see :class:`SampleFilter`."""
        dropped = _share_of(self.fraction, losses.numel()) if epoch >= self.from_epoch else 0
        return _without_lowest(losses, dropped)


@dataclass(frozen=True)
class KFilter:
    """Drops the samples of a batch whose loss is less than the batch's mean loss divided by k.

    At most ``floor(cap * n)`` samples are dropped, those with the lowest loss, ties as in :class:`LossFilter`. If some
    loss is not finite, the batch is not filtered. The batch has to be large, or its mean is no measure.

    The sources name k, the cap and the large batches, not the rule itself; this rule is a reading of them.

    Args:
        k: at least 1.
        cap: maximum fraction that is dropped, in [0, 1).
        from_epoch: the first epoch that is filtered, counted from 0.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> KFilter(k=10).kept(torch.tensor([2.0, 0.01, 1.0, 0.02]), epoch=0)
        tensor([0, 2])
    """

    k: float = 10.0
    cap: float = 0.6
    from_epoch: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.k):
            raise TypeError(f"k must be a number, got {type(self.k).__name__}")
        if not 1 <= self.k < math.inf:
            raise ValueError(f"k must be at least 1 and finite, got {self.k}")
        _check_share("cap", self.cap)
        _check_epoch(self.from_epoch)

    def kept(self, losses: torch.Tensor, epoch: int) -> torch.Tensor:
        """Returns the places of the samples that are kept, see :class:`SampleFilter`."""
        wide = losses.detach().double()
        below = int((wide < wide.mean() / self.k).sum()) if bool(wide.isfinite().all()) else 0
        dropped = min(below, _share_of(self.cap, losses.numel())) if epoch >= self.from_epoch else 0
        return _without_lowest(losses, dropped)


def _without_lowest(losses: torch.Tensor, dropped: int) -> torch.Tensor:
    return losses.detach().sort(stable=True).indices[dropped:].sort().values


def _share_of(fraction: float, count: int) -> int:
    """Returns ``floor(fraction * count)`` of the decimal number that was written: 0.29 of 100 is 29, not 28."""
    return math.floor(Fraction(str(float(fraction))) * count)


def _check_share(name: str, value: object) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= float(str(value)) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def _check_epoch(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"from_epoch must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"from_epoch must be at least 0, got {value}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
