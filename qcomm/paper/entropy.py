"""Figure 3.3: entropy of the weights against the epoch, for several sample rates and numbers of bins."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from qcomm.paper import plots
from qcomm.paper.evaluation import Row, Run, select, spread
from qcomm.paper.experiment import Claim, Experiment
from qcomm.paper.network import LAYER_NAMES
from qcomm.paper.results import Document
from qcomm.paper.settings import INITS, Exchange
from qcomm.paper.training import ENTROPY_BITS, PROBE_BITS, PROBE_FRACTIONS, SAMPLE_FRACTION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT = Exchange()
_STYLES: tuple[Literal[":", "-.", "--", "-"], ...] = (":", "-.", "--", "-")  # one per entry of PROBE_FRACTIONS


def _series(run: Run, layer: int, bits: int, fraction: float) -> list[float]:
    row, column = PROBE_BITS.index(bits), PROBE_FRACTIONS.index(fraction)
    return [values[layer][row][column] for values in run["history"]["probe"]]


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Returns a row per initialisation and layer: H of all weights over time, and the deficit of a 3 % sample."""
    rows = []
    for init in INITS:
        chosen = select(runs, FLOAT, init)
        for layer, name in enumerate(LAYER_NAMES):
            whole = [_series(run, layer, ENTROPY_BITS, 1.0) for run in chosen]
            sampled = [_series(run, layer, ENTROPY_BITS, SAMPLE_FRACTION) for run in chosen]
            ours = [[values[layer] for values in run["history"]["sampled_entropy"]] for run in chosen]
            finer = [_series(run, layer, ENTROPY_BITS + 1, 1.0) for run in chosen]
            rows.append(
                {
                    "init": init,
                    "layer": name,
                    "first": spread([values[0] for values in whole]),
                    "last": spread([values[-1] for values in whole]),
                    "change": spread([values[-1] - values[0] for values in whole]),
                    "paper_sample_bias": _mean_difference(sampled, whole),
                    "own_sample_bias": _mean_difference(ours, whole),
                    "one_more_bit": _mean_difference(finer, whole),
                }
            )
    return rows


def _mean_difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    pairs = [(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
    return round(statistics.fmean(a - b for a, b in pairs), 4)


def claim(runs: Sequence[Run], rows: Sequence[Row]) -> list[Claim]:
    """Checks whether H falls, whether the sample rate matters, and whether one more bit adds one bit of entropy."""
    claims = []
    for init in INITS:
        chosen = [row for row in rows if row["init"] == init]
        claims.append(
            {
                "quantity": f"H, epoch 1 -> last, layers 1, 2, 3, {init} initialisation, bits",
                "paper": "falls during training",
                "here": ", ".join(f"{row['first']['mean']:.2f} -> {row['last']['mean']:.2f}" for row in chosen),
            }
        )
    uniform = [row for row in rows if row["init"] == "uniform"]
    for name, key in (("a random 3 %", "paper_sample_bias"), ("3 %, but at least 1024 values", "own_sample_bias")):
        claims.append(
            {
                "quantity": f"H of {name} minus H of all weights, layers 1, 2, 3, bits",
                "paper": "the sample rate hardly matters",
                "here": ", ".join(f"{row[key]:+.2f}" for row in uniform),
            }
        )
    claims.append(
        {
            "quantity": "H of 32 bins minus H of 16 bins, layers 1, 2, 3, bits",
            "paper": "about 1",
            "here": ", ".join(f"{row['one_more_bit']:+.2f}" for row in uniform),
        }
    )
    return claims


def draw(document: Document) -> "Figure":
    """Draws a column for each number of bins, as in the paper's panels, and a row for each initialisation."""
    from matplotlib.lines import Line2D

    title = f"Entropy of the weights, by sample rate and bins ({document['settings']['dataset']}, float32 exchange)"
    figure, panels = plots.figure(len(INITS), len(PROBE_BITS), title, 3.2, 2.5, sharex=True, sharey=True)
    for row, init in enumerate(INITS):
        chosen = select(document["runs"], FLOAT, init)
        for column, bits in enumerate(PROBE_BITS):
            panel = panels[row][column]
            for layer in range(len(LAYER_NAMES)):
                for fraction, style in zip(PROBE_FRACTIONS, _STYLES, strict=True):
                    series = [_series(run, layer, bits, fraction) for run in chosen]
                    plots.curve(panel, series, None, plots.COLOURS[layer], style)
            if row == 0:
                panel.set_title(f"{1 << bits} bins", fontsize=10)
        panels[row][0].set_ylabel(f"{init} initialisation\nH, bits")
    for panel in panels[-1]:
        plots.name_epochs(panel)
    handles = [Line2D([], [], color=plots.COLOURS[k], label=name) for k, name in enumerate(LAYER_NAMES)]
    handles += [
        Line2D([], [], color="black", linestyle=style, label=f"sample of {fraction:.0%}")
        for fraction, style in zip(PROBE_FRACTIONS, _STYLES, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="entropy",
    help="Figure 3.3: entropy of the weights against the epoch, for several sample rates and numbers of bins.",
    arms=tuple((init, FLOAT) for init in INITS),
    quantities=("probe", "sampled_entropy"),
    summarise=summarise,
    claim=claim,
    draw=draw,
)
