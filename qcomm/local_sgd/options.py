"""How weights are exchanged: the options of an averager, checked."""

from dataclasses import dataclass

import torch

from qcomm.codec import Grid, RangeGrid, SigmaGrid
from qcomm.collectives import check_exchange

__all__ = ["EXCHANGES", "ExchangeOptions"]

EXCHANGES = ("difference", "weights")


@dataclass(frozen=True)
class ExchangeOptions:
    """Options that the averagers share; ``CompressedModelAverager`` describes them.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> ExchangeOptions().uses_feedback, ExchangeOptions(exchange="weights").chosen_grid.reconstruction
        (True, 'endpoint')
    """

    grid: Grid | None = None
    exchange: str = "difference"
    error_feedback: bool | None = None
    min_elements: int = 1024
    strategy: str = "auto"
    ranks_per_node: int | None = None
    num_threads: int = 1
    buffers_of: torch.nn.Module | None = None

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {EXCHANGES}, got {self.exchange!r}")
        check_exchange(self.chosen_grid, self.min_elements, self.strategy, self.ranks_per_node, self.num_threads)
        if not (self.error_feedback is None or isinstance(self.error_feedback, bool)):
            raise TypeError(f"error_feedback must be a bool or None, got {type(self.error_feedback).__name__}")
        if self.error_feedback and self.exchange == "weights":
            raise ValueError(
                "error_feedback must not be True with exchange='weights': what is kept of a weight is not missing from "
                "its next value, and would be added to it"
            )
        if not (self.buffers_of is None or isinstance(self.buffers_of, torch.nn.Module)):
            raise TypeError(f"buffers_of must be a torch.nn.Module or None, got {type(self.buffers_of).__name__}")

    @property
    def chosen_grid(self) -> Grid:
        """``grid``, by default one that suits what is exchanged."""
        if self.grid is None:
            return SigmaGrid(step=1.0) if self.exchange == "difference" else RangeGrid()
        return self.grid

    @property
    def uses_feedback(self) -> bool:
        """``error_feedback``, by default with differences."""
        return self.exchange == "difference" if self.error_feedback is None else self.error_feedback
