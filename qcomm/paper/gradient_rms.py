"""Figure 3.2: RMS of the gradients by layer and epoch, and its correlation with the entropy of the weights."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcomm.paper import plots
from qcomm.paper.evaluation import Row, Run, select, spread
from qcomm.paper.experiment import Claim, Experiment
from qcomm.paper.network import LAYER_NAMES
from qcomm.paper.results import Document
from qcomm.paper.settings import INITS, Exchange

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT = Exchange()


def correlation(run: Run, layer: int) -> float | None:
    """Returns Pearson's correlation of log2(G + 1) with H over the epochs.

    It is None for fewer than three epochs or constant values.
    """
    history = run["history"]
    bits = [math.log2(values[layer] + 1) for values in history["gradient_rms"]]
    entropies = [values[layer] for values in history["entropy"]]
    if len(bits) < 3 or len(set(bits)) == 1 or len(set(entropies)) == 1:
        return None
    return statistics.correlation(bits, entropies)


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Returns a row per initialisation and layer."""
    rows = []
    for init in INITS:
        chosen = select(runs, FLOAT, init)
        for layer, name in enumerate(LAYER_NAMES):
            gradients = [[values[layer] for values in run["history"]["gradient_rms"]] for run in chosen]
            correlations = [value for run in chosen if (value := correlation(run, layer)) is not None]
            rows.append(
                {
                    "init": init,
                    "layer": name,
                    "first_rms": statistics.fmean(values[0] for values in gradients),
                    "last_rms": statistics.fmean(values[-1] for values in gradients),
                    "mean_bits": statistics.fmean(math.log2(g + 1) for values in gradients for g in values),
                    "correlation": spread(correlations) if correlations else None,
                    "correlation_range": [min(correlations), max(correlations)] if correlations else None,
                }
            )
    return rows


def _all_correlations(rows: Sequence[Row], init: str) -> str:
    ranges = [row["correlation_range"] for row in rows if row["init"] == init]
    if None in ranges:
        return "too few epochs"
    return ", ".join(f"{low:+.2f} … {high:+.2f}" for low, high in ranges)


def claim(runs: Sequence[Run], rows: Sequence[Row]) -> list[Claim]:
    """Compares the correlation, the order of the layers, and the size of log(G + 1)."""
    claims = [
        {
            "quantity": f"correlation of log2(G + 1) with H, layers 1, 2, 3, {init} initialisation",
            "paper": "always above 0.75, often above 0.95",
            "here": _all_correlations(rows, init),
        }
        for init in INITS
    ]
    uniform = [row for row in rows if row["init"] == "uniform"]
    claims += [
        {
            "quantity": f"RMS of the gradient, first -> last epoch, layers 1, 2, 3, {init} initialisation",
            "paper": "falls; larger in higher layers",
            "here": ", ".join(
                f"{row['first_rms']:.2g} -> {row['last_rms']:.2g}" for row in rows if row["init"] == init
            ),
        }
        for init in INITS
    ]
    claims.append(
        {
            "quantity": "log2(G + 1), bits, mean of layers 1, 2, 3",
            "paper": "decides on N",
            "here": ", ".join(f"{row['mean_bits']:.4f}" for row in uniform),
        }
    )
    return claims


def draw(document: Document) -> "Figure":
    """Draws the RMS above the entropy, a column for each initialisation."""
    title = f"Gradients and entropy by layer ({document['settings']['dataset']}, float32 exchange)"
    figure, panels = plots.figure(2, len(INITS), title, 3.6, 2.8, sharex=True, sharey="row")
    for column, init in enumerate(INITS):
        chosen = select(document["runs"], FLOAT, init)
        for layer, name in enumerate(LAYER_NAMES):
            for row, quantity in enumerate(("gradient_rms", "entropy")):
                series = [[values[layer] for values in run["history"][quantity]] for run in chosen]
                plots.curve(panels[row][column], series, name, plots.COLOURS[layer])
        panels[0][column].set_title(f"{init} initialisation", fontsize=10)
        panels[0][column].set_yscale("log")
        plots.name_epochs(panels[1][column])
    panels[0][0].set_ylabel("RMS of a batch's gradient")
    panels[1][0].set_ylabel("entropy H of 16 bins, bits")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="gradient-rms",
    help="Figure 3.2: RMS of the gradients by layer and epoch, and its correlation with the entropy of the weights.",
    arms=tuple((init, FLOAT) for init in INITS),
    quantities=("gradient_rms", "entropy"),
    summarise=summarise,
    claim=claim,
    draw=draw,
)
