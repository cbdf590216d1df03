"""The initial steps of the hook: uncompressed, or on a grid that coarsens towards its end value.

Gradients change fastest at the beginning. The residuals of a coarse grid, worth several steps, are then old when they
arrive. In warm-up the hook therefore sends float32, or it begins with a fine step and lengthens it in a few stages of
equal length, each longer than the last by the same factor::

    steps    1 ... 25   26 ... 50   51 ... 75   76 ... 100   101 ...
    step     1.00       1.34        1.79        2.39         3.20        WarmUp(100, 1.0) before SigmaGrid(step=3.2)

A stage has a configuration of its own, on which ranks agree as on any other.
"""

from dataclasses import dataclass, replace

from qcomm.codec import SigmaGrid
from qcomm.collectives import ReduceOptions, with_step

__all__ = ["WarmUp"]

STAGES = 4


@dataclass(frozen=True)
class WarmUp:
    """The initial ``steps`` steps: uncompressed if ``step`` is None, otherwise on grids from ``step`` on.

    Example:
        >>> warm_up = WarmUp(steps=100, step=1.0)
        >>> [warm_up.stage(number) for number in (1, 25, 26, 100, 101)]
        [0, 0, 1, 3, None]
        >>> options = ReduceOptions(SigmaGrid(step=3.2))
        >>> [round(warm_up.options(options, stage).grid.step, 2) for stage in (0, 1, 2, 3)]
        [1.0, 1.34, 1.79, 2.39]
    """

    steps: int
    step: float | None = None

    def stage(self, number: int) -> int | None:
        """Returns the stage of step ``number``, which counts from 1; None after warm-up."""
        if number > self.steps:
            return None
        return 0 if self.step is None else (number - 1) * STAGES // self.steps

    def is_exact(self, stage: int | None) -> bool:
        """Returns whether gradients travel uncompressed in a stage."""
        return stage is not None and self.step is None

    def options(self, options: ReduceOptions, stage: int | None) -> ReduceOptions:
        """Returns the options of a stage; ``options`` are those after warm-up."""
        if stage is None or self.step is None or not isinstance(options.grid, SigmaGrid):
            return options
        step = self.step * (options.grid.step / self.step) ** (stage / STAGES)
        mean_step = None if options.mean_step is None else min(options.mean_step, step)
        return replace(options, grid=replace(options.grid, step=step), mean_step=mean_step)

    def check(self, options: ReduceOptions) -> None:
        """Checks that warm-up can precede these options.

        Raises:
            TypeError, ValueError: naming the option, its value, and what is allowed.

        Example:
            >>> WarmUp(10, 2.0).check(ReduceOptions(SigmaGrid(step=1.0)))
            Traceback (most recent call last):
                ...
            ValueError: warmup_step must be at most the grid's step, 1.0, towards which it coarsens; got 2.0
        """
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"warmup_steps must be an int, got {type(self.steps).__name__}")
        if self.steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.steps}")
        if self.step is None:
            return
        if not isinstance(options.grid, SigmaGrid):
            raise ValueError(f"warmup_step must be None with a RangeGrid, which has no step, got {self.step}")
        first = with_step("warmup_step", self.step, options.grid)
        if not self.steps:
            raise ValueError(f"warmup_step must be None without warmup_steps, got {self.step}; pass warmup_steps too")
        if first.step > options.grid.step:
            raise ValueError(
                f"warmup_step must be at most the grid's step, {options.grid.step}, towards which it coarsens; "
                f"got {self.step}"
            )

    def describe(self) -> dict[str, str]:
        """Returns the options as text, for the comparison between ranks."""
        return {"warmup_steps": str(self.steps), "warmup_step": str(self.step)}
