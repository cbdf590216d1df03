"""Training with bits by the RMS of gradients, and with bits by their entropy: loss, accuracy and bytes.

Source: A. Oland and B. Raj, ICASSP 2015, with the thesis' chapter on it: N = log2(G + 1) + c from the root mean square
G of a layer's gradient, later replaced by the entropy.
"""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import qcomm
from qcomm.codec import RangeGrid
from qcomm.paper import COLOURS, figure, plus_minus, spread
from qcomm.recipes import Split
from qcomm.studies.networks import mlp
from qcomm.studies.records import Run
from qcomm.studies.settings import RunKey, StudySettings
from qcomm.studies.study import Claim, Document, Study, runs_of
from qcomm.studies.workers import MIN_ELEMENTS, Exchange, drawn, gradient, step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, RangeGrid | None] = {
    "exact": None,
    "entropy, c=0": RangeGrid(c=0),
    "entropy, c=1": RangeGrid(c=1),
    "entropy, c=2": RangeGrid(c=2),
    "rms, c=2": RangeGrid(c=2, bits="rms"),
    "rms, c=3": RangeGrid(c=3, bits="rms"),
    "rms, c=4": RangeGrid(c=4, bits="rms"),
}
TEST_IMAGES = 2000
BITS_EVERY = 20  # steps


def measure(settings: StudySettings, key: RunKey) -> Run:
    """Trains one arm with one seed."""
    (data, first), grid = settings.load(), ARMS[key.arm]
    split, test = Split(data.normalise(first.images), first.labels), data.test.first(TEST_IMAGES)
    torch.manual_seed(key.seed)
    model, generator = mlp(data.channels), torch.Generator().manual_seed(1000 + key.seed)
    exchange = Exchange(grid, settings.workers)
    levels: set[int] = set()
    bits: list[float] = []
    for number in range(settings.steps):
        batches = [drawn(split, settings.batch_size, generator) for _ in range(settings.workers)]
        gradients = [gradient(model, *batch) for batch in batches]
        if grid is not None and number % BITS_EVERY == 0:
            large = [value for value in gradients[0].values() if value.numel() >= MIN_ELEMENTS]
            packets = [qcomm.inspect(qcomm.compress(value, grid)) for value in large]
            levels.update(packet.num_bits for packet in packets)
            bits.append(8 * sum(packet.total_bytes for packet in packets) / sum(value.numel() for value in large))
        step(model, exchange.mean(gradients), settings.learning_rate)
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(model(split.images), split.labels))
        right = model(data.normalise(test.images)).argmax(1) == test.labels
    accuracy = 100 * float(right.float().mean())
    return {"loss": loss, "accuracy": accuracy, "levels": sorted(levels), "bits": bits or [32.0]}


def _bits(run: Run) -> float:
    return statistics.fmean(run["bits"])


def claim(runs: Sequence[Run]) -> list[Claim]:
    """Compares each arm with exact gradients; means and standard deviations over seeds."""
    exact = {run["seed"]: run for run in runs_of(runs, "exact")}
    claims = []
    for arm in ARMS:
        if arm == "exact":
            continue
        chosen = runs_of(runs, arm)
        levels = sorted({number for run in chosen for number in run["levels"]})
        losses = [run["loss"] - exact[run["seed"]]["loss"] for run in chosen]
        points = [run["accuracy"] - exact[run["seed"]]["accuracy"] for run in chosen]
        shown = plus_minus(spread(losses), 3), plus_minus(spread(points))
        claims.append(
            {
                "quantity": f"{arm}: N; bits of a packet; loss and accuracy minus exact",
                "source": "N follows the gradient's RMS" if arm.startswith("rms") else "N follows the entropy",
                "here": f"{', '.join(map(str, levels))}; {plus_minus(spread([_bits(run) for run in chosen]))}; "
                f"{shown[0]}, {shown[1]} points",
                "verdict": _verdict(arm, levels),
            }
        )
    return claims


def _verdict(arm: str, levels: Sequence[int]) -> str:
    if not arm.startswith("rms"):
        return "confirmed" if len(levels) > 1 else "open: N is the same in all layers and steps"
    return "refuted: N is constant" if len(levels) == 1 else "confirmed"


def draw(document: Document) -> "Figure":
    """Draws the training loss, less that with exact gradients of the same seed, against the bits of a packet."""
    exact = {run["seed"]: run["loss"] for run in runs_of(document["runs"], "exact")}
    drawn_figure, panels = figure(1, 1, f"Bits by RMS or entropy ({document['settings']['dataset']})", 5.2, 3.8)
    panel = panels[0][0]
    for number, arm in enumerate(arm for arm in ARMS if arm != "exact"):
        chosen = runs_of(document["runs"], arm)
        marker = "o" if arm.startswith("rms") else "s"
        points = [_bits(run) for run in chosen], [run["loss"] - exact[run["seed"]] for run in chosen]
        panel.plot(*points, marker, color=COLOURS[number], label=arm, markersize=5)
    panel.axhline(0, color="#777777", linestyle="--", linewidth=1.2, label="exact")
    panel.set_xlabel("bits per value of a packet")
    panel.set_ylabel("training loss at the end, less exact of the same seed")
    drawn_figure.legend(fontsize=7, loc="outside right center")
    return drawn_figure


STUDY = Study(
    name="bit-rule",
    help="Training with bits by the RMS of gradients, and with bits by their entropy.",
    arms=tuple(ARMS),
    measure=measure,
    claim=claim,
    draw=draw,
)
