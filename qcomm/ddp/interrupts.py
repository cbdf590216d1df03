"""Signals during backward: a wait in Python for the exchanges of a step.

DDP waits for them in C++, where no signal handler runs: Ctrl-C is then seen when the last bucket is there, or at the
timeout. The wait of this module comes right before and ends at once when a handler raises. A thread other than the main
one runs no handlers and waits as before.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["StepEnd"]

# Exchanges under way have this long to end after a signal, so that residuals are those of a whole step.
GRACE_SECONDS = 1.0


class Exchange(Protocol):
    """The exchange of a bucket; tickets are some."""

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the end, well or not; returns False if it has not come after ``seconds``."""

    def exception(self) -> Exception | None:
        """Returns the error; None while it runs and where it succeeded."""


class StepEnd:
    """The exchanges of the present step; used on the thread of backward."""

    def __init__(self) -> None:
        self._exchanges: list[tuple[Exchange, Callable[[], None]]] = []

    def __reduce__(self) -> tuple[type["StepEnd"], tuple[()]]:
        """Makes copies without exchanges."""
        return StepEnd, ()

    def begin(self) -> None:
        """Begins a step."""
        self._exchanges = []

    def add(self, exchange: Exchange, give_up: Callable[[], None]) -> None:
        """Adds an exchange, and the function that ends it early where it waits for other ranks."""
        self._exchanges.append((exchange, give_up))

    def wait_in_backward(self) -> None:
        """Has this pass of backward wait when it ends; called in the last bucket's hook.

        DDP adds its own wait after that hook, and callbacks run in their order.
        """
        if self._exchanges and torch._C._current_graph_task_id() >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(self._wait)

    def _wait(self) -> None:
        exchanges, self._exchanges = self._exchanges, []
        interrupted = True
        try:
            for exchange, _ in exchanges:
                exchange.join()
                if exchange.exception() is not None:  # DDP raises it, and the others may take as long as the timeout
                    break
            interrupted = False
        finally:
            if interrupted:
                _leave(exchanges)


def _leave(exchanges: list[tuple[Exchange, Callable[[], None]]]) -> None:
    """Gives up the exchanges that do not end in time."""
    deadline = time.monotonic() + GRACE_SECONDS
    for exchange, give_up in exchanges:
        if not exchange.join(max(0.0, deadline - time.monotonic())):
            give_up()
