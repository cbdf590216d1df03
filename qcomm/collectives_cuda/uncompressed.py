"""The mean without compression of tensors on a device: the group's own all-reduce, without waiting."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from qcomm.collectives import BucketLayout, MeanTask, Scale, UncompressedValues, count_rings
from qcomm.collectives_cuda.handshake import DevicePart, agree, is_known
from qcomm.communicator import Communicator, Fault, Phase, attempt

__all__ = ["UncompressedDeviceMean"]


@dataclass
class _Bucket:
    layout: BucketLayout
    dtype: torch.dtype
    values: dict[str, UncompressedValues]  # by strategy: those that all ranks have agreed on


class UncompressedDeviceMean:
    """Averages buckets over a group, on the current stream of the buckets' device.

    The results are those of :mod:`qcomm.collectives.uncompressed` on the CPU.

    Args:
        communicator: of the group, for the headers of new buckets; None in a world of one rank.
        rank: of this process in the group.
    """

    def __init__(self, communicator: Communicator | None, rank: int) -> None:
        self._communicator, self._rank = communicator, rank
        self._buckets: dict[int, _Bucket] = {}
        self._captured: list[UncompressedValues] = []

    def settle(self, index: int, strategy: str) -> None:
        """Forgets the memory of all strategies but the current one of a bucket."""
        if index in self._buckets:
            values = self._buckets[index].values
            for other in set(values).difference([strategy]):
                del values[other]

    def average(
        self, part: DevicePart, scale: Scale, strategy: str, group: dist.ProcessGroup, with_residuals: bool
    ) -> Fault | None:
        """Replaces the part's buffer by its mean over all ranks.

        Args:
            part: of this rank.
            scale: the buffer holds values times this: a number, or a tensor of one element on the device.
            strategy: ``"none"`` or ``"bf16"``.
            group: of all ranks, with collectives on the device.
            with_residuals: send the residuals that error feedback keeps of the bucket's parameters. Only other
                strategies keep any, so the first of many collectives sends them for all.

        Returns:
            None, or a fault of this rank, which took part in the collective nevertheless: the caller raises its error
            and may go on with the next collective.

        Raises:
            CollectiveError, ConfigMismatchError: on all ranks, where the bucket or its strategy is new.
        """
        known = self._known(part)
        made, fault = self._prepare(part, scale, known, strategy, with_residuals)
        part = replace(part, fault=fault)
        if known is None or strategy not in known.values:
            agree(part, self._communicator, strategy)
            if fault is not None:
                return fault
        if known is None:
            if part.layout is None:
                raise ValueError("a part without a fault needs a layout")
            known = self._buckets[part.index] = _Bucket(part.layout, part.buffer.dtype, {})
        if made is not None:
            known.values[strategy] = made
        values = known.values[strategy]
        if fault is not None:
            part.buffer.fill_(torch.nan)
        if part.buffer.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.append(values)  # the graph has their addresses
        for summed in values.load(part.buffer):
            dist.all_reduce(summed, group=group)
        values.store(part.buffer)
        if fault is not None:
            return fault
        count_rings(part.telemetry, strategy, known.layout, part.buffer.dtype)
        return None

    def _known(self, part: DevicePart) -> _Bucket | None:
        known = self._buckets.get(part.index)
        return known if known is not None and is_known(part, known.layout, known.dtype) else None

    def _prepare(
        self, part: DevicePart, scale: Scale, known: _Bucket | None, strategy: str, with_residuals: bool
    ) -> tuple[UncompressedValues | None, Fault | None]:
        """Prepares memory for the values if the bucket or its strategy is new, and adds the residuals to the buffer."""
        task, made, fault = part.task, None, part.fault
        if task is None or fault is not None:
            return None, fault
        if known is None or strategy not in known.values:
            device = task.buffer.device
            made, fault = attempt(Phase.PREPARE, UncompressedValues, strategy, task.layout, task.buffer.dtype, device)
        if fault is None and with_residuals:
            _, fault = attempt(Phase.PREPARE, _add_residuals, task, self._rank, scale)
        return made, fault


def _add_residuals(task: MeanTask, rank: int, scale: Scale) -> None:
    """Adds the residuals that other strategies have kept, and empties them.

    The device decides whether a gradient is fit for that.
    """
    layout, feedback, device = task.layout, task.feedback, task.buffer.device
    if feedback is None:
        return
    feedback.adopt(layout, rank)
    factor = scale.reshape(()) if isinstance(scale, torch.Tensor) else scale
    owned = layout.owned_parts[rank]
    for tensor in layout.parameters:
        if not tensor.compressed or not feedback.keeps(tensor.key):
            continue
        values = task.buffer[tensor.offset : tensor.offset + tensor.numel]
        # A step that is not finite is discarded, and so is the mean of a parameter that no rank used.
        fit = values.isfinite().all() & values.any()
        parts = [(feedback.local(tensor.key, tensor.numel, device), values, 1)]
        if tensor.key in owned:
            start, length = owned[tensor.key]
            # The residual is of a mean, not of this rank's values: it is divided by the number of ranks like these.
            share = feedback.owner(tensor.key, start, length, device)
            parts.append((share, values[start : start + length], layout.world_size))
        for kept, part, times in parts:
            sent = kept * fit
            kept.sub_(sent)
            part.add_(sent * times * factor)
