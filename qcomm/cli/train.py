"""The command ``qcomm train``: one training run, or the same one with each gradient exchange for comparison."""

from dataclasses import dataclass, field
from pathlib import Path

from qcomm.cli.options import option, takes
from qcomm.collectives import STRATEGIES
from qcomm.recipes import (
    AMP_MODES,
    DATASET_NAMES,
    GRIDS,
    METHODS,
    MODEL_NAMES,
    RecipeError,
    TrainConfig,
    check,
    comparison_configs,
    launch,
    launched_world_size,
    run_all,
)

__all__ = ["TRAIN_HELP", "train"]

TRAIN_HELP = """Train a residual network by data parallelism, with compressed gradients.

Without --method, --grid, --step or --c the same training runs four times, one after another: with plain fp32
all-reduce, with torch's bf16 hook, and with qcomm at one and at two standard deviations a step. A table compares
accuracy, bits, bytes and time.

[bold]Examples[/bold]

The comparison, on data that ships with scikit-learn: [green]qcomm train[/green]

One run, two standard deviations a step: [green]qcomm train --step 2[/green]

Fashion-MNIST, bf16 autocast: [green]qcomm train --dataset fashion-mnist --epochs 5 --amp bf16[/green]

With checkpoints: [green]qcomm train --method qcomm --checkpoint-every 1 --out runs/a[/green]

From the last one: [green]qcomm train --method qcomm --resume runs/a/qcomm-k1 --out runs/a[/green]

The same command to begin and to go on: [green]torchrun --standalone --nproc_per_node=2 --max-restarts=3 -m qcomm train
--method qcomm --checkpoint-every 1 --resume auto --out runs/a[/green]

Under torchrun: [green]torchrun --standalone --nproc_per_node=2 -m qcomm train --model resnet18
--dataset cifar10 --data-dir cifar-10-batches-py --grid sigma --step 1[/green]

Under mpirun: [green]mpirun -np 4 qcomm train --step 1[/green]
"""

# Defaults that depend on the data set. The digits carry 8x8 pixels, so that the stem may stride by 2.
_DEFAULTS = {"digits": {"epochs": 15, "batch_size": 32, "stem_stride": 2}}
_OTHER_DEFAULTS = {"epochs": 30, "batch_size": 64}

