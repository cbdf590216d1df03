"""Shared parts of the experiments' figures. They are drawn off screen and do not touch matplotlib's global state."""

import importlib
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcomm.paper.evaluation import deviation
from qcomm.paper.results import write_atomically
from qcomm.recipes import RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which remain distinct under colour-blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BASELINE_COLOUR = "#777777"
_DPI = 110


def check_available() -> None:
    """Checks for matplotlib, and for scipy of the intervals, before hours of runs.

    Raises:
        RecipeError: one of them is not installed.
    """
    try:
        for name in ("matplotlib", "scipy"):
            importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"plots and intervals need {error.name}, which is not installed: pip install 'qcomm[train]'"
        ) from error


def figure(
    rows: int, columns: int, title: str, width: float = 4.2, height: float = 3.4, **subplots: Any
) -> tuple["Figure", list[list["Axes"]]]:
    """Returns a figure of panels of ``width`` x ``height`` inches, and the panels by row and column."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    drawn.suptitle(title, fontsize=11)
    panels = drawn.subplots(rows, columns, squeeze=False, **subplots)
    for panel in panels.flat:
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    return drawn, [list(row) for row in panels]


def curve(panel: "Axes", series: Sequence[Sequence[float]], label: str | None, colour: str, style: str = "-") -> None:
    """Draws the mean of the series over epochs 1, 2, ... with a band of one standard deviation."""
    epochs = range(1, len(series[0]) + 1)
    columns = list(zip(*series, strict=True))
    mean = [statistics.fmean(values) for values in columns]
    around = [deviation(values) for values in columns]
    panel.plot(epochs, mean, style, color=colour, label=label, linewidth=1.4)
    low = [m - d for m, d in zip(mean, around, strict=True)]
    high = [m + d for m, d in zip(mean, around, strict=True)]
    panel.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)


def points(panel: "Axes", position: float, values: Sequence[float], colour: str) -> None:
    """Draws every run as a dot, and beside them their mean with a bar of one standard deviation on either side."""
    panel.plot([position + 0.1] * len(values), values, "o", color=colour, alpha=0.4, markersize=4.5, markeredgewidth=0)
    panel.errorbar(
        position - 0.05, statistics.fmean(values), deviation(values), fmt="D", color=colour, capsize=4, markersize=5
    )


def baseline(panel: "Axes", values: Sequence[float], label: str) -> None:
    """Draws a line across the panel with a band of one standard deviation."""
    mean, around = statistics.fmean(values), deviation(values)
    panel.axhline(mean, color=BASELINE_COLOUR, linestyle="--", linewidth=1.2, label=label)
    panel.axhspan(mean - around, mean + around, color=BASELINE_COLOUR, alpha=0.15, linewidth=0)


def name_epochs(panel: "Axes") -> None:
    """Labels the axis of epochs, with whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    panel.set_xlabel("epoch")


def save(drawn: "Figure", path: Path) -> None:
    """Writes a PNG; an existing file is replaced atomically."""
    image = io.BytesIO()
    drawn.savefig(image, format="png", dpi=_DPI)
    write_atomically(path, image.getvalue())
