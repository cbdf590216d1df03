"""Options of the averagers and of DiLoCo: those of the exchange of weights, and those of its mean."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from qcomm.codec import Grid, RangeGrid, SigmaGrid
from qcomm.collectives import ReduceKeywords, ReduceOptions

__all__ = ["EXCHANGES", "ExchangeOptions", "checked_int", "is_member"]

EXCHANGES = ("difference", "weights")


@dataclass(frozen=True)
class ExchangeOptions:
    """Options that the averagers share; ``CompressedModelAverager`` describes them. :meth:`of` makes them.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> ExchangeOptions.of().uses_feedback, ExchangeOptions.of(exchange="weights").reduce.grid.reconstruction
        (True, 'endpoint')
    """

    reduce: ReduceOptions
    exchange: str = "difference"
    error_feedback: bool | None = None
    buffers_of: torch.nn.Module | None = None

    @classmethod
    def of(
        cls,
        grid: Grid | None = None,
        exchange: str = "difference",
        error_feedback: bool | None = None,
        buffers_of: torch.nn.Module | None = None,
        **options: Unpack[ReduceKeywords],
    ) -> "ExchangeOptions":
        """Returns the options of an averager's keyword arguments; the default grid suits the exchange."""
        if grid is None:
            grid = RangeGrid() if exchange == "weights" else SigmaGrid(step=1.0)
        return cls(ReduceOptions(grid, **options), exchange, error_feedback, buffers_of)

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {EXCHANGES}, got {self.exchange!r}")
        if not (self.error_feedback is None or isinstance(self.error_feedback, bool)):
            raise TypeError(f"error_feedback must be a bool or None, got {type(self.error_feedback).__name__}")
        if self.error_feedback and self.exchange == "weights":
            raise ValueError(
                "error_feedback must not be True with exchange='weights': the error of a weight is not missing from "
                "its next value, and would be added to it"
            )
        if self.uses_feedback:
            self.reduce.check_feedback()
        if self.reduce.device_codec:
            raise ValueError(
                "device_codec must be False: weights are compared with the last common ones in host memory"
            )
        if not (self.buffers_of is None or isinstance(self.buffers_of, torch.nn.Module)):
            raise TypeError(f"buffers_of must be a torch.nn.Module or None, got {type(self.buffers_of).__name__}")

    @property
    def uses_feedback(self) -> bool:
        """Returns True if the error of a difference is kept for the next one; by default with differences."""
        return self.exchange == "difference" if self.error_feedback is None else self.error_feedback


def checked_int(name: str, value: object, smallest: int) -> int:
    """Returns ``value`` if it is an int of at least ``smallest``; raises TypeError or ValueError with ``name``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < smallest:
        raise ValueError(f"{name} must be >= {smallest}, got {value}")
    return value


def is_member(group: object) -> bool:
    """Returns True if this process belongs to a group that ``dist.new_group`` returned."""
    return group is not dist.GroupMember.NON_GROUP_MEMBER
