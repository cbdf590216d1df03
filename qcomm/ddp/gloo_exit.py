"""How the process ends while gloo's threads have still something of this library to call.

They need Python for it, and to free what they have called. Where there is none any more they would abort the process,
so its end waits for them, as torch waits for its sums, though torch does so when it is too late.
"""

import atexit
import os
import threading

__all__ = ["CallbackToken"]

EXIT_SECONDS = 60.0  # most that the end of the process waits


class _Callbacks:
    """How many functions of this process gloo's threads have still to call, and to free."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def add(self, change: int) -> None:
        with self._changed:
            self._count += change
            self._changed.notify_all()

    def wait(self) -> None:
        """Until there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0, EXIT_SECONDS)


_callbacks = _Callbacks()


def _forget() -> None:
    """A process that was forked has none of gloo's threads, though it has copies of their tokens."""
    global _callbacks  # noqa: PLW0603 - tokens of the parent's still count where they began
    _callbacks = _Callbacks()


def _wait() -> None:
    _callbacks.wait()


atexit.register(_wait)
os.register_at_fork(after_in_child=_forget)


class CallbackToken:
    """What a function has to hold that a thread of gloo's calls: it counts as long as it lives.

    Example:
        >>> token = CallbackToken()
        >>> def callback(future):
        ...     return token and future.value()
        >>> del token, callback
    """

    def __init__(self) -> None:
        self._counter = _callbacks
        self._counter.add(1)

    def __del__(self) -> None:
        self._counter.add(-1)
