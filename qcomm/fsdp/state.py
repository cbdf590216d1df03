"""The state of a sharded model's exchanges: residuals and counters, kept over checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

from qcomm.collectives import (
    ErrorFeedback,
    GradScale,
    RankState,
    check_grad_scale,
    checked_parts,
    origin_of,
    residuals_of,
    run_entries,
)
from qcomm.fsdp.exchanges import Exchanges

__all__ = ["ShardedState"]

WHOLE = "whole gradients"


class ShardedState:
    """Error feedback and counters of a sharded model on this rank; :func:`qcomm.fsdp.attach` makes it.

    Args:
        exchanges: of the model.
        sizes: number of elements of the residual that each parameter may have.
        part: of each parameter that residuals are for.
    """

    def __init__(self, exchanges: Exchanges, sizes: Mapping[str, int], part: str = WHOLE) -> None:
        self._exchanges, self._sizes, self._part = exchanges, dict(sizes), part

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """Returns the residuals, which must not be used during backward; None where error feedback is off."""
        return self._exchanges.feedback

    @property
    def grad_scale(self) -> GradScale:
        """Returns the factor of the gradients, see :func:`attach`; it may be replaced between steps."""
        return self._exchanges.grad_scale

    @grad_scale.setter
    def grad_scale(self, grad_scale: GradScale) -> None:
        check_grad_scale(grad_scale)
        self._exchanges.grad_scale = grad_scale

    def stats(self) -> dict[str, Any]:
        """Returns the counters of this rank since its start or since :meth:`reset_stats`.

        They are named as in ``CompressionState.stats``, for gradients: ``..._phase1`` counts their way to the owners of
        shards. With replicas it counts the way to the owners of chunks, and ``..._phase2`` that of the means.
        ``steps`` are passes of backward that exchanged gradients. ``weights`` has the same counters for weights, under
        ``..._phase2``. Bytes of torch's own collectives are not counted.
        """
        feedback = self._exchanges.feedback
        return {
            **self._exchanges.gradient_telemetry.stats(),
            "residual_norm": 0.0 if feedback is None else feedback.norm(),
            "weights": self._exchanges.weight_telemetry.stats(),
        }

    def reset_stats(self) -> None:
        """Sets the counters to zero; error feedback and the number of steps stay."""
        self._exchanges.gradient_telemetry.reset()
        self._exchanges.weight_telemetry.reset()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to resume this rank from: number of steps, and residuals. Every rank saves its own.

        It has the entries of ``CompressionState.state_dict``, so that either can resume from the other's where
        residuals are for whole gradients.
        """
        exchanges = self._exchanges
        entries = run_entries(exchanges.steps, exchanges.run, True, exchanges.feedback)
        return RankState({**entries, "part": self._part})

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Resumes from a result of ``state_dict`` on this rank; the number of ranks may have changed.

        Args:
            state_dict: as of ``CompressionState.load_state_dict``.

        Raises:
            ValueError: of another format, damaged, of another model or other shards, or not of one run; nothing has
                changed then. Ranks that resume from states of different runs, steps or numbers of ranks get a
                ConfigMismatchError in the next exchange.
        """
        saved = self._checked(state_dict)
        exchanges, residuals = self._exchanges, residuals_of(saved)
        if residuals:
            # Without error feedback they are checked all the same.
            target = ErrorFeedback() if exchanges.feedback is None else exchanges.feedback
            target.load_state_dict(residuals, self._sizes)
        elif exchanges.feedback is not None:
            exchanges.feedback.clear(saved[0]["world_size"])
        exchanges.steps, exchanges.run = saved[0]["steps"], saved[0]["run"]
        exchanges.origin = origin_of(exchanges.steps, exchanges.run, exchanges.feedback)

    def check_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Raises the errors that :meth:`load_state_dict` would raise, and changes nothing."""
        if residuals := residuals_of(self._checked(state_dict)):
            ErrorFeedback().load_state_dict(residuals, self._sizes)

    def _checked(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        saved = checked_parts(state_dict)
        for state in saved:
            part = state.get("part", WHOLE)  # DDP's states have whole ones
            if part != self._part and state["error_feedback"] is not None:
                raise ValueError(
                    f"state_dict must have residuals of {self._part}, as this model keeps them, got {part!r}: set its "
                    '"error_feedback" to None to go on without residuals'
                )
            if not state["has_names"] and state["error_feedback"] is not None:
                raise ValueError("state_dict must have residuals by the names of parameters: of a hook made by attach")
        return saved
