"""Partition-wise training against backprop through the whole model: accuracy, bytes, filters, and balance.

Source: the thesis behind ``RangeGrid``, on deep partition-wise learning, with its loss filter and k-filter. Partitions
are trained in one process by :class:`qcomm.SequentialPartitions`, which makes the weights of the pipeline bit for bit.

The rule of success was fixed before the runs: with features of 6 bits the mean accuracy is at most 0.5 points below
that with uncompressed ones, and at most a quarter of the bytes are sent.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from qcomm.codec import RangeGrid
from qcomm.paper import COLOURS, deviation, figure, plus_minus, spread
from qcomm.partitions import KFilter, LocalStage, LossFilter, SampleFilter, SequentialPartitions
from qcomm.recipes import NUM_CLASSES, Split
from qcomm.studies.records import Run
from qcomm.studies.settings import RunKey, StudySettings
from qcomm.studies.study import Claim, Document, Study, claim_row, runs_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Arm(NamedTuple):
    """A way to train: the layers at which a partition ends, the bits of features, and the filter."""

    cuts: tuple[int, ...] = ()  # none: backprop through the whole model
    bits: int | None = None
    sample_filter: SampleFilter | None = None


HALVES, QUARTERS = (2,), (1, 2, 3)
FROM_EPOCH = 1
ARMS: dict[str, Arm] = {
    "backprop": Arm(),
    "p=2, raw": Arm(HALVES),
    "p=2, 8 bits": Arm(HALVES, 8),
    "p=2, 6 bits": Arm(HALVES, 6),
    "p=2, 4 bits": Arm(HALVES, 4),
    "p=4, raw": Arm(QUARTERS),
    "p=4, 8 bits": Arm(QUARTERS, 8),
    "p=4, 6 bits": Arm(QUARTERS, 6),
    "p=2, 6 bits, loss filter": Arm(HALVES, 6, LossFilter(0.25, FROM_EPOCH)),
    "p=2, 6 bits, k-filter": Arm(HALVES, 6, KFilter(10, 0.6, FROM_EPOCH)),
    "p=2, 6 bits, cut early": Arm((1,), 6),
}
TEST_IMAGES = 2000
LARGEST_LOSS, SMALLEST_RATIO = 0.5, 4.0  # points and times: the rule of success
CHANNELS = (16, 16, 32, 32)
STRIDES = (2, 1, 2, 1)


def layers(channels: int) -> list[nn.Sequential]:
    """Returns the four layers of the network.

    Example:
        >>> [layer[0].out_channels for layer in layers(1)]
        [16, 16, 32, 32]
    """
    inputs = (channels, *CHANNELS)
    return [
        nn.Sequential(nn.Conv2d(inputs[place], CHANNELS[place], 3, STRIDES[place], padding=1), nn.ReLU())
        for place in range(len(CHANNELS))
    ]


def head(channels: int) -> nn.Module:
    """Returns the decision head of features with so many channels."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, NUM_CLASSES))


def stages(channels: int, cuts: Sequence[int]) -> list[LocalStage]:
    """Returns the stages of the network, which end at ``cuts`` and at its end.

    Example:
        >>> [len(stage.partition) for stage in stages(1, (1,))]
        [1, 3]
    """
    whole = layers(channels)
    bounds = [0, *cuts, len(whole)]
    return [LocalStage(nn.Sequential(*whole[begin:end]), head(CHANNELS[end - 1])) for begin, end in pairwise(bounds)]


