"""Figures of the planner. Matplotlib is imported only when one is drawn."""

from collections.abc import Sequence
from pathlib import Path

from qcomm.planner.advice import bandwidth_text
from qcomm.planner.errors import PlanError
from qcomm.planner.plan import Prediction
from qcomm.planner.sweeps import HeatMap

__all__ = ["check_plots", "plot_efficiency", "plot_heat_map"]

DPI = 130
LEAST_FACTOR, MOST_FACTOR = 0.5, 4.0  # the ends of the map's colour scale


def check_plots() -> None:
    """Checks that plots can be drawn, before anything is computed.

    Raises:
        PlanError: matplotlib is not installed.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise PlanError(f"plots need {error.name}: pip install 'qcomm[train]', or leave out --out") from error


def plot_efficiency(rows: Sequence[Sequence[Prediction]], title: str, path: Path) -> None:
    """Draws the scaling efficiency of each method over the number of GPUs, with its likely bounds.

    Args:
        rows: one row for each number of GPUs, all of the same methods.
        title: text above the axes.
        path: file of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    gpus = [row[0].gpus for row in rows]
    for number, first in enumerate(rows[0]):
        points = [row[number] for row in rows]
        (line,) = axes.plot(gpus, [100 * p.efficiency for p in points], marker="o", markersize=4, label=first.method)
        bounds = [100 * p.efficiency_low for p in points], [100 * p.efficiency_high for p in points]
        axes.fill_between(gpus, *bounds, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.minorticks_off()
    axes.set_ylim(0, 105)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("scaling efficiency, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=9)
    figure.savefig(path)


def plot_heat_map(heat: HeatMap, title: str, path: Path) -> None:
    """Draws the speed-up of a method over another, by bandwidth and number of GPUs.

    Args:
        heat: the factors.
        title: text above the axes.
        path: file of the PNG.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    norm = TwoSlopeNorm(1.0, LEAST_FACTOR, MOST_FACTOR)
    image = axes.imshow(heat.factors, cmap="RdBu", norm=norm, aspect="auto", origin="lower")
    for i, row in enumerate(heat.factors):
        for j, factor in enumerate(row):
            dark = factor > 0.75 * MOST_FACTOR or factor < (1 + LEAST_FACTOR) / 2
            axes.text(j, i, f"{factor:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(heat.gpus)), [str(count) for count in heat.gpus])
    axes.set_yticks(range(len(heat.bandwidths)), [bandwidth_text(rate) for rate in heat.bandwidths])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("network, each node")
    axes.set_title(title, fontsize=10)
    bar = figure.colorbar(image, extend="both", ticks=[LEAST_FACTOR, 0.75, 1, 2, 3, MOST_FACTOR])
    bar.set_label(f"speed of {heat.method} over {heat.base}")
    figure.savefig(path)
