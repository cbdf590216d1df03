"""Figure 3.4: accuracy and epochs to convergence for several ceilings and floors of N."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qcomm.paper import plots
from qcomm.paper.evaluation import (
    Row,
    Run,
    best_accuracy,
    convergence_epoch,
    epoch_mean,
    epochs_to_level,
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
    """Returns a row per setting, the baseline first."""
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
                "level_epochs": spread([epochs_to_level(run, baseline) for run in chosen]),
                "level_epochs_minus_float": paired(chosen, baseline, lambda run: epochs_to_level(run, baseline)),
                "raw_bits": spread([epoch_mean("raw_bits")(run) for run in chosen]),
                "huffman_bits": spread([epoch_mean("huffman_bits")(run) for run in chosen]),
            }
        )
    return rows


def claim(runs: Sequence[Run], rows: Sequence[Row]) -> list[Claim]:
    """Compares accuracy and convergence of the settings that the paper recommends."""
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
    baseline = select(runs, FLOAT)
    last = sum(convergence_epoch(run) >= len(run["history"]["test_accuracy"]) - 1 for run in baseline)
    ended = f"{last} of {len(baseline)} baseline runs were best in their last two epochs"
    for name, key, remark in (
        ("the best validation accuracy", "epochs", f"; {ended}"),
        ("99 % of the baseline's best", "level_epochs", ""),
    ):
        epochs, difference = by_label["32"][key], by_label["10:6"][f"{key}_minus_float"]
        claims.append(
            {
                "quantity": f"epochs to {name}: baseline; 10:6 minus baseline",
                "paper": "20 % fewer at 10:6",
                "here": f"{plus_minus(epochs, 1)}; {with_interval(difference, 1)}{remark}",
            }
        )
    fewer = [row["setting"] for row in rows if row["level_epochs_minus_float"]["difference"] < 0]
    claims.append(
        {
            "quantity": "settings that reach 99 % of the baseline's best in fewer epochs, by the mean",
            "paper": "all (to the peak)",
            "here": f"{len(fewer)} of {len(SETTINGS)}: {', '.join(fewer) or 'none'}",
        }
    )
    return claims


def draw(document: Document) -> "Figure":
    """Draws accuracy, epochs to the peak and to a level, for a fixed ceiling (left) and fixed bins (right)."""
    runs = document["runs"]
    title = f"Bit allocation, ceiling:floor ({document['settings']['dataset']})"
    floats = select(runs, FLOAT)
    measures: dict[str, Callable[[Run], float]] = {
        "test accuracy at the best epoch, %": best_accuracy,
        "epochs to the best\nvalidation accuracy": lambda run: float(convergence_epoch(run)),
        "epochs to 99 % of float32's best\nvalidation accuracy": lambda run: epochs_to_level(run, floats),
    }
    figure, panels = plots.figure(len(measures), 2, title, 4.6, 2.8, sharey="row")
    for column, exchanges in enumerate((SAME_CEILING, SAME_BINS)):
        for row, (name, measure) in enumerate(measures.items()):
            panel = panels[row][column]
            plots.baseline(panel, [measure(run) for run in floats], f"float32, mean ± deviation of {len(floats)}")
            for position, exchange in enumerate(exchanges):
                plots.points(panel, position, [measure(run) for run in select(runs, exchange)], plots.COLOURS[row])
            _name_positions(panel, exchanges)
            panels[row][0].set_ylabel(name)
    panels[0][0].set_title("ceiling 10 bits", fontsize=10)
    panels[0][1].set_title("16 bins (M = 4)", fontsize=10)
    for panel in panels[-1]:
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
