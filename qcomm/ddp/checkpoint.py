"""Checkpoints of the hook's state: number of steps, run, buckets, residuals and measured noise."""

from collections.abc import Mapping, Sequence
from typing import Any

from qcomm.collectives import ErrorFeedback, RankState, checked_parts, origin_of, residuals_of, run_entries
from qcomm.ddp.buckets import BucketTable
from qcomm.ddp.gradient_noise import GradientNoise
from qcomm.ddp.noise_sums import NoiseSums
from qcomm.ddp.steps import Steps

__all__ = ["StateDict", "check", "note_origin", "restore", "save"]

StateDict = Mapping[str, Any]


def save(steps: Steps, table: BucketTable, feedback: ErrorFeedback | None, noise: GradientNoise | None) -> RankState:
    """Returns the state of a rank to resume from.

    It has the number of steps, the name of the run, the number of ranks that the residuals are for, the residuals, a
    flag for residuals that are known by parameter names, and those names by bucket. Measured noise is there where it is
    asked for.
    """
    return RankState(
        {
            **run_entries(steps.number, steps.run, table.has_names or table.residuals_have_names, feedback),
            "buckets": table.order or [list(names) for names in table.saved_order or ()],
            **({"gradient_noise": noise.state_dict()} if noise is not None else {}),
        }
    )


def restore(
    state_dict: StateDict | Sequence[StateDict],
    steps: Steps,
    table: BucketTable,
    feedback: ErrorFeedback | None,
    noise: GradientNoise | None,
) -> None:
    """Restores steps, residuals and measured noise.

    Args:
        state_dict: from :func:`save` on one rank or several, whose residuals are then added.
        steps, table, feedback, noise: of the state that resumes. Without ``feedback`` residuals are dropped, and
            without ``noise`` its measurements. Of several ranks' measurements the first rank's are kept.

    Raises:
        ValueError: of another format, damaged, of another model, or not of one run; nothing has changed then.
    """
    saved = _checked_parts(state_dict)
    first = saved[0]
    residuals = residuals_of(saved)
    if residuals:
        # Without error feedback they are checked all the same.
        (ErrorFeedback() if feedback is None else feedback).load_state_dict(residuals, table.sizes)
    elif feedback is not None:
        feedback.clear(first["world_size"])
    steps.resume(first["steps"], first["run"])
    if noise is not None and "gradient_noise" in first:
        noise.load_state_dict(first["gradient_noise"])  # checked above
    # Checkpoints of before have none. The first step may then differ in its last bits from that of an undisturbed run.
    table.saved_order = first.get("buckets") or None
    table.residuals_have_names = bool(residuals) and any(part["has_names"] for part in saved)
    note_origin(steps, table, feedback)


def check(state_dict: StateDict | Sequence[StateDict], table: BucketTable) -> None:
    """Raises the errors of :func:`restore`, and changes nothing."""
    if residuals := residuals_of(_checked_parts(state_dict)):
        ErrorFeedback().load_state_dict(residuals, table.sizes)


def note_origin(steps: Steps, table: BucketTable, feedback: ErrorFeedback | None) -> None:
    """Has the next handshake compare from where the ranks go on: step, run, and the number of ranks before."""
    table.set_origin(origin_of(steps.number, steps.run, feedback))


def _checked_parts(state_dict: StateDict | Sequence[StateDict]) -> list[dict[str, Any]]:
    saved = checked_parts(state_dict)
    for part in saved:
        _check(part)
    return saved


def _check(part: Mapping[str, Any]) -> None:
    buckets = part.get("buckets", [])
    if not isinstance(buckets, list) or not all(isinstance(bucket, list) for bucket in buckets):
        raise ValueError(f"state_dict is damaged: buckets must be lists of names, got {buckets!r:.80}")
    if not all(isinstance(name, str) for bucket in buckets for name in bucket):
        raise ValueError(f"state_dict is damaged: buckets must be lists of names, got {buckets!r:.80}")
    if "gradient_noise" in part:
        NoiseSums.from_lists(part["gradient_noise"])
