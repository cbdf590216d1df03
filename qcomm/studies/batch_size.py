"""Accuracy over batch size and learning rate, with and without compression, and the critical batch size.

Sources: Gahlot et al., "Data optimization for large batch distributed training of deep neural networks" (accuracy over
the batch size rises to an optimum, then falls); P. Goyal et al., arXiv:1706.02677 (rates in proportion to the batch,
warm-up); Y. You et al., arXiv:1708.03888 (LARS); S. McCandlish et al., arXiv:1812.06162 (critical batch size).

All runs see equally many samples. Larger batches make fewer steps of them.
"""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

import qcomm
from qcomm.codec import CPU
from qcomm.paper import COLOURS, figure, paired, plus_minus, spread, with_interval
from qcomm.recipes import Split
from qcomm.studies.networks import NETWORKS
from qcomm.studies.records import Run
from qcomm.studies.settings import RunKey, StudySettings
from qcomm.studies.study import Claim, Document, Study, claim_row
from qcomm.studies.workers import Exchange, Gradients, drawn, gradient, step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = (16, 64, 256, 1024, 4096)  # of all workers
RATES = (0.5, 2.0, 8.0, 32.0)  # in units of the study's learning rate
LARS_RATES = (0.1, 0.4, 1.6)  # in the same units
EXCHANGES: dict[str, float | None] = {"exact": None, "k=1": 1.0, "k=3.2": 3.2}
LARS = "LARS"
WARM_UP = 0.1  # of the steps
TEST_IMAGES = 2000
LOOKS = 64  # at the training loss
LOOKED_AT = 1000  # images
NEAR = 3  # the factor between two batch sizes up to which one is of the other's order
MEASURED = "exact", 64, 2.0  # the run whose noise scale predicts the critical batch size


class Arm(NamedTuple):
    """One combination: method, of EXCHANGES or LARS; batch of all workers; rate in units of the study's."""

    network: str
    method: str
    batch: int
    rate: float

    @property
    def name(self) -> str:
        """The arm's name in results."""
        return f"{self.network}, {self.method}, batch {self.batch}, rate {self.rate:g}"


ARMS = {
    arm.name: arm
    for network in NETWORKS
    for method in (*EXCHANGES, LARS)
    for batch in BATCHES
    for rate in (LARS_RATES if method == LARS else RATES)
    for arm in [Arm(network, method, batch, rate)]
}


