"""Checkpoints of a data-parallel run: one file for the shared state, and one per rank for its exchange's state.

Error feedback differs between ranks, so a checkpoint of rank 0 alone would lose part of the gradients. A checkpoint is
a directory ``epoch-0003`` that appears under its name only when every rank's file is complete and on the disk. It
disappears at once, too, so that a process may be killed at any time.
"""

import hashlib
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qcomm.recipes.config import TrainConfig
from qcomm.recipes.errors import RecipeError
from qcomm.saved_file import read_saved

_FORMAT = 1
_SHARED = "shared.pt"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.pt"


def save(folder: Path, epoch: int, shared: dict[str, Any], per_rank: dict[str, Any]) -> None:
    """Writes ``folder/epoch-NNNN`` and removes older checkpoints there. Collective: every rank calls it.

    An older checkpoint that cannot be removed is a warning on rank 0: the new one is whole all the same.

    Args:
        folder: the run's directory, on a file system that all ranks see.
        epoch: number of finished epochs.
        shared: state that is equal on all ranks; rank 0's is written.
        per_rank: this rank's own state.

    Raises:
        RecipeError: on all ranks, naming the one that could not write, as with a full disk. The last whole checkpoint
            stays.
    """
    rank = dist.get_rank()
    unfinished, final = folder / f"unfinished-{epoch:04d}", folder / f"epoch-{epoch:04d}"

    left: list[str] = []  # what could not be removed

    def remove(doomed: Path) -> None:
        try:
            _remove(doomed)
        except OSError as error:
            left.append(f"could not remove {doomed}: {type(error).__name__}: {error}")

    def begin() -> None:
        for old in folder.glob("unfinished-[0-9]*"):  # by a process that was killed here
            remove(old)
        unfinished.mkdir(parents=True)
        header = {"format": _FORMAT, "world_size": dist.get_world_size(), "epoch": epoch}
        _write({**header, **shared}, unfinished / _SHARED)

    def publish() -> None:
        replaced = _set_aside(final) if final.exists() else None  # of an earlier run
        try:
            unfinished.replace(final)
        except OSError:
            if replaced is not None:
                replaced.replace(final)
            raise
        _sync(folder)
        outdated = [older for older in _all(folder) if older != final]
        for other in outdated if replaced is None else [*outdated, replaced]:
            remove(other)

    try:
        _on_all_ranks(final, begin if rank == 0 else None)
        _on_all_ranks(final, lambda: _write(per_rank, unfinished / _rank_file(rank)))
    except RecipeError:
        if rank == 0:  # the disk may be full
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _on_all_ranks(final, publish if rank == 0 else None)  # what is complete stays if it gets no name
    for sentence in left:  # after the last collective, since a warning may be an error here
        warnings.warn(f"{sentence}; {final} is whole", stacklevel=2)


def _on_all_ranks(checkpoint: Path, step: Callable[[], None] | None) -> None:
    """Runs this rank's part of a step, if it has one, and waits for that of the others. Collective.

    Raises:
        RecipeError: on all ranks. A rank could not write, and the others would wait for it at the next step.
    """
    failure = ""
    try:
        if step is not None:
            step()
    except (OSError, RuntimeError) as error:  # torch's own is a RuntimeError
        failure = f"{type(error).__name__}: {error}"
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for rank, text in enumerate(failures):
        if text:
            raise RecipeError(f"rank {rank} could not write {checkpoint}: {text}; the last whole checkpoint stays")


def _write(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Writes the names in a directory to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(checkpoint: Path) -> Path:
    """Takes the name of a checkpoint away; returns its new one, which nothing has that could not be removed before."""
    number = checkpoint.name.removeprefix("epoch-")
    return checkpoint.replace(checkpoint.with_name(f"unfinished-{number}-removed-{secrets.token_hex(4)}"))


def _remove(folder: Path) -> None:
    """Removes a directory; a checkpoint has lost its name before it is in pieces."""
    shutil.rmtree(_set_aside(folder) if folder.name.startswith("epoch-") else folder)


def _named(folder: Path) -> list[Path]:
    """Returns what has the name of a checkpoint below ``folder``, oldest first."""
    found = [path for path in folder.glob("epoch-[0-9]*") if path.name.removeprefix("epoch-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("epoch-")))


def _all(folder: Path) -> list[Path]:
    """Returns the checkpoints below ``folder``, oldest first; other directories are the user's."""
    return [path for path in _named(folder) if (path / _SHARED).is_file()]


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


def newest(config: TrainConfig) -> Path | None:
    """Returns the checkpoint from which a run goes on, None where it begins.

    A run that does not resume begins, and so does one that resumes from its own output before its first checkpoint. A
    damaged checkpoint is never passed over: :func:`load` names its file.

    Raises:
        RecipeError: a directory to resume from that is not the run's own holds no checkpoint.
    """
    if config.resume is None:
        return None
    if not config.resumes_own_output:
        return find(config.resume)
    own = [config.folder] if config.folder is not None else []
    for folder in [*own, config.resume]:
        if below := _named(folder):
            return below[-1]
    return None


def load_on_all_ranks(config: TrainConfig) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Returns what :func:`load` returns for :func:`newest`, None where the run begins. Collective: every rank calls it.

    Raises:
        RecipeError: on all ranks. A rank cannot read its files (rank and file are named), or ranks find different ones.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    loaded, found, refusal = None, "no checkpoint", ""
    try:
        path = newest(config)
        if path is not None:
            loaded = load(path, config, rank, ranks)
            digest = hashlib.sha256((path / _SHARED).read_bytes()).hexdigest()[:16]
            found = f"{path.name} ({_SHARED} with SHA-256 {digest})"
    except RecipeError as error:
        refusal = str(error)
    answers: list[Any] = [None] * ranks
    dist.all_gather_object(answers, (found, refusal))
    for other, (_, text) in enumerate(answers):
        if text:
            raise RecipeError(f"rank {other}: {text}")
    first = answers[0][0]
    for other, (name, _) in enumerate(answers):
        if name != first:
            raise RecipeError(
                f"--resume: rank 0 finds {first} in {config.resume}, rank {other} finds {name}; the directory must be "
                "the same for all ranks, on a file system that all of them see"
            )
    return loaded


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
        content = read_saved(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--resume: {path} cannot be read: {error}; remove {path.parent.name} to go on from the checkpoint before "
            "it, if there is one"
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"--resume: {path} holds a {type(content).__name__}, not a checkpoint")
    return content
