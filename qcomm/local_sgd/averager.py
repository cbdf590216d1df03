"""Model averagers for local SGD: every few steps the ranks' weights are replaced by their mean, exchanged compressed.

They replace ``PeriodicModelAverager`` and ``HierarchicalModelAverager`` of
``torch.distributed.algorithms.model_averaging``, by themselves or within ``PostLocalSGDOptimizer``. Unlike those, they
write into the parameters' own memory. They average every parameter, with or without a gradient on this rank.

S. U. Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019; T. Lin et al., "Don't Use Large
Mini-Batches, Use Local SGD", ICLR 2020; in levels: J. Wang et al., "Demystifying Why Local Aggregation Helps", AAAI
2022.
"""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager

from qcomm.collectives import RankState, Telemetry
from qcomm.communicator import resolve_group
from qcomm.local_sgd.options import ExchangeOptions, checked_int, is_member
from qcomm.local_sgd.parameters import Params
from qcomm.local_sgd.saved_exchanges import check_states
from qcomm.local_sgd.weight_exchange import WeightExchange

__all__ = ["CompressedModelAverager", "HierarchicalCompressedModelAverager"]

FORMAT = 2


class _CompressedAverager(ModelAverager):
    """The base of both averagers: counts steps, averages when it is due, keeps the state."""

    def __init__(self, warmup_steps: int, process_group: dist.ProcessGroup | None, options: Mapping[str, Any]) -> None:
        self._options = ExchangeOptions.of(**options)
        if is_member(process_group):
            resolve_group(process_group)
        super().__init__(process_group)
        self.warmup_steps = checked_int("warmup_steps", warmup_steps, 0)
        self._telemetry = Telemetry()
        self._exchanges: list[WeightExchange] = []

    def average_parameters(self, params: Params) -> None:
        """Counts a step, and averages the parameters in place if an averaging is due.

        A collective at every step at which an averaging is due. Each rank calls this once per step of its training
        loop, also where GradScaler skipped the optimizer's step. Parameters without a gradient take part too.

        Args:
            params: ``model.parameters()``, ``model.named_parameters()`` or ``optimizer.param_groups``: the same on all
                ranks and at all steps. Named ones make better error messages.

        Raises:
            CollectiveError: on all ranks that average: a parameter holds NaN or infinity, cannot be averaged, or an
                exchange failed. The message names the rank and the parameter. The step is counted, no weight has
                changed.
            ConfigMismatchError: on all ranks that average: options, parameters, steps or anchors differ. The message
                names them.
        """
        try:
            due = self._due()
            if due is not None and is_member(self.process_group):
                self._exchanges[due].average(params, self.step)
                # Weights common to all of these ranks are common to the groups inside this one.
                for smaller in self._exchanges[:due]:
                    smaller.adopt(self._exchanges[due])
        finally:
            self.step += 1

    @abstractmethod
    def _due(self) -> int | None:
        """Returns the number of the exchange to run at this step, or None."""

    def reset(self) -> None:
        """Forgets anchors and residuals, so that the next averaging is uncompressed; all ranks call it, or none."""
        for exchange in self._exchanges:
            exchange.reset()

    def stats(self) -> dict[str, Any]:
        """Returns the counters of this rank, named as in ``CompressionState.stats``; ``steps`` are averagings."""
        norms = [exchange.residual_norm() for exchange in self._exchanges]
        return {**self._telemetry.stats(), "residual_norm": sum(norm * norm for norm in norms) ** 0.5}

    def reset_stats(self) -> None:
        """Sets the counters to zero."""
        self._telemetry.reset()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to resume this rank from: step, last common weights, residuals. Every rank saves its own.

        ``PostLocalSGDOptimizer.state_dict`` holds the step alone: an averager that resumes from it averages once
        uncompressed, without the residuals.
        """
        return RankState(
            {
                "format": FORMAT,
                "step": self.step,
                "exchanges": [exchange.state_dict() for exchange in self._exchanges],
            }
        )

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Resumes from a result of ``state_dict`` on this rank; the number of ranks may have changed.

        Args:
            state_dict: this rank's. When W ranks resume as fewer, W', rank r passes a list of those of ranks r, r + W',
                r + 2W', ... Its own alone also works, but loses part of the residuals. A new rank passes rank 0's with
                ``"error_feedback"`` set to None in each of ``"exchanges"``.

        Raises:
            ValueError: of another format, damaged, or not of one run; nothing has changed then.
        """
        saved = check_states(state_dict, FORMAT, "an averager", len(self._exchanges))
        by_level = zip(*(part["exchanges"] for part in saved), strict=True)
        # Raises before anything has changed.
        self._exchanges = [exchange.resumed(parts) for exchange, parts in zip(self._exchanges, by_level, strict=True)]
        self.step = saved[0]["step"]


