"""What the DDP communication hook needs and remembers: options, residuals, counters, and how a bucket is averaged."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qcomm.codec import Grid, SigmaGrid, is_on_device
from qcomm.collectives import (
    BucketLayout,
    ErrorFeedback,
    MeanTask,
    Profile,
    Telemetry,
    average,
    check_exchange,
    describe,
    resolve_profile,
    resolve_ranks_per_node,
    settled,
)
from qcomm.collectives_cuda import check_device_strategy
from qcomm.communicator import (
    Communicator,
    Fields,
    Group,
    Phase,
    attempt,
    device_future,
    failed,
    get_communicator,
    get_world_size,
    is_agreed,
    resolve_group,
)
from qcomm.ddp.buckets import BucketTable
from qcomm.ddp.bypass import BYPASSED, Bypass, Lane, can_bypass
from qcomm.ddp.checkpoint import StateDict, restore, save
from qcomm.ddp.checks import check_hook_options
from qcomm.ddp.cuda import DeviceHook
from qcomm.ddp.steps import GradScale, Steps
from qcomm.errors import CollectiveError, ConfigMismatchError

__all__ = ["CompressionState"]


class CompressionState:
    """What the hook needs and remembers: options, error feedback, counters. One for each model and rank.

    Every rank passes the same options, ``num_threads`` excepted; where they differ, every rank gets a
    ConfigMismatchError that names the option, at the first bucket (through DDP as a RuntimeError with its text;
    ``exception()`` has the object).

    Args:
        process_group: the group to average over; by default the model's with :func:`attach`, otherwise the default one.
            A :class:`qcomm.MpiGroup` has the gradients travel over MPI.
        grid: how finely gradients are quantized, ``SigmaGrid`` or ``RangeGrid``. Means are quantized once more, with
            ``step`` at most 1.
        error_feedback: keep what quantization lost and add it to the next gradient: 4 bytes a parameter, and 4 / W for
            the means. A step that fails, or that GradScaler skips, loses at most its own gradient and that feedback.
        min_elements: smaller parameters travel uncompressed, in the same packets; ``"bf16"`` rounds them, too.
        warmup_steps: so many first steps exchange uncompressed values.
        exclude: patterns (``fnmatch``) of the names of parameters that travel as they are. Needs :func:`attach`,
            which knows the names.
        grad_scale: what the loss was multiplied by, with AMP: ``scaler.get_scale``, a 0-dim tensor, or a number. Read
            once a step, a tensor on a CUDA device without waiting for it. Error feedback is kept without it, so that a
            residual stays right when the scale changes.
        strategy: ``"two_phase"`` compresses, also the means; ``"all_gather"`` compresses gradients alone, for few ranks
            or small models; ``"exact_sum"`` rounds them to one grid of all ranks and loses nothing more; ``"none"`` is
            a plain all-reduce and ``"bf16"`` one of float32 values rounded to bfloat16; ``"hierarchical"`` adds
            uncompressed gradients inside a node and compresses between nodes; ``"auto"`` tries what may be fast for
            each bucket during the first steps and keeps the fastest, one that compresses only if it is a quarter faster
            than those that do not (``stats()["strategies"]`` says which), looking again from time to time. Naming one
            makes it run also in a world of one rank, which otherwise has nothing to do. On a CUDA device there are
            ``"two_phase"``, ``"none"`` and ``"bf16"``, and ``"auto"`` tries these; see "On a GPU" in docs/guide.md.
        ranks_per_node: for ``"hierarchical"``: ranks 0 to ``ranks_per_node - 1`` of the group are one node, and so on;
            any divisor of the number of ranks. By default the environment variable LOCAL_WORLD_SIZE, which launchers
            set.
        num_threads: most that encode and decode at once on this rank, beside those of backward. Results do not depend
            on it, and ranks may differ in it.
        profile: for ``"auto"``: the machine as ``qcomm bench --save-profile`` measured it, or that file. Only what may
            be fast there is tried, and the uncompressed ways.

    Raises:
        TypeError, ValueError: naming the argument.
        OSError: the profile cannot be read.

    Example:
        >>> state = CompressionState(grid=SigmaGrid(step=2.0), exclude=["*.bias"])
        >>> state.stats()["bytes_sent"]
        0
    """

    def __init__(
        self,
        process_group: Group | None = None,
        grid: Grid = SigmaGrid(step=1.0),
        error_feedback: bool = True,
        min_elements: int = 1024,
        warmup_steps: int = 0,
        exclude: Sequence[str] = (),
        grad_scale: GradScale = None,
        strategy: str = "auto",
        ranks_per_node: int | None = None,
        num_threads: int = 1,
        profile: Profile | Path | str | None = None,
    ) -> None:
        check_exchange(grid, min_elements, strategy, ranks_per_node, num_threads)
        check_hook_options(error_feedback, warmup_steps, exclude, grad_scale)
        self.given_group = process_group
        self._model_group: Group | None = None
        self.grid = grid
        self.warmup_steps = warmup_steps
        self.grad_scale = grad_scale
        self.strategy = strategy
        self.num_threads = num_threads
        self.ranks_per_node = ranks_per_node
        self.profile = resolve_profile(profile, strategy)
        self.telemetry = Telemetry()
        options = {
            "grid": grid.describe(),
            "error_feedback": str(error_feedback),
            "min_elements": str(min_elements),
            "warmup_steps": str(warmup_steps),
            "exclude": str(list(exclude)),
            "strategy": strategy,
            "ranks_per_node": str(ranks_per_node),
            "profile": describe(self.profile),
        }
        self._table = BucketTable(options, min_elements, exclude)
        self._feedback = ErrorFeedback() if error_feedback else None
        self._steps = Steps()
        self._device_hook: DeviceHook | None = None
        self._bypass = Bypass(self.telemetry)

    @property
    def process_group(self) -> Group | None:
        """The group that was given, otherwise the model's; None before :func:`attach`: the default one."""
        return self.given_group or self._model_group

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """The residuals; None where error feedback is off. Not to be touched during backward."""
        return self._feedback

    def stats(self) -> dict[str, Any]:
        """Counters of this rank since it began or since ``reset_stats``.

        Returns:
            ``steps``, ``buckets``, ``elements``, ``elements_compressed``;
            ``bytes_sent``, ``bytes_received``: all that was handed to sends and receives, and the same apart as
            ``..._phase1`` (values to the owners of chunks), ``..._phase2`` (means to everyone), ``..._inside``
            (uncompressed values inside a node) and ``..._overhead`` (headers that announce sizes); of an uncompressed
            all-reduce, which is not this library's, what a ring sends: 2 (W - 1) / W times what is summed;
            ``bytes_uncompressed``: of the gradients, once;
            ``bits_per_element``: of all elements, the mean of both phases (strategy all_gather has one), all bytes of
            packets counted: of those sent to owners, and of all means;
            ``bits_per_element_phase1``, ``bits_per_element_phase2`` and their mean ``bits_per_element_compressed``: the
            same for compressed parameters alone;
            ``encode_seconds``, ``decode_seconds`` and ``communication_seconds`` (waiting for slower ranks included) of
            the worker thread, and of all-reduces that bypass it (docs/collective.md), side by side where buckets are;
            ``wait_seconds``, from the last bucket's gradient to its mean;
            ``nonfinite_tensors``: how often one held NaN or infinity;
            ``dropped_values``: how many were sent as zeros because a slot was full, and are kept in the residuals (on a
            CUDA device only, where bytes sent and received are those of whole slots, seconds are not measured, and this
            call waits for the device);
            ``strategies``: for each bucket how it was averaged last;
            ``tensors``: for each compressed parameter the last ``grid``, ``coding``, ``num_bits`` and ``step``;
            ``residual_norm``: of what is still to be sent.
        """
        self._flush()
        residual_norm = self._feedback.norm() if self._feedback is not None else 0.0
        return {**self.telemetry.stats(), "residual_norm": residual_norm}

    def reset_stats(self) -> None:
        """Sets the counters to zero; error feedback and the number of steps stay."""
        self._flush()
        self.telemetry.reset()

    def _flush(self) -> None:
        self._bypass.flush()
        if self._device_hook is not None:
            self._device_hook.flush()

    def exception(self) -> Exception | None:
        """The error that ended the last failed step: DDP passes on its text, this is the object."""
        return self._steps.last_error.error

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on: number of steps and residuals.

        Every rank has to save its own; call it between steps.
        """
        return save(self._steps.number, self._table, self._feedback)

    def load_state_dict(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        """Goes on from what ``state_dict`` returned on this rank; the number of ranks may have changed.

        Args:
            state_dict: this rank's. When W ranks go on as fewer, W', rank r passes a list of those of ranks r, r + W',
                r + 2W', ... or, losing part of the residuals, its own alone. A rank that is new passes rank 0's with
                ``"error_feedback"`` set to None.

        Raises:
            ValueError: of another format, damaged, or not of one run; nothing has changed then.
        """
        self._steps.number = restore(state_dict, self._table, self._feedback)
        self._steps.owed = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to the process: its group, its parameters' identity, its ``grad_scale``.

        A copy of a ``grad_scale`` that is a function or a tensor would not follow the GradScaler.
        """
        warnings.warn(
            "a pickled CompressionState has no process group and no grad_scale that is not a number: "
            "attach(ddp_model, state=state, grad_scale=...) gives it both",
            stacklevel=2,
        )
        fixed = self.grad_scale is None or isinstance(self.grad_scale, (int, float))
        kept = self.grad_scale if fixed else _forgotten_scale
        self._flush()
        forgotten = dict.fromkeys(("given_group", "_model_group", "_device_hook"))
        return {**self.__dict__, **forgotten, "grad_scale": kept}

    def bind(self, model: torch.nn.Module, process_group: Group) -> None:
        """Learns the names of a model's parameters and its process group.

        Raises:
            ValueError: another model uses this state.
        """
        self._table.bind(model)
        self._model_group = process_group
        self._bypass.flush()
        # What ranks agreed on, and owe each other, was about another model.
        self._bypass, self._steps.owed = Bypass(self.telemetry), None

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Starts averaging a bucket. Never raises, because DDP could not go on; the Future does."""
        index, buffer = bucket.index(), bucket.buffer()
        _, fault = attempt(Phase.PREPARE, self._begin, index)
        if fault is not None:
            self._steps.owe(fault)
        try:
            group = resolve_group(self.process_group)
            lane = self._bypass.enter(bucket, group) if self._steps.number > self.warmup_steps else None
            if lane is not None:
                return self._pass_by(lane, bucket)
            world_size = get_world_size(group)
            alone = world_size == 1 and self.strategy == "auto"
            communicator = None if alone else get_communicator(group)
        except (RuntimeError, ValueError) as error:
            return self._failed(error)
        task = self._task(bucket, group, world_size)
        if communicator is None:
            if task.fault is not None:
                return self._failed(task.fault.error)
            self._count(task.layout, buffer)
            return device_future(buffer)
        if is_on_device(buffer):
            return self._reduce_on_device(task, group, communicator)
        ready = time.perf_counter() if bucket.is_last() else None
        serial = self._steps.serial
        task.bypassed = self._bypass.started(index)
        lane = self._bypass.begin(bucket, task, group)
        ticket = communicator.submit(lambda: self._run(task, communicator, serial, ready, lane))
        if lane is not None:
            lane.ticket = ticket
        return ticket.future

    def _pass_by(self, lane: Lane, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A step without an agreement. What is owed to the other ranks must wait: nobody may be missing in the sum."""
        future = self._bypass.reduce(lane, bucket, self._steps.last_error, self._steps.owe)
        if self._steps.error_serial == self._steps.serial:  # seen here, or the sum is seen where the error was noted
            self._bypass.drain()
        return future

    def _reduce_on_device(
        self, task: MeanTask, group: Group, communicator: Communicator
    ) -> torch.futures.Future[torch.Tensor]:
        try:
            if self._device_hook is None or not self._device_hook.serves(group):
                if self._device_hook is not None:
                    self._device_hook.flush()
                self._device_hook = DeviceHook(group, communicator, self.telemetry, task.buffer.device)
            future = self._device_hook.reduce(task, self._steps.scale, self._steps.serial)
        except Exception as error:  # noqa: BLE001 - any: DDP could not go on after it, so the Future raises it
            if self._device_hook is not None and isinstance(error, (CollectiveError, ConfigMismatchError)):
                self._device_hook.fail(self._steps.serial)  # all ranks know
            return self._failed(error)
        self._count(task.layout, task.buffer)
        return future

    def _failed(self, error: Exception) -> torch.futures.Future[torch.Tensor]:
        self._steps.last_error.note(error)
        return failed(error).future

    def _begin(self, index: int) -> None:
        first = self._steps.begin(index)
        self.telemetry.mark(index, "ready")
        if first:
            self.telemetry.add(steps=1)
            self._steps.set_scale(self.grad_scale)

    def _task(self, bucket: dist.GradBucket, group: Group, world_size: int) -> MeanTask:
        """What to do with a bucket: to average it, or to tell the other ranks, who are waiting for it, of a fault."""
        task, layout, fault = None, None, self._steps.take_owed()
        if fault is None:
            task, fault = attempt(Phase.PREPARE, self._mean_task, bucket, group, world_size)
        if task is None:
            if is_on_device(bucket.buffer()):  # there a rank must know whether the others wait for its fault
                found, _ = attempt(Phase.PREPARE, self._look_up, bucket, world_size)
                layout = None if found is None else found[0]
            task = MeanTask(
                bucket.buffer(),
                layout,
                self.grid,
                Fields({}),
                self.telemetry,
                index=bucket.index(),
                fault=fault,
                strategy=self.strategy,
            )
        return task

    def _look_up(self, bucket: dist.GradBucket, world_size: int) -> tuple[BucketLayout, Fields]:
        return self._table.look_up(bucket, world_size, warming_up=self._steps.number <= self.warmup_steps)

    def _mean_task(self, bucket: dist.GradBucket, group: Group, world_size: int) -> MeanTask:
        on_device = is_on_device(bucket.buffer())
        if on_device:
            check_device_strategy(self.strategy)
        layout, fields = self._look_up(bucket, world_size)
        node_size = resolve_ranks_per_node(self.ranks_per_node, world_size, self.strategy)
        if self.strategy == "hierarchical":
            fields = fields.extended("ranks per node", str(node_size))
        if self.grad_scale is not None:
            scale = self._steps.scale
            fields = fields.extended("grad_scale", "on the device" if isinstance(scale, torch.Tensor) else repr(scale))
        passes = not on_device and self._steps.number > self.warmup_steps and can_bypass(group)
        if passes:
            fields = fields.extended("steps between agreements", str(BYPASSED))
        return MeanTask(
            bucket.buffer(),
            layout,
            self.grid,
            fields,
            self.telemetry,
            self._feedback,
            self._steps.scale if isinstance(self._steps.scale, float) else 1.0,
            bucket.index(),
            strategy=self.strategy,
            num_threads=self.num_threads,
            ranks_per_node=node_size,
            profile=self.profile,
            can_bypass=passes,
        )

    def _run(
        self, task: MeanTask, communicator: Communicator, serial: int, ready: float | None, lane: Lane | None
    ) -> torch.Tensor:
        if serial == self._steps.failed_serial:
            # Backward raises for the bucket that failed, and the next step may write to the others' memory already.
            text = f"bucket {task.index} was not exchanged, because an earlier one of this step failed"
            raise CollectiveError(text) from self.exception()
        try:
            result = average(task, communicator)
        except Exception as error:  # kept for exception(), and passed on
            self._steps.last_error.note(error)
            self._steps.error_serial = serial
            if communicator.pending_fault is None:  # all ranks know, and leave out the rest of the step
                self._steps.failed_serial = serial
            elif lane is not None:  # they went on
                lane.settle(settled(task, communicator))
            if is_agreed(error):  # otherwise connections must be closed first, for the others' sake
                self._bypass.drain()
            raise
        if lane is not None:
            lane.settle(settled(task, communicator))
        self._count(task.layout, task.buffer)
        if ready is not None:
            self.telemetry.add(wait_seconds=time.perf_counter() - ready)
        return result

    def _count(self, layout: BucketLayout | None, buffer: torch.Tensor) -> None:
        if layout is not None:
            self.telemetry.count_bucket(layout, buffer.element_size())


def _forgotten_scale() -> float:
    raise ValueError(
        "grad_scale is unknown: the state was pickled, and its grad_scale belonged to another process; pass "
        "qcomm.attach(ddp_model, state=state, grad_scale=scaler.get_scale)"
    )
