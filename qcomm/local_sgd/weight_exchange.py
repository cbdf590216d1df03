"""The mean of a model's weights over the ranks of one group, exchanged as differences or as weights.

Weights that were averaged before are the same on all ranks: the *anchor* a. Since then rank i moved by w_i - a, which
is small, symmetric about zero and as compressible as a gradient. With residuals e_i::

    u_i = w_i - a + e_i        sent: Q(u_i)        e_i <- u_i - Q(u_i)        m = mean_i(Q(u_i))

so that over time the means add up to the exact mean of all movements, except for the residuals still kept. An averager
sets a and w_i to a + m; DiLoCo hands m to its outer optimizer, which moves a. Without an anchor, weights travel
uncompressed, and their mean is the anchor.

Anchors have to be equal bit for bit on all ranks. Each exchange makes a new *identity* of the old one and of the new
anchor, and all ranks compare identities before an exchange. Two ranks with the same identity went through the same
exchanges and have the same anchor.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from qcomm.collectives import (
    BucketLayout,
    ErrorFeedback,
    MeanTask,
    Rounds,
    Telemetry,
    TensorSpec,
    average,
    fingerprint,
    refuse,
)
from qcomm.communicator import (
    Communicator,
    Fields,
    Group,
    Phase,
    Ticket,
    attempt,
    check_connections,
    completed,
    deal,
    failed,
    get_world_size,
    resolve_group,
)
from qcomm.errors import ConfigMismatchError
from qcomm.local_sgd.entries import Entry, flatten, part_of
from qcomm.local_sgd.options import ExchangeOptions
from qcomm.local_sgd.parameters import BUFFER, Params, check_averageable, described, floating_buffers, named_tensors
from qcomm.local_sgd.saved_exchanges import NO_ANCHOR, check_exchange

__all__ = ["Started", "WeightExchange"]


@dataclass(frozen=True)
class Started:
    """An exchange under way; ``ticket`` has its flat buffer."""

    entries: Sequence[Entry]
    task: MeanTask | None
    ticket: Ticket[torch.Tensor]


class WeightExchange:
    """Averages weights within one process group, and remembers their anchor and residuals.

    Args:
        group: of the ranks that average; None for the default group.
        options: equal on all ranks except ``num_threads``.
        telemetry: counts bytes, bits and seconds.
        index: number of this exchange in the telemetry.
        merges_small: with error feedback, quantize parameters below ``min_elements`` together, as the hook does.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        options: ExchangeOptions,
        telemetry: Telemetry,
        index: int = 0,
        merges_small: bool = False,
    ) -> None:
        self._group = group
        self._options = options
        self._telemetry = telemetry
        self._index, self._merges_small = index, merges_small
        self._anchor: dict[str, torch.Tensor] = {}
        self._identity = NO_ANCHOR
        self._feedback = ErrorFeedback() if options.uses_feedback else None
        self._is_loaded = False  # and the names in the anchor have not met the parameters'

    @property
    def is_alone(self) -> bool:
        """Returns whether this rank is the whole group, and its weights are their own mean."""
        return self._options.reduce.strategy == "auto" and get_world_size(resolve_group(self._group)) == 1

    @property
    def anchor(self) -> Mapping[str, torch.Tensor]:
        """Returns the common weights by name; none before the first exchange, or after ranks disagreed."""
        return self._anchor

    def average(self, params: Params, step: int) -> None:
        """Replaces parameters, and the buffers of ``options.buffers_of``, by their means over the group, in place.

        Args:
            params: see :func:`qcomm.local_sgd.parameters.named_tensors`.
            step: has to be the same on all ranks.

        Raises:
            CollectiveError, ConfigMismatchError: see :meth:`finish`. No weight has changed.
        """
        if self.is_alone:
            return
        started = self.start(params, step, {"operation": "model averaging"})
        flat = self.finish(started)
        common = {}
        with torch.no_grad():
            for entry in started.entries:
                mean = part_of(entry, flat)
                if entry.anchor is not None:
                    mean.add_(entry.anchor)
                # Every rank rounds the same bits in the same way.
                value = mean.to(entry.tensor.dtype, copy=True)
                entry.tensor.copy_(value)
                if not entry.is_buffer:
                    common[entry.spec.key] = value
        if self._options.exchange == "difference":
            self.move({**self._anchor, **common})

    def start(self, params: Params, step: int, fields: Mapping[str, str]) -> Started:
        """Begins the exchange of parameters, and of the buffers of ``options.buffers_of``, on a background thread.

        The values are copied before it returns. An error of this rank's is kept for :meth:`finish`, on all ranks.

        Args:
            params: see :func:`qcomm.local_sgd.parameters.named_tensors`.
            step: has to be the same on all ranks.
            fields: further values that have to be the same on all ranks.

        Raises:
            CollectiveError, ConfigMismatchError: the ranks of the group cannot be connected.
        """
        group = resolve_group(self._group)
        communicator = None if self.is_alone else self._deal(group)
        prepared, fault = attempt(Phase.PREPARE, self._prepare, group, params, step, fields)
        if prepared is not None:
            entries, task = prepared
            if communicator is None:
                return Started(entries, task, completed(task.buffer))
            is_timed = task.options.strategy == "auto"
            return Started(entries, task, communicator.submit(lambda: self._run(task, communicator), alone=is_timed))
        if communicator is None:
            return Started([], None, failed(RuntimeError("nothing was prepared") if fault is None else fault.error))
        return Started([], None, communicator.submit(lambda: refuse(fault, communicator), alone=False))

    def finish(self, started: Started) -> torch.Tensor:
        """Waits for an exchange; returns the flat buffer of its entries with their means.

        Raises:
            CollectiveError: on all ranks: one has parameters that cannot be averaged, or failed. The anchor stays. If
                the exchange had begun, the residuals are lost.
            ConfigMismatchError: options, step, parameters or anchors differ between ranks. The anchor is forgotten.
        """
        with self._telemetry.timed("wait_seconds"):
            flat = started.ticket.result()
        self._telemetry.add(steps=1)
        # The bytes of the tensors, and not of the buffer, which holds 16-bit values in 32 bits.
        if started.task is not None:
            self._telemetry.count_bucket(started.task.layout, 0)
        self._telemetry.add(bytes_uncompressed=sum(entry.tensor.nbytes for entry in started.entries))
        return flat

    def start_comparing(self, params: Params, step: int, fields: Mapping[str, str]) -> Ticket[None]:
        """Begins to compare options, parameters and anchors of all ranks; exchanges no values.

        Arguments are those of :meth:`start`.

        Returns:
            A ticket, which raises errors as :meth:`finish` does.
        """
        if self.is_alone:
            return completed(None)
        group = resolve_group(self._group)
        communicator = self._deal(group)
        prepared, fault = attempt(Phase.PREPARE, self._prepare, group, params, step, fields)
        if prepared is None:
            return communicator.submit(lambda: refuse(fault, communicator), alone=False)
        return communicator.submit(lambda: self._agree(prepared[1], communicator), alone=False)

    def begin(self, anchor: Mapping[str, torch.Tensor]) -> None:
        """Adopts weights that are the same on all ranks, as the next exchange compares, without one before it."""
        self._anchor, self._identity = {}, NO_ANCHOR
        self.move(anchor)

    def move(self, anchor: Mapping[str, torch.Tensor]) -> None:
        """Adopts the anchor of an exchange that has just ended: tensors in host memory, which may be the known ones."""
        digest = hashlib.sha256(f"{self._identity} {fingerprint(list(anchor.values()))}".encode())
        if self._identity == NO_ANCHOR:
            for name, tensor in anchor.items():
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
        self._anchor, self._identity = dict(anchor), digest.hexdigest()[:16]

    def share(self, anchor: Mapping[str, torch.Tensor]) -> None:
        """Takes equal tensors in place of the known ones, so that the caller's are the anchor."""
        self._anchor = {name: anchor[name] for name in self._anchor}

    def adopt(self, other: "WeightExchange") -> None:
        """Adopts the anchor of an exchange that has just ended on a larger group, which includes this one."""
        if other._anchor:  # without one, as in a world of one rank, there are no common weights
            self._anchor, self._identity = dict(other._anchor), other._identity

    def reset(self) -> None:
        """Forgets anchor and residuals: the next averaging exchanges the weights uncompressed."""
        self._is_loaded = False
        self._anchor, self._identity = {}, NO_ANCHOR
        if self._feedback is not None:
            self._feedback.clear()

    def residual_norm(self) -> float:
        """Returns the Euclidean norm of this rank's residuals."""
        return self._feedback.norm() if self._feedback is not None else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of the anchor and of this rank's residuals, and the anchor's identity."""
        return {
            "identity": self._identity,
            "anchor": {name: tensor.detach().clone() for name, tensor in self._anchor.items()},
            "world_size": self._feedback.world_size if self._feedback is not None else None,
            "error_feedback": self._feedback.state_dict() if self._feedback is not None else None,
        }

    def resumed(self, states: Sequence[Mapping[str, Any]]) -> "WeightExchange":
        """Returns an exchange like this one that goes on from the states of one rank or several.

        Their residuals are added.

        Raises:
            ValueError: damaged, or not of one run.
        """
        for state in states:
            check_exchange(state)
        identities = {state["identity"] for state in states}
        if len(identities) > 1:
            raise ValueError(f"state_dict must be of one run and step, got anchors {sorted(identities)}")
        found = WeightExchange(self._group, self._options, self._telemetry, self._index, self._merges_small)
        sizes = {name: tensor.numel() for name, tensor in states[0]["anchor"].items()}
        residuals = [state["error_feedback"] for state in states if state["error_feedback"] is not None]
        if residuals:  # they are checked without error feedback, too
            (ErrorFeedback() if found._feedback is None else found._feedback).load_state_dict(residuals, sizes)
        elif found._feedback is not None:
            found._feedback.clear(states[0]["world_size"])
        found._identity, found._is_loaded = states[0]["identity"], True
        found._anchor = {name: tensor.detach().clone() for name, tensor in states[0]["anchor"].items()}
        return found

    def _deal(self, group: Group) -> Communicator:
        return deal(group, self._options.reduce.connection_options)

    def _entries(self, params: Params) -> list[Entry]:
        """Returns the tensors to average, checked, with their places in the flat buffer."""
        parameters = named_tensors(params)
        module = self._options.buffers_of
        buffers = [] if module is None else [(f"{BUFFER}{name}", buffer) for name, buffer in floating_buffers(module)]
        entries, offset = [], 0
        for number, (name, tensor) in enumerate([*parameters, *buffers]):
            check_averageable(name, tensor)
            is_buffer, anchor = number >= len(parameters), self._anchor.get(name)
            if anchor is not None and anchor.shape != tensor.shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensor.shape)} and had {tuple(anchor.shape)} when it was averaged "
                    "last: another model? Call reset() on every rank to begin anew"
                )
            comparable = self._options.exchange == "weights" or anchor is not None
            compressed = comparable and not is_buffer and self._options.reduce.is_compressed(tensor.numel())
            may_round = self._merges_small and comparable and not is_buffer
            spec = TensorSpec(name, offset, tensor.numel(), compressed, may_round)
            entries.append(Entry(spec, tensor, None if is_buffer else anchor, is_buffer))
            offset += tensor.numel()
        strangers = set(self._anchor).difference(entry.spec.key for entry in entries) if self._is_loaded else set()
        if strangers:
            raise ValueError(
                f"the loaded state has last common weights of {min(strangers)!r}, which is not among the parameters: "
                "a state of another model? Call reset() on every rank to begin anew"
            )
        self._is_loaded = False
        return entries

    def _prepare(
        self, group: Group, params: Params, step: int, fields: Mapping[str, str]
    ) -> tuple[list[Entry], MeanTask]:
        check_connections(group, self._options.reduce.connection_options)
        entries = self._entries(params)
        return entries, self._task(entries, step, get_world_size(group), fields)

    def _task(self, entries: Sequence[Entry], step: int, world_size: int, fields: Mapping[str, str]) -> MeanTask:
        options, reduce = self._options, self._options.reduce.for_world(world_size)
        specs = [entry.spec for entry in entries]
        merged = reduce.merge_small(specs) if self._merges_small and options.uses_feedback else specs
        layout = BucketLayout(merged, world_size, shares=reduce.owner_shares)
        compared = {
            **fields,
            "exchange": options.exchange,
            **reduce.describe(),
            "error_feedback": str(options.uses_feedback),
            "step": str(step),
            "anchor": self._identity,
            "residuals of ranks": str(self._feedback.world_size if self._feedback is not None else None),
            "layout": layout.description,
            "parameters": described([(entry.spec.key, entry.tensor) for entry in entries]),
        }
        return MeanTask(
            flatten(entries), layout, reduce, Fields(compared), self._telemetry, self._feedback, index=self._index
        )

    def _run(self, task: MeanTask, communicator: Communicator) -> torch.Tensor:
        self._agree(task, communicator)
        has_arrived = False
        try:
            average(task, communicator)
            has_arrived = True
        finally:
            if not has_arrived and self._feedback is not None:
                # Residuals were spent on values that did not arrive. The anchor moves with a mean alone: a rank that
                # fails alone, after its last message, has another one than the others from now on.
                self._feedback.clear(self._feedback.world_size)
        return task.buffer

    def _agree(self, task: MeanTask, communicator: Communicator) -> None:
        """Raises one rank's error on every rank, before residuals change, which some strategies do early."""
        try:
            Rounds(task, communicator).agree()
        except ConfigMismatchError:
            self.reset()  # on all ranks: if anchors differ, no rank can tell which is right
            raise
