"""Checkpoints of the hook's state: number of steps, run, buckets, residuals and measured noise."""

from collections.abc import Mapping, Sequence
from typing import Any

from qcomm.collectives import ErrorFeedback, RankState, parts_of
from qcomm.ddp.buckets import BucketTable
from qcomm.ddp.gradient_noise import GradientNoise
from qcomm.ddp.noise_sums import NoiseSums
from qcomm.ddp.reducer import Steps

__all__ = ["StateDict", "check", "note_origin", "restore", "save"]

FORMAT = 2
ENTRIES = {"steps", "run", "has_names", "world_size", "error_feedback"}

StateDict = Mapping[str, Any]


def save(steps: Steps, table: BucketTable, feedback: ErrorFeedback | None, noise: GradientNoise | None) -> RankState:
    """Returns the state of a rank to resume from.

    It has the number of steps, the name of the run, the number of ranks that the residuals are for, the residuals, a
    flag for residuals that are known by parameter names, and those names by bucket. Measured noise is there where it is
    asked for.
    """
    return RankState(
        {
            "format": FORMAT,
            "steps": steps.number,
            "run": steps.run,
            "has_names": table.has_names or table.residuals_have_names,
            "world_size": feedback.world_size if feedback is not None else None,
            "buckets": table.order or [list(names) for names in table.saved_order or ()],
            "error_feedback": feedback.state_dict() if feedback is not None else None,
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
    residuals = _residuals_of(saved)
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
    if residuals := _residuals_of(_checked_parts(state_dict)):
        ErrorFeedback().load_state_dict(residuals, table.sizes)


def note_origin(steps: Steps, table: BucketTable, feedback: ErrorFeedback | None) -> None:
    """Has the next handshake compare from where the ranks go on: step, run, and the number of ranks before."""
    if not steps.number:
        table.set_origin("nothing")
        return
    ranks = "no residuals" if feedback is None or feedback.world_size is None else f"{feedback.world_size} ranks"
    table.set_origin(f"step {steps.number} of {ranks}" + (f", run {steps.run}" if steps.run else ""))


def _checked_parts(state_dict: StateDict | Sequence[StateDict]) -> list[dict[str, Any]]:
    saved = parts_of(state_dict)
    for part in saved:
        _check(part)
    for name, what in (("steps", "step"), ("run", "run"), ("world_size", "number of ranks")):
        values = {part[name] for part in saved}
        if len(values) > 1:
            raise ValueError(f"state_dict must be of one {what} on all ranks, got {sorted(values, key=str)}")
    return saved


def _residuals_of(saved: Sequence[StateDict]) -> list[Any]:
    return [part["error_feedback"] for part in saved if part["error_feedback"] is not None]


def _check(part: Mapping[str, Any]) -> None:
    if part.get("format") != FORMAT:
        raise ValueError(
            f"state_dict must be of format {FORMAT}, as CompressionState.state_dict returns it, got "
            f"{part.get('format')!r}"
        )
    missing = ENTRIES.difference(part)
    if missing:
        raise ValueError(f"state_dict is damaged: it has no {sorted(missing)}")
    steps, world_size = part["steps"], part["world_size"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"state_dict is damaged: steps must be an int >= 0, got {steps!r}")
    if not isinstance(part["run"], str):
        raise ValueError(f"state_dict is damaged: run must be a string, got {part['run']!r}")
    if not isinstance(part["has_names"], bool):
        raise ValueError(f"state_dict is damaged: has_names must be a bool, got {part['has_names']!r}")
    buckets = part.get("buckets", [])
    if not isinstance(buckets, list) or not all(isinstance(bucket, list) for bucket in buckets):
        raise ValueError(f"state_dict is damaged: buckets must be lists of names, got {buckets!r:.80}")
    if not all(isinstance(name, str) for bucket in buckets for name in bucket):
        raise ValueError(f"state_dict is damaged: buckets must be lists of names, got {buckets!r:.80}")
    positive = isinstance(world_size, int) and not isinstance(world_size, bool) and world_size > 0
    if world_size is not None and not positive:
        raise ValueError(f"state_dict is damaged: world_size must be a positive number of ranks, got {world_size!r}")
    if "gradient_noise" in part:
        NoiseSums.from_lists(part["gradient_noise"])
