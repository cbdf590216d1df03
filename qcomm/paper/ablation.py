"""Ablation of quantization noise: center and endpoint grids beside each of their effects alone.

A grid whose levels are the centers of its bins shrinks weights that are exchanged repeatedly without a change in
between. The gain that the paper credits to noise could therefore be weight decay, or noise, or neither.
"""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import qcomm
from qcomm.paper import plots
from qcomm.paper.evaluation import Row, Run, best_accuracy, paired, select, spread, with_interval
from qcomm.paper.experiment import Claim, Experiment
from qcomm.paper.results import Document
from qcomm.paper.settings import Exchange

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT = Exchange()
FLOORS = (2, 6)
ARMS = {
    "center": ("grid", "center"),
    "endpoint": ("grid", "endpoint"),
    "decay alone": ("decay", "center"),
    "noise alone": ("noise", "center"),
}
ROUNDS = 100
SHRINKAGE_BITS = (6, 8, 10)


def _exchange(arm: str, floor: int) -> Exchange:
    kind, reconstruction = ARMS[arm]
    return Exchange(kind, c=floor, entropy_bits=4, reconstruction=reconstruction)


def shrinkage(num_bits: int, reconstruction: str) -> list[float]:
    """Returns the relative range of 10,000 Gaussian values after 0, 1, ... 100 rounds of compress and decompress."""
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    grid = qcomm.RangeGrid(num_bits=num_bits, reconstruction=reconstruction)
    ranges = [float(values.max() - values.min())]
    for _ in range(ROUNDS):
        values = qcomm.decompress(qcomm.compress(values, grid))
        ranges.append(float(values.max() - values.min()))
    return [round(entry / ranges[0], 6) for entry in ranges]


def _mean_contraction(run: Run) -> float:
    """Returns the contraction of layer 1 in units of 1e-6, mean over the epochs."""
    return 1e6 * statistics.fmean(values[0] for values in run["history"]["contraction"])


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Returns rows of table "accuracy", one per floor and arm, and of "shrinkage", one per N and reconstruction."""
    baseline = select(runs, FLOAT)
    rows: list[Row] = [
        {"table": "accuracy", "arm": "float32", "test_accuracy": spread([best_accuracy(run) for run in baseline])}
    ]
    for floor in FLOORS:
        for arm in ARMS:
            chosen = select(runs, _exchange(arm, floor))
            rows.append(
                {
                    "table": "accuracy",
                    "arm": arm,
                    "c": floor,
                    "test_accuracy": spread([best_accuracy(run) for run in chosen]),
                    "minus_float": paired(chosen, baseline, best_accuracy),
                    "contraction_1e6": spread([_mean_contraction(run) for run in chosen]),
                }
            )
    for bits in SHRINKAGE_BITS:
        for reconstruction in ("center", "endpoint"):
            rows.append(
                {
                    "table": "shrinkage",
                    "bits": bits,
                    "reconstruction": reconstruction,
                    "range": shrinkage(bits, reconstruction),
                }
            )
    return rows


def claim(runs: Sequence[Run], rows: Sequence[Row]) -> list[Claim]:
    """Compares each arm with float32, and reports the shrinkage."""
    claims = []
    for floor in FLOORS:
        for row in rows:
            if row["table"] == "accuracy" and row.get("c") == floor:
                claims.append(
                    {
                        "quantity": f"{row['arm']} at c = {floor} minus float32, points",
                        "paper": "above 0, by quantization noise"
                        if (row["arm"], floor) == ("center", 6)
                        else "not given",
                        "here": with_interval(row["minus_float"]),
                    }
                )
    left = {(row["bits"], row["reconstruction"]): row["range"][-1] for row in rows if row["table"] == "shrinkage"}
    for reconstruction in ("center", "endpoint"):
        claims.append(
            {
                "quantity": f"range after {ROUNDS} rounds without training, {reconstruction}, N = 6, 8, 10",
                "paper": "not given",
                "here": ", ".join(f"{left[bits, reconstruction]:.3f}" for bits in SHRINKAGE_BITS),
            }
        )
    return claims


def draw(document: Document) -> "Figure":
    """Draws the shrinkage at the left, and each arm's difference from float32 at the right."""
    figure, [[left, *right]] = plots.figure(
        1,
        1 + len(FLOORS),
        f"Noise or decay? ({document['settings']['dataset']}; dots: differences of equal seeds)",
        4.0,
        3.4,
    )
    for row in document["summary"]:
        if row["table"] == "shrinkage":
            colour = plots.COLOURS[SHRINKAGE_BITS.index(row["bits"])]
            style = "-" if row["reconstruction"] == "center" else ":"
            left.plot(row["range"], style, color=colour, label=f"N = {row['bits']}, {row['reconstruction']}")
    left.set_title("without training", fontsize=10)
    left.set_xlabel("rounds of compress and decompress")
    left.set_ylabel("range of the values, relative")
    left.set_ylim(0, 1.05)
    left.legend(fontsize=7)
    floats = {run["seed"]: best_accuracy(run) for run in select(document["runs"], FLOAT)}
    for panel, floor in zip(right, FLOORS, strict=True):
        for position, arm in enumerate(ARMS):
            chosen = select(document["runs"], _exchange(arm, floor))
            differences = [best_accuracy(run) - floats[run["seed"]] for run in chosen]
            plots.points(panel, position, differences, plots.COLOURS[position])
        panel.axhline(0.0, color=plots.BASELINE_COLOUR, linestyle="--", linewidth=1.0)
        panel.set_xticks(range(len(ARMS)), [arm.replace(" ", "\n") for arm in ARMS])
        panel.set_xlim(-0.6, len(ARMS) - 0.4)
        panel.set_title(f"c = {floor}, M = 4", fontsize=10)
        panel.set_ylabel("test accuracy minus float32, points")
    return figure


EXPERIMENT = Experiment(
    name="ablation",
    help="Does quantization noise improve generalization? Center and endpoint grids, equal decay, equal noise.",
    arms=(("uniform", FLOAT), *(("uniform", _exchange(arm, floor)) for floor in FLOORS for arm in ARMS)),
    quantities=("validation_accuracy", "test_accuracy", "contraction"),
    summarise=summarise,
    claim=claim,
    draw=draw,
)
