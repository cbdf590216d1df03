"""Options that all hooks of gradients share, and their checks."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch

from qcomm.collectives.task import Scale

__all__ = ["GradScale", "check_grad_scale", "check_hook_options", "check_scale", "is_excluded"]

# A scale, or a function that returns the present one.
GradScale = Scale | Callable[[], Scale] | None


def check_hook_options(error_feedback: object, exclude: object, grad_scale: object) -> None:
    """Raises TypeError or ValueError, naming the option, unless all of them are right."""
    if not isinstance(error_feedback, bool):
        raise TypeError(f"error_feedback must be a bool, got {type(error_feedback).__name__}")
    if not isinstance(exclude, Sequence) or isinstance(exclude, str) or not all(isinstance(p, str) for p in exclude):
        raise TypeError(f"exclude must be a sequence of patterns, such as ['*.bias'], got {exclude!r}")
    check_grad_scale(grad_scale)


def check_grad_scale(grad_scale: object) -> None:
    """Raises unless ``grad_scale`` is None, a function, or a scale."""
    if grad_scale is not None and not callable(grad_scale):
        check_scale(grad_scale)


def check_scale(scale: object) -> float:
    """Returns the number in ``grad_scale``; raises an error that names it where there is none.

    Example:
        >>> check_scale(torch.tensor(1024.0))
        1024.0
    """
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1:
            raise ValueError(f"grad_scale must have one element, got shape {tuple(scale.shape)}")
        scale = scale.item()
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(
            f"grad_scale must be a number, a 0-dim tensor or a function that returns one, got {type(scale).__name__}"
        )
    # The scale and its inverse both have to be normal float32 numbers, or gradients would vanish or overflow.
    if not 2.0**-126 <= scale <= 2.0**126:
        raise ValueError(f"grad_scale must be positive and finite, got {scale}")
    return float(scale)


def is_excluded(key: str, exclude: Sequence[str]) -> bool:
    """Returns whether the name of a parameter fits one of the patterns.

    Example:
        >>> is_excluded("fc.bias", ["*.bias"])
        True
    """
    return any(fnmatchcase(key, pattern) for pattern in exclude)
