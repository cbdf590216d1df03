"""The mean of a model's weights over the ranks of one group, exchanged as differences or as weights.

Weights that were averaged before are the same on all ranks: the *anchor* a. Since then rank i moved by w_i - a, which
is small, symmetric about zero and as compressible as a gradient. With residuals e_i::

    u_i = w_i - a + e_i        sent: Q(u_i)        e_i <- u_i - Q(u_i)
    a  <- a + mean_i(Q(u_i))   w_i <- a

so that over time ``a`` moves by the exact mean of all movements, except for the residuals still kept. The first
exchange has no anchor, and weights travel uncompressed. Afterwards they are the same on all ranks.

Anchors have to be equal bit for bit on all ranks, but they are not compared. Each exchange makes a new *identity* of
the old one, and all ranks compare identities before an exchange. Two ranks with the same identity went through the same
exchanges.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from qcomm.codec import CPU, DTYPE_NUMBERS, check_memory, measure
from qcomm.collectives import (
    BucketLayout,
    ErrorFeedback,
    MeanTask,
    Rounds,
    Telemetry,
    TensorSpec,
    average,
    refuse,
)
from qcomm.communicator import (
    Communicator,
    Fields,
    Group,
    Phase,
    attempt,
    check_links,
    find_communicator,
    get_communicator,
    get_world_size,
    resolve_group,
)
from qcomm.errors import ConfigMismatchError
from qcomm.local_sgd.options import ExchangeOptions
from qcomm.local_sgd.parameters import Params, check_averageable, described, floating_buffers, named_tensors

__all__ = ["WeightExchange"]

NO_ANCHOR = "none yet"


@dataclass(frozen=True)
class _Entry:
    """A tensor that takes part. Its difference is taken to ``anchor``; its values are exchanged if that is None."""

    spec: TensorSpec
    tensor: torch.Tensor
    anchor: torch.Tensor | None
    is_buffer: bool


class WeightExchange:
    """Averages weights within one process group, and remembers their anchor and residuals.

    Args:
        group: of the ranks that average; None for the default group.
        options: equal on all ranks except ``num_threads``.
        telemetry: counts bytes, bits and seconds.
        index: number of this exchange in the telemetry.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, options: ExchangeOptions, telemetry: Telemetry, index: int = 0
    ) -> None:
        self._group = group
        self._options = options
        self._telemetry = telemetry
        self._index = index
        self._anchor: dict[str, torch.Tensor] = {}
        self._identity = NO_ANCHOR
        self._feedback = ErrorFeedback() if options.uses_feedback else None
        self._is_loaded = False  # and the names in the anchor have not met the parameters'

    def average(self, params: Params, step: int) -> None:
        """Replaces parameters, and the buffers of ``options.buffers_of``, by their means over the group, in place.

        Args:
            params: see :func:`qcomm.local_sgd.parameters.named_tensors`.
            step: has to be the same on all ranks.

        Raises:
            CollectiveError: on all ranks: one has parameters that cannot be averaged, or failed. No weight has changed.
                If the exchange had begun, the anchor is forgotten.
            ConfigMismatchError: options, step, parameters or anchors differ between ranks. No weight has changed. The
                anchor is forgotten.
        """
        options = self._options
        group = resolve_group(self._group)
        world_size = get_world_size(group)
        if world_size == 1 and options.reduce.strategy == "auto":
            return
        communicator = find_communicator(group) or get_communicator(group, options.reduce.links)
        prepared, fault = attempt(Phase.PREPARE, self._prepare, group, params, step, world_size)
        if prepared is None:
            communicator.submit(lambda: refuse(fault, communicator)).wait()
            return
        entries, task = prepared
        ticket = communicator.submit(lambda: self._run(task, communicator))
        with self._telemetry.timed("wait_seconds"):
            flat = ticket.result()
        with torch.no_grad():
            for entry in entries:
                _apply(entry, flat)
        self._count(entries, task)
        if options.exchange == "difference":
            self._move_anchor(entries, task.layout)

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
        """Returns the anchor, its identity, and this rank's residuals."""
        return {
            "identity": self._identity,
            "anchor": dict(self._anchor),  # anchors are replaced and never written to
            "world_size": self._feedback.world_size if self._feedback is not None else None,
            "error_feedback": self._feedback.state_dict() if self._feedback is not None else None,
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Resumes from the states of one rank or several, whose residuals are added.

        Raises:
            ValueError: damaged, or not of one run; nothing has changed then.
        """
        for state in states:
            _check_saved(state)
        identities = {state["identity"] for state in states}
        if len(identities) > 1:
            raise ValueError(f"state_dict must be of one run and step, got anchors {sorted(identities)}")
        sizes = {name: tensor.numel() for name, tensor in states[0]["anchor"].items()}
        residuals = [state["error_feedback"] for state in states if state["error_feedback"] is not None]
        if residuals:  # they are checked without error feedback, too
            (ErrorFeedback() if self._feedback is None else self._feedback).load_state_dict(residuals, sizes)
        elif self._feedback is not None:
            self._feedback.clear(states[0]["world_size"])
        self._identity, self._is_loaded = states[0]["identity"], True
        self._anchor = {name: tensor.detach().clone() for name, tensor in states[0]["anchor"].items()}

    def _entries(self, params: Params) -> list[_Entry]:
        """Returns the tensors to average, checked, with their places in the flat buffer."""
        parameters = named_tensors(params)
        module = self._options.buffers_of
        buffers = [] if module is None else [(f"buffer {name}", buffer) for name, buffer in floating_buffers(module)]
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
            spec = TensorSpec(name, offset, tensor.numel(), compressed)
            entries.append(_Entry(spec, tensor, None if is_buffer else anchor, is_buffer))
            offset += tensor.numel()
        strangers = set(self._anchor).difference(entry.spec.key for entry in entries) if self._is_loaded else set()
        if strangers:
            raise ValueError(
                f"the loaded state has last common weights of {min(strangers)!r}, which is not among the parameters: "
                "a state of another model? Call reset() on every rank to begin anew"
            )
        self._is_loaded = False
        return entries

    def _prepare(self, group: Group, params: Params, step: int, world_size: int) -> tuple[list[_Entry], MeanTask]:
        check_links(group, self._options.reduce.links)
        entries = self._entries(params)
        return entries, self._task(entries, step, world_size)

    def _task(self, entries: Sequence[_Entry], step: int, world_size: int) -> MeanTask:
        options, reduce = self._options, self._options.reduce.for_world(world_size)
        layout = BucketLayout([entry.spec for entry in entries], world_size)
        listing = described([(entry.spec.key, entry.tensor) for entry in entries])
        fields = {
            "operation": "model averaging",
            "exchange": options.exchange,
            **reduce.describe(),
            "error_feedback": str(options.uses_feedback),
            "step": str(step),
            "anchor": self._identity,
            "residuals of ranks": str(self._feedback.world_size if self._feedback is not None else None),
            "layout": layout.description,
            "parameters": listing,
        }
        return MeanTask(
            _flatten(entries), layout, reduce, Fields(fields), self._telemetry, self._feedback, index=self._index
        )

    def _run(self, task: MeanTask, communicator: Communicator) -> torch.Tensor:
        self._agree(task, communicator)
        has_arrived = False
        try:
            average(task, communicator)
            has_arrived = True
        finally:
            if not has_arrived:
                # Residuals were spent on values that did not arrive. A rank that fails alone, after its last message,
                # differs from the others at the next averaging.
                self.reset()
        return task.buffer

    def _agree(self, task: MeanTask, communicator: Communicator) -> None:
        """Raises one rank's error on every rank, before residuals change, which some strategies do early."""
        try:
            Rounds(task, communicator).agree()
        except ConfigMismatchError:
            self.reset()  # on all ranks: if anchors differ, no rank can tell which is right
            raise

    def _move_anchor(self, entries: Sequence[_Entry], layout: BucketLayout) -> None:
        """Replaces the anchor by the present weights, which are the same on all ranks."""
        digest = hashlib.sha256(f"{self._identity} {layout.description}".encode())
        for entry in entries:
            if entry.is_buffer:
                continue
            copy = entry.tensor.detach().clone()
            self._anchor[entry.spec.key] = copy
            if self._identity == NO_ANCHOR:
                digest.update(copy.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._identity = digest.hexdigest()[:16]

    def _count(self, entries: Sequence[_Entry], task: MeanTask) -> None:
        self._telemetry.add(steps=1)
        # The bytes of the tensors, and not of the buffer, which holds 16-bit values in 32 bits.
        self._telemetry.count_bucket(task.layout, 0)
        self._telemetry.add(bytes_uncompressed=sum(entry.tensor.nbytes for entry in entries))


def _flatten(entries: Sequence[_Entry]) -> torch.Tensor:
    """Returns values or differences in row-major order, whatever the tensors' layout; float64 if one of them is.

    Raises:
        FloatingPointError: naming the tensor with a value that is not finite. Buffers may hold infinities, as masks do.
    """
    wide = any(entry.tensor.dtype == torch.float64 for entry in entries)
    flat = torch.empty(
        sum(entry.spec.numel for entry in entries), dtype=torch.float64 if wide else torch.float32, device=CPU
    )
    with torch.no_grad():
        for entry in entries:
            part = _part(entry, flat)
            part.copy_(entry.tensor)
            if entry.anchor is not None:
                part.sub_(entry.anchor)
    if not measure(flat).finite:
        for entry in entries:
            _check_finite(entry, _part(entry, flat))
    return flat


def _check_finite(entry: _Entry, part: torch.Tensor) -> None:
    bad = part.isnan() if entry.is_buffer else ~part.isfinite()
    if count := int(bad.sum()):
        raise FloatingPointError(
            f"{entry.spec.key!r} has {count} of {part.numel()} values that are not finite, or too far from those of "
            "the last averaging"
        )


def _part(entry: _Entry, flat: torch.Tensor) -> torch.Tensor:
    spec = entry.spec
    return flat[spec.offset : spec.offset + spec.numel].view(entry.tensor.shape)


def _apply(entry: _Entry, flat: torch.Tensor) -> None:
    """Writes a mean into its tensor; every rank rounds the same bits in the same way."""
    mean = _part(entry, flat)
    if entry.anchor is not None:
        mean.add_(entry.anchor)
    entry.tensor.copy_(mean)


def _check_saved(state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or not {"identity", "anchor", "world_size", "error_feedback"} <= set(state):
        raise ValueError("state_dict is damaged: an exchange needs identity, anchor, world_size and error_feedback")
    anchor, world_size = state["anchor"], state["world_size"]
    if not isinstance(anchor, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in anchor.values()):
        raise ValueError("state_dict is damaged: anchor must hold the tensors of the last common weights by name")
    for name, tensor in anchor.items():
        check_memory(f"the anchor of {name!r}", tensor)
        if not isinstance(name, str) or tensor.layout != torch.strided or tensor.dtype not in DTYPE_NUMBERS:
            raise ValueError(
                "state_dict is damaged: anchor must hold dense floating-point tensors by the names of parameters, got "
                f"{tensor.dtype} for {name!r}"
            )
        if bad := int((~tensor.isfinite()).sum()):
            raise ValueError(
                f"state_dict is damaged: the anchor of {name!r} has {bad} of {tensor.numel()} values that are not "
                "finite"
            )
    if not isinstance(state["identity"], str) or (state["identity"] == NO_ANCHOR) != (not anchor):
        raise ValueError(
            f"state_dict is damaged: the anchor's identity {state['identity']!r} does not fit an anchor of "
            f"{len(anchor)} tensors"
        )
    positive = isinstance(world_size, int) and not isinstance(world_size, bool) and world_size > 0
    if world_size is not None and not positive:
        raise ValueError(f"state_dict is damaged: world_size must be a positive number of ranks, got {world_size!r}")
