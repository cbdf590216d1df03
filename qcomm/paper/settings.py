"""Settings that determine one run of an experiment."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcomm.codec import RECONSTRUCTIONS, RangeGrid
from qcomm.recipes import RecipeError

DATASETS = ("mnist", "fashion-mnist", "digits")
INITS = ("uniform", "gaussian", "small")
KINDS = ("float", "grid", "decay", "noise")
MAX_CEILING = 16
_MAX_LEARNING_RATE = 3.4e38


@dataclass(frozen=True)
class Exchange:
    """The treatment of weights in the exchange at the end of an epoch.

    Attributes:
        kind: ``"float"`` sends them unchanged, ``"grid"`` quantized and Huffman-coded. The two others send floats that
            imitate one effect of the grid: ``"decay"`` contracts each layer towards the middle of its range by
            ``2**-N``, ``"noise"`` adds noise that is uniform over a bin.
        c: bits added to the entropy, the paper's floor.
        entropy_bits: the paper's M; ``c + M`` is its ceiling. 0 makes N fixed: ``N = c``.
        reconstruction: ``"center"``, as in the paper, or ``"endpoint"``.

    Raises:
        RecipeError: a field is out of its range.

    Example:
        >>> Exchange("grid", c=6, entropy_bits=4).label
        '10:6'
    """

    kind: str = "float"
    c: int = 6
    entropy_bits: int = 4
    reconstruction: str = "center"

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("reconstruction", RECONSTRUCTIONS)):
            if getattr(self, name) not in choices:
                raise RecipeError(f"exchange {name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if self.c < 0 or self.entropy_bits < 0 or not 1 <= self.c + self.entropy_bits <= MAX_CEILING:
            raise RecipeError(
                f"c is {self.c} and entropy_bits {self.entropy_bits}; neither may be negative, and their sum must be "
                f"in 1..{MAX_CEILING}"
            )

    @property
    def grid(self) -> RangeGrid:
        """Returns the grid, or the imitated one."""
        if self.entropy_bits == 0:
            return RangeGrid(num_bits=self.c, reconstruction=self.reconstruction)
        return RangeGrid(c=self.c, entropy_bits=self.entropy_bits, reconstruction=self.reconstruction)

    @property
    def label(self) -> str:
        """Returns ceiling and floor in the paper's notation; ``"32"`` for floats."""
        return "32" if self.kind == "float" else f"{self.c + self.entropy_bits}:{self.c}"

    @property
    def slug(self) -> str:
        """Returns a name for files."""
        if self.kind == "float":
            return "float"
        kind = self.reconstruction if self.kind == "grid" else self.kind
        return f"{kind}-c{self.c}-M{self.entropy_bits}"


@dataclass(frozen=True)
class Settings:
    """One training run. Fields with an option on the command line have its name.

    Attributes:
        dataset: one of ``DATASETS``.
        data_dir: directory with the data set's files; digits needs none.
        train_images: number of training images, from the first on; None for all but the validation split.
        epochs: passes over the training images, with one exchange at the end of each.
        seed: determines weights, order of the images and noise.
        workers: each trains on its share of the images and starts the epoch from the common weights.
        batch_size: images per worker and step.
        learning_rate: constant learning rate of plain SGD.
        init: initial weights: ``"uniform"`` over +-1/sqrt(fan_in), ``"gaussian"`` of the same deviation, ``"small"`` is
            Gaussian of deviation 0.01. Biases start at 0.
        exchange: exchange of weights.

    Raises:
        RecipeError: a field is out of its range; the message names the option.

    Example:
        >>> Settings(exchange=Exchange("grid"), seed=3).slug
        'center-c6-M4-uniform-seed3'
    """

    dataset: str = "fashion-mnist"
    data_dir: Path | None = None
    train_images: int | None = None
    epochs: int = 30
    seed: int = 0
    workers: int = 2
    batch_size: int = 20
    learning_rate: float = 0.05
    init: str = "uniform"
    exchange: Exchange = Exchange()

    def __post_init__(self) -> None:
        for name, choices in (("dataset", DATASETS), ("init", INITS)):
            if getattr(self, name) not in choices:
                raise RecipeError(f"--{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name, least in (("epochs", 1), ("seed", 0), ("workers", 1), ("batch_size", 1), ("train_images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        if not 0 < self.learning_rate <= _MAX_LEARNING_RATE:  # also false for NaN
            raise RecipeError(f"--lr is {self.learning_rate}; it must be positive and a float32 number")

    @property
    def slug(self) -> str:
        """Returns a name for the run's file; the remaining fields are compared with the file's content."""
        return f"{self.exchange.slug}-{self.init}-seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON types, without the directory of the data."""
        return {name: value for name, value in asdict(self).items() if name != "data_dir"}

    def difference(self, stored: dict[str, Any]) -> str | None:
        """Describes the first field whose value differs from ``stored`` (of :meth:`to_json`), or returns None."""
        for name, value in self.to_json().items():
            if stored.get(name) != value:
                return f"{name} is {value!r} here and {stored.get(name)!r} there"
        return None
