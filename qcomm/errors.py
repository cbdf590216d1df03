"""Exceptions that qcomm adds to Python's own. Invalid arguments raise ``TypeError`` and ``ValueError``."""

__all__ = ["CollectiveError", "ConfigMismatchError", "DivergenceError", "PacketError"]


class PacketError(ValueError):
    """An error of bytes that are not a valid packet: truncated, damaged, of another version, or something else."""


class ConfigMismatchError(RuntimeError):
    """A difference between the configurations of the ranks in one collective.

    The message names the field and the ranks.
    """


class CollectiveError(RuntimeError):
    """A failure of a collective on some rank.

    Every rank raises this error, which names the failed rank and its operation.
    """


class DivergenceError(CollectiveError):
    """A difference between the means that ranks have got of the same collective.

    The message names the bucket, the step and the ranks. Unless every mean is compared before it is used
    (``verify="step"``), they are in use already, and the ranks' weights differ.
    """
