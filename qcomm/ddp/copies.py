"""Copies of a DDP model, which torch makes without the communication hook."""

import warnings
from typing import Any

__all__ = ["AttachedHooks"]


class AttachedHooks(list[tuple[Any, Any]]):
    """DDP's list of its hooks. A deep or unpickled copy of the model gets an empty one, and a warning that says so.

    DDP makes its reducer anew in a copy and registers no hook with it, but would list the old one. It has no place
    where the first step of a copy could be noticed. The residuals are not copied either: they belong to the original.
    """

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _without_hooks, ()


def _without_hooks() -> list[tuple[Any, Any]]:
    warnings.warn(
        "this copy of a DistributedDataParallel model has no communication hook and would train uncompressed: call "
        "qcomm.attach(copy, ...) on every rank before you train it; state_dict and load_state_dict hand residuals over",
        stacklevel=2,
    )
    return []
