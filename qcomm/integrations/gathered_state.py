"""The states of all ranks in one dictionary, for checkpoints that only rank 0 writes.

Residuals differ between ranks. A framework whose rank 0 saves ``state_dict()`` for everybody would therefore lose those
of all other ranks, and give rank 0's to each of them, without a word. Here ranks send their states to rank 0 first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from qcomm.collectives import states_for_rank
from qcomm.ddp import CompressionState

__all__ = ["GatheredState"]


class GatheredState(CompressionState):
    """A :class:`qcomm.CompressionState` whose ``state_dict`` on rank 0 has every rank's residuals.

    Rank 0 holds 4 bytes per parameter and rank while it saves, about twice during the transfer.

    Args:
        **options: of :class:`qcomm.CompressionState`, without ``secret``: states travel over the program's own group,
            which nothing seals.

    Raises:
        ValueError: a secret is set.

    Example:
        >>> state = GatheredState(strategy="two_phase")
        >>> list(state.state_dict())
        ['rank 0 of 1']
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.options.key_file is not None:
            raise ValueError(
                f"secret must be None for a state that rank 0 gathers, since nothing seals that, got "
                f"{self.options.key_file.path}; take qcomm.CompressionState, and save each rank's state_dict() in a "
                "file of its own"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all ranks on rank 0, and this rank's own elsewhere.

        A collective of the default process group: every rank calls it, between steps.
        """
        own = super().state_dict()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return own
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, gathered)
        return own if gathered is None else {key: value for part in gathered for key, value in part.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Resumes from what rank 0 saved; every rank passes the same. The number of ranks may have changed.

        Args:
            state_dict: of all ranks. This rank's own alone, or a list, is taken as :class:`qcomm.CompressionState`
                takes it.

        Raises:
            ValueError: ranks are missing in it, or a state is refused; nothing has changed then.
        """
        super().load_state_dict(states_for_rank(state_dict) if isinstance(state_dict, Mapping) else state_dict)
