"""Checkpoints of a data-parallel run: one file for the shared state, and one per rank for its exchange's state.

Error feedback differs between ranks, so a checkpoint of rank 0 alone would lose part of the gradients. A checkpoint is
a directory ``epoch-0003`` that appears under its name only when every rank's file is complete.
"""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qcomm.recipes.config import TrainConfig
from qcomm.recipes.errors import RecipeError

_FORMAT = 1
_SHARED = "shared.pt"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.pt"


def save(folder: Path, epoch: int, shared: dict[str, Any], per_rank: dict[str, Any]) -> None:
    """Writes ``folder/epoch-NNNN`` and removes older checkpoints there. Collective: every rank calls it.

    Args:
        folder: the run's directory, on a file system that all ranks see.
        epoch: number of finished epochs.
        shared: state that is equal on all ranks; rank 0's is written.
        per_rank: this rank's own state.
    """
    rank = dist.get_rank()
    unfinished, final = folder / f"unfinished-{epoch:04d}", folder / f"epoch-{epoch:04d}"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        torch.save(
            {"format": _FORMAT, "world_size": dist.get_world_size(), "epoch": epoch, **shared}, unfinished / _SHARED
        )
    dist.barrier()  # the directory exists
    torch.save(per_rank, unfinished / _rank_file(rank))
    dist.barrier()  # every file is complete
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.replace(final)
        for older in _all(folder):
            if older != final:
                shutil.rmtree(older)
    dist.barrier()


def _all(folder: Path) -> list[Path]:
    """Returns the checkpoints below ``folder``, oldest first; other directories are the user's."""
    return sorted(path for path in folder.glob("epoch-[0-9]*") if (path / _SHARED).is_file())


def find(path: Path) -> Path:
    """Returns the checkpoint that ``--resume`` means: ``path`` itself, or the newest below it.

    Raises:
        RecipeError: there is no checkpoint.
    """
    if (path / _SHARED).is_file():
        return path
    below = _all(path)
    if not below:
        raise RecipeError(f"--resume: {path} holds no checkpoint (a directory epoch-NNNN with {_SHARED} in it)")
    return below[-1]


def load(
    checkpoint: Path, config: TrainConfig, rank: int, world_size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads a checkpoint that :func:`save` wrote; no code in the files is run.

    The number of ranks may have changed. With fewer ranks, rank r takes the parts of r, r + W, r + 2 W, ... With more
    ranks, a new rank gets rank 0's part.

    Args:
        checkpoint: directory, from :func:`find`.
        config: configuration of the resumed run. Fields that determine the result must not have changed.
        rank: rank whose state is read.
        world_size: number of ranks of the resumed run.

    Returns:
        The shared part, and the parts of the ranks that this one replaces.

    Raises:
        RecipeError: a missing or damaged file, or another configuration (the option is named).
    """
    shared = _read(checkpoint / _SHARED)
    if shared.get("format") != _FORMAT:
        raise RecipeError(f"--resume: {checkpoint} has format {shared.get('format')}; this version reads {_FORMAT}")
    difference = config.difference(shared["config"])
    if difference:
        raise RecipeError(f"--resume: {checkpoint} belongs to another run: {difference}")
    written = int(shared["world_size"])
    sources = range(rank, written, world_size) if rank < written else range(1)
    return shared, [_read(checkpoint / _rank_file(source)) for source in sources]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise RecipeError(f"--resume: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"--resume: {path} holds a {type(content).__name__}, not a checkpoint")
    return content
