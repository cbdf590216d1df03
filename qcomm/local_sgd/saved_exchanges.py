"""Checks of saved exchanges, made before any of them replaces what a rank has."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qcomm.codec import DTYPE_NUMBERS, check_memory
from qcomm.collectives import check_saved_count, check_saved_world_size, parts_of

__all__ = ["NO_ANCHOR", "check_exchange", "check_states", "check_tensors"]

NO_ANCHOR = "none yet"


def check_states(
    state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]], number: int, kind: str, exchanges: int
) -> list[dict[str, Any]]:
    """Returns the states of one rank or several, checked but for the exchanges in them.

    Args:
        state_dict: a result of ``state_dict``, or a list of them.
        number: of the format.
        kind: of the object, for messages: ``"an averager"``.
        exchanges: number of exchanges that it has.

    Raises:
        ValueError: of another format, damaged, or not of one step.
    """
    saved = parts_of(state_dict)
    for part in saved:
        if part.get("format") != number:
            raise ValueError(
                f"state_dict must be of format {number}, as state_dict() of {kind} returns it, got "
                f"{part.get('format')!r}"
            )
        check_saved_count("step", part.get("step"))
        found = part.get("exchanges")
        if not isinstance(found, list) or len(found) != exchanges:
            raise ValueError(f"state_dict must hold {exchanges} exchanges, as {kind} of these arguments has")
    steps = {part["step"] for part in saved}
    if len(steps) > 1:
        raise ValueError(f"state_dict must be of one step on all ranks, got {sorted(steps)}")
    return saved


def check_exchange(state: Mapping[str, Any]) -> None:
    """Checks a result of ``WeightExchange.state_dict``, except for its residuals.

    Raises:
        ValueError: naming the entry, its value and the right one.
    """
    if not isinstance(state, Mapping) or not {"identity", "anchor", "world_size", "error_feedback"} <= set(state):
        raise ValueError("state_dict is damaged: an exchange needs identity, anchor, world_size and error_feedback")
    anchor = state["anchor"]
    check_tensors("anchor", anchor)
    if not isinstance(state["identity"], str) or (state["identity"] == NO_ANCHOR) != (not anchor):
        raise ValueError(
            f"state_dict is damaged: the anchor's identity {state['identity']!r} does not fit an anchor of "
            f"{len(anchor)} tensors"
        )
    check_saved_world_size(state["world_size"])


def check_tensors(entry: str, tensors: object) -> None:
    """Checks that an entry of a saved state holds finite, dense, floating-point tensors by name.

    Raises:
        ValueError: naming the entry and the tensor.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"state_dict is damaged: {entry} must hold the tensors of the last common weights by name")
    for name, tensor in tensors.items():
        check_memory(f"the {entry} of {name!r}", tensor)
        if not isinstance(name, str) or tensor.layout != torch.strided or tensor.dtype not in DTYPE_NUMBERS:
            raise ValueError(
                f"state_dict is damaged: {entry} must hold dense floating-point tensors by the names of parameters, "
                f"got {tensor.dtype} for {name!r}"
            )
        if bad := int((~tensor.isfinite()).sum()):
            raise ValueError(
                f"state_dict is damaged: the {entry} of {name!r} has {bad} of {tensor.numel()} values that are not "
                "finite"
            )
