"""What ranks agree on about tensors on a device: by messages between their hosts, or on the device itself.

Hosts that agree wait for each other. Numbers that were agreed on the device are read much later, when they have been
on the host for long, so that nobody waits.
"""

import torch
import torch.distributed as dist

from qcomm.collectives import BucketLayout, MeanTask
from qcomm.communicator import Communicator, Phase

__all__ = ["AgreedNumbers", "agree", "is_known"]


def agree(task: MeanTask, communicator: Communicator | None, strategy: str) -> None:
    """The headers of a collective: raises on every rank if one has a fault or is configured differently.

    Args:
        task: of the collective.
        communicator: of the group; None in a world of one rank, which has nobody to agree with.
        strategy: how the buffer is to be averaged.
    """
    if communicator is None:
        return
    nothing = [0] * communicator.world_size
    fields = task.fields.extended("exchange", "slots on the device").extended("strategy chosen", strategy)

    def job() -> None:
        communicator.begin()
        fault = communicator.pending_fault or task.fault
        _, overhead = communicator.agree(Phase.ENCODE, fields, nothing, nothing, fault)
        task.telemetry.add_traffic("overhead", overhead)

    communicator.submit(job).wait()


def is_known(task: MeanTask, layout: BucketLayout, dtype: torch.dtype) -> bool:
    """Whether a task is of the bucket that ranks have agreed on; by its size, where a fault left it without a layout.

    So a rank with a fault finds out whether the others are about to agree, or count on its part in a collective.
    """
    same = task.layout is layout or (task.layout is None and task.buffer.numel() == layout.elements)
    return same and task.buffer.dtype == dtype


class AgreedNumbers:
    """Integers that all ranks have reduced to the same, on their way to the host.

    Args:
        numbers: 1-D int64 on a device; overwritten.
        operation: how they are reduced.
        group: of all ranks that make this object.
    """

    def __init__(self, numbers: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
        dist.all_reduce(numbers, op=operation, group=group)
        self._host, self._event = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[int]:
        """Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return [int(number) for number in self._host.tolist()]
