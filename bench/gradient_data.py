"""Buckets of real gradients: ResNet-18 after some steps on digits, every rank's from its own images."""

import hashlib
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from qcomm.collectives.layout import TensorSpec
from qcomm.recipes.datasets import load_dataset
from qcomm.recipes.models import build_model

BUILD = Path(__file__).resolve().parents[1] / "build"
MIN_ELEMENTS = 1024  # as of the hook: smaller tensors travel uncompressed
STEPS, BATCH = 20, 16


class Bucket(NamedTuple):
    """Flat values, where the tensors are, and each tensor's own shape."""

    values: torch.Tensor
    specs: list[TensorSpec]
    shapes: list[torch.Size]


def gradients(ranks: Sequence[int]) -> list[list[torch.Tensor]]:
    """For each rank ResNet-18's gradients, last layer first. Weights are the same on all ranks, images are not."""
    if not ranks:
        return []
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = build_model("resnet18", in_channels=1, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(1))

    def backward(first: int) -> None:
        chosen = order[first : first + BATCH]
        optimizer.zero_grad()
        functional.cross_entropy(model(data.normalise(data.train.images[chosen])), data.train.labels[chosen]).backward()

    for step in range(STEPS):
        backward(BATCH * step)
        optimizer.step()
    found = []
    for rank in ranks:
        backward(BATCH * (STEPS + rank))
        found.append([p.grad for p in reversed(list(model.parameters())) if p.grad is not None])
    return found


def save(folder: Path, world_size: int) -> None:
    """Makes the gradients of all ranks that ``folder`` lacks, for :func:`load`."""
    missing = [rank for rank in range(world_size) if not (folder / f"{rank}.pt").exists()]
    for rank, parts in zip(missing, gradients(missing), strict=True):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            torch.save(parts, file)
        Path(file.name).rename(folder / f"{rank}.pt")  # at once: others may look for it


def worlds(rates: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[Path, str, int]]:
    """(folder for :func:`load`, rate, number of ranks) of each world.

    The gradients are made once, and kept where the tree has a build folder: they follow from torch and this file.
    """
    with tempfile.TemporaryDirectory(prefix="qcomm-bench-") as given:
        folder = Path(given)
        if BUILD.is_dir():
            key = hashlib.sha256(torch.__version__.encode() + Path(__file__).read_bytes()).hexdigest()[:16]
            folder = BUILD / "bench-gradients" / key
            folder.mkdir(parents=True, exist_ok=True)
        save(folder, max(sizes))
        for rate, world_size in itertools.product(rates, sizes):
            yield folder, rate, world_size


def load(folder: Path | None, rank: int) -> list[torch.Tensor]:
    """A rank's gradients, from where :func:`save` put them or made here."""
    if folder is None:
        return gradients([rank])[0]
    parts: list[torch.Tensor] = torch.load(folder / f"{rank}.pt", weights_only=True)
    return parts


def bucket(parts: Sequence[torch.Tensor], elements: int) -> Bucket:
    """The first ``elements`` values of tensors, which are repeated where they have fewer.

    The last tensor is cut after a whole row, so that it still has the shape of a layer, and what then is left to fill
    is a tensor of one dimension.

    Example:
        >>> bucket([torch.zeros(4, 3), torch.zeros(5)], 25).shapes
        [torch.Size([4, 3]), torch.Size([5]), torch.Size([2, 3]), torch.Size([2])]
    """
    values, specs, shapes, offset = torch.empty(elements), [], [], 0
    while offset < elements:
        for part in parts:
            position = 0
            for shape in _fitting(part.shape, elements - offset):
                count = math.prod(shape)
                values[offset : offset + count] = part.reshape(-1)[position : position + count]
                specs.append(TensorSpec(f"tensor {len(specs)}", offset, count, count >= MIN_ELEMENTS, may_round=True))
                shapes.append(torch.Size(shape))
                offset, position = offset + count, position + count
    return Bucket(values, specs, shapes)


def _fitting(shape: Sequence[int], elements: int) -> list[Sequence[int]]:
    """The shapes of what fits of a tensor in so many elements."""
    if math.prod(shape) <= elements:
        return [shape]
    rows, rest = divmod(elements, math.prod(shape[1:]))
    return [found for found in ((rows, *shape[1:]), (rest,)) if math.prod(found)]
