"""The handle of an all-reduce under way, on a worker thread or by the process group's own sum."""

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch

from qcomm.collectives import Telemetry
from qcomm.communicator import Ticket
from qcomm.errors import CollectiveError
from qcomm.transport import poll_until

__all__ = ["AllReduceWork", "DirectSum"]


class Outcome(Protocol):
    """The end of an all-reduce; tickets are one."""

    @property
    def future(self) -> torch.futures.Future[torch.Tensor]:
        """Returns a Future of the tensor."""

    def wait(self, timeout: timedelta | float | None = None) -> None:
        """Waits for the end and raises the error."""

    def is_completed(self) -> bool:
        """Returns True if it has ended, well or not."""

    def exception(self) -> Exception | None:
        """Returns the error; None while it runs and where it succeeded."""


class AllReduceWork:
    """Handle of an all-reduce under way, with the methods of ``torch.distributed.Work`` that make sense on a CPU."""

    def __init__(self, outcome: Outcome, telemetry: Telemetry) -> None:
        self._outcome = outcome
        self._telemetry = telemetry

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """Waits until the tensor holds the mean.

        Args:
            timeout: seconds or a timedelta; by default the exchange is limited by the process group's timeout alone.

        Returns:
            True.

        Raises:
            TimeoutError: not finished within ``timeout``; the all-reduce goes on.
            CollectiveError: it failed, here or on another rank.
            ConfigMismatchError: ranks called it with different shapes, grids or options.
        """
        self._outcome.wait(timeout)
        return True

    def is_completed(self) -> bool:
        """Returns True if the all-reduce has ended, well or not."""
        return self._outcome.is_completed()

    def is_success(self) -> bool:
        """Returns True if it has ended well."""
        return self._outcome.is_completed() and self._outcome.exception() is None

    def exception(self) -> Exception | None:
        """Returns the error of the all-reduce, if it failed."""
        return self._outcome.exception()

    def get_future(self) -> torch.futures.Future[torch.Tensor]:
        """Returns a Future of the tensor."""
        return self._outcome.future

    def stats(self) -> dict[str, object]:
        """Returns bytes, bits and seconds of this call, named as in ``CompressionState.stats``; final at its end."""
        return self._telemetry.stats()


class DirectSum:
    """A sum of the process group's own under way. Whoever waits for it also stores its result.

    Args:
        tensor: that holds the mean in the end.
        works: of torch, one or two.
        store: writes the sums to the tensor.
        lost: is told the error of a sum that failed, and returns the one to raise.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        works: Sequence[Any],
        store: Callable[[], None],
        lost: Callable[[RuntimeError], CollectiveError],
    ) -> None:
        self._tensor, self._works, self._store, self._lost = tensor, works, store, lost
        self._lock = threading.Lock()
        self._has_ended = False
        self._error: Exception | None = None

    @property
    def future(self) -> torch.futures.Future[torch.Tensor]:
        """Returns a Future of the tensor, which a thread of its own completes."""
        ticket: Ticket[torch.Tensor] = Ticket()

        def complete() -> None:
            self._end()
            ticket.complete(None if self._error is not None else self._tensor, self._error)

        threading.Thread(target=complete, name="qcomm waits for a sum", daemon=True).start()
        return ticket.future

    def wait(self, timeout: timedelta | float | None = None) -> None:
        """Waits for the end and raises the error; TimeoutError after ``timeout``, and the sum goes on."""
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        # A wait of torch's that runs out of time would close the group's connections.
        if seconds is not None and not poll_until(self._is_summed, seconds):
            raise TimeoutError(f"the collective is still running after {seconds:g} s")
        self._end()
        if self._error is not None:
            raise self._error

    def is_completed(self) -> bool:
        """Returns True if it has ended, well or not."""
        if self._is_summed():
            self._end()
        return self._has_ended

    def exception(self) -> Exception | None:
        """Returns the error; None while it runs and where it succeeded."""
        return self._error

    def _is_summed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def _end(self) -> None:
        with self._lock:
            if self._has_ended:
                return
            try:
                for work in self._works:
                    work.wait()
                self._store()
            except CollectiveError as error:
                self._error = error
            except RuntimeError as error:
                self._error = self._lost(error)
            finally:
                self._has_ended = True
