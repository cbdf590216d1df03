"""Runs of a long study, one JSON line each, so that an interrupted study goes on where it stopped; its command line."""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from scipy import stats

Run = TypeVar("Run")


def parse_study(
    parser: argparse.ArgumentParser, seeds: int, summary: Path, quick: str, check_method: Callable[[str], object]
) -> argparse.Namespace:
    """Adds the options that all studies have, and parses; ``command`` of the result is the command line.

    Args:
        parser: with the study's own options, ``--methods`` among them.
        seeds: default of ``--seeds``.
        summary: default of ``--json``.
        quick: what ``--quick`` runs.
        check_method: raises ValueError for a method that is none.
    """
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds 0 to SEEDS - 1 (default %(default)s)")
    parser.add_argument("--runs", type=Path, default=None, help="lines of the runs (default: --json with .jsonl)")
    parser.add_argument("--json", type=Path, default=summary, help="the summary")
    parser.add_argument("--summary", action="store_true", help="summarise the runs that there are")
    parser.add_argument("--quick", action="store_true", help=quick)
    arguments = parser.parse_args()
    for name in ("seeds", "steps"):
        if getattr(arguments, name, 1) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    for method in arguments.methods:
        try:
            check_method(method)
        except ValueError as error:
            parser.error(f"--methods: {error}")
    arguments.runs = arguments.runs or arguments.json.with_suffix(".jsonl")
    options = [argument for argument in sys.argv[1:] if argument != "--summary"]
    arguments.command = shlex.join(["python", f"bench/{parser.prog}", *options])
    return arguments


def not_done(runs: Sequence[Run], key: Callable[[Run], Mapping[str, Any]], path: Path) -> list[Run]:
    """Returns the runs that are not among the finished ones, and prints how many there are."""
    records = read(path)
    missing = [run for run in runs if not is_done(key(run), records)]
    print(f"# torch {torch.__version__}, {len(runs)} runs, {len(missing)} missing; lines in {path}", flush=True)
    return missing


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


def shown(difference: Mapping[str, Any]) -> str:
    """Returns what :func:`paired` has found for a table.

    Example:
        >>> shown({"difference": 2.0, "interval": [1.0, 3.0]}), shown({"difference": -1.0, "interval": None})
        ('+2.0000 (+1.0000 .. +3.0000)', '-1.0000')
    """
    text = f"{difference['difference']:+.4f}"
    if difference["interval"] is None:
        return text
    return text + " ({:+.4f} .. {:+.4f})".format(*difference["interval"])


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
