"""The application ``qcomm``, assembled from its commands. :mod:`qcomm.__main__` enters it."""

from typing import Annotated

import torch
import typer

import qcomm
from qcomm.cli.bench import BENCH_HELP, bench
from qcomm.cli.inspect import INSPECT_HELP, inspect
from qcomm.cli.paper import app as paper_app
from qcomm.cli.plan import PLAN_HELP, plan
from qcomm.cli.study import app as study_app
from qcomm.cli.train import TRAIN_HELP, train

__all__ = ["app"]

app = typer.Typer(
    name="qcomm",
    help="Compressed gradient exchange for data-parallel training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qcomm {qcomm.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Holds the options of qcomm itself, which act in their callbacks."""


app.add_typer(paper_app)
app.add_typer(study_app)
app.command(help=BENCH_HELP)(bench)
app.command(help=TRAIN_HELP)(train)
app.command(help=PLAN_HELP)(plan)
app.command(help=INSPECT_HELP)(inspect)