class CompressedModelAverager(_CompressedAverager):
    """Averages a model over all ranks every ``period`` steps. All ranks end with the same bits.

    Ranks send each parameter's difference since the last averaging, at about 2 bits per value, with error feedback.
    Every rank keeps the common weights of that averaging. The first averaging has no such weights and is uncompressed.
    Ranks may begin with different weights, and all have their mean afterwards.

    Args:
        period: steps between averagings: one is due at step ``warmup_steps`` and every ``period`` steps later, counted
            from 0, as in torch's ``PeriodicModelAverager``.
        warmup_steps: number of initial steps without averaging, during which DDP averages gradients.
        process_group: by default the default group. A rank that is not in it averages nothing.
        **options: the same on all ranks except ``num_threads``:

            ``exchange``: ``"difference"``, or ``"weights"`` for the weights themselves, as in the paper. Weights cost 6
            to 10 bits and lose up to half a level each time, and half a level of the mean.
            ``grid``: of the quantization; by default ``SigmaGrid(step=1.0)`` for differences, ``RangeGrid()`` for
            weights. ``error_feedback``: keep the quantization error of a difference for the next one: 4 bytes per
            parameter. By default with differences; not possible with weights.
            ``min_elements``: smaller parameters travel uncompressed; 1024 by default.
            ``buffers_of``: a module whose floating-point buffers, such as BatchNorm's statistics, are averaged with the
            parameters, uncompressed and in fp32. By default buffers are not modified, as in torch's averagers.
            ``mean_step``, ``strategy``, ``ranks_per_node``, ``link_rates``, ``num_threads``, ``profile``,
            ``verify``, ``secret``, ``connections``: as in :func:`qcomm.all_reduce`.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> import tempfile, torch
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> averager = CompressedModelAverager(period=4, strategy="two_phase")
        >>> for _ in range(8):
        ...     model(torch.randn(8, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     averager.average_parameters(model.parameters())
        >>> averager.step, averager.stats()["steps"]
        (8, 2)
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, period: int, warmup_steps: int = 0, process_group: dist.ProcessGroup | None = None, **options: Any
    ) -> None:
        self.period = checked_int("period", period, 1)
        super().__init__(warmup_steps, process_group, options)
        self._exchanges = [WeightExchange(process_group, self._options, self._telemetry)]

    def _due(self) -> int | None:
        past = self.step - self.warmup_steps
        return 0 if past >= 0 and past % self.period == 0 else None


class HierarchicalCompressedModelAverager(_CompressedAverager):
    """Averages often within small groups of ranks and rarely over all of them.

    At a step that several periods divide, the level of the largest one averages. Each level keeps its own residuals,
    and the last weights that its ranks had in common.

    Args:
        period_group_size_dict: period -> number of ranks in a group, both ascending; the last group is all of
            ``process_group``. ``OrderedDict([(2, 2), (8, 4)])`` averages pairs every 2 steps, and all 4 ranks every 8.
            Groups are neighbouring ranks. Making them is a collective.
        warmup_steps: number of initial steps without averaging. Steps are counted from 0 and not from the end of these,
            as in torch's ``HierarchicalModelAverager``.
        process_group: by default the default group.
        **options: of :class:`CompressedModelAverager`.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import tempfile, torch
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> averager = HierarchicalCompressedModelAverager({4: 1})
        >>> averager.average_parameters(torch.nn.Linear(64, 64).parameters())
        >>> averager.step
        1
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        period_group_size_dict: Mapping[int, int],
        warmup_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(warmup_steps, process_group, options)
        world_size = dist.get_world_size(self.process_group)
        _check_levels(period_group_size_dict, world_size)
        self.period_process_group_dict: OrderedDict[int, dist.ProcessGroup] = OrderedDict()
        for index, (period, size) in enumerate(period_group_size_dict.items()):
            whole = size == world_size
            group = self.process_group if whole else dist.new_subgroups(size, self.process_group)[0]
            self.period_process_group_dict[period] = group
            self._exchanges.append(WeightExchange(group, self._options, self._telemetry, index))

    def _due(self) -> int | None:
        if self.step < self.warmup_steps:
            return None
        periods = list(self.period_process_group_dict)
        return next((level for level in reversed(range(len(periods))) if self.step % periods[level] == 0), None)


def _check_levels(levels: object, world_size: int) -> None:
    if not isinstance(levels, Mapping) or not levels:
        raise TypeError(f"period_group_size_dict must be a dictionary of period to group size, got {levels!r}")
    for name, values in (("periods", list(levels)), ("group sizes", list(levels.values()))):
        for value in values:
            checked_int(f"period_group_size_dict: each of the {name}", value, 1)
        if any(a >= b for a, b in pairwise(values)):
            raise ValueError(f"period_group_size_dict must have ascending {name}, got {values}")
    sizes = list(levels.values())
    if sizes[-1] != world_size or any(larger % size for size, larger in pairwise(sizes)):
        raise ValueError(
            f"period_group_size_dict must have group sizes that divide each other, the last one {world_size}, the "
            f"ranks of process_group, got {sizes}"
        )
