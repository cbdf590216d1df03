"""Tickets: the result or the error of a job, for which other threads can wait."""

import threading
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from typing import Generic, TypeVar, cast

import torch

__all__ = ["Ticket", "completed", "device_future", "failed"]

T = TypeVar("T")

SIGNAL_SECONDS = 0.5  # most that a signal waits for its handler


class Ticket(Generic[T]):
    """The outcome of a job. Any thread but those that run jobs may wait for it, any number of times.

    Args:
        workers: the threads that run the jobs of the group.
        told: returns the error that ``future`` raises for the job's; by default that error itself.
        device: of a result that a stream of this device may still compute when the job ends; it is the worker thread's
            current stream then. Whoever waits makes the own current stream wait for it.

    Attributes:
        future: holds the job's result; its ``wait()`` raises the job's error.
    """

    def __init__(
        self,
        workers: Collection[threading.Thread] = (),
        told: Callable[[Exception], Exception] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._workers, self._told = workers, told
        self._done = threading.Event()
        self._result: T | None = None
        self._error: Exception | None = None
        self._device = device
        # A Future records the stream behind a tensor that it holds, and behind nothing else.
        self._signal: torch.futures.Future[T | None] = torch.futures.Future(
            devices=None if device is None else [device]
        )
        # An exception set on a Future would reach DDP as if it were the result; one raised in a callback arrives as an
        # exception.
        self.future: torch.futures.Future[T] = self._signal.then(self._value)

    def is_completed(self) -> bool:
        """Returns True if the job has ended, well or not."""
        return self._done.is_set()

    def exception(self) -> Exception | None:
        """Returns the job's error; None while it runs and where it succeeded."""
        return self._error

    def wait(self, timeout: timedelta | float | None = None) -> None:
        """Waits for the end of the job and raises its error.

        Raises:
            TimeoutError: the job still runs after ``timeout`` (seconds or a timedelta).
            RuntimeError: called on a worker thread, as by a Future's callback, for a job that has not ended.
        """
        if not self._done.is_set() and threading.current_thread() in self._workers:
            raise RuntimeError(
                "a callback waits for a collective that can only run after the callback; pass async_op=True and wait "
                "on another thread"
            )
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        if not self._has_ended(seconds):
            raise TimeoutError(f"the collective is still running after {seconds:g} s")
        if self._error is not None:
            raise self._error
        self._follow()

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the end of the job, well or not; returns False if it still runs after ``seconds``."""
        ended = self._has_ended(seconds)
        if ended and self._error is None:
            self._follow()
        return ended

    def _has_ended(self, seconds: float | None) -> bool:
        """Waits for the end of the job, at most for ``seconds``; returns whether it has ended."""
        if seconds is not None:
            return self._done.wait(seconds)
        # A signal interrupts a wait, but not one that begins just after it came.
        while not self._done.wait(SIGNAL_SECONDS):
            pass
        return True

    def _follow(self) -> None:
        """Makes the caller's current stream wait for a result on a device."""
        if self._device is not None:
            self.future.wait()

    def result(self) -> T:
        """Waits for the job and returns its result."""
        self.wait()
        return cast(T, self._result)

    def _value(self, _: object) -> T:
        if self._error is not None:
            next(_raising(self._error if self._told is None else self._told(self._error)))
        return cast(T, self._result)

    def complete(self, result: T | None, error: Exception | None) -> None:
        """Ends the wait. It is called once."""
        self._result, self._error = result, error
        self._done.set()
        self._signal.set_result(None if self._device is None else result)


def _raising(error: Exception) -> Iterator[None]:
    """Raises an error when its first element is taken.

    torch writes the frame that raised and all of its callers behind the error's text. A generator that has ended has no
    callers.
    """
    yield from ()
    raise error


def completed(result: T, future: torch.futures.Future[T] | None = None) -> Ticket[T]:
    """Returns the ticket of a job that has ended or had nothing to do; ``future``: of a result on a device."""
    ticket: Ticket[T] = Ticket()
    ticket.complete(result, None)
    if future is not None:
        ticket.future = future
    return ticket


def failed(error: Exception) -> Ticket[T]:
    """Returns the ticket of a job that could not be queued."""
    ticket: Ticket[T] = Ticket()
    ticket.complete(None, error)
    return ticket


def device_future(result: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """Returns a completed Future of a tensor that the current stream of its device is about to compute.

    Waiting for it makes the caller's own stream wait. A Future that does not know its devices would record no event.

    Example:
        >>> device_future(torch.ones(2)).wait()
        tensor([1., 1.])
    """
    devices: list[int | str | torch.device] | None = None if result.is_cpu else [result.device]
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
    future.set_result(result)
    return future
