"""Checks of saved residuals, made before any of them replaces what a rank has."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from qcomm.codec import check_memory

__all__ = ["FORMAT", "check_fit", "check_saved"]

FORMAT = 2
SHOWN_NAMES = 4


def check_saved(saved: object, sizes: Mapping[str, int] | None = None) -> None:
    """Checks a result of ``ErrorFeedback.state_dict``.

    Args:
        saved: of one rank.
        sizes: number of elements of each parameter that may have a residual; None where they are unknown.

    Raises:
        ValueError: naming the entry, its value and the right one.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"state must be a result of ErrorFeedback.state_dict, got {type(saved).__name__}")
    if saved.get("format") != FORMAT:
        raise ValueError(f"state has format {saved.get('format')!r}, this version reads {FORMAT}")
    local, owner, rms = saved.get("local"), saved.get("owner"), saved.get("rms")
    if (
        not isinstance(local, Mapping)
        or not isinstance(owner, Mapping)
        or not isinstance(rms, Mapping)
        or "world_size" not in saved
    ):
        raise ValueError(f"state is damaged: it needs world_size, local, owner and rms, it has {sorted(saved)}")
    _check_world_size(saved["world_size"], bool(local or owner))
    _check_rms(rms)
    for key, residual in local.items():
        _check_residual(key, residual)
    for key, part in owner.items():
        _check_part(key, part, local)
    if sizes is not None:
        check_fit({key: residual.numel() for key, residual in local.items()}, sizes)


def check_fit(residuals: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Checks that residuals belong to a model's parameters.

    Args:
        residuals: number of elements by name.
        sizes: number of elements of each parameter.

    Raises:
        ValueError: naming the residual.

    Example:
        >>> check_fit({"fc.weight": 6}, {"fc.weight": 8})
        Traceback (most recent call last):
            ...
        ValueError: the residual of 'fc.weight' has 6 elements, the model's parameter 8: a state of another model?
    """
    for key, numel in residuals.items():
        if key not in sizes:
            shown = ", ".join(map(repr, [*sizes][:SHOWN_NAMES])) + (", ..." if len(sizes) > SHOWN_NAMES else "")
            raise ValueError(
                f"there is a residual of {key!r}, which the model does not have (it has {shown}): a state of another "
                'model, or of a hook that knew no names? Set its "error_feedback" to None to go on without residuals'
            )
        if numel != sizes[key]:
            raise ValueError(
                f"the residual of {key!r} has {numel} elements, the model's parameter {sizes[key]}: a state of another "
                "model?"
            )


def _check_world_size(world_size: object, has_residuals: bool) -> None:
    if world_size is None and not has_residuals:
        return  # nothing was exchanged yet
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(
            f"state is damaged: world_size must be the positive number of ranks that saved it, got {world_size!r}"
        )


def _check_rms(rms: Mapping[str, Any]) -> None:
    for name in ("local", "owner"):
        known = rms.get(name)
        if not isinstance(known, Mapping):
            raise ValueError(f"state is damaged: rms[{name!r}] must be a dictionary, got {type(known).__name__}")
        for key, value in known.items():
            if not isinstance(key, str) or not isinstance(value, float) or not 0.0 < value < math.inf:
                raise ValueError(
                    f"state is damaged: rms must hold positive numbers for {name} parameters, got {value!r} for {key!r}"
                )


def _check_part(key: object, part: object, local: Mapping[str, Any]) -> None:
    if not isinstance(part, tuple) or len(part) != 2 or not _is_index(part[0]):
        raise ValueError(
            f"state is damaged: the owner residual of {key!r} must be a pair of its start, >= 0, and a tensor"
        )
    start, residual = part
    _check_residual(key, residual)
    if not isinstance(key, str) or key not in local or start + residual.numel() > local[key].numel():
        raise ValueError(f"state is damaged: the owner residual of {key!r} does not fit its local residual")


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_residual(key: object, residual: object) -> None:
    if not isinstance(key, str):
        raise ValueError(f"state is damaged: residuals must be named by strings, got {key!r}")
    if (
        not isinstance(residual, torch.Tensor)
        or residual.dtype != torch.float32
        or residual.dim() != 1
        or residual.layout != torch.strided
    ):
        found = type(residual).__name__
        if isinstance(residual, torch.Tensor):
            found = f"{residual.dtype} of shape {tuple(residual.shape)}"
        raise ValueError(f"state is damaged: the residual of {key!r} must be a 1-D float32 tensor, got {found}")
    check_memory(f"the residual of {key!r}", residual)
    if bad := int((~residual.isfinite()).sum()):
        raise ValueError(
            f"state is damaged: the residual of {key!r} has {bad} of {residual.numel()} values that are not finite, "
            "which would make its gradients so in every step"
        )
