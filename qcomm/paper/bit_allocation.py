"""Figure 3.4: accuracy and epochs to convergence for several ceilings and floors of N."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcomm.paper import plots
from qcomm.paper.evaluation import (
    Row,
    Run,
    best_accuracy,
    convergence_epoch,
    epoch_mean,
    paired,
    plus_minus,
    select,
    spread,
    with_interval,
)
from qcomm.paper.experiment import Claim, Experiment
from qcomm.paper.results import Document
from qcomm.paper.settings import Exchange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOAT = Exchange()


def _entropy_chosen(floor: int, bits: int) -> Exchange:
    return Exchange("grid", c=floor, entropy_bits=bits)


SAME_CEILING = tuple(_entropy_chosen(floor, 10 - floor) for floor in (2, 4, 5, 6, 10))
SAME_BINS = tuple(_entropy_chosen(floor, 4) for floor in (2, 4, 5, 6))
SETTINGS = (*SAME_CEILING, *(exchange for exchange in SAME_BINS if exchange not in SAME_CEILING))


def summarise(runs: Sequence[Run]) -> list[Row]:
    """A row per setting, the baseline first."""
    baseline = select(runs, FLOAT)
    rows = []
    for exchange in (FLOAT, *SETTINGS):
        chosen = select(runs, exchange)
        rows.append(
            {
                "setting": exchange.label,
                "test_accuracy": spread([best_accuracy(run) for run in chosen]),
                "accuracy_minus_float": paired(chosen, baseline, best_accuracy),
                "epochs": spread([float(convergence_epoch(run)) for run in chosen]),
                "epochs_minus_float": paired(chosen, baseline, lambda run: float(convergence_epoch(run))),
                "raw_bits": spread([epoch_mean("raw_bits")(run) for run in chosen]),
                "huffman_bits": spread([epoch_mean("huffman_bits")(run) for run in chosen]),
            }
        )
    return rows


def claim(runs: Sequence[Run], rows: Sequence[Row]) -> list[Claim]:
    """Accuracy and convergence of the settings that the paper recommends."""
    by_label = {row["setting"]: row for row in rows}
    claims = [
        {
            "quantity": f"accuracy at {label} minus baseline, points",
            "paper": paper,
            "here": with_interval(by_label[label]["accuracy_minus_float"]),
        }
        for label, paper in (("10:6", "above the baseline"), ("9:5", "marginally below the baseline"))
    ]
    nine, ten = select(runs, _entropy_chosen(5, 4)), select(runs, _entropy_chosen(5, 5))
    claims.append(
        {
            "quantity": "accuracy at 9:5 minus that at 10:5, points",
            "paper": "9:5 is better",
            "here": with_interval(paired(nine, ten, best_accuracy)),
        }
    )
    epochs = by_label["32"]["epochs"], by_label["10:6"]["epochs_minus_float"]
    claims.append(
        {
            "quantity": "epochs to convergence, baseline; 10:6 minus baseline",
            "paper": "20 % fewer at 10:6",
            "here": f"{plus_minus(epochs[0], 1)}; {with_interval(epochs[1], 1)}",
        }
    )
    fewer = [row["setting"] for row in rows if row["epochs_minus_float"]["difference"] < 0]
    claims.append(
        {
            "quantity": "settings that converge in fewer epochs than the baseline, by the mean",
            "paper": "all",
            "here": f"{len(fewer)} of {len(SETTINGS)}",
        }
    )
    return claims


def draw(document: Document) -> "Figure":
    """Above accuracy, below epochs; at the left the ceiling is fixed, at the right the number of bins."""
    runs = document["runs"]
    title = f"Bit allocation, ceiling:floor ({document['settings']['dataset']})"
    figure, panels = plots.figure(2, 2, title, 4.6, 3.2, sharey="row")
    floats = select(runs, FLOAT)
    for column, exchanges in enumerate((SAME_CEILING, SAME_BINS)):
        for row, measure in enumerate((best_accuracy, convergence_epoch)):
            panel = panels[row][column]
            plots.baseline(
                panel, [float(measure(run)) for run in floats], f"float32, mean ± deviation of {len(floats)}"
            )
            for position, exchange in enumerate(exchanges):
                values = [float(measure(run)) for run in select(runs, exchange)]
                plots.points(panel, position, values, plots.COLOURS[row])
            _name_positions(panel, exchanges)
    panels[0][0].set_title("ceiling 10 bits", fontsize=10)
    panels[0][1].set_title("16 bins (M = 4)", fontsize=10)
    panels[0][0].set_ylabel("test accuracy at the best epoch, %")
    panels[1][0].set_ylabel("epochs to the best validation accuracy")
    for panel in panels[1]:
        panel.set_xlabel("ceiling:floor, bits; dots: runs, diamonds: mean ± deviation")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8)
    return figure


def _name_positions(panel: "Axes", exchanges: Sequence[Exchange]) -> None:
    panel.set_xticks(range(len(exchanges)), [exchange.label for exchange in exchanges])
    panel.set_xlim(-0.6, len(exchanges) - 0.4)


EXPERIMENT = Experiment(
    name="bit-allocation",
    help="Figure 3.4: accuracy and epochs to convergence for 8 settings of ceiling and floor.",
    arms=(("uniform", FLOAT), *(("uniform", exchange) for exchange in SETTINGS)),
    quantities=("validation_accuracy", "test_accuracy", "raw_bits", "huffman_bits"),
    summarise=summarise,
    claim=claim,
    draw=draw,
)
