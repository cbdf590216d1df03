"""Polling: a wait for MPI, which has no wait with a timeout.

Calls of MPI also make its messages progress, so there is no event to wait for instead.
"""

import time
from collections.abc import Callable

__all__ = ["poll_until"]

SPIN_SECONDS = 1e-3
LONGEST_PAUSE = 1e-3


def poll_until(is_done: Callable[[], bool], seconds: float) -> bool:
    """Calls ``is_done`` until it returns True; returns False if it has not after ``seconds``.

    A rank that never comes must become an error, and MPI_Wait has no timeout. Between two calls the thread yields the
    processor at first. Later it sleeps for a twentieth of the time that it has waited, at most a millisecond. It is
    late by 5 % and idle on long waits.
    """
    begin = time.monotonic()
    while not is_done():
        waited = time.monotonic() - begin
        if waited > seconds:
            return False
        time.sleep(0.0 if waited < SPIN_SECONDS else min(waited / 20, LONGEST_PAUSE))
    return True
