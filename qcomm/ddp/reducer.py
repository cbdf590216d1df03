"""The reducer: the way of one gradient bucket, from the thread of backward to its mean.

::

    backward     begin a step | find the layout | queue | return a Future
    worker                                              | average over all ranks | count | complete the Future

A bucket takes one of four paths. It bypasses the worker where compression does not pay for it
(:mod:`qcomm.ddp.bypass`). It stays on its device where the codec runs there (:mod:`qcomm.ddp.cuda`). It is its own mean
where ``"auto"`` averages over one rank. Otherwise the group's worker averages it, in host memory: a bucket on a device
is copied there and back (:mod:`qcomm.staging`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from qcomm.codec import is_on_device
from qcomm.collectives import (
    BYPASSED,
    UNCOMPRESSED,
    Bypassing,
    ErrorFeedback,
    GradScale,
    MeanTask,
    ReduceOptions,
    Telemetry,
    agree_on_smallest,
    average,
    refuse,
    settled,
)
from qcomm.collectives_cuda import DevicePart, check_device_options
from qcomm.communicator import (
    CHANNELS,
    UNEQUAL_CHANNELS,
    Communicator,
    Fault,
    Group,
    LateFaultError,
    Phase,
    Ticket,
    connect,
    device_future,
    failed,
    get_communicator,
    is_agreed,
    resolve_group,
)
from qcomm.ddp.buckets import BucketTable, KnownBucket
from qcomm.ddp.bypass import Bypass, Lane
from qcomm.ddp.cuda import DeviceHook
from qcomm.ddp.failures import GROUP_IS_BROKEN, NOTHING_BEGAN, StepError, of_bucket
from qcomm.ddp.gradient_noise import GradientNoise
from qcomm.ddp.regroup import Regrouping, may_regroup
from qcomm.ddp.step_choice import StepChoice
from qcomm.ddp.steps import StepEnd, Steps
from qcomm.ddp.warm_up import WarmUp
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.staging import stage
from qcomm.transport import break_group, can_bypass

__all__ = ["Reducer"]


P = ParamSpec("P")
T = TypeVar("T")


class Reducer:
    """Averages the buckets of one model, in the order in which backward fills them.

    Args:
        options: of the mean, for any number of ranks.
        warm_up: the initial steps.
        table: layouts of the buckets.
        feedback: residuals; None without error feedback.
        telemetry: counts bytes, bits and seconds.
        grad_scale: the factor of the gradients.
        noise: measures the gradients' noise; None where nobody asked for it.

    Attributes:
        group: to average over; None for the default group.
        grad_scale: may be replaced between steps.
        steps: counts steps, and keeps their errors.
        bypass: lanes of the buckets that need no agreement.
        choice: between compressing and not, by the time of steps.
    """

    def __init__(
        self,
        options: ReduceOptions,
        warm_up: WarmUp,
        table: BucketTable,
        feedback: ErrorFeedback | None,
        telemetry: Telemetry,
        grad_scale: GradScale,
        noise: GradientNoise | None,
    ) -> None:
        self.group: Group | None = None
        self.grad_scale = grad_scale
        self.steps = Steps()
        self.bypass = Bypass(telemetry)
        self.choice = StepChoice()
        self._options, self._warm_up = options, warm_up
        self._table, self._feedback, self._telemetry = table, feedback, telemetry
        self._device_hook: DeviceHook | None = None
        self._regrouping: Regrouping | None = None
        self._step_end = StepEnd()
        self._last_took: int | None = None  # of the step before, until the present one has used it
        self._noise = noise

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the objects of this process: group, device, a ``grad_scale`` that is no number."""
        fixed = self.grad_scale is None or isinstance(self.grad_scale, (int, float))
        kept = self.grad_scale if fixed else _forgotten_scale
        return {**self.__dict__, "group": None, "_device_hook": None, "_regrouping": None, "grad_scale": kept}

    def reconfigure(self, options: ReduceOptions) -> None:
        """Goes on with other options.

        Agreements to bypass end with the options they were about. The number of threads is each rank's own business, so
        a change of it alone must not make this rank agree where the others do not.
        """
        if replace(options, num_threads=1) != replace(self._options, num_threads=1):
            self.bypass.forget()
            self.choice = StepChoice()
        self._options = options

    def forget_agreements(self) -> None:
        """Forgets agreements and owed faults, which concerned the earlier model or options."""
        self.bypass.flush()
        self.bypass, self.choice = Bypass(self._telemetry), StepChoice()
        self.steps.take_owed()

    def flush(self) -> None:
        """Adds the counters of the bypass and of the device to the telemetry. It waits for the device."""
        self.bypass.flush()
        if self._device_hook is not None:
            self._device_hook.flush()

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Starts averaging a bucket. The Future raises all errors, since DDP could not go on after one raised here."""
        if self._noise is not None:
            self._prepare(self._noise.begin, bucket, self._table.name_of)
        if self._table.saved_order is not None:
            future = self._reduce_regrouped(self._table.saved_order, bucket)
        else:
            future = self._reduce(bucket)
        if bucket.is_last() or self.steps.skips_buckets:  # then the last one may be missing
            self._step_end.wait_in_backward()
        if self._noise is not None and self._noise.has_all(bucket, future):
            self._measure_in_backward(self._noise)
        return future

    def _measure_in_backward(self, noise: GradientNoise) -> None:
        """Has this pass of backward measure the step when it ends, behind the wait for its exchanges."""
        if torch._C._current_graph_task_id() >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: self._prepare(noise.finish, float(self.steps.scale))
            )

    def _reduce_regrouped(
        self, order: Sequence[Sequence[str]], bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """Holds back a bucket of the first step after a checkpoint, whose buckets are others."""
        if self._regrouping is None or bucket.index() == 0:
            if not self._table.has_names or not may_regroup(bucket, self.steps.skips_buckets):
                self._table.saved_order = None
                return self._reduce(bucket)
            self._regrouping = Regrouping(order, self._table.name_of, self._reduce, self._owe)
        regrouping = self._regrouping
        if bucket.is_last():
            self._regrouping = self._table.saved_order = None
        return regrouping.add(bucket)

    def _owe(self, error: Exception) -> None:
        self.steps.owe(Fault(Phase.PREPARE, error))

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._prepare(self._begin, bucket.index())
        try:
            group = resolve_group(self.group)
            if self._last_took is not None:
                self._choose_by_step(group)
            lane = self.bypass.enter(bucket, group) if self._may_bypass else None
            if lane is not None and lane.strategy in UNCOMPRESSED:
                return self._pass_by(lane, bucket)
            channels = self._channels(bucket, lane)
            alone, channel = self._options.strategy == "auto", bucket.index() % channels
            communicator = connect(group, alone, self._options.connection_options, channel, channels)
        except (RuntimeError, ValueError, OSError) as error:
            return self._failed(error, bucket.index())
        world_size = 1
        if communicator is not None:
            world_size, self.steps.run = communicator.world_size, communicator.run
        # The lookup happens even where a fault is owed: on a device a rank must know if the others wait for its part.
        known = self._prepare(self._table.look_up, bucket, world_size, self._stage)
        task = None
        if known is not None and not self.steps.has_owed:
            task = self._prepare(self._task, bucket, known, group, communicator, lane)
        fault = self.steps.take_owed()
        if communicator is None:
            return self._finished(task, fault, bucket)
        if self._options.device_codec and is_on_device(bucket.buffer()):
            layout = None if known is None else known.layout
            part = DevicePart(bucket.index(), bucket.buffer(), self._telemetry, layout, task, fault)
            return self._reduce_on_device(part, group, communicator)
        return self._submit(bucket, task, fault, group, communicator, lane is None)

    def _channels(self, bucket: dist.GradBucket, lane: Lane | None) -> int:
        """Returns the number of channels to which buckets like this one are dealt, the same on all ranks."""
        is_compressed = self._options.compresses or lane is not None
        if self.steps.serial <= self.steps.first_serial:
            return 1
        # Buffers in host memory for tensors on a device are few, and one worker at a time takes them.
        if not is_compressed or not bucket.buffer().is_cpu:
            return 1
        return UNEQUAL_CHANNELS if self._options.owner_shares else CHANNELS

    def _prepare(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Returns the result of a step before the collective; its error is owed to the other ranks, who wait."""
        try:
            return step(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - any: it is raised on every rank by the next agreement
            self.steps.owe(Fault(Phase.PREPARE, error))
            return None

    @property
    def _stage(self) -> int | None:
        """The stage of warm-up of the present step, None after it."""
        number = self.steps.number
        return None if number > self._warm_up.steps else self._warm_up.stage(number)

    @property
    def _may_bypass(self) -> bool:
        options = self._options
        named = not options.compresses and options.verify != "step"
        # The program's own all-reduce is not sealed.
        return named and options.secret is None and self._stage is None

    def _begin(self, index: int) -> None:
        first = self.steps.begin(index)
        self._telemetry.mark(index, "ready")
        if first:
            took = self._step_end.begin()
            self._last_took = took if self._options.strategy == "auto" and self._stage is None else None
            self._telemetry.add(steps=1)
            self.steps.set_scale(self.grad_scale, self._options.device_codec)

    def _choose_by_step(self, group: Group) -> None:
        """Begins a step of the choice between compressing and not; all buckets agree anew where it changes."""
        took, self._last_took = self._last_took or 0, None

        def agree(nanoseconds: int) -> Ticket[int]:
            communicator = get_communicator(group, self._options.connection_options)

            def job() -> int:
                agreed = agree_on_smallest(nanoseconds, communicator, "time of a step")
                self._telemetry.add_traffic("overhead", agreed.traffic)
                return max(0, agreed.last_time - 1)

            return communicator.submit(job)

        if self.choice.begin(took, agree):
            self.bypass.forget()

    def _task(
        self,
        bucket: dist.GradBucket,
        known: KnownBucket,
        group: Group,
        communicator: Communicator | None,
        lane: Lane | None,
    ) -> MeanTask:
        buffer, fields, scale, options = bucket.buffer(), known.fields, self.steps.scale, known.options
        if known.on_device:
            check_device_options(self._options)
        elif self._may_bypass and buffer.is_cpu and can_bypass(group):
            fields = fields.extended("steps between agreements", str(BYPASSED))
        if lane is not None:
            fields = fields.extended("strategy chosen", lane.strategy)
            options = lane.named(known.options)
        if self.grad_scale is not None:
            fields = fields.extended("grad_scale", "on the device" if isinstance(scale, torch.Tensor) else repr(scale))
        staged = None
        if communicator is not None and not known.on_device and not buffer.is_cpu:
            staged = stage(buffer, communicator)
        return MeanTask(
            buffer,
            known.layout,
            options,
            fields,
            self._telemetry,
            self._feedback,
            scale if isinstance(scale, float) else 1.0,
            bucket.index(),
            self.steps.number,
            staged,
        )

    def _pass_by(self, lane: Lane, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Starts a step without an agreement. An owed fault must wait, because every rank takes part in the sum."""
        verified = f"bucket {bucket.index()}, step {self.steps.number}" if self._options.verify != "off" else ""
        future = self.bypass.reduce(lane, bucket, self.steps.failures.last, self.steps.owe, verified)
        if lane.outcome is not None:
            self._step_end.add(lane.outcome, partial(break_group, lane.group))
        if self.steps.failures.seen_serial == self.steps.serial:  # if not seen here, _note sees the sum
            self.bypass.drain()
        return future

    def _finished(
        self, task: MeanTask | None, fault: Fault | None, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """Returns the Future of a rank that is alone, whose gradients are their own mean."""
        if task is None and fault is not None:
            return self._failed(fault.error, bucket.index())
        self._count(task)
        return device_future(bucket.buffer())

    def _submit(
        self,
        bucket: dist.GradBucket,
        task: MeanTask | None,
        fault: Fault | None,
        group: Group,
        communicator: Communicator,
        agrees: bool,
    ) -> torch.futures.Future[torch.Tensor]:
        """Queues a bucket for a worker; where this rank has no task, it tells the others its fault.

        With ``agrees`` the ranks may settle on a strategy for the steps after this one.
        """
        index, buffer, serial = bucket.index(), bucket.buffer(), self.steps.serial
        ready = time.perf_counter() if bucket.is_last() else None
        lane, bypassing = None, None
        choice, uncompressed, is_last = self.choice, self.choice.uncompressed, bucket.is_last()
        is_auto = task is not None and task.options.strategy == "auto"
        if self._may_bypass and agrees:
            started, means = self.bypass.bypassing(index)
            lane = self.bypass.begin(bucket, None if task is None else task.layout, group)
            bypassing = None if lane is None else Bypassing(started, lane.memory, means)
        elif self._stage is not None:
            # Perhaps again, after a checkpoint was loaded: an agreement would be of another time.
            self.bypass.leave(index)
        settles = lane is not None or is_auto

        def settle(task: MeanTask) -> None:
            found = settled(task, communicator, bypassing)
            if lane is not None:
                lane.settle(found.of(uncompressed))
            if is_auto:
                choice.note(index, is_last, found)

        def job() -> torch.Tensor:
            if serial == self.steps.failures.failed_serial:
                self._refuse_rest(task, communicator)
            try:
                if task is None:
                    refuse(fault, communicator)
                average(task, communicator, bypassing, uncompressed)
            except Exception as error:  # kept for exception(), and passed on
                self._note(error, index, serial)
                if task is not None and settles and isinstance(error, LateFaultError):  # the others went on
                    settle(task)
                raise
            if settles:
                settle(task)
            self._count(task)
            if ready is not None:
                self._telemetry.add(wait_seconds=time.perf_counter() - ready)
            return buffer

        device = None if buffer.is_cpu else buffer.device
        ticket = communicator.submit(job, lambda error: of_bucket(error, index, self.steps.finds_unused), device)
        if lane is not None:
            lane.ticket = ticket
        self._step_end.add(ticket, communicator.interrupt)
        return ticket.future

    def _refuse_rest(self, task: MeanTask | None, communicator: Communicator) -> NoReturn:
        """Tells the others in place of a bucket that the step has failed; some may not know yet, on another channel.

        Backward raises for the bucket that failed, and the next step may write to the others' memory already.
        """
        if task is not None:
            task.abandon()
        failures = self.steps.failures
        if failures.failed_serial <= self.steps.first_serial:  # all ranks know, on their one channel
            raise StepError(failures.text)
        try:
            refuse(Fault(Phase.PREPARE, StepError(failures.cause)), communicator)
        except (CollectiveError, ConfigMismatchError) as error:
            if not is_agreed(error):
                raise
        raise StepError(failures.text)

    def _note(self, error: Exception, index: int, serial: int) -> None:
        self.steps.failures.note(error, index, serial, self.steps.finds_unused)
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
            return self._failed(error, part.index, GROUP_IS_BROKEN)
        self._count(part.task)
        return future

    def _failed(self, error: Exception, index: int, advice: str = NOTHING_BEGAN) -> torch.futures.Future[torch.Tensor]:
        self.steps.failures.last.note(error)
        return failed(of_bucket(error, index, self.steps.finds_unused, advice)).future

    def _count(self, task: MeanTask | None) -> None:
        if task is not None:
            self._telemetry.count_bucket(task.layout, task.buffer.element_size())


def _forgotten_scale() -> float:
    raise ValueError(
        "grad_scale is unknown: the state was pickled, and its grad_scale belonged to another process; pass "
        "qcomm.attach(ddp_model, state=state, grad_scale=scaler.get_scale)"
    )
