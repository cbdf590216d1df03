"""Steps: which bucket begins one, what they owe to other ranks, and the wait at the end of each."""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from qcomm.collectives import GradScale, Scale, check_scale
from qcomm.communicator import Fault
from qcomm.ddp.failures import StepFailures

__all__ = ["StepEnd", "Steps"]

# Exchanges under way have this long to end after a signal, so that residuals are those of a whole step.
GRACE_SECONDS = 1.0


class Steps:
    """Counts steps by their buckets, on the thread of backward.

    Attributes:
        number: of the present step, as a checkpoint has it.
        serial: of the present step among those of this object. A loaded checkpoint does not change it, because jobs of
            a failed step may still be in the queue when the resumed step has the same number.
        first_serial: of the first step, here and after a checkpoint was loaded: ranks may have other buckets in it.
        scale: the factor of the present step's gradients: a number, or a tensor that stays on its device.
        failures: errors of the steps.
        skips_buckets: whether a step may consist of any of the buckets.
        finds_unused: whether DDP looks for unused parameters, and so cannot go on after an error.
        run: names the connections of the last exchange; "" before the first one.
    """

    def __init__(self) -> None:
        self.number = 0
        self.serial = 0
        self.first_serial = 1
        self.scale: Scale = 1.0
        self.failures = StepFailures()
        self._owed: deque[Fault] = deque(maxlen=1)  # gloo's thread adds to it while this one takes from it
        self.skips_buckets = False
        self.finds_unused = False
        self.run = ""
        self._last_index, self._last_pass = -1, -1

    def __getstate__(self) -> dict[str, object]:
        """Returns the state without the objects of this process: errors, and a scale that may be on a device."""
        return {**self.__dict__, "scale": 1.0, "_owed": deque(maxlen=1)}

    def begin(self, index: int) -> bool:
        """Begins bucket ``index``, and a new step if it is a step's first; returns True if it is."""
        # Buckets come in ascending order, so an index that does not ascend begins a new step, also where the last
        # buckets of a step were skipped. Where any may be missing, another pass of the autograd engine does, too.
        # Elsewhere it does not: checkpointed layers run passes of their own inside of backward.
        number = torch._C._current_graph_task_id() if self.skips_buckets else -1
        first = index <= self._last_index or self._last_index < 0 or number != self._last_pass
        self._last_index, self._last_pass = index, number
        if first:
            self.number += 1
            self.serial += 1
        return first

    def resume(self, number: int, run: str) -> None:
        """Goes on from a saved number of steps and run."""
        self.number, self.run, self.first_serial = number, run, self.serial + 1
        self.take_owed()

    def set_scale(self, grad_scale: GradScale, device_codec: bool) -> None:
        """Reads the present step's scale; raises ValueError or TypeError where it is not one."""
        scale = grad_scale() if callable(grad_scale) else grad_scale
        # The value of a tensor stays on the device that uses it, because reading it would wait for the device.
        if device_codec and isinstance(scale, torch.Tensor) and scale.numel() == 1 and scale.is_cuda:
            self.scale = scale
        else:
            self.scale = 1.0 if scale is None else check_scale(scale)

    @property
    def has_owed(self) -> bool:
        """Returns whether there is a fault that the other ranks do not know yet."""
        return bool(self._owed)

    def owe(self, fault: Fault) -> None:
        """Keeps a fault, if there is none yet, for the next agreement."""
        if not self._owed:
            self._owed.append(fault)

    def take_owed(self) -> Fault | None:
        """Returns the owed fault, to be told now, and forgets it."""
        return self._owed.popleft() if self._owed else None


class Exchange(Protocol):
    """The exchange of a bucket; tickets are some."""

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the end, well or not; returns False if it has not come after ``seconds``."""

    def exception(self) -> Exception | None:
        """Returns the error; None while it runs and where it succeeded."""


class StepEnd:
    """The exchanges of the present step, and a wait for them in Python; used on the thread of backward.

    DDP waits for them in C++, where no signal handler runs: Ctrl-C would be seen when the last bucket is there, or at
    the timeout. This wait comes right before and ends at once when a handler raises. A thread other than the main one
    runs no handlers and waits as before.
    """

    def __init__(self) -> None:
        self._exchanges: list[tuple[Exchange, Callable[[], None]]] = []
        self._began = 0
        self._took = 0

    def __reduce__(self) -> tuple[type["StepEnd"], tuple[()]]:
        """Makes copies without exchanges."""
        return StepEnd, ()

    def begin(self) -> int:
        """Begins a step; returns the nanoseconds of the one before it, 0 if backward has not waited for it."""
        self._exchanges = []
        took, self._took, self._began = self._took, 0, time.perf_counter_ns()
        return took

    def add(self, exchange: Exchange, give_up: Callable[[], None]) -> None:
        """Adds an exchange, and the function that ends it early where it waits for other ranks."""
        self._exchanges.append((exchange, give_up))

    def wait_in_backward(self) -> None:
        """Has this pass of backward wait when it ends; called in the last bucket's hook at the latest.

        DDP adds its own wait after that hook, and callbacks run in their order.
        """
        if self._exchanges and torch._C._current_graph_task_id() >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(self._wait)

    def _wait(self) -> None:
        exchanges, self._exchanges = self._exchanges, []
        interrupted = True
        try:
            for exchange, _ in exchanges:  # also after an error: others may still write to their gradients
                exchange.join()
            interrupted = False
            self._took = time.perf_counter_ns() - self._began
        finally:
            if interrupted:
                _leave(exchanges)


def _leave(exchanges: list[tuple[Exchange, Callable[[], None]]]) -> None:
    """Gives up the exchanges that do not end in time."""
    deadline = time.monotonic() + GRACE_SECONDS
    for exchange, give_up in exchanges:
        if not exchange.join(max(0.0, deadline - time.monotonic())):
            give_up()