_AUTO = "auto"  # of --resume
_MODEL, _TRAINING, _EXCHANGE, _RUN = "Model and data", "Training", "Gradient exchange", "Run"


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``qcomm train`` as they were given.

    The fields are those of :class:`TrainConfig`, and ``ranks``. None is an option that was left out.

    Raises:
        RecipeError: options that contradict each other. :class:`TrainConfig` checks single values.
    """

    model: str = field(default=TrainConfig.model, metadata=option("One of {choices}.", _MODEL, choices=MODEL_NAMES))
    dataset: str = field(
        default=TrainConfig.dataset, metadata=option("One of {choices}.", _MODEL, choices=DATASET_NAMES)
    )
    data_dir: Path | None = field(default=None, metadata=option("Directory with the data set's files.", _MODEL))
    train_images: int | None = field(
        default=None, metadata=option("Use only the first so many training images.", _MODEL)
    )
    stem_stride: int | None = field(
        default=None, metadata=option("Stride of the first convolution, 1 or 2.", _MODEL, shown="1; digits: 2")
    )
    epochs: int | None = field(
        default=None, metadata=option("Passes over the data.", _TRAINING, shown="30; digits: 15")
    )
    batch_size: int | None = field(
        default=None, metadata=option("Images per rank and step.", _TRAINING, shown="64; digits: 32")
    )
    learning_rate: float = field(
        default=TrainConfig.learning_rate, metadata=option("Peak learning rate.", _TRAINING, flag="--lr")
    )
    momentum: float = field(default=TrainConfig.momentum, metadata=option("Of SGD.", _TRAINING))
    nesterov: bool = field(default=TrainConfig.nesterov, metadata=option("Nesterov's momentum.", _TRAINING))
    weight_decay: float = field(
        default=TrainConfig.weight_decay, metadata=option("L2 penalty of matrices and kernels.", _TRAINING)
    )
    decay_norm: bool = field(
        default=TrainConfig.decay_norm, metadata=option("Decay biases and batch normalisation, too.", _TRAINING)
    )
    warmup_epochs: float = field(
        default=TrainConfig.warmup_epochs, metadata=option("Linear warm-up; a cosine follows.", _TRAINING)
    )
    amp: str = field(
        default=TrainConfig.amp,
        metadata=option("Autocast: {choices}. fp16 uses a GradScaler.", _TRAINING, choices=AMP_MODES),
    )
    channels_last: bool = field(default=TrainConfig.channels_last, metadata=option("Memory format.", _TRAINING))
    augment: bool = field(
        default=TrainConfig.augment,
        metadata=option("Random shifts and mirror images (digits are not mirrored).", _TRAINING),
    )
    seed: int = field(
        default=TrainConfig.seed, metadata=option("Determines weights, order and augmentation.", _TRAINING)
    )
    method: str | None = field(
        default=None, metadata=option("{choices}; without it, compare all.", _EXCHANGE, choices=METHODS)
    )
    grid: str | None = field(
        default=None, metadata=option("Of qcomm: {choices}.", _EXCHANGE, choices=GRIDS, shown=TrainConfig.grid)
    )
    step: float | None = field(
        default=None,
        metadata=option("Of the sigma grid, in standard deviations.", _EXCHANGE, shown=f"{TrainConfig.step:g}"),
    )
    mean_step: float | None = field(
        default=None,
        metadata=option("Of the grid for means.", _EXCHANGE, shown="at most 1 up to --step 2, then --step"),
    )
    c: float | None = field(
        default=None,
        metadata=option("Of the range grid, bits above the entropy.", _EXCHANGE, shown=f"{TrainConfig.c:g}"),
    )
    error_feedback: bool = field(default=TrainConfig.error_feedback, metadata=option("Of qcomm.", _EXCHANGE))
    strategy: str = field(
        default=TrainConfig.strategy,
        metadata=option("Of qcomm: {choices}. auto takes what pays on this network.", _EXCHANGE, choices=STRATEGIES),
    )
    ranks_per_node: int | None = field(
        default=None, metadata=option("Of the strategy hierarchical.", _EXCHANGE, shown="the launcher's")
    )
    min_elements: int = field(
        default=TrainConfig.min_elements,
        metadata=option("Smaller tensors are quantized together, on a finer grid.", _EXCHANGE),
    )
    compression_warmup_steps: int = field(
        default=TrainConfig.compression_warmup_steps,
        metadata=option("So many first steps travel uncompressed.", _EXCHANGE),
    )
    compression_warmup_step: float | None = field(
        default=None,
        metadata=option("The first of these steps has this step instead.", _EXCHANGE, shown="uncompressed"),
    )
    secret: Path | None = field(
        default=None, metadata=option("Key file, with which weights and gradients are sealed.", _EXCHANGE)
    )
    ranks: int | None = field(
        default=None, metadata=option("Processes to start here.", _RUN, shown="2, or the launcher's")
    )
    threads: int = field(default=TrainConfig.threads, metadata=option("Of torch, per rank.", _RUN))
    out: Path = field(
        default=Path("runs"), metadata=option("Directory for the log, the results and checkpoints.", _RUN)
    )
    checkpoint_every: int = field(
        default=TrainConfig.checkpoint_every, metadata=option("Epochs between checkpoints; 0 for none.", _RUN)
    )
    resume: str | None = field(
        default=None,
        metadata=option(
            "Continue from the newest checkpoint in this directory. auto: in --out, or begin if there is none.", _RUN
        ),
    )

    def __post_init__(self) -> None:
        if self.grid == "sigma" and self.c is not None:
            raise RecipeError("--c belongs to --grid range")
        if self._on_range_grid and (self.step is not None or self.mean_step is not None):
            raise RecipeError("--step and --mean-step belong to --grid sigma")
        if self._has_grid and self.method not in (None, "qcomm"):
            raise RecipeError(
                f"--grid, --step, --mean-step and --c belong to --method qcomm; --method is {self.method!r}"
            )
        if self.compares and (self.resume is not None or self.checkpoint_every):
            raise RecipeError("--resume and --checkpoint-every need --method: a comparison is run in one piece")
        if self.resume == _AUTO and not self.checkpoint_every:
            raise RecipeError("--resume auto needs --checkpoint-every: without checkpoints the run would always begin")
        of_qcomm = not self.error_feedback or self.compression_warmup_steps
        if of_qcomm and self.method not in (None, "qcomm"):
            raise RecipeError("--no-error-feedback and --compression-warmup-steps belong to --method qcomm")
        if self.compression_warmup_step is not None and not self.compression_warmup_steps:
            raise RecipeError("--compression-warmup-step needs --compression-warmup-steps")

    @property
    def _on_range_grid(self) -> bool:
        return self.c is not None or self.grid == "range"

    @property
    def _has_grid(self) -> bool:
        return any(value is not None for value in (self.grid, self.step, self.mean_step, self.c))

    @property
    def compares(self) -> bool:
        """True where the same training runs with every gradient exchange."""
        return self.method is None and not self._has_grid

    @property
    def config(self) -> TrainConfig:
        """The run, or the one from which the comparison's differ."""
        given = {name: value for name, value in vars(self).items() if value is not None and name != "ranks"}
        if self.resume is not None:
            given["resume"] = self.out if self.resume == _AUTO else Path(self.resume)
        if self._has_grid:
            given["method"] = "qcomm"
        if self.grid is None and self._on_range_grid:
            given["grid"] = "range"
        return TrainConfig(**{**_DEFAULTS.get(self.dataset, _OTHER_DEFAULTS), **given})


@takes(TrainOptions, RecipeError)
def train(options: TrainOptions) -> None:
    """Checks the parts that need no ranks, and launches."""
    config, ranks = options.config, options.ranks
    if launched_world_size() is None:
        ranks = 2 if ranks is None else ranks
        check(config, ranks)  # an error that stops every rank is told once
    launch(run_all, ranks, config.threads, comparison_configs(config) if options.compares else [config])
