"""The reducer: the way of one gradient bucket, from the thread of backward to its mean.

::

    backward     begin a step | find the layout | queue | return a Future
    worker                                              | average over all ranks | count | complete the Future

A bucket goes one of three ways. It bypasses the worker where compression does not pay for it (:mod:`qcomm.ddp.bypass`).
It stays on its device where the codec runs there (:mod:`qcomm.ddp.cuda`). Otherwise the group's worker averages it.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

from qcomm.codec import is_on_device
from qcomm.collectives import Bypassing, ErrorFeedback, MeanTask, ReduceOptions, Telemetry, average, refuse, settled
from qcomm.collectives_cuda import DevicePart, check_device_strategy
from qcomm.communicator import (
    Communicator,
    Fault,
    Group,
    LateFaultError,
    Phase,
    attempt,
    device_future,
    failed,
    get_communicator,
    get_world_size,
    is_agreed,
    resolve_group,
)
from qcomm.ddp.buckets import BucketTable, KnownBucket
from qcomm.ddp.bypass import BYPASSED, Bypass, Lane, can_bypass
from qcomm.ddp.cuda import DeviceHook
from qcomm.ddp.steps import GradScale, Steps
from qcomm.errors import CollectiveError, ConfigMismatchError

__all__ = ["Reducer"]


class Reducer:
    """Averages the buckets of one model, in the order in which backward fills them.

    Args:
        options: of the mean, for any number of ranks.
        warmup_steps: number of initial steps whose gradients are exchanged uncompressed.
        table: layouts of the buckets.
        feedback: residuals; None without error feedback.
        telemetry: counts bytes, bits and seconds.
        grad_scale: the factor of the gradients.

    Attributes:
        group: to average over; None for the default group.
        grad_scale: may be replaced between steps.
        steps: counts steps, and keeps their errors.
        bypass: lanes of the buckets that need no agreement.
    """

    def __init__(
        self,
        options: ReduceOptions,
        warmup_steps: int,
        table: BucketTable,
        feedback: ErrorFeedback | None,
        telemetry: Telemetry,
        grad_scale: GradScale,
    ) -> None:
        self.group: Group | None = None
        self.grad_scale = grad_scale
        self.steps = Steps()
        self.bypass = Bypass(telemetry)
        self._options, self._warmup_steps = options, warmup_steps
        self._table, self._feedback, self._telemetry = table, feedback, telemetry
        self._device_hook: DeviceHook | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the things of this process: its group, its device, a ``grad_scale`` that is no number."""
        fixed = self.grad_scale is None or isinstance(self.grad_scale, (int, float))
        kept = self.grad_scale if fixed else _forgotten_scale
        return {**self.__dict__, "group": None, "_device_hook": None, "grad_scale": kept}

    def reconfigure(self, options: ReduceOptions) -> None:
        """Goes on with other options; agreements to bypass were about the ones before."""
        self._options = options
        self.forget_agreements()

    def forget_agreements(self) -> None:
        """Begins anew with another model: agreements, and faults that are owed, were about the one before."""
        self.bypass.flush()
        self.bypass, self.steps.owed = Bypass(self._telemetry), None

    def flush(self) -> None:
        """Adds everything that is counted elsewhere to the telemetry. Waits for a device."""
        self.bypass.flush()
        if self._device_hook is not None:
            self._device_hook.flush()

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Starts averaging a bucket. Never raises, because DDP could not go on; the Future does."""
        _, fault = attempt(Phase.PREPARE, self._begin, bucket.index())
        if fault is not None:
            self.steps.owe(fault)
        try:
            group = resolve_group(self.group)
            lane = self.bypass.enter(bucket, group) if self._may_bypass else None
            if lane is not None:
                return self._pass_by(lane, bucket)
            world_size = get_world_size(group)
            alone = world_size == 1 and self._options.strategy == "auto"
            communicator = None if alone else get_communicator(group)
        except (RuntimeError, ValueError) as error:
            return self._failed(error)
        # Looked up even where a fault is owed: on a device a rank must know whether the others wait for its part.
        known, missing = attempt(Phase.PREPARE, self._table.look_up, bucket, world_size, self._is_warming_up)
        task, fault = None, self.steps.take_owed() or missing
        if known is not None and fault is None:
            task, fault = attempt(Phase.PREPARE, self._task, bucket, known, group)
        if communicator is None:
            return self._finished(task, fault, bucket)
        if is_on_device(bucket.buffer()):
            layout = None if known is None else known.layout
            part = DevicePart(bucket.index(), bucket.buffer(), self._telemetry, layout, task, fault)
            return self._reduce_on_device(part, group, communicator)
        return self._submit(bucket, task, fault, group, communicator)

    @property
    def _is_warming_up(self) -> bool:
        return self.steps.number <= self._warmup_steps

    @property
    def _may_bypass(self) -> bool:
        return not (self._options.compresses or self._is_warming_up)

    def _begin(self, index: int) -> None:
        first = self.steps.begin(index)
        self._telemetry.mark(index, "ready")
        if first:
            self._telemetry.add(steps=1)
            self.steps.set_scale(self.grad_scale)

    def _task(self, bucket: dist.GradBucket, known: KnownBucket, group: Group) -> MeanTask:
        fields, scale = known.fields, self.steps.scale
        if is_on_device(bucket.buffer()):
            check_device_strategy(self._options.strategy)
        elif self._may_bypass and can_bypass(group):
            fields = fields.extended("steps between agreements", str(BYPASSED))
        if self.grad_scale is not None:
            fields = fields.extended("grad_scale", "on the device" if isinstance(scale, torch.Tensor) else repr(scale))
        return MeanTask(
            bucket.buffer(),
            known.layout,
            known.options,
            fields,
            self._telemetry,
            self._feedback,
            scale if isinstance(scale, float) else 1.0,
            bucket.index(),
        )

    def _pass_by(self, lane: Lane, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A step without an agreement. A fault that is owed must wait: every rank takes part in the sum."""
        future = self.bypass.reduce(lane, bucket, self.steps.last_error, self.steps.owe)
        if self.steps.error_serial == self.steps.serial:  # seen here, or the sum is seen where the error was noted
            self.bypass.drain()
        return future

    def _finished(
        self, task: MeanTask | None, fault: Fault | None, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """The Future of a rank that is alone, whose gradients are their own mean."""
        if task is None and fault is not None:
            return self._failed(fault.error)
        self._count(task)
        return device_future(bucket.buffer())

    def _submit(
        self,
        bucket: dist.GradBucket,
        task: MeanTask | None,
        fault: Fault | None,
        group: Group,
        communicator: Communicator,
    ) -> torch.futures.Future[torch.Tensor]:
        """Queues a bucket for the worker; where this rank has no task, it tells the others its fault."""
        index, buffer, serial = bucket.index(), bucket.buffer(), self.steps.serial
        ready = time.perf_counter() if bucket.is_last() else None
        lane, bypassing = None, None
        if self._may_bypass:
            started = self.bypass.started(index)
            lane = self.bypass.begin(bucket, None if task is None else task.layout, group)
            bypassing = None if lane is None else Bypassing(started, lane.memory)

        def job() -> torch.Tensor:
            self._check_step(index, serial)
            try:
                if task is None:
                    refuse(fault or _no_fault(), communicator)
                average(task, communicator, bypassing)
            except Exception as error:  # kept for exception(), and passed on
                self._note(error, serial)
                if lane is not None and task is not None and isinstance(error, LateFaultError):  # the others went on
                    lane.settle(settled(task, communicator, bypassing))
                raise
            if lane is not None:
                lane.settle(settled(task, communicator, bypassing))
            self._count(task)
            if ready is not None:
                self._telemetry.add(wait_seconds=time.perf_counter() - ready)
            return buffer

        ticket = communicator.submit(job)
        if lane is not None:
            lane.ticket = ticket
        return ticket.future

    def _check_step(self, index: int, serial: int) -> None:
        if serial == self.steps.failed_serial:
            # Backward raises for the bucket that failed, and the next step may write to the others' memory already.
            text = f"bucket {index} was not exchanged, because an earlier one of this step failed"
            raise CollectiveError(text) from self.steps.last_error.error

    def _note(self, error: Exception, serial: int) -> None:
        self.steps.last_error.note(error)
        self.steps.error_serial = serial
        if not isinstance(error, LateFaultError):  # all ranks know, and leave out the rest of the step
            self.steps.failed_serial = serial
        if is_agreed(error):  # otherwise connections must be closed first, for the others' sake
            self.bypass.drain()

    def _reduce_on_device(
        self, part: DevicePart, group: Group, communicator: Communicator
    ) -> torch.futures.Future[torch.Tensor]:
        try:
            if self._device_hook is None or not self._device_hook.serves(group):
                if self._device_hook is not None:
                    self._device_hook.flush()
                self._device_hook = DeviceHook(group, communicator, self._telemetry, part.buffer.device)
            future = self._device_hook.reduce(part, self.steps.scale, self.steps.serial)
        except Exception as error:  # noqa: BLE001 - any: DDP could not go on after it, so the Future raises it
            if self._device_hook is not None and isinstance(error, (CollectiveError, ConfigMismatchError)):
                self._device_hook.fail(self.steps.serial)  # all ranks know
            return self._failed(error)
        self._count(part.task)
        return future

    def _failed(self, error: Exception) -> torch.futures.Future[torch.Tensor]:
        self.steps.last_error.note(error)
        return failed(error).future

    def _count(self, task: MeanTask | None) -> None:
        if task is not None:
            self._telemetry.count_bucket(task.layout, task.buffer.element_size())


def _no_fault() -> Fault:
    raise ValueError("a bucket without a task needs a fault")


def _forgotten_scale() -> float:
    raise ValueError(
        "grad_scale is unknown: the state was pickled, and its grad_scale belonged to another process; pass "
        "qcomm.attach(ddp_model, state=state, grad_scale=scaler.get_scale)"
    )
