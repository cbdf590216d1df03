"""Order: the jobs of a group begin one after another, whatever channels they are dealt to, and some run alone.

::

    channel 0   job 0 ------            job 4 (alone) -----
    channel 1    job 1 ----------                           job 5 ------
    channel 2     job 2 ---                                  job 6 ----
    channel 3      job 3 -----                                job 7 --

What a job decides when it begins, such as a strategy under trial, is therefore decided in the same order on all ranks.
A job whose time counts runs alone: it begins when all before it have ended, and none begins beside it. A job never
waits for a later one, so ranks may differ in which jobs run alone.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Order"]


class Order:
    """The order of a group's dealt jobs, which worker threads of several channels run.

    Example:
        >>> order, queue = Order(), []
        >>> order.enqueue(queue.append)
        >>> order.enqueue(queue.append)
        >>> with order.turn(queue[0], alone=False), order.turn(queue[1], alone=False):
        ...     queue
        [0, 1]
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._enqueued = self._begun = self._running = 0

    def enqueue(self, put: Callable[[int], None]) -> None:
        """Gives a job the next number, with which ``put`` puts it into the queue of its channel."""
        with self._changed:
            put(self._enqueued)
            self._enqueued += 1

    @contextmanager
    def turn(self, number: int, alone: bool) -> Iterator[None]:
        """Waits until job ``number`` may begin; the body is the job. Every job that was enqueued comes here once."""
        with self._changed:
            self._changed.wait_for(lambda: self._begun == number and not (alone and self._running))
            self._running += 1
            if not alone:
                self._begin_next()
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                if alone:
                    self._begin_next()
                self._changed.notify_all()

    def _begin_next(self) -> None:
        self._begun += 1
        self._changed.notify_all()
