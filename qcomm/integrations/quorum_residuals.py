"""Residuals of a replica whose group changes: each new quorum keeps their sum, and a discarded step takes nothing.

An all-reduce of torchft's is a sum, over the replicas of the quorum that is there at the moment. With the local
residuals e_i and the owners' o, of W replicas each::

    sum_t out_t = sum_t sum_i(g_i) - (sum_i(e_i) + W * sum(o))

A new quorum has other owners. So ``W * o`` goes into the owner's local residual, and nothing is rescaled: the bracket
stays as it is, whatever W is next. What a dead replica held is lost, and a newcomer begins with zeros.

An exchange changes residuals before it is known whether the step will be taken. So the residuals from before it are
kept until then, and come back with a step that torchft discards, as its gradients are discarded.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from qcomm.collectives import ErrorFeedback

__all__ = ["QuorumResiduals"]

FORMAT = 1


class QuorumResiduals:
    """The residuals of one replica, apart for each all-reduce of a step.

    Example:
        >>> residuals = QuorumResiduals()
        >>> feedback, keep = residuals.of("0")
        >>> keep()
        >>> _ = feedback.local("piece", 2).fill_(1.0)
        >>> residuals.undo()
        >>> residuals.of("0")[0].local("piece", 2)
        tensor([0., 0.])
    """

    def __init__(self) -> None:
        self._residuals: dict[str, ErrorFeedback] = {}
        # By all-reduce, from before the step under way; one that changed nothing has no entry.
        self._before: dict[str, dict[str, Any]] = {}

    def of(self, key: str) -> tuple[ErrorFeedback, Callable[[], None]]:
        """Returns the residuals of an all-reduce, and the function that its exchange calls before it changes them."""
        feedback = self._residuals.setdefault(key, ErrorFeedback())
        before = self._before  # an exchange that outlives its quorum keeps nothing for a later step

        def keep() -> None:
            before[key] = feedback.state_dict()

        return feedback, keep

    def commit(self) -> None:
        """Forgets the residuals from before the step, which was taken."""
        self._before = {}

    def undo(self) -> None:
        """Takes back what the step changed, which was discarded."""
        for key, saved in self._before.items():
            self._residuals[key] = _restored(saved)
        self._before = {}

    def regroup(self) -> None:
        """Prepares for other replicas: puts all residuals in the local ones, as they count in a sum."""
        # New objects, since an exchange of the quorum before may still end.
        self._residuals = {key: _restored(feedback.state_dict()) for key, feedback in self._residuals.items()}

    def norm(self) -> float:
        """Returns the Euclidean norm of the local residuals."""
        return math.hypot(*(feedback.norm() for feedback in self._residuals.values()))

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of this replica's residuals."""
        saved = {key: feedback.state_dict() for key, feedback in sorted(self._residuals.items())}
        return {"format": FORMAT, "residuals": saved}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from saved residuals, with any number of replicas.

        Raises:
            ValueError: damaged, or of another format; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping) or state_dict.get("format") != FORMAT:
            found = state_dict.get("format") if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"state_dict must be of format {FORMAT}, as state_dict() returns it, got {found!r}")
        saved = state_dict.get("residuals")
        if not isinstance(saved, Mapping) or not all(isinstance(key, str) for key in saved):
            raise ValueError(
                f"state_dict is damaged: residuals must be a dictionary with names, got {type(saved).__name__}"
            )
        self._residuals = {key: _restored(of_key) for key, of_key in saved.items()}
        self._before = {}


def _restored(saved: Mapping[str, Any]) -> ErrorFeedback:
    """Returns saved residuals in the units of a sum, all in the local ones and for no number of replicas yet."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"state_dict is damaged: residuals must be dictionaries, got {type(saved).__name__}")
    if saved.get("world_size", 0) is None and not saved.get("owner"):  # regrouped before; the number would not count
        saved = {**saved, "world_size": 1}
    before, now = ErrorFeedback(), ErrorFeedback()
    before.load_state_dict(saved)
    for name, local in saved["local"].items():
        now.local(name, local.numel(), local.device).copy_(before.take(name, local.numel(), local.device))
    return now
