"""Collectives that torch's ``FSDPModule`` takes in the place of its own."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qcomm.fsdp.exchanges import Exchanges
from qcomm.fsdp.units import Unit

__all__ = ["GradientScatter", "ReplicaMean", "WeightGather", "factor_of"]


class _OfUnit:
    """Something that torch calls for one unit.

    Args:
        unit: whose buffers come here.
        exchanges: of the model.
    """

    def __init__(self, unit: Unit, exchanges: Exchanges) -> None:
        self._unit, self._exchanges = unit, exchanges


class _Comm(_OfUnit):
    """The part of torch's interface that its collectives share."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns memory for a buffer, as torch's own collectives do."""
        with torch.inference_mode(False):  # another thread writes to it, outside of that mode
            return torch.empty(*size, dtype=dtype, device=device)


class GradientScatter(_Comm):
    """The reduce-scatter of gradients, for ``set_custom_reduce_scatter``."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Writes the reduced row of this rank to ``output_tensor``.

        Raises:
            CollectiveError, ConfigMismatchError: on all ranks.
        """
        self._exchanges.scatter(self._unit, output_tensor, input_tensor, factor_of(op))
        return _Ended() if async_op else None


class WeightGather(_Comm):
    """The all-gather of weights, for ``set_custom_all_gather``."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Fills ``output_tensor`` with the weights of all ranks; ``input_tensor`` is this rank's part of it.

        Raises:
            CollectiveError, ConfigMismatchError: on all ranks.
        """
        own = output_tensor.view(self._unit.world_size, -1)[self._unit.rank]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        self._exchanges.gather(self._unit, output_tensor)
        return _Ended() if async_op else None


class ReplicaMean(_OfUnit):
    """The mean over replicas, for ``set_all_reduce_hook``."""

    def __call__(self, reduce_output: torch.Tensor) -> None:
        """Replaces this rank's row by the mean; with a divide factor of the user's own by the sum, as torch does."""
        group = self._unit.param_group
        factors = (getattr(group, name, None) for name in ("gradient_divide_factor", "reduce_scatter_reduce_op"))
        self._exchanges.average(self._unit, reduce_output, any(factor is not None for factor in factors))


class _Ended(dist.Work):
    """The handle of a collective that has ended."""

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True


def factor_of(op: Any) -> float | None:
    """Returns the factor of the sum that a reduction of torch asks for; None for the mean.

    Raises:
        ValueError: it is neither a sum nor a mean.

    Example:
        >>> factor_of(dist.ReduceOp.AVG), factor_of(dist.ReduceOp.SUM)
        (None, 1.0)
        >>> from torch.distributed import _make_nccl_premul_sum
        >>> factor_of(_make_nccl_premul_sum(0.25))
        0.25
    """
    if op == dist.ReduceOp.AVG:
        return None
    if op == dist.ReduceOp.SUM:
        return 1.0
    state: Callable[[], Any] | None = getattr(op, "__getstate__", None)
    found = state() if state is not None else None
    if isinstance(found, tuple) and len(found) == 2 and found[0] == dist.ReduceOp.PREMUL_SUM:
        return float(found[1])
    raise ValueError(f"op must be SUM, AVG or a premultiplied sum, got {op}")
