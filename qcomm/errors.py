"""The exceptions that qcomm adds to Python's own; bad arguments are ``TypeError`` and ``ValueError`` as everywhere."""

__all__ = ["CollectiveError", "ConfigMismatchError", "PacketError"]


class PacketError(ValueError):
    """Bytes that are not a valid packet: truncated, damaged, of another version, or not a packet at all."""


class ConfigMismatchError(RuntimeError):
    """Ranks that take part in one collective are configured differently; the message names the field and the ranks."""


class CollectiveError(RuntimeError):
    """A collective failed on some rank; every rank gets this error, which names the rank and what it was doing."""
