"""Accelerate: the hook on a model that ``accelerator.prepare`` has returned, and its state in ``save_state``.

``DistributedDataParallelKwargs(comm_hook=...)`` accepts torch's own hooks only. Objects given to
``register_for_checkpointing`` are saved by the main process alone, so the state of each rank goes into a file of its
own, by hooks of ``save_state`` and ``load_state``.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.ddp import CompressionState
from qcomm.integrations import rank_files
from qcomm.integrations.ddp_models import find_ddp

try:
    from accelerate import Accelerator
except ImportError as missing:
    raise ImportError(
        f"qcomm.integrations.accelerate needs accelerate: pip install 'qcomm[accelerate]' ({missing})"
    ) from None

__all__ = ["attach"]


def attach(accelerator: Accelerator, model: torch.nn.Module, **options: Any) -> CompressionState:
    """Compresses the gradients of a prepared model, and adds the residuals to the accelerator's checkpoints.

    A collective, like :func:`qcomm.attach`. ``accelerator.save_state(folder)`` writes a file
    ``qcomm_0_rank_<rank>_of_<ranks>.pt`` from every rank, and ``accelerator.load_state(folder)`` reads them, also on
    another number of ranks. A second model gets files ``qcomm_1_...``: attach models in the same order in each run.

    Args:
        accelerator: that has prepared the model.
        model: what ``accelerator.prepare`` has returned, compiled or not.
        **options: of :func:`qcomm.attach`. ``grad_scale`` is by default the accelerator's scaler.

    Returns:
        The state.

    Warns:
        UserWarning: in ``load_state``, if the folder has no files of qcomm, so that residuals begin at zero.

    Raises:
        TypeError, ValueError: as of ``qcomm.attach``, and where the accelerator has made no DDP model.

    Example:
        >>> accelerator = Accelerator(cpu=True)
        >>> attach(accelerator, accelerator.prepare(torch.nn.Linear(2, 2)))
        Traceback (most recent call last):
            ...
        TypeError: qcomm compresses gradients of DistributedDataParallel, and NO has wrapped Linear in none: a single
        process sends no gradients; start several, or leave qcomm out. For DDP: accelerate launch --num_processes 2
    """
    kind = str(accelerator.distributed_type.value)
    ddp_model = find_ddp(model, kind, "accelerate launch --num_processes 2")
    if accelerator.scaler is not None:
        options.setdefault("grad_scale", accelerator.scaler.get_scale)
    state = qcomm.attach(ddp_model, **options)
    _add_to_checkpoints(accelerator, ddp_model, state)
    return state


class _Entry:
    """A model's place in the checkpoints of an accelerator."""

    def __init__(self, index: int, model: DistributedDataParallel, state: CompressionState) -> None:
        self.index, self.model, self.state = index, weakref.ref(model), state
        self.handles: list[Any] = []

    def save(self, _models: Sequence[torch.nn.Module], _weights: Sequence[dict[str, Any]], folder: str) -> None:
        rank_files.save(folder, self.state, self.index)

    def load(self, _models: Sequence[torch.nn.Module], folder: str) -> None:
        if not rank_files.load(folder, self.state, self.index):
            warnings.warn(f"{folder} has no state of qcomm, so its residuals begin at zero", stacklevel=2)


def _add_to_checkpoints(accelerator: Accelerator, model: DistributedDataParallel, state: CompressionState) -> None:
    """Registers the state under the lowest index that no living model of the accelerator has."""
    entries: list[_Entry] = vars(accelerator).setdefault("_qcomm_entries", [])
    for entry in [entry for entry in entries if entry.model() is None]:
        for handle in entry.handles:
            handle.remove()
        entries.remove(entry)
    taken = {entry.index for entry in entries}
    entry = _Entry(min(set(range(len(taken) + 1)) - taken), model, state)
    entry.handles = [
        accelerator.register_save_state_pre_hook(entry.save),
        accelerator.register_load_state_pre_hook(entry.load),
    ]
    entries.append(entry)
