"""Agreements about tensors on a device: by messages between the hosts, or on the device itself.

Hosts that agree wait for each other. Numbers that were agreed on the device are read much later. They have long been on
the host by then, so reading them does not wait.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from qcomm.codec import CPU
from qcomm.collectives import BucketLayout, MeanTask, Telemetry
from qcomm.communicator import Communicator, Fault, Fields, Phase

__all__ = ["AgreedNumbers", "DevicePart", "agree", "is_known"]


@dataclass(frozen=True)
class DevicePart:
    """This rank's part in a collective on a device: a task, or a fault in its place.

    Attributes:
        index: number of the bucket.
        buffer: on the device.
        telemetry: counts bytes, bits and seconds.
        layout: of the buffer; None where a fault kept this rank from finding it.
        task: its ``scale`` is ignored, because a scale may stay on the device; None with a fault.
        fault: the error of this rank before the collective.
    """

    index: int
    buffer: torch.Tensor
    telemetry: Telemetry
    layout: BucketLayout | None
    task: MeanTask | None
    fault: Fault | None = None

    @classmethod
    def of(cls, task: MeanTask) -> "DevicePart":
        """Returns the part of a rank without a fault."""
        return cls(task.index, task.buffer, task.telemetry, task.layout, task)


def agree(part: DevicePart, communicator: Communicator | None, strategy: str) -> None:
    """Exchanges the headers of a collective; raises on every rank if one has a fault or is configured differently.

    Args:
        part: of this rank in the collective.
        communicator: of the group; None in a world of one rank, which has no other to agree with.
        strategy: the strategy that averages the buffer.
    """
    if communicator is None:
        return
    nothing = [0] * communicator.world_size
    fields = Fields({}) if part.task is None else part.task.fields
    fields = fields.extended("exchange", "slots on the device").extended("strategy chosen", strategy)

    def job() -> None:
        fault = communicator.begin() or part.fault
        agreed = communicator.handshake(Phase.ENCODE, fields, nothing, nothing, fault).finish()
        part.telemetry.add_traffic("overhead", agreed.traffic)

    communicator.submit(job).wait()


def is_known(part: DevicePart, layout: BucketLayout, dtype: torch.dtype) -> bool:
    """Returns whether the ranks have agreed on the bucket of a part; without a layout, by the buffer's size.

    So a rank with a fault finds out whether the others are about to agree, or count on its part in a collective.
    """
    same = part.layout is layout or (part.layout is None and part.buffer.numel() == layout.elements)
    return same and part.buffer.dtype == dtype


class AgreedNumbers:
    """Integers that all ranks have reduced to the same, on their way to the host.

    Args:
        numbers: 1-D int64 on a device; overwritten.
        operation: the reduction that combines them.
        group: of all ranks that make this object.
    """

    def __init__(self, numbers: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
        dist.all_reduce(numbers, op=operation, group=group)
        self._host, self._event = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True, device=CPU)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[int]:
        """Waits for the integers and returns them."""
        if self._event is not None:
            self._event.synchronize()
        return [int(number) for number in self._host.tolist()]
