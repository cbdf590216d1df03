"""``qcomm paper``: a command for each experiment, all with the same options."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from qcomm.paper import DATASETS, EXPERIMENTS, Experiment, Settings, perform
from qcomm.recipes import USER_ERROR, RecipeError

app = typer.Typer(
    name="paper",
    help="Repeat the experiments of the paper that RangeGrid comes from; docs/paper.md has results.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_NETWORK, _RUNS = "Network and data", "Runs"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reproduce(experiment: Experiment, base: Settings, runs: int, in_processes: bool) -> list[str]:
    """The command line with everything written out that the result depends on."""
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
    def run(
        dataset: Annotated[
            str, typer.Option(help=f"One of {', '.join(DATASETS)}.", rich_help_panel=_NETWORK)
        ] = "digits",
        data_dir: Annotated[
            Path | None, typer.Option(help="Directory with the data set's files.", rich_help_panel=_NETWORK)
        ] = None,
        train_images: Annotated[
            int | None, typer.Option(help="Train on the first so many.", show_default="all", rich_help_panel=_NETWORK)
        ] = None,
        epochs: Annotated[
            int, typer.Option(help="Passes over the data; weights are exchanged after each.", rich_help_panel=_NETWORK)
        ] = 30,
        workers: Annotated[
            int, typer.Option(help="Share the images and average their weights.", rich_help_panel=_NETWORK)
        ] = 2,
        batch_size: Annotated[int, typer.Option(help="Images per worker and step.", rich_help_panel=_NETWORK)] = 20,
        lr: Annotated[float, typer.Option(help="Learning rate of SGD, constant.", rich_help_panel=_NETWORK)] = 0.05,
        runs: Annotated[int, typer.Option(help="Seeds for each setting.", rich_help_panel=_RUNS)] = 5,
        seed: Annotated[int, typer.Option(help="The first of them.", rich_help_panel=_RUNS)] = 0,
        jobs: Annotated[
            int | None, typer.Option(help="Runs at a time.", show_default="one per core", rich_help_panel=_RUNS)
        ] = None,
        processes: Annotated[
            bool,
            typer.Option(
                "--processes/--single-process",
                help="Workers are processes that exchange over gloo. The weights are the same.",
                rich_help_panel=_RUNS,
            ),
        ] = False,
        out: Annotated[
            Path, typer.Option(help="Directory for results, plots and finished runs.", rich_help_panel=_RUNS)
        ] = Path("runs/paper"),
    ) -> None:
        try:
            base = Settings(
                dataset=dataset,
                data_dir=data_dir,
                train_images=train_images,
                epochs=epochs,
                seed=seed,
                workers=workers,
                batch_size=batch_size,
                learning_rate=lr,
            )
            command = _reproduce(experiment, base, runs, processes)
            default_jobs = max(1, _usable_cores() // (workers if processes else 1))
            document = perform(
                experiment,
                base,
                runs,
                out,
                command,
                jobs=default_jobs if jobs is None else jobs,
                in_processes=processes,
            )
        except RecipeError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None
        for claim in document["claims"]:
            typer.echo(f"{claim['quantity']}: paper says {claim['paper']} / here {claim['here']}")
        typer.echo(f"Results: {out / dataset / experiment.name}.json and .png. To repeat: {shlex.join(command)}")

    run.__doc__ = experiment.help
    return run


for _experiment in EXPERIMENTS.values():
    app.command(_experiment.name, help=_experiment.help)(_command(_experiment))
