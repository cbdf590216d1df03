"""Statistics of runs: the epoch of peak accuracy, means over seeds, and paired differences."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from qcomm.paper.settings import Exchange

Run = dict[str, Any]  # an entry of a document's "runs"
Row = dict[str, Any]  # an entry of its "summary"


def exchange_of(run: Run) -> Exchange:
    """Returns the run's exchange."""
    return Exchange(**run["exchange"])


def convergence_epoch(run: Run) -> int:
    """Returns the epoch, counted from 1, of the highest validation accuracy; the first of several."""
    accuracies = run["history"]["validation_accuracy"]
    return int(accuracies.index(max(accuracies))) + 1


def epochs_to_level(run: Run, baseline: Sequence[Run], share: float = 0.99) -> float:
    """Returns the first epoch whose validation accuracy is ``share`` of the baseline's best for the same seed.

    If no epoch reaches it, the result is the number of epochs plus one. Unlike the peak, the level is not at the end of
    a run that still improves.
    """
    reference = next(other for other in baseline if other["seed"] == run["seed"])
    level = share * max(reference["history"]["validation_accuracy"])
    accuracies = run["history"]["validation_accuracy"]
    return float(next((epoch for epoch, value in enumerate(accuracies, 1) if value >= level), len(accuracies) + 1))


def best_accuracy(run: Run) -> float:
    """Returns the test accuracy in percent, after the epoch of the highest validation accuracy."""
    return float(100 * run["history"]["test_accuracy"][convergence_epoch(run) - 1])


def epoch_mean(quantity: str) -> Callable[[Run], float]:
    """Returns a function that averages a quantity of a run's history over all epochs."""
    return lambda run: statistics.fmean(run["history"][quantity])


def select(runs: Sequence[Run], exchange: Exchange, init: str = "uniform") -> list[Run]:
    """Returns the runs with that exchange and initialisation, by seed."""
    chosen = [run for run in runs if run["init"] == init and exchange_of(run) == exchange]
    return sorted(chosen, key=lambda run: int(run["seed"]))


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation of a sample; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns mean and standard deviation, for a row.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        {'mean': 2.0, 'deviation': 1.0}
    """
    return {"mean": round(statistics.fmean(values), 4), "deviation": round(deviation(values), 4)}


def paired(runs: Sequence[Run], baseline: Sequence[Run], measure: Callable[[Run], float]) -> dict[str, float | None]:
    """Returns the mean difference from the baseline's runs of the same seeds, with its 95 % interval (t test).

    The interval is given by its half width. A single pair has no interval: None.
    """
    theirs = {run["seed"]: measure(run) for run in baseline}
    differences = [measure(run) - theirs[run["seed"]] for run in runs if run["seed"] in theirs]
    half = None
    if len(differences) > 1:
        from scipy import stats  # comes with scikit-learn

        quantile = float(stats.t.ppf(0.975, len(differences) - 1))
        half = round(quantile * deviation(differences) / math.sqrt(len(differences)), 4)
    return {"difference": round(statistics.fmean(differences), 4), "half_interval": half}


def plus_minus(value: dict[str, float], digits: int = 2) -> str:
    """Formats a result of :func:`spread` as ``"1.00 ± 0.20"``."""
    return f"{value['mean']:.{digits}f} ± {value['deviation']:.{digits}f}"


def with_interval(value: dict[str, float | None], digits: int = 2) -> str:
    """Formats a result of :func:`paired` as ``"+0.10 [-0.05, +0.25]"``."""
    difference, half = value["difference"], value["half_interval"]
    assert difference is not None
    if half is None:
        return f"{difference:+.{digits}f} [one seed]"
    return f"{difference:+.{digits}f} [{difference - half:+.{digits}f}, {difference + half:+.{digits}f}]"
