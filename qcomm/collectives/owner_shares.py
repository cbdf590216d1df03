"""Shares of a buffer that the ranks own, where their links differ.

A rank that owns the share w of a buffer of B compressed bytes sends (1 - w) B to the other owners and its mean, w B, to
each of the W - 1 others, and receives as much: ``B (1 + (W - 2) w)`` in each direction. With equal shares all ranks
send the same, and wait for the slowest link. A slow rank therefore gets a smaller share, down to none, for which its
link carries B instead of ``2 B (W - 1) / W``: with four ranks a third less, with many nearly half.
"""

import math
import sys
from collections.abc import Sequence

__all__ = ["checked_link_rates", "owner_shares"]

# Links that differ less are taken for equal: a measurement is not exact either.
DIFFERENCE = 1.25


def owner_shares(link_rates: Sequence[float]) -> tuple[float, ...] | None:
    """Returns each rank's share of a buffer, or None for equal ones.

    The time of the slowest link is the least that shares can reach, then that of the next one, and so on. Two ranks
    have equal shares: each sends the same whatever it owns.

    Args:
        link_rates: what the link of each rank carries, in any unit.

    Example:
        >>> [round(share, 3) for share in owner_shares([100, 100, 100, 20])]
        [0.333, 0.333, 0.333, 0.0]
        >>> [round(share, 3) for share in owner_shares([100, 100, 100, 70])]
        [0.311, 0.311, 0.311, 0.068]
        >>> owner_shares([100, 100, 100, 90])
    """
    ranks = len(link_rates)
    if ranks < 3 or max(link_rates) / DIFFERENCE <= min(link_rates):
        return None
    shares = [0.0] * ranks
    rates = [rate / max(link_rates) for rate in link_rates]  # whose sum is finite
    owners = sorted(range(ranks), key=lambda rank: rates[rank])
    # All owners' links take (1 + (W - 2) w) / rate = seconds. One for which the share would be negative owns nothing.
    while True:
        seconds = (ranks - 2 + len(owners)) / math.fsum(rates[rank] for rank in owners)
        if seconds * rates[owners[0]] >= 1:
            break
        owners.pop(0)
    for rank in owners:
        shares[rank] = (seconds * rates[rank] - 1) / (ranks - 2)
    return tuple(shares)


def checked_link_rates(link_rates: object) -> tuple[float, ...] | None:
    """Returns the rates as a tuple of floats.

    Raises:
        TypeError, ValueError: naming the option.

    Example:
        >>> checked_link_rates([100, -1])
        Traceback (most recent call last):
            ...
        ValueError: link_rates must be positive and finite, got -1 for rank 1
    """
    if link_rates is None:
        return None
    if not isinstance(link_rates, Sequence) or isinstance(link_rates, (str, bytes)):
        raise TypeError(f"link_rates must be a sequence of numbers or None, got {type(link_rates).__name__}")
    for rank, rate in enumerate(link_rates):
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"link_rates must be numbers, got {type(rate).__name__} for rank {rank}")
        if not 0 < rate <= sys.float_info.max:
            raise ValueError(f"link_rates must be positive and finite, got {rate!r} for rank {rank}")
    return tuple(float(rate) for rate in link_rates)
