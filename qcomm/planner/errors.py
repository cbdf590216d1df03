"""The planner's error."""

__all__ = ["PlanError"]


class PlanError(ValueError):
    """What was asked for cannot be planned; the message says what would be right."""
