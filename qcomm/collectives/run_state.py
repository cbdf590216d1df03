"""The entries that the saved states of all hooks share: number of steps, run, and residuals by parameter.

A run can therefore go on with another hook, as one of DDP that continues with FSDP2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.rank_state import check_saved_count, check_saved_world_size, parts_of

__all__ = ["checked_parts", "origin_of", "residuals_of", "run_entries"]

FORMAT = 2
ENTRIES = {"steps", "run", "has_names", "world_size", "error_feedback"}


def run_entries(steps: int, run: str, has_names: bool, feedback: ErrorFeedback | None) -> dict[str, Any]:
    """Returns the entries of a rank.

    Args:
        steps: number of steps.
        run: names the connections.
        has_names: whether residuals are known by the names of parameters.
        feedback: residuals; None without error feedback.

    Example:
        >>> run_entries(7, "", True, None)["steps"]
        7
    """
    return {
        "format": FORMAT,
        "steps": steps,
        "run": run,
        "has_names": has_names,
        "world_size": feedback.world_size if feedback is not None else None,
        "error_feedback": feedback.state_dict() if feedback is not None else None,
    }


def checked_parts(state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the states of ranks in one saved state or in several, which are of one run.

    Raises:
        ValueError: of another format, damaged, or not of one run.
    """
    saved = parts_of(state_dict)
    for part in saved:
        _check(part)
    for name, what in (("steps", "step"), ("run", "run"), ("world_size", "number of ranks")):
        values = {part[name] for part in saved}
        if len(values) > 1:
            raise ValueError(f"state_dict must be of one {what} on all ranks, got {sorted(values, key=str)}")
    return saved


def residuals_of(saved: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns the residuals in states of ranks, as far as they have any."""
    return [part["error_feedback"] for part in saved if part["error_feedback"] is not None]


def origin_of(steps: int, run: str, feedback: ErrorFeedback | None) -> str:
    """Returns from where a rank goes on, which all ranks compare: step, run, and the number of ranks before.

    Example:
        >>> origin_of(7, "", None), origin_of(0, "", ErrorFeedback())
        ('step 7 of no residuals', 'nothing')
    """
    if not steps:
        return "nothing"
    ranks = "no residuals" if feedback is None or feedback.world_size is None else f"{feedback.world_size} ranks"
    return f"step {steps} of {ranks}" + (f", run {run}" if run else "")


def _check(part: Mapping[str, Any]) -> None:
    if part.get("format") != FORMAT:
        raise ValueError(
            f"state_dict must be of format {FORMAT}, as state_dict() of a hook returns it, got {part.get('format')!r}"
        )
    missing = ENTRIES.difference(part)
    if missing:
        raise ValueError(f"state_dict is damaged: it has no {sorted(missing)}")
    check_saved_count("steps", part["steps"])
    if not isinstance(part["run"], str):
        raise ValueError(f"state_dict is damaged: run must be a string, got {part['run']!r}")
    if not isinstance(part["has_names"], bool):
        raise ValueError(f"state_dict is damaged: has_names must be a bool, got {part['has_names']!r}")
    check_saved_world_size(part["world_size"])
