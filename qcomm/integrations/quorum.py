"""Quorum: the replicas that exchange values until torchft has others, with connections and a thread of their own.

It ends when it has to, and waits for no replica then: connections are closed under an exchange that waits for one that
died, on this replica and on all others that wait for it.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch

from qcomm.codec import check_floats
from qcomm.collectives import (
    BucketLayout,
    ErrorFeedback,
    MeanTask,
    ReduceOptions,
    Telemetry,
    TensorSpec,
    average,
    refuse,
)
from qcomm.communicator import Communicator, Fields, Phase, Ticket, attempt, completed
from qcomm.staging import check_device, device_types, stage
from qcomm.transport import GlooTransport, Meeting, secure

__all__ = ["Quorum"]

# torchft hands over whole buckets, and no names of the parameters in them. Pieces have scales of their own, so that a
# large gradient does not decide how finely a small one elsewhere in the bucket is quantized.
PIECE_ELEMENTS = 1 << 16


class Quorum:
    """The replicas of one quorum, connected. Making it is a collective of all of them.

    Args:
        meeting: of the replicas.
        options: equal on all of them.
        telemetry: counts bytes, bits and seconds.

    Raises:
        CollectiveError: a replica does not take part within the timeout.
        ConfigMismatchError: only some have a secret, or they differ in their number of connections.
    """

    def __init__(self, meeting: Meeting, options: ReduceOptions, telemetry: Telemetry) -> None:
        self.world_size = len(meeting.ranks)
        self._options = options.for_world(self.world_size)
        self._telemetry = telemetry
        self._layouts: dict[tuple[int, int], BucketLayout] = {}
        self._tickets: list[Ticket[torch.Tensor]] = []
        self._communicator: Communicator | None = None
        if self.world_size > 1:
            self._communicator = Communicator(secure(GlooTransport(meeting), options.connection_options))

    def start(
        self,
        tensor: torch.Tensor,
        number: int,
        is_mean: bool,
        feedback: ErrorFeedback | None,
        keep: Callable[[], None] | None = None,
    ) -> Ticket[torch.Tensor]:
        """Begins to replace a tensor by its sum or mean over all replicas, the same bits on all of them.

        A replica that is alone has its sum already. Its residuals wait for others to exchange values with.

        Args:
            tensor: floating-point, as of :func:`qcomm.all_reduce`.
            number: of the all-reduce in its step, the same on all replicas.
            is_mean: whether the sum is divided by the number of replicas.
            feedback: residuals of this all-reduce; None without error feedback.
            keep: is called before residuals change.
        """
        communicator = self._communicator
        if communicator is None:
            return completed(tensor)
        task, fault = attempt(Phase.PREPARE, self._task, communicator, tensor, number, is_mean, feedback)

        def job() -> torch.Tensor:
            if task is None:
                refuse(fault, communicator)
            if keep is not None:
                keep()
            average(task, communicator)
            result = tensor.detach()
            if task.staged is None and task.buffer.data_ptr() != tensor.data_ptr():
                result.copy_(task.buffer.view(tensor.shape))
            if not is_mean:
                result.mul_(self.world_size)
            return tensor

        ticket = communicator.submit(job, device=None if tensor.is_cpu else tensor.device)
        self._tickets.append(ticket)
        return ticket

    def error(self) -> Exception | None:
        """Returns the first error since :meth:`end_step`, of exchanges that have ended."""
        return next((error for ticket in self._tickets if (error := ticket.exception()) is not None), None)

    def join(self) -> None:
        """Waits for the ends of all exchanges, well or not."""
        for ticket in self._tickets:
            ticket.join()

    def end_step(self) -> None:
        """Forgets the exchanges of a step, which have ended."""
        self._tickets = []

    def close(self) -> bool:
        """Ends all exchanges and closes the connections, whatever the other replicas do.

        Returns:
            Whether all exchanges had ended well.
        """
        has_ended_well = all(ticket.is_completed() for ticket in self._tickets) and self.error() is None
        if self._communicator is not None:
            self._communicator.interrupt()
            self._communicator.close()
        return has_ended_well

    def _task(
        self,
        communicator: Communicator,
        tensor: torch.Tensor,
        number: int,
        is_mean: bool,
        feedback: ErrorFeedback | None,
    ) -> MeanTask:
        check_floats("tensor", tensor, devices=device_types())
        check_device("tensor", tensor.device)
        layout = self._layout(number, tensor.numel())
        compared = {
            "operation": "torchft's all-reduce",
            **self._options.describe(),
            "number in the step": str(number),
            "reduce_op": "AVG" if is_mean else "SUM",
            "elements": str(tensor.numel()),
            "dtype": str(tensor.dtype),
            "error_feedback": str(feedback is not None),
        }
        self._telemetry.count_bucket(layout, tensor.element_size())
        task = MeanTask(
            tensor.detach(), layout, self._options, Fields(compared), self._telemetry, feedback, index=number
        )
        if not tensor.is_cpu:
            return replace(task, staged=stage(tensor.detach(), communicator))
        return replace(task, buffer=tensor.detach().contiguous().reshape(-1))

    def _layout(self, number: int, elements: int) -> BucketLayout:
        if (number, elements) not in self._layouts:
            parts = max(1, -(-elements // PIECE_ELEMENTS))
            cuts = [elements * part // parts for part in range(parts + 1)]
            pieces = [
                TensorSpec(f"{number}.{part}", begin, end - begin, self._options.is_compressed(end - begin))
                for part, (begin, end) in enumerate(pairwise(cuts))
            ]
            self._layouts[number, elements] = BucketLayout(pieces, self.world_size)
        return self._layouts[number, elements]
