"""The configuration of a training run, validated once, and the learning-rate schedule."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcomm.codec import Grid, RangeGrid, SigmaGrid
from qcomm.collectives import STRATEGIES, ReduceOptions
from qcomm.recipes.datasets import DATASET_NAMES
from qcomm.recipes.errors import RecipeError
from qcomm.recipes.models import MODEL_NAMES

METHODS = ("fp32", "bf16", "qcomm")
GRIDS = ("sigma", "range")
AMP_MODES = ("none", "bf16", "fp16")

# These may differ between a run and the one that resumes it: they have no part in the arithmetic.
_FREE_ON_RESUME = frozenset({"out", "resume", "checkpoint_every", "data_dir", "secret"})


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of one training run. Field names are the command line's options.

    Attributes:
        model: one of ``models.MODEL_NAMES``.
        dataset: one of ``datasets.DATASET_NAMES``.
        data_dir: directory with the data set's files, where it needs one.
        epochs: passes over the training images.
        batch_size: images per rank and step.
        learning_rate: maximum, which is reached after the warm-up and before the cosine.
        momentum: of SGD.
        nesterov: Nesterov's variant of momentum.
        weight_decay: coefficient of the L2 penalty.
        decay_norm: whether it also applies to biases and batch normalisation.
        warmup_epochs: length of the linear warm-up, which may be a fraction.
        seed: determines weights, order and augmentation.
        amp: autocast dtype of forward and backward, "none", "bf16" or "fp16" (with a GradScaler).
        channels_last: memory format of weights and images.
        augment: random shifts and, where the data set allows it, mirror images.
        train_images: number of initial training images to use; None for all.
        stem_stride: stride of the first convolution; None for the model's default.
        method: average of the gradients, "fp32" (plain all-reduce), "bf16" (torch's bf16_compress_hook) or "qcomm".
        grid: of qcomm, "sigma" or "range".
        step: of the sigma grid, in standard deviations.
        mean_step: the same for means; None takes the default of :class:`qcomm.collectives.ReduceOptions`.
        c: of the range grid, bits above the entropy.
        error_feedback: of qcomm.
        strategy: of qcomm; by default it compresses even where that is slower, so that runs can be compared.
        ranks_per_node: of qcomm's strategy hierarchical; None takes the launcher's.
        min_elements: of qcomm; smaller tensors are quantized together, or travel uncompressed without error feedback.
        compression_warmup_steps: of qcomm; number of initial steps whose gradients travel uncompressed.
        compression_warmup_step: of qcomm; the grid's step with which they begin instead; None for uncompressed.
        secret: of qcomm; the path of a key file, with which gradients, weights and buffers are sealed. What ranks tell
            each other besides, such as losses, is not.
        threads: of torch, per rank.
        out: directory for the log and the checkpoints; None writes nothing.
        checkpoint_every: epochs between checkpoints; 0 for none.
        resume: a checkpoint directory, or a directory of them, to continue from. ``out`` and the run's own directory in
            it may hold none: the run then begins.

    Raises:
        RecipeError: a field is out of its range; the message names the option.

    Example:
        >>> TrainConfig(method="qcomm", step=2.0).label
        'qcomm k=2'
    """

    model: str = "resnet20"
    dataset: str = "digits"
    data_dir: Path | None = None
    epochs: int = 12
    batch_size: int = 32
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norm: bool = False
    warmup_epochs: float = 1.0
    seed: int = 0
    amp: str = "none"
    channels_last: bool = True
    augment: bool = True
    train_images: int | None = None
    stem_stride: int | None = None
    method: str = "fp32"
    grid: str = "sigma"
    step: float = 1.0
    mean_step: float | None = None
    c: float = 6.0
    error_feedback: bool = True
    strategy: str = "two_phase"
    ranks_per_node: int | None = None
    min_elements: int = 1024
    compression_warmup_steps: int = 0
    compression_warmup_step: float | None = None
    secret: Path | None = None
    threads: int = 1
    out: Path | None = None
    checkpoint_every: int = 0
    resume: Path | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("model", MODEL_NAMES),
            ("dataset", DATASET_NAMES),
            ("amp", AMP_MODES),
            ("method", METHODS),
            ("grid", GRIDS),
            ("strategy", STRATEGIES),
        ):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{_option(name)} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("threads", 1),
            ("min_elements", 0),
            ("compression_warmup_steps", 0),
            ("checkpoint_every", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise RecipeError(f"{_option(name)} is {getattr(self, name)}; it must be at least {least}")
        for name, positive in (
            ("learning_rate", True),
            ("step", True),
            ("c", False),
            ("momentum", False),
            ("weight_decay", False),
            ("warmup_epochs", False),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                bound = "positive" if positive else "zero or more"
                raise RecipeError(f"{_option(name)} is {value}; it must be finite and {bound}")
        if self.momentum >= 1:
            raise RecipeError(f"--momentum is {self.momentum}; it must be below 1")
        if self.nesterov and self.momentum == 0:
            raise RecipeError("--nesterov needs --momentum above 0")
        if self.train_images is not None and self.train_images < 1:
            raise RecipeError(f"--train-images is {self.train_images}; it must be at least 1")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise RecipeError(f"--ranks-per-node is {self.ranks_per_node}; it must be at least 1")
        if self.stem_stride not in (None, 1, 2):
            raise RecipeError(f"--stem-stride is {self.stem_stride}; it must be 1 or 2")
        if self.checkpoint_every and self.out is None:
            raise RecipeError("--checkpoint-every needs --out, the directory to write to")
        if self.secret is not None and self.method != "qcomm":
            raise RecipeError(f"--secret belongs to --method qcomm; {self.method} is torch's own and not sealed")
        if self.method == "qcomm":
            self._check_grids()

    def _check_grids(self) -> None:
        try:
            options = ReduceOptions(self.quantization, mean_step=self.mean_step)
            if self.error_feedback:
                options.check_feedback()
        except ValueError as error:
            raise RecipeError(f"--step is {self.step}, --mean-step {self.mean_step}, --c {self.c}: {error}") from error

    @property
    def quantization(self) -> Grid:
        """Returns the grid of qcomm."""
        return SigmaGrid(step=self.step) if self.grid == "sigma" else RangeGrid(c=self.c)

    @property
    def label(self) -> str:
        """Returns a short name for tables: "fp32", "bf16", "qcomm k=1", "qcomm range c=6"."""
        if self.method != "qcomm":
            return self.method
        return f"qcomm k={self.step:g}" if self.grid == "sigma" else f"qcomm range c={self.c:g}"

    @property
    def slug(self) -> str:
        """Returns the label as a file name."""
        return self.label.replace(" ", "-").replace("=", "")

    @property
    def folder(self) -> Path | None:
        """Returns the directory of the run's own checkpoints; None where it writes nothing."""
        return None if self.out is None else self.out / self.slug

    @property
    def resumes_own_output(self) -> bool:
        """Returns True if ``resume`` is where this run writes, so that one command line both begins and resumes it."""
        if self.resume is None or self.out is None or self.folder is None:
            return False
        return self.resume.resolve() in (self.out.resolve(), self.folder.resolve())

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON types."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def difference(self, stored: dict[str, Any]) -> str | None:
        """Returns the first option that differs from ``stored`` (of :meth:`to_json`) and would change the result."""
        for name, value in self.to_json().items():
            if name not in _FREE_ON_RESUME and stored.get(name) != value:
                return f"{_option(name)} is {value!r} here and {stored.get(name)!r} there"
        return None


def _option(name: str) -> str:
    return {"learning_rate": "--lr"}.get(name, "--" + name.replace("_", "-"))


def learning_rate(step: int, total_steps: int, warmup_steps: int, maximum: float) -> float:
    """Returns the rate of a linear warm-up and then half a cosine down to zero.

    Args:
        step: 0-based optimiser step, below ``total_steps``.
        total_steps: steps of the whole run.
        warmup_steps: steps until ``maximum`` is reached; 0 for none.
        maximum: peak of the schedule.

    Returns:
        The learning rate of step ``step``, which is positive at every step.

    Source: arXiv:1706.02677 (warm-up) and arXiv:1608.03983 (cosine).

    Example:
        >>> [round(learning_rate(step, 6, 2, 1.0), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup_steps:
        return maximum * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return maximum * 0.5 * (1 + math.cos(math.pi * progress))
