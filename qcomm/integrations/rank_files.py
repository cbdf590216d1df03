"""One file per rank in a framework's checkpoint folder, for frameworks that tell every rank where that is.

Residuals differ between ranks, and rank 0 may have no memory for those of all. Every rank writes its own file, on
whatever disk it sees the folder.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qcomm.collectives import keys_to_resume, without_residuals
from qcomm.ddp import CompressionState
from qcomm.saved_file import read_saved

__all__ = ["load", "save"]

NAME = re.compile(r"qcomm_(\d+)_rank_(\d+)_of_(\d+)\.pt")
# What reading, checking and loading states may raise. Another error would keep the other ranks waiting.
ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, MemoryError)


def save(folder: str | os.PathLike[str], state: CompressionState, index: int = 0) -> None:
    """Writes this rank's state, whole or not at all, and removes files of another number of ranks.

    Args:
        folder: of the checkpoint; it is made where it is missing.
        state: between two steps.
        index: of the model, where a program has several.

    Raises:
        OSError: the file cannot be written.
    """
    place, (rank, world_size) = Path(folder), _own_place()
    place.mkdir(parents=True, exist_ok=True)
    target = place / f"qcomm_{index}_rank_{rank}_of_{world_size}.pt"
    for path in place.glob(f".{target.name}." + 16 * "[0-9a-f]"):  # by a process of this rank that was killed here
        path.unlink(missing_ok=True)
    temporary = place / f".{target.name}.{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            torch.save(CompressionState.state_dict(state), file)  # this rank's alone, of any subclass
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    for path, (_, ranks) in _files(place, index).items():
        if ranks != world_size:  # of an earlier run into the same folder, and no longer of the weights beside them
            path.unlink(missing_ok=True)


def load(folder: str | os.PathLike[str], state: CompressionState, index: int = 0) -> bool:
    """Resumes from the files in a folder. A collective of the default process group.

    With another number of ranks every file has to be visible to every rank, and the sum of residuals is kept.

    Args:
        folder: of the checkpoint.
        state: attached to its model.
        index: of the model.

    Returns:
        True; False where no rank has a file, so that nothing has changed.

    Raises:
        ValueError: on every rank, with the errors of those that found no file of theirs, or a damaged one; nothing has
            changed then. If a rank fails afterwards, out of memory, the others have loaded theirs.
    """
    place = Path(folder)
    states, error = None, ""
    try:
        states = _read(place, index)
        if states is not None:
            CompressionState.check_state_dict(state, states)
    except ERRORS as caught:
        error = f"{type(caught).__name__}: {caught}"
    _agree(place, states is not None or bool(error), error)
    if states is None:
        return False
    try:
        CompressionState.load_state_dict(state, states)
    except ERRORS as caught:
        error = f"{type(caught).__name__}: {caught}"
    _agree(place, True, error)
    return True


def _agree(folder: Path, found: bool, error: str) -> None:
    """Raises ValueError on every rank if one has an error, or has no file while others have. A collective."""
    rank, world_size = _own_place()
    outcomes: list[Any] = [None] * world_size
    if world_size > 1:
        dist.all_gather_object(outcomes, (found, error))
    else:
        outcomes[rank] = found, error
    missing = any(found for found, _ in outcomes)  # on a rank that has none while others have
    errors = [
        f"rank {number}: {error or 'no file of it'}"
        for number, (found, error) in enumerate(outcomes)
        if error or (missing and not found)
    ]
    if errors:
        raise ValueError(f"{folder}: qcomm's files of the ranks cannot be loaded: {'; '.join(errors)}")


def _read(folder: Path, index: int) -> dict[str, Any] | None:
    """Returns the states that this rank resumes from; None where there are no files."""
    paths = {f"rank {rank} of {world_size}": path for path, (rank, world_size) in _files(folder, index).items()}
    if not paths:
        return None
    wanted, is_new = keys_to_resume([*paths])
    states: dict[str, Any] = {}
    for name in wanted:
        saved = read_saved(paths[name])
        if not isinstance(saved, dict) or list(saved) != [name]:
            raise ValueError(f"{paths[name].name} must hold the state of {name}, got {str(saved)[:80]}")
        states.update(saved)
    return without_residuals(states) if is_new else states


def _files(folder: Path, index: int) -> dict[Path, tuple[int, int]]:
    """Returns the files of a model with the ranks, and numbers of ranks, that wrote them."""
    matches = {path: NAME.fullmatch(path.name) for path in sorted(folder.glob("qcomm_*.pt"))}
    return {
        path: (int(match[2]), int(match[3]))
        for path, match in matches.items()
        if match is not None and int(match[1]) == index
    }


def _own_place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
