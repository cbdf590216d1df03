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
        self.forget()

    def forget(self) -> None:
        """For a process that was forked, which has none of gloo's threads."""
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
atexit.register(_callbacks.wait)
os.register_at_fork(after_in_child=_callbacks.forget)


class CallbackToken:
    """What a function has to hold that a thread of gloo's calls: it counts as long as it lives.

    Example:
        >>> token = CallbackToken()
        >>> def callback(future):
        ...     return token and future.value()
        >>> del token, callback
    """

    def __init__(self) -> None:
        _callbacks.add(1)

    def __del__(self) -> None:
        _callbacks.add(-1)
