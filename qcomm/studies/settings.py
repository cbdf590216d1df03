"""Settings that all runs of a study share, and the key of one run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qcomm.recipes import DATASET_NAMES, Dataset, RecipeError, Split, load_dataset

DATASETS = DATASET_NAMES


class RunKey(NamedTuple):
    """A run: one arm of the study with one seed."""

    arm: str
    seed: int


@dataclass(frozen=True)
class StudySettings:
    """The settings that all runs of a study share.

    Attributes:
        dataset: one of ``DATASETS``.
        data_dir: directory with its files.
        train_images: train on the first so many.
        steps: of training.
        workers: number of workers, simulated in one process.
        batch_size: images per worker and step.
        learning_rate: of SGD, constant.
        runs: seeds of each arm.
        seed: the first of them.

    Raises:
        RecipeError: a field is out of its range.
    """

    dataset: str = "fashion-mnist"
    data_dir: Path | None = None
    train_images: int = 4000
    steps: int = 320
    workers: int = 2
    batch_size: int = 32
    learning_rate: float = 0.05
    runs: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise RecipeError(f"--dataset is {self.dataset!r}; it must be one of {', '.join(DATASETS)}")
        for name, least in (("train_images", 1), ("steps", 1), ("workers", 2), ("batch_size", 1), ("runs", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise RecipeError(f"--{option} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.learning_rate < float("inf"):
            raise RecipeError(f"--lr is {self.learning_rate}; it must be positive and finite")
        if self.seed < 0:
            raise RecipeError(f"--seed is {self.seed}; it must be at least 0")

    @property
    def seeds(self) -> range:
        """The seeds of each arm."""
        return range(self.seed, self.seed + self.runs)

    def load(self) -> tuple[Dataset, Split]:
        """Returns the data set, and its first ``train_images`` training images.

        Raises:
            RecipeError: the data set is not there, or has fewer images.
        """
        data = load_dataset(self.dataset, self.data_dir)
        if self.train_images > len(data.train):
            raise RecipeError(f"--train-images is {self.train_images}; {self.dataset} has {len(data.train)}")
        return data, data.train.first(self.train_images)

    def of_a_run(self) -> dict[str, Any]:
        """Returns the fields that one run depends on, as JSON types."""
        fields = asdict(self)
        for name in ("data_dir", "runs", "seed"):
            del fields[name]
        return fields