def measure(settings: StudySettings, key: RunKey) -> Run:
    """Trains one arm with one seed; a loss that is not finite ends the run."""
    (data, first), arm = settings.load(), ARMS[key.arm]
    split, test = Split(data.normalise(first.images), first.labels), data.test.first(TEST_IMAGES)
    seen = settings.steps * settings.batch_size * settings.workers
    steps, share = max(1, seen // arm.batch), max(1, arm.batch // settings.workers)
    torch.manual_seed(key.seed)
    model, generator = NETWORKS[arm.network](data.channels), torch.Generator().manual_seed(1000 + key.seed)
    grid_step = EXCHANGES.get(arm.method)
    exchange = Exchange(None if grid_step is None else qcomm.SigmaGrid(grid_step), settings.workers)
    noise, looks = qcomm.GradientNoise(share), {math.ceil(steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    history: list[tuple[int, float]] = []
    for number in range(1, steps + 1):
        batches = [drawn(split, share, generator) for _ in range(settings.workers)]
        gradients = [gradient(model, *batch) for batch in batches]
        mean = exchange.mean(gradients)
        if (arm.method, arm.batch, arm.rate) == MEASURED and number > steps // 2:
            noise.add(gradients[0], mean, settings.workers)
        rate = settings.learning_rate * arm.rate * min(1.0, number / max(1.0, WARM_UP * steps))
        step(model, _lars(model, mean) if arm.method == LARS else mean, rate)
        if number in looks:
            history.append((number, _loss(model, split)))
            if not math.isfinite(history[-1][1]):
                return {"steps": steps, "history": history[:-1], "accuracy": None, "noise_scale": None}
    with torch.no_grad():
        right = model(data.normalise(test.images)).argmax(1) == test.labels
    scale = noise.total().noise_scale if (arm.method, arm.batch, arm.rate) == MEASURED else None
    return {"steps": steps, "history": history, "accuracy": 100 * float(right.float().mean()), "noise_scale": scale}


def _lars(model: nn.Module, mean: Gradients) -> Gradients:
    """Returns gradients with the norms of their weights."""
    weights = {name: float(parameter.detach().norm()) for name, parameter in model.named_parameters()}
    return {name: value * (weights[name] / max(float(value.norm()), 1e-12)) for name, value in mean.items()}


def _loss(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(split.images[:LOOKED_AT]), split.labels[:LOOKED_AT]))


class Found:
    """The runs of one seed, by arm."""

    def __init__(self, runs: Sequence[Run], seed: int) -> None:
        self._runs = {run["arm"]: run for run in runs if run["seed"] == seed}

    def accuracy(self, network: str, method: str, batch: int, rate: float) -> float:
        """Returns test accuracy in percent; 0 of a run that diverged."""
        return float(self._runs[Arm(network, method, batch, rate).name]["accuracy"] or 0.0)

    def best(self, network: str, method: str, batch: int) -> float:
        """Returns the accuracy with the best rate."""
        rates = LARS_RATES if method == LARS else RATES
        return max(self.accuracy(network, method, batch, rate) for rate in rates)

    def optimum(self, network: str, method: str, rate: float) -> int:
        """Returns the batch size with the best accuracy at a rate."""
        return max(BATCHES, key=lambda batch: self.accuracy(network, method, batch, rate))

    def noise_scale(self, network: str) -> float | None:
        """Returns the noise scale over the second half of a run."""
        method, batch, rate = MEASURED
        found: float | None = self._runs[Arm(network, method, batch, rate).name]["noise_scale"]
        return found

    def critical_batch(self, network: str, method: str) -> float | None:
        """Returns the batch size with which twice the fewest steps, and twice the fewest samples, reach a loss.

        Of all rates the one counts that reaches it first. The loss is the lowest that every batch size reaches.
        S = S_min (1 + B / batch) is fitted to the steps by relative least squares.
        """
        curves = {
            batch: [self._runs[Arm(network, method, batch, rate).name]["history"] for rate in RATES]
            for batch in BATCHES
        }
        lowest = [min((loss for history in each for _, loss in history), default=math.inf) for each in curves.values()]
        points = [(batch, _first(each, max(lowest))) for batch, each in curves.items()]
        return fit_critical_batch([(batch, steps) for batch, steps in points if steps is not None])


def _first(histories: Sequence[Sequence[tuple[int, float]]], loss: float) -> int | None:
    reached = [next((number for number, value in history if value <= loss), None) for history in histories]
    return min((number for number in reached if number is not None), default=None)


def fit_critical_batch(points: Sequence[tuple[int, int]]) -> float | None:
    """Returns B of S = S_min (1 + B / batch) for (batch, steps S); None where there is no such curve.

    Example:
        >>> round(fit_critical_batch([(16, 700), (64, 250), (256, 138), (1024, 109)]))
        96
    """
    if len(points) < 3:
        return None
    # Relative errors: 1 = S_min / S + S_min B / (batch S), a linear fit without a constant.
    columns = torch.tensor(
        [[1 / steps, 1 / (batch * steps)] for batch, steps in points], dtype=torch.float64, device=CPU
    )
    fewest, product = torch.linalg.lstsq(
        columns, torch.ones(len(points), 1, dtype=torch.float64, device=CPU)
    ).solution.flatten()
    return float(product / fewest) if fewest > 0 and product > 0 else None


def claim(runs: Sequence[Run]) -> list[Claim]:
    """Compares each claim of the sources with the runs; means and standard deviations over seeds."""
    seeds = sorted({run["seed"] for run in runs})
    every = [Found(runs, seed) for seed in seeds]
    claims = []
    for network in NETWORKS:
        claims += [_optimum(network, every), _scaled(network, every), _by_lars(network, every)]
        claims += [_compressed(network, method, every) for method in EXCHANGES if EXCHANGES[method] is not None]
        claims += [_critical(network, method, every) for method in EXCHANGES]
    claims.append(
        claim_row(
            "deeper ResNets fall suddenly, ResNet-18 and 34 gradually",
            "accuracy of ResNet-18 to 152 over batches of 16 to 20,480, 50 epochs",
            "not measured here",
            "open: hundreds of runs of networks of this size need GPUs",
        )
    )
    return claims


def _optimum(network: str, every: Sequence[Found]) -> Claim:
    optima = {rate: [found.optimum(network, "exact", rate) for found in every] for rate in RATES}
    inside = sum(BATCHES[0] < batch < BATCHES[-1] for found in optima.values() for batch in found)
    total = len(RATES) * len(every)
    shown = "; ".join(f"{rate:g}: {', '.join(map(str, optima[rate]))}" for rate in RATES)
    verdict = f"an optimum inside the range in {inside} of {total}"
    return claim_row(
        f"{network}: batch size with the best accuracy, by rate (units of the study's)",
        "accuracy rises with the batch to an optimum, then falls",
        shown,
        f"{'confirmed' if inside == total else 'in part' if inside else 'refuted'}: {verdict}",
    )


def _scaled(network: str, every: Sequence[Found]) -> Claim:
    path = list(zip(BATCHES, RATES, strict=False))  # both grow by 4
    means = [statistics.fmean(found.accuracy(network, "exact", *point) for found in every) for point in path]
    held = [batch for (batch, _), mean in zip(path, means, strict=True) if mean >= means[0] - 1]
    return claim_row(
        f"{network}: accuracy with rates in proportion to the batch, {', '.join(str(batch) for batch, _ in path)}",
        "linear scaling with warm-up keeps accuracy up to a limit",
        ", ".join(f"{mean:.1f}" for mean in means),
        f"kept within a point up to {max(held)}" if len(held) < len(path) else "confirmed in this range",
    )


def _by_lars(network: str, every: Sequence[Found]) -> Claim:
    batch = BATCHES[-1]
    difference = _less_exact(network, LARS, batch, every)
    return claim_row(
        f"{network}: LARS minus SGD at batch {batch}, best rates; points",
        "LARS trains with larger batches than SGD",
        with_interval(difference),
        _sign(difference),
    )


def _compressed(network: str, method: str, every: Sequence[Found]) -> Claim:
    differences = {batch: _less_exact(network, method, batch, every) for batch in BATCHES}
    lost = [batch for batch, found in differences.items() if _sign(found) == "less"]
    return claim_row(
        f"{network}, {method}: accuracy minus exact at best rates, {', '.join(map(str, BATCHES))}; points",
        "no claim",
        "; ".join(with_interval(found, 1) for found in differences.values()),
        f"less at {', '.join(map(str, lost))}" if lost else "no loss shows",
    )


def _critical(network: str, method: str, every: Sequence[Found]) -> Claim:
    critical = [value for found in every if (value := found.critical_batch(network, method)) is not None]
    scales = [value for found in every if (value := found.noise_scale(network)) is not None]
    measured = plus_minus(spread(critical), 0) if critical else "not found"
    predicted = plus_minus(spread(scales), 0) if scales else "not found"
    if critical and scales:
        ratio = statistics.fmean(critical) / statistics.fmean(scales)
        place = ("confirmed", "within") if 1 / NEAR <= ratio <= NEAR else ("refuted", "beyond")
        verdict = f"{place[0]}: {ratio:.2g} times, {place[1]} a factor of {NEAR}"
    else:
        verdict = "open: no fit"
    return claim_row(
        f"{network}, {method}: measured critical batch size; noise scale of exact gradients",
        "of the order of the noise scale",
        f"{measured}; {predicted}",
        verdict,
    )


def _less_exact(network: str, method: str, batch: int, every: Sequence[Found]) -> dict[str, float | None]:
    """Returns the accuracy of a method less that of exact gradients, each with its best rate."""
    runs, others = (
        [{"seed": number, "accuracy": found.best(network, name, batch)} for number, found in enumerate(every)]
        for name in (method, "exact")
    )
    return paired(runs, others, lambda run: float(run["accuracy"]))


def _sign(found: dict[str, float | None]) -> str:
    difference, half = found["difference"], found["half_interval"]
    if difference is None or half is None or abs(difference) <= half:
        return "open: 0 is in the interval"
    return "more" if difference > 0 else "less"


def draw(document: Document) -> "Figure":
    """Draws accuracy over batch size: by rate with exact gradients above, and of each method's best rate below."""
    runs = document["runs"]
    every = [Found(runs, seed) for seed in sorted({run["seed"] for run in runs})]
    drawn_figure, panels = figure(2, len(NETWORKS), f"Batch sizes ({document['settings']['dataset']})", 4.4, 3.2)
    unit = document["settings"]["learning_rate"]
    for column, network in enumerate(NETWORKS):
        above, below = panels[0][column], panels[1][column]
        for number, rate in enumerate(RATES):
            by_rate = [[found.accuracy(network, "exact", batch, rate) for found in every] for batch in BATCHES]
            _curve(above, by_rate, f"{unit * rate:g}", number)
        for number, method in enumerate((*EXCHANGES, LARS)):
            best = [[found.best(network, method, batch) for found in every] for batch in BATCHES]
            _curve(below, best, method, number)
        above.set_title(f"{network}, exact gradients, by rate", fontsize=9)
        below.set_title(f"{network}, best rate of each method", fontsize=9)
    for row in panels:
        row[0].set_ylabel("test accuracy, %")
    panels[0][-1].legend(fontsize=7, loc="upper right")
    panels[1][-1].legend(fontsize=7, loc="lower left")
    for panel in panels[-1]:
        panel.set_xlabel("batch of all workers")
    return drawn_figure


def _curve(panel: "Axes", values: Sequence[Sequence[float]], label: str, number: int) -> None:
    """Draws the mean over seeds by batch size, with a band from the least to the most."""
    low, high = [min(each) for each in values], [max(each) for each in values]
    panel.plot(BATCHES, [statistics.fmean(each) for each in values], "o-", color=COLOURS[number], label=label,
               markersize=4, linewidth=1.3)  # fmt: skip
    panel.fill_between(BATCHES, low, high, color=COLOURS[number], alpha=0.15, linewidth=0)
    panel.set_xscale("log", base=2)


STUDY = Study(
    name="batch-size",
    help="Accuracy over batch size and learning rate, with and without compression, and the critical batch size.",
    arms=tuple(ARMS),
    measure=measure,
    claim=claim,
    draw=draw,
)
