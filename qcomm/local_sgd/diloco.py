"""DiLoCo: each rank trains by itself, and every few steps an outer optimizer moves the weights that all have in common.

With the common weights a, the *anchor*, and those of rank i, w_i, an exchange of a fragment at step t, and its merge
``delay`` steps later, are::

    m = mean_i(w_i - a)                    at step t, compressed, with error feedback in both directions
    a <- outer optimizer of a, gradient -m                      at step t + delay, the same bits on all ranks
    w_i <- alpha w_i + (1 - alpha) a                            the weights of that step

A. Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv:2311.08105; fragments,
delay and alpha: "Streaming DiLoCo with overlapping communication", arXiv:2501.18512.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from qcomm.collectives import RankState, Telemetry
from qcomm.communicator import resolve_group
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.local_sgd.fragments import cut_model, due_fragment, trained
from qcomm.local_sgd.options import ExchangeOptions, checked_int, is_member
from qcomm.local_sgd.outer import MakeOuter, Outer, nesterov
from qcomm.local_sgd.parameters import BUFFER, floating_buffers
from qcomm.local_sgd.pending import Pending, mix
from qcomm.local_sgd.saved_exchanges import check_states
from qcomm.local_sgd.weight_exchange import WeightExchange

__all__ = ["DiLoCo"]

FORMAT = 1
MIXING = 0.5  # the default of alpha with a delay, as in Streaming DiLoCo


class DiLoCo:
    """Trains with few exchanges: the ranks' movements of ``period`` steps are averaged and given to an outer optimizer.

    Call :meth:`step` after each step of the inner optimizer, on every rank. All ranks begin with the same weights,
    which the first call compares, and make this object when those are loaded. Parameters that need no gradient then
    take no part. The anchor, the outer optimizer's state and residuals take host memory: 4 bytes each a parameter.

    Args:
        model: to train; also one in DistributedDataParallel over a group of its own.
        outer: returns the outer optimizer of the parameters that it is given: copies of the model's in host memory, in
            their order. A function, because the anchor is made here. By default SGD with a rate of 0.7 and a Nesterov
            momentum of 0.9. The attribute ``outer`` is the optimizer, for a learning rate scheduler.
        period: steps from one exchange of a parameter to the next.
        fragments: number of parts of the model, each with exchanges of its own, spread evenly over the period.
        delay: number of steps that train on while an exchange is under way; fewer than ``period // fragments``.
        alpha: share of the rank's own weights when an exchange is merged, from 0 to less than 1. By default 0, and 0.5
            with a delay, where 0 would drop the steps that were taken meanwhile.
        process_group: by default the default group. On a rank that is not in it nothing happens.
        **options: of :class:`qcomm.CompressedModelAverager`, except ``exchange``. With error feedback, parameters below
            ``min_elements`` are quantized together, at ``small_step``. Buffers of ``buffers_of`` are set to their mean
            with the last fragment.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> import tempfile
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> diloco = DiLoCo(model, lambda parameters: torch.optim.SGD(parameters, lr=0.7), period=4)
        >>> for _ in range(8):
        ...     model(torch.randn(8, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     diloco.step()
        >>> diloco.stats()["steps"]
        2
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        model: torch.nn.Module,
        outer: MakeOuter | None = None,
        *,
        period: int,
        fragments: int = 1,
        delay: int = 0,
        alpha: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._model = model
        self._fragments = cut_model(model, period, fragments)
        self._period, self._delay = period, _checked_delay(delay, period // fragments)
        self._alpha = _checked_alpha(alpha, delay)
        self._is_member = is_member(process_group)
        if self._is_member:
            resolve_group(process_group)
        if "exchange" in options:
            raise TypeError("exchange must not be given: DiLoCo exchanges differences to the anchor")
        of_all = ExchangeOptions.of(**options)
        self._buffers_of = of_all.buffers_of
        self._outer = Outer(trained(model), nesterov if outer is None else outer)
        self._telemetry = Telemetry()
        self._exchanges = []
        for number, names in enumerate(self._fragments):
            its_options = of_all if number == len(self._fragments) - 1 else replace(of_all, buffers_of=None)
            exchange = WeightExchange(process_group, its_options, self._telemetry, number, merges_small=True)
            exchange.begin(self._anchor_of(names))
            self._exchanges.append(exchange)
        self._step, self._began = 0, [0] * len(self._fragments)  # the step at which each fragment's last exchange began
        self._is_compared = False
        self._pending: Pending | None = None

    @property
    def outer(self) -> torch.optim.Optimizer:
        """Returns the outer optimizer."""
        return self._outer.optimizer

    @property
    def steps(self) -> int:
        """Returns the number of steps of this rank."""
        return self._step

    def step(self) -> None:
        """Counts a step of the inner optimizer, and begins or merges an exchange if that is due.

        A collective at the first step, which compares options and weights of all ranks, and at every step at which an
        exchange is due or merged. Call it also where GradScaler skipped the inner optimizer's step.

        Raises:
            CollectiveError: on all ranks, at the same step: weights hold NaN or infinity on one, cannot be averaged, or
                an exchange failed. The message names the rank and the parameter. Neither the anchor nor a weight has
                changed, and training may go on.
            ConfigMismatchError: on all ranks, at the same step: options, outer optimizers, parameters, steps or anchors
                differ; at the first step, weights. Nothing has changed. If ranks go on, the next exchange of the
                fragment has no anchor: it averages weights, uncompressed.
        """
        self._step += 1
        if not self._is_member:
            return
        if not self._is_compared:
            self._is_compared = True
            self._compare()
        fragment = due_fragment(self._step, self._period, len(self._fragments))
        if self._pending is not None and (self._pending.due <= self._step or fragment is not None):
            self._merge_pending()
        if fragment is not None:
            self._pending = self._exchange(fragment)
            if self._delay == 0:
                self._merge_pending()

    def finish(self) -> None:
        """Ends training: exchanges what has moved since the last exchanges, and gives all ranks the anchor's weights.

        A collective. An exchange under way is merged first. The outer optimizer takes a step on each fragment that has
        moved. Their exchanges are under way at once.

        Raises:
            CollectiveError, ConfigMismatchError: see :meth:`step`; the first of them, when the others have been merged.
        """
        if not self._is_member:
            return
        self._merge_pending()
        moved = [fragment for fragment, began in enumerate(self._began) if began < self._step]
        begun = [self._exchange(fragment) for fragment in moved]
        errors: list[CollectiveError | ConfigMismatchError] = []
        try:
            for pending in begun:
                try:
                    self._merge(pending, 0.0)
                except (CollectiveError, ConfigMismatchError) as error:
                    errors.append(error)
        finally:
            for pending in begun:
                pending.join()
        if errors:
            raise errors[0]
        anchor = self._outer.anchor
        with torch.no_grad():
            for name, parameter in trained(self._model):
                mix(parameter, anchor[name], 0.0)

    def anchor(self) -> dict[str, torch.Tensor]:
        """Returns copies of the common weights by name, on the CPU, in the parameters' dtypes: the model to evaluate.

        They are those of the last exchange that was merged.
        """
        anchor = self._outer.anchor
        return {name: anchor[name].to(tensor.dtype, copy=True) for name, tensor in trained(self._model)}

    def reset(self) -> None:
        """Forgets residuals, the outer optimizer's state, and that weights were equal; all ranks call it, or none.

        The next exchange of each fragment averages the weights themselves, uncompressed, and their mean is the anchor.
        An exchange under way is dropped.
        """
        self._drop()
        for exchange in self._exchanges:
            exchange.reset()

    def stats(self) -> dict[str, Any]:
        """Returns the counters of this rank, named as in ``CompressionState.stats``; ``steps`` are exchanges.

        It waits for an exchange under way.
        """
        self._join()
        norms = [exchange.residual_norm() for exchange in self._exchanges]
        return {**self._telemetry.stats(), "residual_norm": sum(norm * norm for norm in norms) ** 0.5}

    def reset_stats(self) -> None:
        """Sets the counters to zero."""
        self._telemetry.reset()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to resume this rank from: step, anchor, outer optimizer, residuals. Each rank saves it.

        An exchange under way is waited for, and its mean is part of the state. It is merged at its time, here and by
        whoever resumes, so that saving a state does not change training.

        Raises:
            CollectiveError, ConfigMismatchError: the exchange under way failed, see :meth:`step`, which raises it again
                when it is due.
        """
        pending = self._pending
        return RankState(
            {
                "format": FORMAT,
                "step": self._step,
                "pending": None if pending is None else pending.state_dict(self._exchanges[pending.fragment]),
                "exchanges": [exchange.state_dict() for exchange in self._exchanges],
                "outer": self._outer.state_dict(),
                "began": list(self._began),
            }
        )

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Resumes from a result of ``state_dict`` on this rank; the number of ranks may have changed.

        The caller loads the model's weights. An exchange under way is dropped.

        Args:
            state_dict: as of :meth:`qcomm.CompressedModelAverager.load_state_dict`.

        Raises:
            ValueError: of another format or model, damaged, or not of one run; nothing has changed then.
        """
        saved = check_states(state_dict, FORMAT, "DiLoCo", len(self._exchanges))
        by_fragment = zip(*(part["exchanges"] for part in saved), strict=True)
        resumed = [exchange.resumed(parts) for exchange, parts in zip(self._exchanges, by_fragment, strict=True)]
        for exchange, names in zip(resumed, self._fragments, strict=True):
            if exchange.anchor:  # after a reset there is none
                self._check_names(exchange.anchor, names)
        state = saved[0]
        self._outer.check(state.get("outer"))
        pending, began = self._loaded(state.get("pending"), state["step"]), state.get("began")
        if not isinstance(began, list) or len(began) != len(resumed) or not all(type(found) is int for found in began):
            raise ValueError(f"state_dict is damaged: began must hold {len(resumed)} steps, got {began!r}")
        self._drop()
        for exchange in resumed:
            self._outer.replace(exchange.anchor)
            exchange.share(self._outer.anchor)
        self._outer.load_state_dict(state["outer"])
        self._exchanges, self._step, self._began, self._pending = resumed, state["step"], list(began), pending
        self._is_compared = False

    def _loaded(self, saved: object, step: int) -> Pending | None:
        """Returns the pending exchange of a state that was saved at a step, checked."""
        if saved is None:
            return None
        pending = Pending.of(saved, len(self._fragments), range(step + 1, step + self._period + 1))
        means = {} if pending.arrived is None else pending.arrived.means
        parameters = {name: mean for name, mean in means.items() if not name.startswith(BUFFER)}
        self._check_names(parameters, self._fragments[pending.fragment])
        return pending

    def _compare(self) -> None:
        """Compares options and weights of all ranks, and raises the first error.

        The fragments are compared at once but for the first one, which tells whether ranks have equally many.
        """
        self._exchanges[0].start_comparing(self._tensors(0), self._step, self._fields()).wait()
        tickets = [
            exchange.start_comparing(self._tensors(number), self._step, self._fields())
            for number, exchange in enumerate(self._exchanges[1:], start=1)
        ]
        for ticket in tickets:
            ticket.join()
        for ticket in tickets:
            ticket.wait()

    def _exchange(self, fragment: int) -> Pending:
        """Begins the exchange of a fragment."""
        started = self._exchanges[fragment].start(self._tensors(fragment), self._step, self._fields())
        self._began[fragment] = self._step
        return Pending(fragment, self._step + self._delay, started)

    def _merge_pending(self) -> None:
        """Merges the exchange under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._merge(pending, self._alpha)

    def _merge(self, pending: Pending, alpha: float) -> None:
        """Takes the outer step of an exchange, and mixes the anchor into the weights."""
        exchange, names = self._exchanges[pending.fragment], self._fragments[pending.fragment]
        arrived = pending.wait(exchange)
        means = {name: arrived.means[name] for name in names}
        has_moved = False
        try:
            (self._outer.move if arrived.is_movement else self._outer.replace)(means)
            exchange.move(self._anchor_of(names))
            has_moved = True
        finally:
            if not has_moved:  # perhaps in part, and perhaps on this rank alone
                exchange.reset()
        anchor = self._outer.anchor
        with torch.no_grad():
            for name, parameter in trained(self._model):
                if name in means:
                    mix(parameter, anchor[name], alpha)
            for name, buffer in self._buffers():
                if name in arrived.means:
                    buffer.copy_(arrived.means[name].to(buffer.dtype))

    def _join(self) -> None:
        """Waits until no other thread touches residuals and counters."""
        if self._pending is not None:
            self._pending.join()

    def _drop(self) -> None:
        self._join()
        self._pending = None

    def _tensors(self, fragment: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the parameters of a fragment; raises where the exchange tells all ranks of it."""
        found = dict(trained(self._model))
        if changed := found.keys() ^ self._outer.anchor.keys():
            raise ValueError(
                f"the parameters that need a gradient have changed since DiLoCo was made, for instance "
                f"{min(changed)!r}; make a new DiLoCo on every rank"
            )
        for name in self._fragments[fragment]:
            yield name, found[name]

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        module = self._buffers_of
        return [] if module is None else [(f"{BUFFER}{name}", buffer) for name, buffer in floating_buffers(module)]

    def _fields(self) -> dict[str, str]:
        return {
            "operation": "DiLoCo",
            "period": str(self._period),
            "fragments": str(len(self._fragments)),
            "delay": str(self._delay),
            "alpha": str(self._alpha),
            "outer": self._outer.describe(),
        }

    def _anchor_of(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        anchor = self._outer.anchor
        return {name: anchor[name] for name in names}

    def _check_names(self, found: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        """Raises ValueError unless saved tensors are those of a fragment's parameters."""
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self._anchor_of(names).items()}
        if different := [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]:
            name = different[0]
            raise ValueError(
                f"state_dict is of another model or of other fragments: {name!r} has shape {shapes.get(name)} there "
                f"and {wanted.get(name)} here"
            )


def _checked_delay(delay: object, limit: int) -> int:
    steps = checked_int("delay", delay, 0)
    if steps >= limit:
        raise ValueError(
            f"delay must be less than period // fragments = {limit}, so that an exchange is merged before the next one "
            f"begins, got {delay}"
        )
    return steps


def _checked_alpha(alpha: object, delay: int) -> float:
    if alpha is None:
        return MIXING if delay else 0.0
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha must be a real number or None, got {type(alpha).__name__}")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and less than 1, got {alpha}")
    return float(alpha)
