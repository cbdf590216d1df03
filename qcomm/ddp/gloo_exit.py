"""The end of the process while gloo's threads still have functions of this library to call.

The threads need Python to call these functions and to free them. Without an interpreter they would abort the process,
so its end waits for them. torch also waits for its sums, but too late.
"""

import atexit
import os
import threading

__all__ = ["CallbackToken"]

EXIT_SECONDS = 60.0  # maximum wait at the end of the process


class _Callbacks:
    """Counter of the functions that gloo's threads still have to call and to free."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def add(self, change: int) -> None:
        with self._changed:
            self._count += change
            self._changed.notify_all()

    def wait(self) -> None:
        """Waits until there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0, EXIT_SECONDS)


_callbacks = _Callbacks()


def _forget() -> None:
    """Resets the counter of a forked process, which has copies of tokens but none of gloo's threads."""
    global _callbacks  # noqa: PLW0603 - tokens of the parent's still count where they began
    _callbacks = _Callbacks()


def _wait() -> None:
    _callbacks.wait()


atexit.register(_wait)
os.register_at_fork(after_in_child=_forget)


class CallbackToken:
    """A token that a function called by a thread of gloo must hold; it counts as long as it lives.

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
