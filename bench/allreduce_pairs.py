"""Interleaved pairs of ``strategy="auto"`` and of torch's own all-reduce: whether qcomm is ever slower than nothing.

A pair is one call of each, one after the other, the first of them in turn; its ratio is the plain call's time over
auto's, so that 1 means equally fast. What the machine does meanwhile meets both. Pairs begin after auto has settled.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from allreduce_methods import DTYPES, GRIDS, Compressed, Method, plain, timed
from gradient_data import Bucket
from scipy import stats

import qcomm
from qcomm.collectives.strategies import AUTOMATIC
from qcomm.collectives.tuner import DUEL_ROUNDS, ROUNDS, WARM_UP

BASES = ("fp32", "bf16")
GRID = "qcomm k=1"
# Trials of every way, twice, the calls between them, more trials of close ones, and some of the way that was chosen.
SETTLING = (2 * ROUNDS + DUEL_ROUNDS) * len(AUTOMATIC) + WARM_UP + 6
CONFIDENCE = 0.95


@dataclass
class Pairs:
    """How many times as fast as a plain all-reduce auto is; above 1 it is faster.

    Attributes:
        way: "hook", as DDP calls it, or "all_reduce".
        chosen: what auto settled on, after the last pair.
        geometric_mean, lower, upper: of the pairs' ratios, with the two-sided 95 % interval of a t test of their
            logarithms.
        median, median_lower: the same from the order of the ratios alone, which a few bad pairs do not move; the bound
            is one-sided, of 95 %.
        seconds, seconds_base: medians.
        wrong: pairs whose results differ between ranks; always checked on the first.
    """

    way: str
    base: str
    mib: float
    pairs: int
    chosen: str
    geometric_mean: float
    lower: float
    upper: float
    median: float
    median_lower: float
    seconds: float
    seconds_base: float
    wrong: int


def summarise(ratios: Sequence[float]) -> tuple[float, float, float, float, float]:
    """(geometric mean, its interval's ends, median, its lower bound) of positive ratios."""
    logs = [math.log(ratio) for ratio in ratios]
    centre = statistics.fmean(logs)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    # At least so many ratios lie below the true median with probability CONFIDENCE.
    rank = int(stats.binom.ppf(1 - CONFIDENCE, len(ratios), 0.5))
    median_lower = sorted(ratios)[max(rank - 1, 0)]
    return math.exp(centre), math.exp(centre - half), math.exp(centre + half), statistics.median(ratios), median_lower


class AllReduce:
    """``qcomm.all_reduce`` with "auto", which has no error feedback."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self.chosen = ""  # the strategy of the last call

    def __call__(self, buffer: torch.Tensor) -> int:
        """The mean, and the bytes that this rank sent."""
        work = qcomm.all_reduce(buffer, GRIDS[GRID], num_threads=self._num_threads, async_op=True)
        assert work is not None
        work.wait()
        figures: dict[str, Any] = work.stats()
        self.chosen = str(figures["strategies"][0])
        return int(figures["bytes_sent"])

    def average(self, buffer: torch.Tensor) -> None:
        """The mean alone."""
        qcomm.all_reduce(buffer, GRIDS[GRID], num_threads=self._num_threads)


def run_pairs(bucket: Bucket, mib: float, count: int, error_feedback: bool, num_threads: int) -> list[Pairs]:
    """On every rank: ``count`` pairs of each way with each plain all-reduce."""
    ways = Compressed(GRIDS[GRID], bucket, "auto", error_feedback, num_threads), AllReduce(num_threads)
    for auto in ways:
        for _ in range(SETTLING):
            timed(auto, bucket.values)
    found = []
    for auto, base in itertools.product(ways, BASES):
        other, way = plain(DTYPES[base]), "hook" if isinstance(auto, Compressed) else "all_reduce"
        wrong = sum(_differences(method, bucket.values) for method in (auto, other))
        times: list[tuple[float, float]] = []
        for number in range(count):
            if number % 2:
                mine, theirs = timed(auto, bucket.values), timed(other, bucket.values)
            else:
                theirs, mine = timed(other, bucket.values), timed(auto, bucket.values)
            times.append((mine, theirs))
        if isinstance(auto, AllReduce):
            auto(bucket.values.clone())  # which asks for its strategy
        summary = summarise([theirs / mine for mine, theirs in times])
        medians = (statistics.median(column) for column in zip(*times, strict=True))
        found.append(Pairs(way, base, mib, count, auto.chosen, *summary, *medians, wrong))
    return found


def _differences(method: Method, values: torch.Tensor) -> int:
    """Elements of a result that are not equal on all ranks."""
    buffer = values.clone()
    method(buffer)
    first = buffer.clone()
    dist.broadcast(first, 0)
    wrong = (buffer != first).sum()
    dist.all_reduce(wrong)
    return int(wrong)


def show_pairs(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'rate':>8}{'ranks':>6}{'MiB':>8}  {'auto in':<11}{'against':<8}{'pairs':>6}{'geo mean':>10}{'95 %':>16}"
          f"{'median':>8}{'its bound':>11}{'ms':>8}{'chosen':>14}{'#wrong':>8}")  # fmt: skip
    for row in rows:
        interval = f"{row['lower']:.3f}..{row['upper']:.3f}"
        print(f"{row['rate']:>8}{row['world_size']:>6}{row['mib']:>8g}  {row['way']:<11}{row['base']:<8}"
              f"{row['pairs']:>6}{row['geometric_mean']:>10.3f}{interval:>16}{row['median']:>8.3f}{row['median_lower']:>11.3f}"
              f"{1e3 * row['seconds']:>8.1f}{row['chosen']:>14}{row['wrong']:>8}", flush=True)  # fmt: skip
