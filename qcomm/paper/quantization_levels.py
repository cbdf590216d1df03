"""Figure 3.1: accuracy against a fixed number of bits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcomm.paper import plots
from qcomm.paper.evaluation import Row, Run, best_accuracy, paired, select, spread, with_interval
from qcomm.paper.experiment import Claim, Experiment
from qcomm.paper.results import Document
from qcomm.paper.settings import Exchange

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A packet's grid ends at 16 bits; the paper goes on to 30.
BITS = (2, 3, 4, 5, 6, 8, 10, 16)
FLOAT = Exchange()


def _fixed(bits: int) -> Exchange:
    return Exchange("grid", c=bits, entropy_bits=0)


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Returns a row per number of bits, the baseline last."""
    baseline = select(runs, FLOAT)
    rows = []
    for bits in (*BITS, 32):
        chosen = baseline if bits == 32 else select(runs, _fixed(bits))
        rows.append(
            {
                "bits": bits,
                "test_accuracy": spread([best_accuracy(run) for run in chosen]),
                "minus_float": paired(chosen, baseline, best_accuracy),
            }
        )
    return rows


def claim(runs: Sequence[Run], rows: Sequence[Row]) -> list[Claim]:
    """Finds the number of bits from which accuracy no longer depends on it."""
    by_bits = {row["bits"]: row["minus_float"] for row in rows}
    return [
        {
            "quantity": "accuracy with 8 bits minus baseline, points",
            "paper": "comparable",
            "here": with_interval(by_bits[8]),
        },
        {
            "quantity": "accuracy minus baseline with 4, 5, 6 bits, points",
            "paper": "nothing gained beyond 6-7 bits",
            "here": ", ".join(with_interval(by_bits[bits]) for bits in (4, 5, 6)),
        },
    ]


def draw(document: Document) -> "Figure":
    """Draws boxes as in the paper: mean, median, quartiles, and the standard deviation; every run is a dot."""
    figure, [[panel]] = plots.figure(1, 1, f"Accuracy against bits per weight ({document['settings']['dataset']})", 6.4)
    runs = document["runs"]
    arms = [(str(bits), select(runs, _fixed(bits))) for bits in BITS]
    values = [[best_accuracy(run) for run in chosen] for _, chosen in arms]
    positions = list(range(len(arms)))
    panel.boxplot(
        values,
        positions=[position - 0.2 for position in positions],
        widths=0.22,
        medianprops={"color": "black"},
        showfliers=False,
    )
    for position, accuracies in zip(positions, values, strict=True):
        plots.points(panel, position + 0.12, accuracies, plots.COLOURS[0])
    floats = [best_accuracy(run) for run in select(runs, FLOAT)]
    plots.baseline(panel, floats, f"float32, mean ± deviation of {len(floats)} runs")
    panel.set_xticks(positions, [label for label, _ in arms])
    panel.set_xlim(-0.6, len(arms) - 0.4)
    panel.set_xlabel("bits N per weight, fixed; boxes: quartiles, dots: runs, diamonds: mean ± deviation")
    panel.set_ylabel("test accuracy at the best epoch, %")
    panel.legend(loc="lower right", fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="quantization-levels",
    help="Figure 3.1: accuracy against a fixed number of bits.",
    arms=(("uniform", FLOAT), *(("uniform", _fixed(bits)) for bits in BITS)),
    quantities=("validation_accuracy", "test_accuracy"),
    summarise=summarise,
    claim=claim,
    draw=draw,
)
