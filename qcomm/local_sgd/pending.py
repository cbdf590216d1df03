"""Pending: an exchange of DiLoCo that is not merged yet, and the way of its mean into a checkpoint and the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qcomm.codec import CPU
from qcomm.local_sgd.entries import part_of
from qcomm.local_sgd.saved_exchanges import check_tensors
from qcomm.local_sgd.weight_exchange import Started, WeightExchange

__all__ = ["Arrived", "Pending", "mix"]


@dataclass(frozen=True)
class Arrived:
    """The result of a fragment's exchange, the same on all ranks.

    Attributes:
        means: by name: of the parameters' movements since the anchor, or of their values; of the buffers' values.
        is_movement: whether there was an anchor.
    """

    means: Mapping[str, torch.Tensor]
    is_movement: bool


@dataclass
class Pending:
    """A fragment's exchange, under way or arrived, which is merged at step ``due``."""

    fragment: int
    due: int
    started: Started | None
    arrived: Arrived | None = None

    def join(self) -> None:
        """Waits until the exchange has ended, well or not."""
        if self.started is not None:
            self.started.ticket.join()

    def wait(self, exchange: WeightExchange) -> Arrived:
        """Waits for the result.

        Args:
            exchange: that started it.

        Raises:
            CollectiveError, ConfigMismatchError: as :meth:`WeightExchange.finish`, at each call.
        """
        if self.arrived is None:
            if self.started is None:
                raise RuntimeError("an exchange is under way or has arrived")
            flat, entries = exchange.finish(self.started), self.started.entries
            means = {entry.spec.key: part_of(entry, flat) for entry in entries}
            self.arrived, self.started = Arrived(means, any(entry.anchor is not None for entry in entries)), None
        return self.arrived

    def state_dict(self, exchange: WeightExchange) -> dict[str, Any]:
        """Returns a copy of the result, which it waits for as :meth:`wait`, and its place in the schedule."""
        arrived = self.wait(exchange)
        means = {name: mean.clone() for name, mean in arrived.means.items()}
        return {"fragment": self.fragment, "due": self.due, "means": means, "is_movement": arrived.is_movement}

    @classmethod
    def of(cls, saved: object, fragments: int, steps: range) -> "Pending":
        """Returns the exchange of a result of :meth:`state_dict`, checked but for the names of its tensors.

        Args:
            saved: the result.
            fragments: number of fragments.
            steps: at which it may be due.

        Raises:
            ValueError: it is damaged.
        """
        if not isinstance(saved, Mapping) or not {"fragment", "due", "means", "is_movement"} <= set(saved):
            raise ValueError("state_dict is damaged: pending needs fragment, due, means and is_movement")
        fragment, due, means, is_movement = (saved[name] for name in ("fragment", "due", "means", "is_movement"))
        for name, value, allowed in (("fragment", fragment, range(fragments)), ("due", due, steps)):
            if type(value) is not int or value not in allowed:
                raise ValueError(f"state_dict is damaged: pending has {name} {value!r}, which must be in {allowed}")
        if not isinstance(is_movement, bool):
            raise ValueError(f"state_dict is damaged: is_movement must be a bool, got {is_movement!r}")
        check_tensors("mean", means)
        copied = {name: mean.detach().clone() for name, mean in means.items()}
        return cls(fragment, due, None, Arrived(copied, is_movement))


def mix(tensor: torch.Tensor, anchor: torch.Tensor, alpha: float) -> None:
    """Writes ``alpha tensor + (1 - alpha) anchor``, computed in the anchor's dtype and rounded once.

    Args:
        tensor: on any device.
        anchor: in host memory.
        alpha: from 0 to less than 1.

    Example:
        >>> weights = torch.tensor([1.0, 3.0])
        >>> mix(weights, torch.zeros(2), 0.5)
        >>> weights
        tensor([0.5000, 1.5000])
    """
    mixed = anchor.lerp(tensor.detach().to(device=CPU, dtype=anchor.dtype), alpha) if alpha else anchor
    tensor.copy_(mixed.to(tensor.dtype))
