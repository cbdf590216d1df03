"""Exchanges: the collectives of one sharded model, their faults, and the agreement at the end of backward.

::

    forward      gather weights of unit 0 | unit 1 | ...
    backward     ... | gather weights, reduce gradients of unit 1 | of unit 0 | agree on the end

Each runs on the thread of the group's communicator while this one waits for it, as torch's own collectives do on the
CPU. All ranks run the same ones in the same order.

A rank that fails tells the others in the headers of the exchange, and all raise. One that fails after its last message
of an exchange, as over a damaged packet, writes NaN in place of what it should have got and goes on: the next exchange
raises on all ranks. Backward therefore ends with an agreement of headers alone, and raises whatever happened in it.

With replicas each rank is in two groups. The ranks that replicate a shard know of a failure among them, and those that
share the model do not, and would wait for this rank in torch's own collectives. So a failure among replicas waits for
the agreement at the end, over both groups.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from qcomm.codec import CPU, DTYPE_NUMBERS
from qcomm.collectives import (
    BucketLayout,
    ErrorFeedback,
    GradScale,
    MeanTask,
    ReduceOptions,
    Telemetry,
    average,
    check_scale,
    end_well,
    gather_shards,
    is_excluded,
    reduce_scatter,
    refuse,
)
from qcomm.communicator import Communicator, Fault, Fields, LateFaultError, Phase, attempt
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.fsdp.units import Unit

__all__ = ["Exchanges"]


class Exchanges:
    """Runs the exchanges of one model, in the order in which torch asks for them.

    Args:
        gradients: options of gradients; None where torch's own collectives serve them.
        weights: options of weights; None where torch's own all-gather serves them.
        error_feedback: whether residuals of gradients are kept.
        exclude: patterns of the names of parameters that travel uncompressed.
        grad_scale: the factor of the gradients.

    Attributes:
        shards: communicator of the ranks that share the model; None before :meth:`connect`, and for one rank.
        replicas: communicator of the ranks that replicate this rank's shards, where gradients are averaged over them.
        feedback: residuals; None without error feedback.
        gradient_telemetry, weight_telemetry: count bytes, bits and seconds.
        steps: number of backward passes with exchanges of gradients.
        run: names the connections of the last exchange; "" before the first.
        origin: from where this rank goes on, which all ranks compare.
    """

    def __init__(
        self,
        gradients: ReduceOptions | None,
        weights: ReduceOptions | None,
        error_feedback: bool,
        exclude: Sequence[str],
        grad_scale: GradScale,
    ) -> None:
        self._gradients, self._weights, self._exclude = gradients, weights, tuple(exclude)
        self.grad_scale = grad_scale
        self.feedback = ErrorFeedback() if error_feedback and gradients is not None else None
        self.gradient_telemetry, self.weight_telemetry = Telemetry(), Telemetry()
        self._units: tuple[Unit, ...] = ()
        self.shards: Communicator | None = None
        self.replicas: Communicator | None = None
        self.steps = 0
        self.run = ""
        self.origin = "nothing"
        self._pass = -1  # number of backward's pass in the autograd engine
        self._scale = 1.0
        self._unread_scale: Fault | None = None
        self._failure: Exception | None = None  # of replicas, in this pass
        self._described = {"error_feedback": str(error_feedback), "exclude": str(list(exclude))}

    def connect(self, units: Sequence[Unit], shards: Communicator | None, replicas: Communicator | None) -> None:
        """Takes the units of the model and the connections of its groups."""
        self._units, self.shards, self.replicas = tuple(units), shards, replicas

    def scatter(self, unit: Unit, out: torch.Tensor, values: torch.Tensor, factor: float | None) -> None:
        """Writes the reduced gradients of this rank's shards to ``out``.

        Args:
            unit: that the gradients belong to.
            out: one row.
            values: W rows, which are only read.
            factor: of the sum; None for the mean.
        """
        communicator = self.shards
        if communicator is None:  # a rank that is alone
            out.copy_(values)
            out.mul_(1.0 if factor is None else factor)
            return
        self._begin()
        task, fault = self._prepare(self._scatter_task, unit, values, out.numel(), factor)

        def job() -> None:
            if task is None:
                refuse(fault, communicator)
            reduce_scatter(task, communicator, out, factor)
            self.gradient_telemetry.count_bucket(task.layout, values.element_size())

        with self._ending_backward():
            self._run(communicator, job, out)
        if self._pass < 0:  # not in backward, and so never at its end
            self._end()

    def gather(self, unit: Unit, buffer: torch.Tensor) -> None:
        """Replaces every rank's row of ``buffer`` by its weights, decoded; this rank's own row holds them."""
        communicator = self.shards
        if communicator is None:
            return
        task, fault = attempt(Phase.PREPARE, self._gather_task, unit, buffer)

        def job() -> None:
            if task is None:
                refuse(fault, communicator)
            gather_shards(task, communicator)
            self.weight_telemetry.count_bucket(task.layout, buffer.element_size())

        with self._ending_backward():
            self._run(communicator, job, buffer)

    def average(self, unit: Unit, values: torch.Tensor, sums: bool) -> None:
        """Replaces this rank's row of gradients by its mean over the replicas, or by the sum.

        A failure is raised at the end of backward.
        """
        communicator = self.replicas
        if communicator is None:
            return
        self._begin()
        if self._failure is not None:
            unit.forget_used()
            values.fill_(math.nan)
            return
        task, fault = self._prepare(self._average_task, unit, values, communicator.world_size)

        def job() -> None:
            if task is None:
                refuse(fault, communicator)
            average(task, communicator)
            self.gradient_telemetry.count_bucket(task.layout, values.element_size())

        try:
            self._run(communicator, job, values)
        except (CollectiveError, ConfigMismatchError) as error:
            self._failure = error
            values.fill_(math.nan)
        else:
            if sums:
                values.mul_(communicator.world_size)
        if self._pass < 0:
            self._end()

    def _begin(self) -> None:
        """Begins an exchange of gradients, and with the first one of a pass of backward a step."""
        number = torch._C._current_graph_task_id()
        if 0 <= number == self._pass:
            return
        self._pass = number
        self.steps += 1
        self.gradient_telemetry.add(steps=1)
        connected = self.shards if self.replicas is None else self.replicas
        if connected is not None:
            self.run = connected.run
        scale, self._unread_scale = attempt(Phase.PREPARE, self._read_scale)
        self._scale = 1.0 if scale is None else scale
        if number >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _read_scale(self) -> float:
        scale = self.grad_scale() if callable(self.grad_scale) else self.grad_scale
        return 1.0 if scale is None else check_scale(scale)

    def _prepare(self, make: Callable[..., MeanTask], *arguments: object) -> tuple[MeanTask | None, Fault | None]:
        """Returns the task of an exchange of gradients, or the fault that the other ranks are told in its place."""
        task, fault = attempt(Phase.PREPARE, make, *arguments)
        return (None, self._unread_scale) if self._unread_scale is not None else (task, fault)

    def _run(self, communicator: Communicator, job: Callable[[], None], out: torch.Tensor) -> None:
        """Runs a job to its end; raises its error, unless the others do not know of it yet."""
        ticket = communicator.submit(job)
        try:
            ticket.wait()
        except LateFaultError:
            out.fill_(math.nan)  # the next exchange raises it, on all ranks
        finally:
            if not ticket.is_completed():  # a signal's handler has raised
                communicator.interrupt()

    @contextmanager
    def _ending_backward(self) -> Iterator[None]:
        """Drops the gradients that backward has left where an error of the body ends it."""
        is_well = False
        try:
            yield
            is_well = True
        finally:
            if not is_well and torch._C._current_graph_task_id() >= 0:
                for unit in self._units:
                    unit.discard()

    def _end(self) -> None:
        """Ends a step: what any rank has still to tell is raised on all of them."""
        failure, self._failure = self._failure, None
        fields = Fields({"operation": "end of backward", "step": str(self.steps)})
        if self.replicas is not None and failure is None:
            try:
                self._agree(self.replicas, None, fields)
            except (CollectiveError, ConfigMismatchError) as error:
                failure = error
        if self.shards is not None:
            fault = None if failure is None else Fault(Phase.REDUCE, failure)
            try:
                self._agree(self.shards, fault, fields)
            except CollectiveError:
                if failure is None:
                    raise
        if failure is not None:
            raise failure

    def _agree(self, communicator: Communicator, fault: Fault | None, fields: Fields) -> None:
        ticket = communicator.submit(lambda: end_well(fault, communicator, fields))
        try:
            self.gradient_telemetry.add_traffic("overhead", ticket.result())
        finally:
            if not ticket.is_completed():
                communicator.interrupt()

    def _scatter_task(self, unit: Unit, values: torch.Tensor, row_elements: int, factor: float | None) -> MeanTask:
        layout = unit.rows(unit.take_used(row_elements), self._is_compressed)
        reduction = {"reduction": "mean" if factor is None else f"sum times {factor!r}"}
        return self._gradient_task("reduce-scatter of gradients", unit, values, layout, reduction)

    def _average_task(self, unit: Unit, values: torch.Tensor, world_size: int) -> MeanTask:
        options = self._options(self._gradients).for_world(world_size)
        layout = unit.own_row(unit.take_used(values.numel()), options, self._exclude, world_size)
        shard = {"shard": f"{unit.rank} of {unit.world_size}"}
        return self._gradient_task("mean over replicas", unit, values, layout, shard, options)

    def _gradient_task(
        self,
        operation: str,
        unit: Unit,
        values: torch.Tensor,
        layout: BucketLayout,
        described: dict[str, str],
        options: ReduceOptions | None = None,
    ) -> MeanTask:
        options = self._options(self._gradients) if options is None else options
        _check_dtype(unit, values, "gradients")
        fields = {**_fields(operation, unit, options, values), **self._described, **described}
        if self.grad_scale is not None:
            fields["grad_scale"] = repr(self._scale)
        fields |= {"loaded state": self.origin, "step": str(self.steps), "layout": layout.description}
        return MeanTask(
            values,
            layout,
            options,
            Fields(fields),
            self.gradient_telemetry,
            self.feedback,
            self._scale,
            unit.index,
            self.steps,
        )

    def _gather_task(self, unit: Unit, buffer: torch.Tensor) -> MeanTask:
        options = self._options(self._weights)
        _check_dtype(unit, buffer, "weights")
        layout = unit.rows(unit.parameters, self._is_compressed)
        fields = _fields("all-gather of weights", unit, options, buffer)
        fields = {**fields, "exclude": self._described["exclude"], "layout": layout.description}
        return MeanTask(buffer, layout, options, Fields(fields), self.weight_telemetry, index=unit.index)

    def _is_compressed(self, key: str, numel: int) -> bool:
        options = self._options(self._gradients or self._weights)
        return options.is_compressed(numel) and not is_excluded(key, self._exclude)

    @staticmethod
    def _options(options: ReduceOptions | None) -> ReduceOptions:
        if options is None:
            raise ValueError("torch's own collective serves this exchange")
        return options


def _fields(operation: str, unit: Unit, options: ReduceOptions, values: torch.Tensor) -> dict[str, str]:
    unit_name = f"{unit.index} ({unit.name})"
    return {"operation": operation, "unit": unit_name, **options.describe(), "dtype": str(values.dtype)}


def _check_dtype(unit: Unit, values: torch.Tensor, what: str) -> None:
    if values.dtype not in DTYPE_NUMBERS:
        raise TypeError(
            f"{what} of unit {unit.name!r} must be float32, float16, bfloat16 or float64, got {values.dtype}"
        )
    if values.device != CPU:
        raise ValueError(f"{what} of unit {unit.name!r} must be on the CPU, got device {values.device}")