def measure(settings: StudySettings, key: RunKey) -> Run:
    """Trains one arm with one seed."""
    (data, first), arm = settings.load(), ARMS[key.arm]
    split, test = Split(data.normalise(first.images), first.labels), data.test.first(TEST_IMAGES)
    torch.manual_seed(key.seed)
    parts = stages(data.channels, arm.cuts)
    optimizers = [torch.optim.SGD(part.parameters(), lr=settings.learning_rate, momentum=0.9) for part in parts]
    grid = None if arm.bits is None else RangeGrid(num_bits=arm.bits)
    trainer = SequentialPartitions(parts, optimizers, grid=grid, sample_filter=arm.sample_filter)
    samples = settings.workers * settings.batch_size  # of the whole batch
    epochs = _epochs(split, samples, settings.steps, torch.Generator().manual_seed(1000 + key.seed))
    begin = time.process_time()
    reports = [trainer.run_epoch(batches) for batches in epochs]
    return {
        "accuracy": _accuracy(parts, data.normalise(test.images), test.labels),
        "sent_bytes": sum(report.sent_bytes for epoch in reports for report in epoch),
        "uncompressed_bytes": sum(report.uncompressed_bytes for epoch in reports for report in epoch),
        "forwarded": sum(epoch[0].forwarded_samples for epoch in reports) / sum(epoch[0].samples for epoch in reports),
        "stage_seconds": [sum(epoch[place].seconds for epoch in reports) for place in range(len(parts))],
        "processor_seconds": time.process_time() - begin,
    }


