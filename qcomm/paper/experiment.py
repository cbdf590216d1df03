"""Definition and execution of an experiment."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcomm.paper import plots, training
from qcomm.paper.data import load
from qcomm.paper.evaluation import Row, Run
from qcomm.paper.results import Document, document, to_text, write_atomically
from qcomm.paper.runs import Measurement, run_missing
from qcomm.paper.settings import Exchange, Settings
from qcomm.recipes import RecipeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Claim = dict[str, str]


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper, or about it.

    Attributes:
        name: name of the command and of the files.
        help: help text of the command; its first line is a sentence.
        arms: (initialisation, exchange) pairs; each is run with every seed. Experiments share equal pairs.
        quantities: quantities of the runs' histories that the document keeps.
        summarise: makes the rows of the table.
        claim: makes the paper's claims beside the results found here, from runs and rows.
        draw: draws the figure from the document alone.
        kind: kind of the runs' files.
        measurement: makes the measurement of one run.
    """

    name: str
    help: str
    arms: tuple[tuple[str, Exchange], ...]
    quantities: tuple[str, ...]
    summarise: Callable[[Sequence[Run]], list[Row]]
    claim: Callable[[Sequence[Run], Sequence[Row]], list[Claim]]
    draw: Callable[[Document], "Figure"]
    kind: str = "train"
    measurement: Measurement = training.run

    def wanted(self, base: Settings, runs: int) -> list[Settings]:
        """Returns the settings of all runs: every arm with ``runs`` seeds, from ``base.seed`` on."""
        seeds = range(base.seed, base.seed + runs)
        return [
            replace(base, seed=seed, init=init, exchange=exchange) for init, exchange in self.arms for seed in seeds
        ]


def perform(
    experiment: Experiment, base: Settings, runs: int, out: Path, command: list[str], *, jobs: int, in_processes: bool
) -> Document:
    """Makes the runs that are not stored yet, and writes ``<out>/<dataset>/<experiment>.json`` and ``.png``.

    Args:
        experiment: the experiment.
        base: settings of all runs; an arm replaces initialisation and exchange.
        runs: number of seeds.
        out: the directory; runs are kept in ``<out>/<dataset>/cells`` and shared by the experiments.
        command: command line for the document.
        jobs: number of concurrent runs.
        in_processes: whether workers are processes that exchange over gloo.

    Returns:
        The document.

    Raises:
        RecipeError: the message names the option, data file, package or stored run at fault.
    """
    if runs < 1:
        raise RecipeError(f"--runs is {runs}; it must be at least 1")
    if jobs < 1:
        raise RecipeError(f"--jobs is {jobs}; it must be at least 1")
    plots.check_available()
    data = load(base.dataset, base.data_dir, base.train_images)  # errors in the data are raised before any run
    if len(data.train) < base.workers * base.batch_size:
        raise RecipeError(
            f"--batch-size is {base.batch_size} on {base.workers} workers; {len(data.train)} training images do not "
            "fill one step"
        )
    folder = out / base.dataset
    stored = run_missing(
        experiment.kind,
        experiment.measurement,
        experiment.wanted(base, runs),
        folder / "cells",
        jobs,
        in_processes,
    )
    kept = [_keep(run, experiment.quantities) for run in stored]
    result = document(experiment.name, command, base, kept, [], [])
    result["summary"] = experiment.summarise(result["runs"])
    result["claims"] = experiment.claim(result["runs"], result["summary"])
    write_atomically(folder / f"{experiment.name}.json", to_text(result).encode())
    redraw(experiment, folder)
    return result


def redraw(experiment: Experiment, folder: Path) -> None:
    """Draws the figure again from the document in ``folder``."""
    content = json.loads((folder / f"{experiment.name}.json").read_text())
    plots.save(experiment.draw(content), folder / f"{experiment.name}.png")


def _keep(run: Run, quantities: Sequence[str]) -> Run:
    history = {name: run["history"][name] for name in quantities if name in run["history"]}
    return {**run, "history": history}
