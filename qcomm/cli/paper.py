"""The commands ``qcomm paper``: one for each experiment, all with the same options."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import typer

from qcomm.cli.options import option, takes
from qcomm.paper import DATASETS, EXPERIMENTS, Experiment, Settings, perform
from qcomm.recipes import RecipeError

app = typer.Typer(
    name="paper",
    help="Repeat the experiments of the paper that RangeGrid comes from; docs/paper.md has results.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_NETWORK, _RUNS = "Network and data", "Runs"


@dataclass(frozen=True)
class PaperOptions:
    """The options of every experiment. :class:`Settings` checks its fields, and ``perform`` the rest."""

    dataset: str = field(default="digits", metadata=option("One of {choices}.", _NETWORK, choices=DATASETS))
    data_dir: Path | None = field(default=None, metadata=option("Directory with the data set's files.", _NETWORK))
    train_images: int | None = field(
        default=None, metadata=option("Train on the first so many.", _NETWORK, shown="all")
    )
    epochs: int = field(
        default=Settings.epochs,
        metadata=option("Passes over the data; weights are exchanged after each.", _NETWORK),
    )
    workers: int = field(
        default=Settings.workers, metadata=option("Share the images and average their weights.", _NETWORK)
    )
    batch_size: int = field(default=Settings.batch_size, metadata=option("Images per worker and step.", _NETWORK))
    lr: float = field(default=Settings.learning_rate, metadata=option("Learning rate of SGD, constant.", _NETWORK))
    runs: int = field(default=5, metadata=option("Seeds for each setting.", _RUNS))
    seed: int = field(default=Settings.seed, metadata=option("The first of them.", _RUNS))
    jobs: int | None = field(default=None, metadata=option("Runs at a time.", _RUNS, shown="one per core"))
    processes: bool = field(
        default=False,
        metadata=option(
            "Workers are processes that exchange over gloo. The weights are the same.",
            _RUNS,
            flag="--processes/--single-process",
        ),
    )
    out: Path = field(
        default=Path("runs/paper"), metadata=option("Directory for results, plots and finished runs.", _RUNS)
    )

    @property
    def settings(self) -> Settings:
        """The settings that all runs share."""
        return Settings(
            dataset=self.dataset,
            data_dir=self.data_dir,
            train_images=self.train_images,
            epochs=self.epochs,
            seed=self.seed,
            workers=self.workers,
            batch_size=self.batch_size,
            learning_rate=self.lr,
        )

    @property
    def jobs_at_once(self) -> int:
        """The number of runs at a time, where None stands for all cores."""
        if self.jobs is not None:
            return self.jobs
        return max(1, _usable_cores() // (self.workers if self.processes else 1))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reproduce(experiment: Experiment, base: Settings, runs: int, in_processes: bool) -> list[str]:
    """Returns the command line with every option that the result depends on."""
    options = {
        "--dataset": base.dataset,
        "--train-images": base.train_images,
        "--epochs": base.epochs,
        "--workers": base.workers,
        "--batch-size": base.batch_size,
        "--lr": base.learning_rate,
        "--runs": runs,
        "--seed": base.seed,
    }
    given = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    return ["qcomm", "paper", experiment.name, *given, *(["--processes"] if in_processes else [])]


def _command(experiment: Experiment) -> Callable[..., None]:
    @takes(PaperOptions, RecipeError)
    def run(options: PaperOptions) -> None:
        base = options.settings
        command = _reproduce(experiment, base, options.runs, options.processes)
        jobs, in_processes = options.jobs_at_once, options.processes
        document = perform(experiment, base, options.runs, options.out, command, jobs=jobs, in_processes=in_processes)
        for claim in document["claims"]:
            typer.echo(f"{claim['quantity']}: paper says {claim['paper']} / here {claim['here']}")
        results = options.out / options.dataset / experiment.name
        typer.echo(f"Results: {results}.json and .png. To repeat: {shlex.join(command)}")

    return run


for _experiment in EXPERIMENTS.values():
    app.command(_experiment.name, help=_experiment.help)(_command(_experiment))
