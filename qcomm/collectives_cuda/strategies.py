"""The choice of a strategy for a bucket on a device: by trial as on the CPU, but without waiting for the device.

A bucket keeps its strategy for a turn of several collectives. The device times the first one of a turn. All ranks agree
on the time during the next turn. So a time has long been on the host when :mod:`qcomm.collectives.tuner` needs it:

::

    turn        1                2                      3
    device      none, none       two_phase, two_phase   bf16, bf16
    agreed on                    time of 1              time of 2
    host        launches, at the beginning of 3: reads time of 1, chooses the strategy of turn 3
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from qcomm.codec import RangeGrid
from qcomm.collectives import (
    UNCOMPRESSED,
    BucketLayout,
    MeanTask,
    ReduceOptions,
    Scale,
    Telemetry,
    Tuner,
    uncompressed_strategies,
)
from qcomm.collectives_cuda.handshake import AgreedNumbers, DevicePart, agree, is_known
from qcomm.collectives_cuda.slots import PERIOD
from qcomm.collectives_cuda.two_phase import DeviceMean, check_group
from qcomm.collectives_cuda.uncompressed import UncompressedDeviceMean
from qcomm.communicator import UNTIMED, Communicator, Fault, Group, is_agreed
from qcomm.errors import CollectiveError, ConfigMismatchError

__all__ = ["DEVICE_STRATEGIES", "DeviceChoice", "check_device_options", "device_strategies"]

DEVICE_STRATEGIES = ("auto", *UNCOMPRESSED, "two_phase")
TRIAL = 2  # collectives of a turn while strategies are tried: the host runs ahead of the device by at most this
UNKNOWN = 2**63 - 1  # the time of a turn that failed, or was not timed


def check_device_options(options: ReduceOptions) -> None:
    """Raises ValueError for options that only tensors on the CPU have.

    Example:
        >>> check_device_options(ReduceOptions(strategy="exact_sum"))
        Traceback (most recent call last):
            ...
        ValueError: strategy must be one of ('auto', 'none', 'bf16', 'two_phase') for CUDA tensors, got 'exact_sum'
    """
    if options.strategy not in DEVICE_STRATEGIES:
        raise ValueError(f"strategy must be one of {DEVICE_STRATEGIES} for CUDA tensors, got {options.strategy!r}")
    if isinstance(options.grid, RangeGrid) and options.grid.bits != "entropy":
        raise ValueError(f"grid must have bits='entropy' with device_codec, got bits={options.grid.bits!r}")
    if options.key_file is not None:
        raise ValueError(
            f"secret must be None with device_codec, whose messages NCCL carries and nothing seals, got "
            f"{options.key_file.path}"
        )


def device_strategies(task: MeanTask) -> tuple[str, ...]:
    """Returns the strategies that ``"auto"`` tries for a buffer, the most exact first, or the one that is named."""
    if task.options.strategy != "auto":
        return (task.options.strategy,)
    layout = task.layout
    uncompressed = uncompressed_strategies(layout, task.buffer.dtype, task.options.grid)
    return (*uncompressed, "two_phase") if layout.compressed_elements else uncompressed


class Stopwatch:
    """A timer of the work between :meth:`start` and :meth:`stop` on the current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times: list[int] = []

    def start(self) -> None:
        """Begins the time: work that is launched from now on counts."""
        self._mark(0)

    def stop(self) -> None:
        """Ends the time: work that is launched from now on does not count."""
        self._mark(1)

    def read(self) -> int:
        """Returns the time in nanoseconds; waits until the device has reached :meth:`stop`."""
        if not self._events:
            return self._times[1] - self._times[0]
        self._events[1].synchronize()
        return round(1e6 * float(self._events[0].elapsed_time(self._events[1])))

    def _mark(self, number: int) -> None:
        if self._events:
            self._events[number].record()
        else:
            self._times.append(time.perf_counter_ns())


@dataclass
class _Turns:
    """The turns of one bucket.

    Attributes:
        layout, dtype: of the bucket.
        strategies: of the bucket. No turn is timed if there is only one.
        strategy: of this turn.
        length, left: number of collectives of this turn, and of those still to come.
        stopwatch: of this turn's first collective, unless it failed.
        agreed: the time of the previous turn, which all ranks know.
    """

    layout: BucketLayout
    dtype: torch.dtype
    strategies: Sequence[str]
    strategy: str
    tuner: Tuner = field(default_factory=Tuner)
    length: int = 0
    left: int = 0
    stopwatch: Stopwatch | None = None
    agreed: AgreedNumbers | None = None


