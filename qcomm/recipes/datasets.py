"""Image data sets that fit in memory: digits, MNIST, Fashion-MNIST and CIFAR-10, all as 32x32 uint8 tensors.

Nothing is downloaded. The digits ship inside scikit-learn; the others are read from files the user has.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from qcomm.recipes.errors import RecipeError
from qcomm.recipes.image_files import read_cifar_batch, read_idx

IMAGE_SIZE = 32
NUM_CLASSES = 10

# Where distributions install the files; Debian: apt install dataset-fashion-mnist.
_FASHION_MNIST_PLACES = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/local/share/datasets/fashion-mnist"))
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


@dataclass(frozen=True, eq=False)
class Split:
    """Images, uint8 ``[n, channels, 32, 32]``, and labels, int64 ``[n]``, both on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def first(self, count: int) -> "Split":
        """Returns the first ``count`` images (views)."""
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its augmentation and the statistics that images are normalised with.

    ``mean`` and ``std`` are fp32 ``[1, channels, 1, 1]`` in units of one grey level, measured over all training images;
    ``crop_padding`` is in pixels.
    """

    name: str
    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    crop_padding: int
    flip: bool

    @property
    def channels(self) -> int:
        """Returns 1 for grey images, 3 for colour."""
        return self.train.images.shape[1]

    def normalise(self, images: Tensor) -> Tensor:
        """Converts uint8 images to fp32 with zero mean and unit deviation per channel."""
        return (images.float() - self.mean) / self.std


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the exact mean and deviation per channel from 256-bin histograms, without a float copy."""
    levels = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(1):
        counts = torch.zeros(256, dtype=torch.float64)
        for part in torch.split(channel, 4096):  # bincount widens to int64; keep that copy small
            counts += torch.bincount(part.flatten(), minlength=256)
        weights = counts / counts.sum()
        mean = (weights * levels).sum()
        means.append(mean)
        deviations.append((weights * (levels - mean).square()).sum().sqrt().clamp(min=1.0))
    shape = (1, -1, 1, 1)
    return torch.stack(means).float().view(shape), torch.stack(deviations).float().view(shape)


def _assemble(name: str, train: Split, test: Split, *, crop_padding: int, flip: bool) -> Dataset:
    mean, std = _channel_statistics(train.images)
    return Dataset(name, train, test, mean, std, crop_padding, flip)