def _epochs(
    split: Split, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields epochs of shuffled batches until ``steps`` batches have been given."""
    left = steps
    while left > 0:
        order = torch.randperm(len(split), generator=generator, dtype=torch.int64, device="cpu")
        chosen = order.split(batch_size)[:left]
        left -= len(chosen)
        yield [(split.images[places], split.labels[places]) for places in chosen]


def _accuracy(parts: Sequence[LocalStage], images: Tensor, labels: Tensor) -> float:
    """Returns the percentage of test images that partitions and the last head classify rightly."""
    with torch.no_grad():
        right = 0
        for values, wanted in zip(images.split(500), labels.split(500), strict=True):
            features = values
            for part in parts:
                features = part.partition(features)
            right += int((parts[-1].head(features).argmax(1) == wanted).sum())
    return 100 * right / len(labels)


def _differences(runs: Sequence[Run], arm: str, other: str) -> list[float]:
    """Returns points of accuracy of an arm above another one, by seed."""
    found = {run["seed"]: run["accuracy"] for run in runs_of(runs, other)}
    return [run["accuracy"] - found[run["seed"]] for run in runs_of(runs, arm)]


def _ratio(run: Run) -> float:
    return float(run["uncompressed_bytes"] / run["sent_bytes"])


def _balance(run: Run) -> float:
    """Returns the utilisation of a pipeline whose slowest partition never waits."""
    seconds = run["stage_seconds"]
    return float(100 * statistics.fmean(seconds) / max(seconds))


def claim(runs: Sequence[Run]) -> list[Claim]:
    """Compares each claim of the source with the runs; means and standard deviations over seeds."""
    whole = [run["accuracy"] for run in runs_of(runs, "backprop")]
    claims = [claim_row("backprop: accuracy", "90.97 % (CINIC10+)", f"{plus_minus(spread(whole))} %", "the baseline")]
    for arm, source in (("p=2, raw", "+0.03 points (ImageNet)"), ("p=4, raw", "-0.27 points (CINIC10+, bottom-up)")):
        points = _differences(runs, arm, "backprop")
        claims.append(claim_row(f"{arm}: accuracy minus backprop", source, _points(points), _compared(points)))
    for arm, other in [(f"p=2, {bits} bits", "p=2, raw") for bits in (8, 6, 4)] + [
        (f"p=4, {bits} bits", "p=4, raw") for bits in (8, 6)
    ]:
        points, ratios = _differences(runs, arm, other), [_ratio(run) for run in runs_of(runs, arm)]
        well = statistics.fmean(points) >= -LARGEST_LOSS, statistics.fmean(ratios) >= SMALLEST_RATIO
        verdict = f"rule of success {'met' if all(well) else 'not met'}; {_compared(points)}"
        here = f"{_points(points)}; {plus_minus(spread(ratios))} times"
        claims.append(claim_row(f"{arm}: accuracy minus raw; fewer bytes", "not given", here, verdict))
    for arm, source in (
        ("p=2, 6 bits, loss filter", "-0.19 points to backprop, 75 % from epoch 31"),
        ("p=2, 6 bits, k-filter", "-0.04 points to backprop, about 50 % at the end"),
    ):
        points, kept = _differences(runs, arm, "p=2, 6 bits"), [100 * run["forwarded"] for run in runs_of(runs, arm)]
        here = f"{_points(points)}; {plus_minus(spread(kept), 1)} %"
        quantity = f"{arm}: accuracy minus unfiltered; samples that go on"
        claims.append(claim_row(quantity, source, here, _compared(points)))
    for arm in ("p=2, 6 bits", "p=2, 6 bits, cut early", "p=4, 6 bits"):
        shares = [_balance(run) for run in runs_of(runs, arm)]
        here = f"{plus_minus(spread(shares), 0)} %"
        claims.append(
            claim_row(
                f"{arm}: utilisation by balance", "throughput of the slowest partition", here, "measured; no claim"
            )
        )
    return claims


def _compared(points: Sequence[float]) -> str:
    """Returns what the 95 % interval of the mean (t test) says about a loss of more than LARGEST_LOSS."""
    if len(points) < 2:
        return "open: one seed"
    from scipy import stats  # comes with scikit-learn

    half = float(stats.t.ppf(0.975, len(points) - 1)) * deviation(points) / math.sqrt(len(points))
    mean = statistics.fmean(points)
    if mean - half >= -LARGEST_LOSS:
        return f"at most {LARGEST_LOSS} points are lost"
    if mean + half < -LARGEST_LOSS:
        return f"more than {LARGEST_LOSS} points are lost"
    return f"open: the interval of the mean is ±{half:.1f} points"


def _points(points: Sequence[float]) -> str:
    return f"{plus_minus(spread(points))} points"


def draw(document: Document) -> "Figure":
    """Draws accuracy against the bytes that all partitions send, and the balance of the cuts."""
    runs, title = document["runs"], f"Partition-wise training ({document['settings']['dataset']})"
    drawn, panels = figure(1, 2, title, 5.0, 3.8)
    left, right = panels[0]
    whole = [run["accuracy"] for run in runs_of(runs, "backprop")]
    left.axhline(statistics.fmean(whole), color="#777777", linestyle="--", linewidth=1.2, label="backprop")
    for number, arm in enumerate(arm for arm in ARMS if arm != "backprop"):
        chosen = runs_of(runs, arm)
        accuracies = [run["accuracy"] for run in chosen]
        left.errorbar(
            statistics.fmean(run["sent_bytes"] for run in chosen) / 1e6,
            statistics.fmean(accuracies),
            deviation(accuracies),
            fmt="os^"[number // len(COLOURS)],
            color=COLOURS[number % len(COLOURS)],
            label=arm,
            capsize=3,
            markersize=5,
        )
    left.set_xscale("log")
    left.set_xlabel("megabytes sent in all")
    left.set_ylabel("test accuracy, %")
    for place, arm in enumerate(("p=2, 6 bits", "p=2, 6 bits, cut early", "p=4, 6 bits")):
        seconds = [run["stage_seconds"] for run in runs_of(runs, arm)]
        shares = [[100 * value / max(each) for value in each] for each in seconds]
        for stage, values in enumerate(zip(*shares, strict=True)):
            right.bar(place + 0.18 * stage, statistics.fmean(values), 0.16, color=COLOURS[stage])
    right.set_xticks(range(3), labels=["p=2", "p=2, cut early", "p=4"])
    right.set_ylabel("work of a partition, % of the slowest one's")
    right.set_xlabel("partitions of a model, the first one on the left")
    drawn.legend(fontsize=7, loc="outside right center")
    return drawn


STUDY = Study(
    name="partitions",
    help="Partition-wise training against backprop: accuracy, bytes, filters, and balance.",
    arms=tuple(ARMS),
    measure=measure,
    claim=claim,
    draw=draw,
)
