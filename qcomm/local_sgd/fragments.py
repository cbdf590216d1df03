"""Fragments: the parts of a model that are exchanged at different steps, so that the network has work all the time.

Fragment p of F is exchanged ``(p + 1) * period // F`` steps after the beginning of each period::

    period 12, 3 fragments      step    4  8 12 16 20 24 ...
                                        0  1  2  0  1  2

A. Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv:2501.18512.
"""

from collections.abc import Sequence

import torch

from qcomm.local_sgd.options import checked_int
from qcomm.local_sgd.parameters import check_averageable

__all__ = ["cut_evenly", "cut_model", "due_fragment", "trained"]


def trained(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns the parameters that need a gradient, one that is used in several places once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def cut_model(model: torch.nn.Module, period: int, fragments: int) -> list[list[str]]:
    """Returns the names of the parameters of each fragment: neighbours, and nearly as many elements in each.

    Raises:
        TypeError, ValueError: naming the argument, or a parameter that cannot be averaged.

    Example:
        >>> cut_model(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 2)), period=4, fragments=2)
        [['0.weight', '0.bias'], ['1.weight', '1.bias']]
    """
    checked_int("period", period, 1)
    checked_int("fragments", fragments, 1)
    named = trained(model)
    if not named:
        raise ValueError("model must have parameters that need a gradient, got none")
    for name, parameter in named:
        check_averageable(name, parameter)
    most = min(period, len(named))
    if fragments > most:
        raise ValueError(
            f"fragments must be at most {most}, with {len(named)} parameters and {period} steps in a period, got "
            f"{fragments}"
        )
    sizes = [parameter.numel() for _, parameter in named]
    return [[name for name, _ in named[part]] for part in cut_evenly(sizes, fragments)]


def cut_evenly(sizes: Sequence[int], parts: int) -> list[slice]:
    """Cuts a sequence into ``parts`` runs of at least one item, whose sums of sizes are nearly equal.

    Args:
        sizes: of the items, in order.
        parts: at most the number of items.

    Example:
        >>> cut_evenly([5, 1, 1, 1, 1, 1], 2)
        [slice(0, 1, None), slice(1, 6, None)]
        >>> cut_evenly([0, 0, 9], 3)
        [slice(0, 1, None), slice(1, 2, None), slice(2, 3, None)]
    """
    found, begin = [], 0
    for left in range(parts, 0, -1):
        share, total, end = sum(sizes[begin:]) / left, sizes[begin], begin + 1
        # An item joins if it brings the sum closer to the share, and leaves one item for each part behind.
        while end < len(sizes) - left + 1 and (left == 1 or total + sizes[end] / 2 <= share):
            total, end = total + sizes[end], end + 1
        found.append(slice(begin, end))
        begin = end
    return found


def due_fragment(step: int, period: int, fragments: int) -> int | None:
    """Returns the number of the fragment whose exchange begins at a step, None where none does.

    Args:
        step: of training, counted from 1.
        period: steps from one exchange of a fragment to the next.
        fragments: at most ``period``.

    Example:
        >>> [due_fragment(step, 5, 2) for step in range(1, 8)]
        [None, 0, None, None, 1, None, 0]
    """
    place = (step - 1) % period + 1
    ends = [(fragment + 1) * period // fragments for fragment in range(fragments)]
    return ends.index(place) if place in ends else None
