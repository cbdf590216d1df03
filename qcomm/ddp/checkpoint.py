"""Checkpoints of the hook's state: number of steps and residuals."""

from collections.abc import Mapping, Sequence
from typing import Any

from qcomm.collectives import ErrorFeedback
from qcomm.ddp.buckets import BucketTable

__all__ = ["StateDict", "restore", "save"]

FORMAT = 1

StateDict = Mapping[str, Any]


def save(steps: int, table: BucketTable, feedback: ErrorFeedback | None) -> dict[str, Any]:
    """Returns a rank's number of steps and residuals, and a flag for residuals known by parameter names."""
    return {
        "format": FORMAT,
        "steps": steps,
        "has_names": table.has_names or table.residuals_have_names,
        "error_feedback": feedback.state_dict() if feedback is not None else None,
    }


def restore(state_dict: StateDict | Sequence[StateDict], table: BucketTable, feedback: ErrorFeedback | None) -> int:
    """Restores the residuals and returns the number of steps.

    Args:
        state_dict: from :func:`save` on one rank or several, whose residuals are then added.
        table, feedback: of the state that resumes. Without ``feedback`` residuals are dropped.

    Raises:
        ValueError: of another format, damaged, or not of one run; nothing has changed then.
    """
    saved = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)
    if not saved or any(not isinstance(part, Mapping) or part.get("format") != FORMAT for part in saved):
        raise ValueError(f"state_dict must be of format {FORMAT}, as CompressionState.state_dict returns it")
    missing = {"steps", "has_names", "error_feedback"}.difference(*saved)
    if missing:
        raise ValueError(f"state_dict is damaged: it has no {sorted(missing)}")
    steps = {part["steps"] for part in saved}
    if len(steps) > 1 or not all(isinstance(step, int) and step >= 0 for step in steps):
        raise ValueError(f"state_dict must be of one step on all ranks, got those of steps {sorted(steps, key=str)}")
    residuals = [part["error_feedback"] for part in saved if part["error_feedback"] is not None]
    if feedback is not None:
        if residuals:
            feedback.load_state_dict(residuals)
        else:
            feedback.clear()
    table.residuals_have_names = bool(residuals) and any(part["has_names"] for part in saved)
    return int(saved[0]["steps"])
