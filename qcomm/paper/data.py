"""Images in the form of the paper's network: 784 numbers each, split into training, validation and test."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qcomm.recipes import NUM_CLASSES, RecipeError, Split, load_dataset

# The epoch of peak accuracy is chosen on images with no other use: the last sixth of the training images.
_VALIDATION_SHARE = 6


@dataclass(frozen=True, eq=False)
class Vectors:
    """Images, fp32 ``[n, 784]``, and labels, int64 ``[n]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def share(self, worker: int, workers: int) -> "Vectors":
        """Returns every ``workers``-th image, from ``worker`` on."""
        return Vectors(self.images[worker::workers], self.labels[worker::workers])

    def targets(self) -> Tensor:
        """Returns the targets, fp32 ``[n, 10]``: 1 for the class, 0 for the others."""
        return torch.nn.functional.one_hot(self.labels, NUM_CLASSES).float()


@dataclass(frozen=True, eq=False)
class Data:
    """The three splits, scaled alike."""

    train: Vectors
    validation: Vectors
    test: Vectors


@lru_cache(maxsize=1)
def load(dataset: str, data_dir: Path | None = None, train_images: int | None = None) -> Data:
    """Loads a data set; the last one stays in memory.

    Pixels are scaled by the mean and the deviation of all training images.

    Args:
        dataset: one of ``settings.DATASETS``.
        data_dir: the directory with its files; digits needs none and fashion-mnist may find its own.
        train_images: number of training images, from the first on; None for all but the validation split.

    Raises:
        RecipeError: a file is missing or damaged, or ``train_images`` exceeds the data set. For a file, the message
            names it, the place of the search, and the way to get it.

    Example:
        >>> data = load("digits")
        >>> len(data.train), len(data.validation), tuple(data.test.images.shape)
        (1127, 225, (445, 784))
    """
    source = load_dataset(dataset, data_dir)
    held_out = len(source.train) // _VALIDATION_SHARE
    available = len(source.train) - held_out
    wanted = available if train_images is None else train_images
    if wanted > available:
        raise RecipeError(
            f"--train-images is {wanted}; {dataset} has {available} besides the {held_out} of the validation split"
        )

    def vectors(split: Split, first: int, last: int) -> Vectors:
        pixels = split.images[first:last, 0, 2:-2, 2:-2]  # the recipes' 32x32 images without the margin
        scaled = pixels.reshape(last - first, -1).float().sub_(source.mean.item()).div_(source.std.item())
        return Vectors(scaled, split.labels[first:last])

    return Data(
        vectors(source.train, 0, wanted),
        vectors(source.train, available, len(source.train)),
        vectors(source.test, 0, len(source.test)),
    )
