"""Errors of backward: the sentence that a user sees, with the bucket, the cause, and what to do next; failed steps."""

import threading

from qcomm.communicator import LateFaultError, is_agreed
from qcomm.errors import CollectiveError, ConfigMismatchError, DivergenceError

__all__ = ["GROUP_IS_BROKEN", "NOTHING_BEGAN", "TOLD_LATER", "LastError", "StepError", "StepFailures", "of_bucket"]

NEXT_STEP = "The rest of this step is not exchanged, and the next step can begin"
WRAP_ANEW = (
    "DDP with find_unused_parameters=True cannot go on after it: run ddp_model = DistributedDataParallel("
    "ddp_model.module, ...) and qcomm.attach(ddp_model, state=state) on every rank before the next step"
)
GROUP_IS_BROKEN = "This process group cannot be used further: end all ranks and resume from a checkpoint"
TOLD_LATER = "The other ranks go on, and are told when ranks next agree"
NOTHING_BEGAN = "Nothing was exchanged; the next step can begin when the cause is removed"


class StepError(CollectiveError):
    """Another bucket of the step has failed; the text is what backward raises for that one."""


def of_bucket(error: Exception, index: int, finds_unused: bool, otherwise: str = GROUP_IS_BROKEN) -> Exception:
    """Returns the error that DDP raises for a bucket. It has no traceback, whose frames torch would add to the text.

    Args:
        error: of the exchange.
        index: of the bucket.
        finds_unused: whether DDP runs with ``find_unused_parameters=True``.
        otherwise: the advice if the ranks have not agreed to end this exchange.

    Example:
        >>> print(of_bucket(CollectiveError("rank 1 failed"), 3, False))
        bucket 3 was not averaged: rank 1 failed. The rest of this step is not exchanged, and the next step can begin.
    """
    if isinstance(error, (DivergenceError, StepError)):
        return type(error)(str(error))  # about other means than this bucket's, with an advice of its own
    advice = otherwise
    if is_agreed(error) or (finds_unused and otherwise == NOTHING_BEGAN):
        advice = WRAP_ANEW if finds_unused else NEXT_STEP
    if isinstance(error, (CollectiveError, ConfigMismatchError)):
        return type(error)(f"bucket {index} was not averaged: {error}. {advice}.")
    return CollectiveError(f"bucket {index} was not averaged: {type(error).__name__}: {error}. {advice}.")


class LastError:
    """The last error of a model's steps."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def note(self, error: Exception) -> None:
        """Replaces the error before it."""
        self.error = error


class StepFailures:
    """The errors of a model's steps. Workers of several channels note them, and the first of a step counts.

    Attributes:
        last: the last error of any step.
        seen_serial: of the last step in which this rank saw an error.
        failed_serial: of the last one that failed on all ranks, whose remaining buckets are refused.
        text: what backward raises for that step.
        cause: the same without advice.
    """

    def __init__(self) -> None:
        self.last = LastError()
        self.seen_serial = self.failed_serial = 0
        self.text = self.cause = ""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["StepFailures"], tuple[()]]:
        """Makes copies without errors, which concern this process."""
        return StepFailures, ()

    def note(self, error: Exception, index: int, serial: int, finds_unused: bool) -> None:
        """Notes the error of a bucket's exchange.

        Args:
            error: of the exchange.
            index: of the bucket.
            serial: of the step.
            finds_unused: as of :func:`of_bucket`.
        """
        text = str(of_bucket(error, index, finds_unused))
        with self._lock:
            if self.seen_serial < serial:
                self.last.note(error)
                self.seen_serial = serial
            if self.failed_serial < serial and not isinstance(error, LateFaultError):  # the others do not know of that
                self.text, self.cause = text, f"bucket {index} was not averaged: {error}"
                self.failed_serial = serial
