"""Runs of a long study, one JSON line each, so that an interrupted study goes on where it stopped."""

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from scipy import stats

Run = TypeVar("Run")


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the finished runs; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a finished run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def is_done(key: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether a run with these fields is among the finished ones."""
    return any(all(record.get(name) == value for name, value in key.items()) for record in records)


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Returns the mean of paired differences, and its 95 % interval by a t test.

    Example:
        >>> paired([1.0, 3.0])["difference"], paired([1.0])["interval"]
        (2.0, None)
    """
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return {"difference": mean, "interval": None}
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"difference": mean, "interval": [mean - half, mean + half]}


def in_turn(missing: Sequence[Run], name: Callable[[Run], str]) -> Iterator[Run]:
    """Yields the runs that are missing, and prints for each its name and the time that is left."""
    begin = time.perf_counter()
    for number, run in enumerate(missing):
        left = ""
        if number:
            each = (time.perf_counter() - begin) / number
            left = f", {each:.0f} s a run, {each * (len(missing) - number) / 3600:.1f} h left"
        print(f"# {number + 1}/{len(missing)}: {name(run)}{left}", flush=True)
        yield run


def commit() -> str:
    """Returns the hash of the checkout's commit, empty without git."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
