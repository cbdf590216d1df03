"""Progress reports of a run: bars on a terminal, and one line per epoch elsewhere.

Only rank 0 reports.
"""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Reporter:
    """Progress of one run; a context manager.

    Args:
        label: the run's name.
        total_steps: optimiser steps of the whole run.
        enabled: False on every rank but 0.
    """

    def __init__(self, label: str, total_steps: int, enabled: bool) -> None:
        self._label = label
        self._enabled = enabled
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if enabled and sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[result]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(f"{label:<16}", total=total_steps, result="")

    def __enter__(self) -> "Reporter":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def step(self, step: int) -> None:
        """Reports that ``step`` optimiser steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def epoch(self, epoch: int, epochs: int, train_loss: float, accuracy: float, images_per_second: float) -> None:
        """Reports that an epoch, counted from 1, was validated."""
        if self._progress:
            result = f"epoch {epoch}/{epochs}  test {accuracy:.2%}"
            self._progress.update(self._task, result=result)
        elif self._enabled:
            print(
                f"{self._label}: epoch {epoch}/{epochs}  train loss {train_loss:.4f}  test accuracy {accuracy:.2%}  "
                f"{images_per_second:.0f} images/s",
                flush=True,
            )