def load_digits(_data_dir: Path | None = None) -> Dataset:
    """Loads the 1,797 8x8 digits of scikit-learn, upscaled to 32x32 by bilinear interpolation.

    1,352 are for training, 445 for testing. The split is fixed and stratified: every fourth image of each class is a
    test image.

    Raises:
        RecipeError: scikit-learn is not installed.

    Example:
        >>> digits = load_digits()
        >>> tuple(digits.train.images.shape), len(digits.test)
        ((1352, 1, 32, 32), 445)
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise RecipeError(
            "the digits data set ships inside scikit-learn, which is not installed: pip install 'qcomm[train]'"
        ) from error
    bunch = load()
    small = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)  # [n, 1, 8, 8], values 0..16
    size = (IMAGE_SIZE, IMAGE_SIZE)
    large = functional.interpolate(small, size=size, mode="bilinear", align_corners=False)
    images = (large * (255 / 16)).round().to(torch.uint8)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(NUM_CLASSES):
        is_test[(labels == digit).nonzero().flatten()[3::4]] = True
    train, test = Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])
    # Two pixels of 32 are half a pixel of the original 8: more would cut strokes off.
    return _assemble("digits", train, test, crop_padding=2, flip=False)


def _find_idx(folder: Path, stem: str) -> Path | None:
    """Returns the file under any of the names of its distributions."""
    for name in (stem, stem.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix)
    return None


def _load_idx_dataset(name: str, places: Sequence[Path], how_to_get: str, *, crop_padding: int, flip: bool) -> Dataset:
    for folder in places:
        paths = [_find_idx(folder, stem) for stem in _IDX_FILES]
        if all(paths):
            tensors = [read_idx(path) for path in paths if path is not None]
            break
    else:
        looked = ", ".join(str(place) for place in places) or "nowhere (no --data-dir was given)"
        files = ", ".join(f"{stem}[.gz]" for stem in _IDX_FILES)
        raise RecipeError(f"{name} needs the files {files}; looked in {looked}. {how_to_get}")
    splits = []
    for images, labels, path in ((tensors[0], tensors[1], paths[0]), (tensors[2], tensors[3], paths[2])):
        if images.dim() != 3 or tuple(images.shape[1:]) != (28, 28) or len(images) == 0:
            raise RecipeError(f"{path} has shape {list(images.shape)}; {name} has images of 28 x 28")
        if labels.shape != images.shape[:1] or int(labels.max()) >= NUM_CLASSES:
            raise RecipeError(f"the labels that belong to {path} are not {len(images)} numbers in 0..{NUM_CLASSES - 1}")
        padded = functional.pad(images.unsqueeze(1), (2, 2, 2, 2))
        splits.append(Split(padded, labels.long()))
    return _assemble(name, *splits, crop_padding=crop_padding, flip=flip)


def load_mnist(data_dir: Path | None) -> Dataset:
    """Loads MNIST from its four idx files (gzip or not) in ``data_dir``; 28x28 padded with zeros to 32x32.

    Raises:
        RecipeError: a file is missing, damaged or of another shape.
    """
    how = "Download them from https://ossci-datasets.s3.amazonaws.com/mnist/ and name the directory with --data-dir."
    return _load_idx_dataset("mnist", [data_dir] if data_dir else [], how, crop_padding=4, flip=False)


def load_fashion_mnist(data_dir: Path | None) -> Dataset:
    """Loads Fashion-MNIST (arXiv:1708.07747) from its four idx files; 28x28 padded with zeros to 32x32.

    Without ``data_dir`` the place where Debian's package dataset-fashion-mnist puts them is tried.

    Raises:
        RecipeError: a file is missing, damaged or of another shape.
    """
    how = (
        "On Debian and Ubuntu: apt install dataset-fashion-mnist. Otherwise download them from "
        "https://github.com/zalandoresearch/fashion-mnist and name the directory with --data-dir."
    )
    places = [data_dir] if data_dir else _FASHION_MNIST_PLACES
    return _load_idx_dataset("fashion-mnist", places, how, crop_padding=4, flip=True)


def load_cifar10(data_dir: Path | None) -> Dataset:
    """Loads CIFAR-10 from the files of its python version.

    They lie in ``data_dir`` or ``data_dir/cifar-10-batches-py``.

    Raises:
        RecipeError: a file is missing, damaged or not a batch of images.
    """
    places = [data_dir, data_dir / _CIFAR_FOLDER] if data_dir else []
    for folder in places:
        if all((folder / name).is_file() for name in _CIFAR_FILES):
            batches = [read_cifar_batch(folder / name) for name in _CIFAR_FILES]
            break
    else:
        looked = ", ".join(str(place) for place in places) or "nowhere (no --data-dir was given)"
        raise RecipeError(
            f"cifar10 needs the files {', '.join(_CIFAR_FILES)}; looked in {looked}. Download the python version from "
            "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it and name the directory with --data-dir."
        )
    images = torch.cat([images for images, _ in batches[:-1]])
    labels = torch.cat([labels for _, labels in batches[:-1]])
    return _assemble("cifar10", Split(images, labels), Split(*batches[-1]), crop_padding=4, flip=True)


_LOADERS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
}
DATASET_NAMES: tuple[str, ...] = tuple(_LOADERS)


@lru_cache(maxsize=1)
def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Loads a data set by name; the last one stays in memory, so that consecutive runs read it once.

    Args:
        name: one of ``DATASET_NAMES``.
        data_dir: the directory with its files; digits needs none and fashion-mnist may find its own.

    Raises:
        RecipeError: the name is unknown, or files are missing; the message says where to get them.
    """
    if name not in _LOADERS:
        raise RecipeError(f"dataset is {name!r}; it must be one of {', '.join(DATASET_NAMES)}")
    return _LOADERS[name](data_dir)


def augmentation_generator(seed: int, epoch: int, rank: int) -> torch.Generator:
    """Returns the random numbers of one rank in one epoch; a resumed run draws the same ones."""
    # torch's CPU generator keeps the low 32 bits of a seed only, so the three numbers are hashed into those.
    digest = hashlib.blake2b(f"{seed}/{epoch}/{rank}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to ``padding`` pixels (zeros move in) and mirrors half of them.

    Args:
        images: uint8 or float ``[n, channels, height, width]`` on the CPU.
        padding: maximum shift in either direction, in pixels.
        flip: whether half of the images are mirrored left to right.
        generator: source of the shifts and flips.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        >>> augment(torch.ones(1, 1, 4, 4), 0, True, torch.Generator()).sum()
        tensor(16.)
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator, dtype=torch.int64)
    rows = shifts[0] + torch.arange(height, dtype=torch.int64)
    columns = torch.arange(width, dtype=torch.int64).expand(count, width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator, dtype=torch.float32) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + shifts[1]
    image_index = torch.arange(count, dtype=torch.int64).view(-1, 1, 1, 1)
    channel_index = torch.arange(channels, dtype=torch.int64).view(1, -1, 1, 1)
    return padded[image_index, channel_index, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width)]
