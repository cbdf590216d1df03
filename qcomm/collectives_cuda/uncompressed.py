"""The mean without compression of tensors on a device: the group's own all-reduce, and nothing that waits."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from qcomm.collectives import BucketLayout, MeanTask, PlainValues, Scale, count_rings
from qcomm.collectives_cuda.handshake import agree, is_known
from qcomm.communicator import Communicator, Phase, attempt

__all__ = ["DevicePlain"]


@dataclass
class _Bucket:
    layout: BucketLayout
    dtype: torch.dtype
    values: dict[str, PlainValues]  # by strategy: those that all ranks have agreed on


class DevicePlain:
    """Averages buckets over a group, on the current stream of the buckets' device.

    The same as :mod:`qcomm.collectives.uncompressed` does on the CPU.

    Args:
        communicator: of the group, for the headers of new buckets; None in a world of one rank.
        rank: of this process in the group.
    """

    def __init__(self, communicator: Communicator | None, rank: int) -> None:
        self._communicator, self._rank = communicator, rank
        self._buckets: dict[int, _Bucket] = {}
        self._captured: list[PlainValues] = []

    def settle(self, index: int, strategy: str) -> None:
        """Forgets the memory of other strategies than that which a bucket has from now on."""
        if index in self._buckets:
            values = self._buckets[index].values
            for other in set(values).difference([strategy]):
                del values[other]

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
            CollectiveError, ConfigMismatchError: on all ranks, where the bucket or its strategy is new.
            Exception: this rank's own fault. Where neither is new the others get NaN, and do not wait.
        """
        known = self._buckets.get(task.index)
        if known is not None and not is_known(task, known.layout, known.dtype):
            known = None
        new = known is None or strategy not in known.values
        made: PlainValues | None = None
        if task.fault is None and new:
            layout, device = task.agreed_layout, task.buffer.device
            made, task.fault = attempt(Phase.PREPARE, PlainValues, strategy, layout, task.buffer.dtype, device)
        if task.fault is None and with_residuals:
            _, task.fault = attempt(Phase.PREPARE, _add_residuals, task, self._rank, scale)
        if new:
            agree(task, self._communicator, strategy)
            if task.fault is not None:
                raise task.fault.error
        if known is None:
            known = self._buckets[task.index] = _Bucket(task.agreed_layout, task.buffer.dtype, {})
        if made is not None:
            known.values[strategy] = made
        values = known.values[strategy]
        if task.fault is not None:
            task.buffer.fill_(torch.nan)
        if task.buffer.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.append(values)  # whose addresses the graph has
        for part in values.load(task.buffer):
            dist.all_reduce(part, group=group)
        values.store(task.buffer)
        if task.fault is not None:
            raise task.fault.error
        count_rings(task.telemetry, strategy, task.agreed_layout, task.buffer.dtype)


def _add_residuals(task: MeanTask, rank: int, scale: Scale) -> None:
    """Adds what other ways have kept, and empties it. Whether a gradient is fit for that is decided on the device."""
    layout, feedback, device = task.agreed_layout, task.feedback, task.buffer.device
    if feedback is None:
        return
    feedback.adopt(layout, rank)
    factor = scale.reshape(()) if isinstance(scale, torch.Tensor) else scale
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
            part.add_(sent * times * factor)
