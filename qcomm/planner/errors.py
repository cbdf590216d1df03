"""The planner's error."""

__all__ = ["PlanError"]


class PlanError(ValueError):
    """A request that cannot be planned; the message names a valid value."""
