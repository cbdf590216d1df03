"""Rank states: dictionaries that belong to one rank, and stay apart from the other ranks' in a shared checkpoint.

``torch.save`` writes one file per rank, so every rank finds its own state there. ``torch.distributed.checkpoint`` takes
nested dictionaries apart and keeps one value for each key, whichever rank had it. A rank state therefore has a single
key, which names the rank and the number of ranks, and a value that is not taken apart::

    {"rank 1 of 2": ({"format": 2, "steps": 7, ...},)}

A checkpoint of another number of ranks has none of the keys that a rank asks for, so ``dcp.load`` ends with an error.
:func:`load_rank_states` asks for those that it has.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch.distributed as dist

__all__ = [
    "RankState",
    "check_saved_count",
    "check_saved_world_size",
    "keys_for_rank",
    "keys_to_resume",
    "load_rank_states",
    "parts_of",
    "states_for_rank",
    "without_residuals",
]

KEY = re.compile(r"rank (\d+) of (\d+)")


class RankState(dict[str, Any]):
    """The state of this rank, whose entries are read as if there was no rank above them.

    A copy made with ``{**state, "steps": 9}`` has entries beside the rank's. They replace the ones below it. Pickling
    gives a plain dictionary, which ``torch.load`` reads without this class.

    Args:
        entries: the state.
        rank, world_size: by default of this process in the whole job.

    Example:
        >>> state = RankState({"steps": 7}, rank=1, world_size=2)
        >>> list(state), state["steps"]
        (['rank 1 of 2'], 7)
        >>> parts_of({**state, "steps": 9})
        [{'steps': 9}]
    """

    def __init__(self, entries: Mapping[str, Any], rank: int | None = None, world_size: int | None = None) -> None:
        if rank is None or world_size is None:
            rank, world_size = _own_place()
        # A dictionary inside of a tuple is not taken apart.
        super().__init__({f"rank {rank} of {world_size}": (dict(entries),)})

    def __missing__(self, name: str) -> Any:
        """Returns an entry of the rank's state."""
        for value in self.values():
            if isinstance(value, tuple) and name in value[0]:
                return value[0][name]
        raise KeyError(name)

    def __copy__(self) -> "RankState":
        return self._replaced(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RankState":
        return self._replaced(copy.deepcopy(dict(self), memo))

    def __reduce__(self) -> tuple[type, tuple[()], None, None, Iterator[tuple[str, Any]]]:
        return OrderedDict, (), None, None, iter(self.items())

    def _replaced(self, content: Mapping[str, Any]) -> "RankState":
        other = RankState.__new__(RankState)
        other.update(content)
        return other


def check_saved_count(name: str, value: object) -> None:
    """Raises ValueError unless an entry of a saved state is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"state_dict is damaged: {name} must be an int >= 0, got {value!r}")


def check_saved_world_size(value: object) -> None:
    """Raises ValueError unless an entry of a saved state is a number of ranks, or None where it has no residuals."""
    positive = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is not None and not positive:
        raise ValueError(f"state_dict is damaged: world_size must be a positive number of ranks, got {value!r}")


def parts_of(state_dict: object) -> list[dict[str, Any]]:
    """Returns the states of ranks in one saved state or in several, with the entries that were set beside them.

    Raises:
        ValueError: naming the part that is no state of a rank.
    """
    given = [state_dict] if isinstance(state_dict, Mapping) or not isinstance(state_dict, Iterable) else [*state_dict]
    parts: list[dict[str, Any]] = []
    for part in given:
        if not isinstance(part, Mapping):
            raise ValueError(
                f"state_dict must be a result of state_dict() or a list of them, got {type(part).__name__}"
            )
        ranks = [key for key in part if _names_rank(key)]
        beside = {key: value for key, value in part.items() if key not in ranks}
        if not ranks:
            raise ValueError(
                "state_dict must be a result of state_dict(), with a key such as 'rank 0 of 2', got the keys "
                f"{sorted(map(str, part))[:5]}"
            )
        for key in ranks:
            value = part[key]
            if not isinstance(value, tuple) or len(value) != 1 or not isinstance(value[0], Mapping):
                raise ValueError(f"state_dict[{key!r}] must be a tuple of one dictionary, got {type(value).__name__}")
            parts.append({**value[0], **beside})
    if not parts:
        raise ValueError("state_dict must hold the state of at least one rank, got an empty list")
    return parts


def _names_rank(key: object) -> bool:
    return isinstance(key, str) and KEY.fullmatch(key) is not None


def keys_for_rank(keys: Sequence[str], rank: int, world_size: int) -> tuple[list[str], bool]:
    """Returns the keys of the states that a rank resumes from, and whether it is new and takes no residuals.

    Rank r of W' takes the states of ranks r, r + W', r + 2 W', ... that were saved. A rank beyond those that saved
    takes rank 0's without residuals.

    Args:
        keys: of a checkpoint, at the place of the states.
        rank, world_size: of the process that resumes.

    Raises:
        ValueError: the keys are not those of all ranks of one job.

    Example:
        >>> keys_for_rank(["rank 0 of 3", "rank 1 of 3", "rank 2 of 3"], rank=0, world_size=2)
        (['rank 0 of 3', 'rank 2 of 3'], False)
        >>> keys_for_rank(["rank 0 of 1"], rank=1, world_size=2)
        (['rank 0 of 1'], True)
    """
    saved = {key for key in keys if KEY.fullmatch(key)}
    sizes = {int(key.rpartition(" ")[2]) for key in saved}
    before = max(sizes, default=0)
    if not saved or saved != {f"rank {number} of {before}" for number in range(before)}:
        raise ValueError(f"a checkpoint must hold the state of every rank of one job, got {sorted(keys)[:8]}")
    is_new = rank >= before
    sources = range(1) if is_new else range(rank, before, world_size)
    return [f"rank {number} of {before}" for number in sources], is_new


def load_rank_states(checkpoint_id: str | PathLike[str], key: str) -> dict[str, Any]:
    """Reads the states that this rank resumes from, out of a checkpoint that any number of ranks saved.

    A collective of all ranks, like ``torch.distributed.checkpoint.load``. Every residual goes to one rank, so their sum
    survives. With the same number of ranks ``load`` does the same.

    Args:
        checkpoint_id: the directory that ``torch.distributed.checkpoint.save`` wrote.
        key: of the ``state_dict`` in it: ``"hook"`` for ``{"hook": state.state_dict()}``, with dots between the keys of
            nested dictionaries.

    Returns:
        An argument for ``load_state_dict`` of a :class:`qcomm.CompressionState` or of an averager.

    Raises:
        ValueError: the checkpoint holds no such states there, or not of every rank.

    Example:
        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> import qcomm
        >>> _ = dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/s", rank=0, world_size=1)
        >>> folder = tempfile.mkdtemp()
        >>> _ = dcp.save({"hook": qcomm.CompressionState().state_dict()}, checkpoint_id=folder)
        >>> qcomm.CompressionState().load_state_dict(load_rank_states(folder, "hook"))
        >>> dist.destroy_process_group()
    """
    import torch.distributed.checkpoint as dcp  # takes as long to import as all of this library

    reader = dcp.FileSystemReader(checkpoint_id)
    names = reader.read_metadata().state_dict_metadata
    saved = [name.removeprefix(f"{key}.") for name in names if name.startswith(f"{key}.")]
    try:
        wanted, is_new = keys_for_rank(saved, *_own_place())
    except ValueError as error:
        raise ValueError(f"{checkpoint_id} has no complete states at key {key!r}: {error}") from error
    target: dict[str, Any] = {f"{key}.{name}": () for name in wanted}
    dcp.load(target, storage_reader=reader)
    states = {name: target[f"{key}.{name}"] for name in wanted}
    return without_residuals(states) if is_new else states


def states_for_rank(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the states that this rank resumes from, out of those that all ranks of a job saved.

    Args:
        saved: the states of all ranks in one dictionary. This rank's own, saved by as many ranks, is enough.

    Raises:
        ValueError: this rank's is missing, or with another number of ranks any of them.

    Example:
        >>> saved = {**RankState({"steps": 7}, 0, 2), **RankState({"steps": 7}, 1, 2)}
        >>> list(states_for_rank(saved))  # one rank resumes what two have saved
        ['rank 0 of 2', 'rank 1 of 2']
    """
    wanted, is_new = keys_to_resume([key for key in saved if _names_rank(key)])
    states = {name: saved[name] for name in wanted}
    beside = {key: value for key, value in saved.items() if not _names_rank(key)}  # they replace entries of the states
    return {**(without_residuals(states) if is_new else states), **beside}


def keys_to_resume(keys: Sequence[str]) -> tuple[list[str], bool]:
    """Returns :func:`keys_for_rank` of this rank, whose own key is enough where as many ranks have saved."""
    rank, world_size = _own_place()
    own = f"rank {rank} of {world_size}"
    return ([own], False) if own in keys else keys_for_rank(keys, rank, world_size)


def without_residuals(states: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the states for a rank that has lost nothing to quantization yet."""
    return {name: (_without_residuals(state),) for name, state in zip(states, parts_of(states), strict=True)}


def _without_residuals(state: dict[str, Any]) -> dict[str, Any]:
    if "exchanges" in state:
        return {**state, "exchanges": [{**exchange, "error_feedback": None} for exchange in state["exchanges"]]}
    return {**state, "error_feedback": None}


def _own_place() -> tuple[int, int]:
    """Returns rank and number of ranks of the whole job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
