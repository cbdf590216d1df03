"""Options of collectives, checked; the number of ranks that form a node, checked or found out."""

import os

from qcomm.codec import RangeGrid, SigmaGrid, check_num_threads

__all__ = ["STRATEGIES", "check_exchange", "check_grid", "check_min_elements", "resolve_ranks_per_node"]

STRATEGIES = ("auto", "none", "bf16", "exact_sum", "all_gather", "hierarchical", "two_phase")


def check_ranks_per_node(ranks_per_node: object) -> None:
    """Raises unless ``ranks_per_node`` is None or a positive int."""
    if ranks_per_node is None:
        return
    if isinstance(ranks_per_node, bool) or not isinstance(ranks_per_node, int):
        raise TypeError(f"ranks_per_node must be an int or None, got {type(ranks_per_node).__name__}")
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node must be at least 1, got {ranks_per_node}")


def resolve_ranks_per_node(ranks_per_node: int | None, world_size: int, strategy: str) -> int:
    """How many ranks form a node: what was given, otherwise, for ``"hierarchical"``, the launcher's LOCAL_WORLD_SIZE.

    Raises:
        ValueError: it does not divide the number of ranks, or is not to be found.

    Example:
        >>> resolve_ranks_per_node(2, 6, "hierarchical"), resolve_ranks_per_node(None, 6, "two_phase")
        (2, 1)
    """
    source = "ranks_per_node"
    if ranks_per_node is None:
        if strategy != "hierarchical":
            return 1
        source, text = "LOCAL_WORLD_SIZE, and so ranks_per_node,", os.environ.get("LOCAL_WORLD_SIZE", "")
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(
                "ranks_per_node must be given for strategy 'hierarchical', because the launcher did not set "
                f"LOCAL_WORLD_SIZE (it is {text!r})"
            )
        ranks_per_node = int(text)
    if world_size % ranks_per_node:
        raise ValueError(f"{source} must divide the number of ranks, {world_size}, got {ranks_per_node}")
    return ranks_per_node


def check_exchange(
    grid: object, min_elements: object, strategy: object, ranks_per_node: object, num_threads: object
) -> None:
    """Raises TypeError or ValueError, naming the option, unless each is what collectives take."""
    check_grid(grid)
    check_min_elements(min_elements)
    check_strategy(strategy)
    check_ranks_per_node(ranks_per_node)
    check_num_threads(num_threads)


def check_grid(grid: object) -> None:
    """Raises TypeError unless ``grid`` is a grid."""
    if not isinstance(grid, (SigmaGrid, RangeGrid)):
        raise TypeError(f"grid must be a qcomm.SigmaGrid or qcomm.RangeGrid, got {type(grid).__name__}")


def check_min_elements(min_elements: object) -> None:
    """Raises unless ``min_elements`` is an int >= 0."""
    if isinstance(min_elements, bool) or not isinstance(min_elements, int):
        raise TypeError(f"min_elements must be an int, got {type(min_elements).__name__}")
    if min_elements < 0:
        raise ValueError(f"min_elements must be >= 0, got {min_elements}")


def check_strategy(strategy: object) -> None:
    """Raises ValueError unless ``strategy`` is one of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