class DeviceChoice:
    """Averages buckets on a device, each by the strategy that is named, or that is fastest for it.

    All ranks make one, and average the same buckets in the same order, on the current stream of the same device.

    Args:
        group: with collectives on the device.
        communicator: of the group; None in a world of one rank.
        telemetry: counts events; the device's counts are added by :meth:`flush`.
        device: of all buckets.
    """

    def __init__(
        self, group: Group, communicator: Communicator | None, telemetry: Telemetry, device: torch.device
    ) -> None:
        checked = check_group(group, device)
        self._compressed = DeviceMean(checked, communicator, telemetry)
        self._uncompressed = UncompressedDeviceMean(communicator, dist.get_rank(checked))
        self._communicator, self._telemetry = communicator, telemetry
        self._turns: dict[int, _Turns] = {}

    def average(self, part: DevicePart, scale: Scale = 1.0) -> Fault | None:
        """Replaces the part's buffer by its mean over all ranks.

        Args:
            part: of this rank.
            scale: the buffer holds values times this: a number, or a tensor of one element on the device.

        Returns:
            None, or a fault of this rank, which took part in the collective nevertheless: the caller raises its error
            and may go on with the next collective.

        Raises:
            CollectiveError, ConfigMismatchError: on all ranks, where the host waits.
        """
        turns = self._turns_of(part)
        if turns is None:
            agree(part, self._communicator, "auto")
            return part.fault
        first = False
        # Collectives that a graph captures are not counted: they run again without this code.
        if not (part.buffer.is_cuda and torch.cuda.is_current_stream_capturing()):
            if turns.left == 0:
                self._begin_turn(turns, part)
            first = turns.left == turns.length
            turns.left -= 1  # even if this collective fails: the other ranks count too, and may not see this failure
        stopwatch = Stopwatch(part.buffer.device) if first and len(turns.strategies) > 1 else None
        if stopwatch is not None:
            stopwatch.start()
        try:
            if turns.strategy in UNCOMPRESSED:
                fault = self._uncompressed.average(
                    part, scale, turns.strategy, self._compressed.group(), with_residuals=first
                )
            else:
                fault = self._compressed.average(part, scale)
        except (CollectiveError, ConfigMismatchError) as error:
            if is_agreed(error):  # a rank with a fault may have had no turns, and begins them next
                self._turns[part.index] = _Turns(turns.layout, turns.dtype, turns.strategies, turns.strategies[0])
            raise
        if fault is not None:
            return fault
        if stopwatch is not None:
            stopwatch.stop()
            turns.stopwatch = stopwatch
        self._telemetry.note_strategy(part.index, turns.strategy)
        return None

    def serves(self, group: Group) -> bool:
        """Returns whether this object was made for ``group``."""
        return self._compressed.serves(group)

    def flush(self) -> None:
        """Adds the device's counts to the telemetry. Waits for the device."""
        self._compressed.flush()

    def _turns_of(self, part: DevicePart) -> _Turns | None:
        """Returns the bucket's turns.

        It is None if a fault left this rank without any, while the others are about to agree on the bucket.
        """
        known = self._turns.get(part.index)
        if known is not None and is_known(part, known.layout, known.dtype):
            return known
        if part.task is None:
            return None
        strategies = device_strategies(part.task)
        turns = self._turns[part.index] = _Turns(part.task.layout, part.buffer.dtype, strategies, strategies[0])
        return turns

    def _begin_turn(self, turns: _Turns, part: DevicePart) -> None:
        """Ends a turn and begins the next."""
        if len(turns.strategies) == 1:
            turns.strategy, turns.length, turns.left = turns.strategies[0], PERIOD, PERIOD
            return
        if turns.length:
            agreed = UNKNOWN if turns.agreed is None else turns.agreed.read()[0]
            own = UNKNOWN if turns.stopwatch is None else turns.stopwatch.read()
            turns.tuner.finished(None, 0 if agreed == UNKNOWN else agreed, UNTIMED, turns.length)
            numbers = torch.full((1,), own, dtype=torch.int64, device=part.buffer.device)
            turns.agreed = AgreedNumbers(numbers, dist.ReduceOp.MIN, self._compressed.group())
        turns.strategy, turns.stopwatch = turns.tuner.next(None, turns.strategies), None
        turns.length = turns.left = TRIAL
        if turns.tuner.settled(None):
            turns.length = turns.left = PERIOD
            self._uncompressed.settle(part.index, turns.strategy)
