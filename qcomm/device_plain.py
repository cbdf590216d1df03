"""The mean without compression of tensors on a device: the group's own all-reduce, and nothing that waits."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from qcomm.agreement import Phase
from qcomm.communicator import Communicator
from qcomm.device_agreement import agree, is_known
from qcomm.layout import BucketLayout
from qcomm.mean import MeanTask, Scale, attempt
from qcomm.plain_values import PlainValues, count_rings

__all__ = ["DevicePlain"]


@dataclass
class _Bucket:
    layout: BucketLayout
    dtype: torch.dtype
    strategy: str
    values: PlainValues


class DevicePlain:
    """Averages buckets over a group, on the current stream of the buckets' device, as :mod:`qcomm.plain` on the CPU.

    Args:
        communicator: of the group, for the headers of new buckets; None in a world of one rank.
        rank: of this process in the group.
    """

    def __init__(self, communicator: Communicator | None, rank: int) -> None:
        self._communicator, self._rank = communicator, rank
        self._buckets: dict[int, _Bucket] = {}

    def average(
        self, task: MeanTask, scale: Scale, strategy: str, group: dist.ProcessGroup, with_residuals: bool
    ) -> None:
        """Replaces ``task.buffer`` by its mean over all ranks.

        Args:
            task: its ``scale`` is not looked at.
            scale: the buffer holds values times this: a number, or a tensor of one element on the device.
            strategy: ``"none"`` or ``"bf16"``.
            group: of all ranks, with collectives on the device.
            with_residuals: send what error feedback keeps of the bucket's parameters. It is only kept by other ways,
                so that the first of many collectives does it for all of them.

        Raises:
            CollectiveError, ConfigMismatchError: on all ranks, where the bucket is new.
            Exception: this rank's own fault. Of a bucket that is not new the others get NaN, and do not wait.
        """
        if task.fault is None and with_residuals:
            _, task.fault = attempt(Phase.PREPARE, _add_residuals, task, self._rank, scale)
        known = self._buckets.get(task.index)
        if known is None or not is_known(task, known.layout, known.dtype):
            agree(task, self._communicator, strategy)
            if task.fault is not None:
                raise task.fault.error
            known = None
        if known is None or known.strategy != strategy:
            layout = task.agreed_layout if known is None else known.layout
            values = PlainValues(strategy, layout, task.buffer.dtype, task.buffer.device)
            known = self._buckets[task.index] = _Bucket(layout, task.buffer.dtype, strategy, values)
        if task.fault is not None:
            task.buffer.fill_(torch.nan)
        for part in known.values.load(task.buffer):
            dist.all_reduce(part, group=group)
        known.values.store(task.buffer)
        if task.fault is not None:
            raise task.fault.error
        count_rings(task.telemetry, strategy, task.agreed_layout, task.buffer.dtype)


def _add_residuals(task: MeanTask, rank: int, scale: Scale) -> None:
    """Adds what other ways have kept, and empties it. Whether a gradient is fit for that is decided on the device."""
    layout, feedback, device = task.agreed_layout, task.feedback, task.buffer.device
    if feedback is None:
        return
    feedback.adopt(layout, rank)
    owned = {piece.tensor: piece for piece in layout.chunks[rank].pieces}
    for number, tensor in enumerate(layout.tensors):
        if not tensor.compressed or not feedback.keeps(tensor.key):
            continue
        values = task.buffer[tensor.offset : tensor.offset + tensor.numel]
        # A step that is not finite is thrown away, and so is the mean of a parameter that no rank used.
        fit = values.isfinite().all() & values.any()
        parts = [(feedback.local(tensor.key, tensor.numel, device), values, 1)]
        if number in owned:
            start, length = owned[number].start, owned[number].length
            # Of a mean, not of this rank's values: it is divided by the number of ranks like these.
            share = feedback.owner(tensor.key, start, length, device)
            parts.append((share, values[start : start + length], layout.world_size))
        for kept, part, times in parts:
            sent = kept * fit
            kept.sub_(sent)
            part.add_(sent * times * scale)
