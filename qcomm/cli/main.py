"""The command line: ``qcomm train``, ``bench``, ``plan``, ``paper``, ``inspect``. :mod:`qcomm.__main__` enters it."""

import dataclasses
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

import torch
import typer

import qcomm
from qcomm.cli.bench import BENCH_HELP, bench
from qcomm.cli.paper import app as paper_app
from qcomm.cli.plan import plan
from qcomm.collectives import STRATEGIES
from qcomm.recipes import (
    AMP_MODES,
    DATASET_NAMES,
    GRIDS,
    METHODS,
    MODEL_NAMES,
    USER_ERROR,
    RecipeError,
    TrainConfig,
    check,
    comparison_configs,
    launch,
    launched_world_size,
    run_all,
)

app = typer.Typer(
    name="qcomm",
    help="Compressed gradient exchange for data-parallel training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(paper_app)

_TRAIN_HELP = """Train a residual network by data parallelism, with compressed gradients.

Without --method, --grid, --step or --c the same training runs four times, one after another: with plain fp32
all-reduce, with torch's bf16 hook, and with qcomm at one and at two standard deviations a step. A table compares
accuracy, bits, bytes and time.

[bold]Examples[/bold]

The comparison, on data that ships with scikit-learn: [green]qcomm train[/green]

One run, two standard deviations a step: [green]qcomm train --step 2[/green]

Fashion-MNIST, bf16 autocast: [green]qcomm train --dataset fashion-mnist --epochs 5 --amp bf16[/green]

With checkpoints: [green]qcomm train --method qcomm --checkpoint-every 1 --out runs/a[/green]

From the last one: [green]qcomm train --method qcomm --resume runs/a/qcomm-k1 --out runs/a[/green]

Under torchrun: [green]torchrun --standalone --nproc_per_node=2 -m qcomm train --model resnet18
--dataset cifar10 --data-dir cifar-10-batches-py --grid sigma --step 1[/green]

Under mpirun: [green]mpirun -np 4 qcomm train --step 1[/green]
"""


class _DatasetDefaults(NamedTuple):
    epochs: int
    batch_size: int  # per rank
    stem_stride: int | None


# Options whose default depends on the data set. The digits carry 8x8 pixels, so that the stem may stride by 2.
_DEFAULTS = {"digits": _DatasetDefaults(epochs=15, batch_size=32, stem_stride=2)}
_OTHER_DEFAULTS = _DatasetDefaults(epochs=30, batch_size=64, stem_stride=None)

_MODEL, _TRAINING, _EXCHANGE, _RUN = "Model and data", "Training", "Gradient exchange", "Run"


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
    """Options of qcomm itself; they act in their callbacks."""


app.command(help=BENCH_HELP)(bench)


@app.command(help=_TRAIN_HELP)
def train(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODEL_NAMES)}.", rich_help_panel=_MODEL)] = "resnet20",
    dataset: Annotated[
        str, typer.Option(help=f"One of {', '.join(DATASET_NAMES)}.", rich_help_panel=_MODEL)
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory with the data set's files.", rich_help_panel=_MODEL)
    ] = None,
    train_images: Annotated[
        int | None, typer.Option(help="Use only the first so many training images.", rich_help_panel=_MODEL)
    ] = None,
    stem_stride: Annotated[
        int | None,
        typer.Option(
            help="Stride of the first convolution, 1 or 2.", show_default="1; digits: 2", rich_help_panel=_MODEL
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data.", show_default="30; digits: 15", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per rank and step.", show_default="64; digits: 32", rich_help_panel=_TRAINING),
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_TRAINING)] = 0.1,
    momentum: Annotated[float, typer.Option(help="Of SGD.", rich_help_panel=_TRAINING)] = 0.9,
    nesterov: Annotated[bool, typer.Option(help="Nesterov's momentum.", rich_help_panel=_TRAINING)] = False,
    weight_decay: Annotated[
        float, typer.Option(help="L2 penalty of matrices and kernels.", rich_help_panel=_TRAINING)
    ] = (5e-4),
    decay_norm: Annotated[
        bool, typer.Option(help="Decay biases and batch normalisation, too.", rich_help_panel=_TRAINING)
    ] = False,
    warmup_epochs: Annotated[
        float, typer.Option(help="Linear warm-up; a cosine follows.", rich_help_panel=_TRAINING)
    ] = 1.0,
    amp: Annotated[
        str, typer.Option(help=f"Autocast: {', '.join(AMP_MODES)}. fp16 uses a GradScaler.", rich_help_panel=_TRAINING)
    ] = "none",
    channels_last: Annotated[bool, typer.Option(help="Memory format.", rich_help_panel=_TRAINING)] = True,
    augment: Annotated[
        bool, typer.Option(help="Random shifts and mirror images (digits are not mirrored).", rich_help_panel=_TRAINING)
    ] = True,
    seed: Annotated[
        int, typer.Option(help="Determines weights, order and augmentation.", rich_help_panel=_TRAINING)
    ] = 0,
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)}; without it, compare all.", rich_help_panel=_EXCHANGE),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help=f"Of qcomm: {', '.join(GRIDS)}.", show_default="sigma", rich_help_panel=_EXCHANGE)
    ] = None,
    step: Annotated[
        float | None,
        typer.Option(help="Of the sigma grid, in standard deviations.", show_default="1", rich_help_panel=_EXCHANGE),
    ] = None,
    c: Annotated[
        float | None,
        typer.Option(
            "--c", help="Of the range grid, bits above the entropy.", show_default="6", rich_help_panel=_EXCHANGE
        ),
    ] = None,
    error_feedback: Annotated[bool, typer.Option(help="Of qcomm.", rich_help_panel=_EXCHANGE)] = True,
    strategy: Annotated[
        str,
        typer.Option(
            help=f"Of qcomm: {', '.join(STRATEGIES)}. auto takes what pays on this network.",
            rich_help_panel=_EXCHANGE,
        ),
    ] = "two_phase",
    ranks_per_node: Annotated[
        int | None,
        typer.Option(help="Of the strategy hierarchical.", show_default="the launcher's", rich_help_panel=_EXCHANGE),
    ] = None,
    min_elements: Annotated[
        int, typer.Option(help="Smaller tensors travel uncompressed.", rich_help_panel=_EXCHANGE)
    ] = 1024,
    compression_warmup_steps: Annotated[
        int, typer.Option(help="So many first steps travel uncompressed.", rich_help_panel=_EXCHANGE)
    ] = 0,
    ranks: Annotated[
        int | None,
        typer.Option(help="Processes to start here.", show_default="2, or the launcher's", rich_help_panel=_RUN),
    ] = None,
    threads: Annotated[int, typer.Option(help="Of torch, per rank.", rich_help_panel=_RUN)] = 1,
    out: Annotated[
        Path, typer.Option(help="Directory for the log, the results and checkpoints.", rich_help_panel=_RUN)
    ] = Path("runs"),
    checkpoint_every: Annotated[
        int, typer.Option(help="Epochs between checkpoints; 0 for none.", rich_help_panel=_RUN)
    ] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Continue from the newest checkpoint in this directory.", rich_help_panel=_RUN)
    ] = None,
) -> None:
    """Build the configuration, check what can be checked without ranks, and launch."""
    try:
        wants_range = c is not None or grid == "range"
        if grid == "sigma" and c is not None:
            raise RecipeError("--c belongs to --grid range")
        if wants_range and step is not None:
            raise RecipeError("--step belongs to --grid sigma")
        of_qcomm = grid is not None or step is not None or c is not None
        if of_qcomm and method not in (None, "qcomm"):
            raise RecipeError(f"--grid, --step and --c belong to --method qcomm; --method is {method!r}")
        single = method if method is not None else ("qcomm" if of_qcomm else None)
        if single is None and (resume is not None or checkpoint_every):
            raise RecipeError("--resume and --checkpoint-every need --method: a comparison is run in one piece")
        if single != "qcomm" and single is not None and (not error_feedback or compression_warmup_steps):
            raise RecipeError("--no-error-feedback and --compression-warmup-steps belong to --method qcomm")

        defaults = _DEFAULTS.get(dataset, _OTHER_DEFAULTS)
        config = TrainConfig(
            epochs=defaults.epochs if epochs is None else epochs,
            batch_size=defaults.batch_size if batch_size is None else batch_size,
            stem_stride=defaults.stem_stride if stem_stride is None else stem_stride,
            model=model,
            dataset=dataset,
            data_dir=data_dir,
            learning_rate=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            decay_norm=decay_norm,
            warmup_epochs=warmup_epochs,
            seed=seed,
            amp=amp,
            channels_last=channels_last,
            augment=augment,
            train_images=train_images,
            method=single or "fp32",
            grid="range" if wants_range else (grid or "sigma"),
            step=1.0 if step is None else step,
            c=6.0 if c is None else c,
            error_feedback=error_feedback,
            strategy=strategy,
            ranks_per_node=ranks_per_node,
            min_elements=min_elements,
            compression_warmup_steps=compression_warmup_steps,
            threads=threads,
            out=out,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )
        if launched_world_size() is None:
            ranks = 2 if ranks is None else ranks
            check(config, ranks)  # what stops every rank is told once
        launch(run_all, ranks, threads, [config] if single else comparison_configs(config))
    except RecipeError as error:
        _fail(str(error))


app.command()(plan)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A packet, as bytes.")],
) -> None:
    """Print what a packet holds: shape, dtype, grid, bits, entropy and sizes; for several segments one line each."""
    content = bytearray(file.read_bytes())
    packet = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    try:
        info = qcomm.inspect(packet)
    except qcomm.PacketError as error:
        _fail(f"{file} is not a packet: {error}")
    for field in dataclasses.fields(info):
        if field.name != "segments":
            typer.echo(f"{field.name:<18} {getattr(info, field.name)}")
    if len(info.segments) > 1:
        for index, segment in enumerate(info.segments):
            typer.echo(f"{f'segment {index}':<18} {segment}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(USER_ERROR)
