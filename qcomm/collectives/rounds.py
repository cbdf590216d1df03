"""Rounds: the frame of one collective on one rank, which owns its begin, its faults and their announcement.

A strategy is a few rounds. In each of them the ranks compute a step, tell each other in a handshake whether it
succeeded, and exchange packets, which travel with the headers::

    compute                step 1           step 2           last step
    headers and packets             round 1          round 2              next collective

A step that fails on one rank keeps that rank from computing further steps. Its next handshake says so, and the error is
raised on all ranks. A fault of the last step is announced by the first handshake of the next collective. On the failed
rank it is raised at once.

``two_phase`` has no rounds. It agrees once, and a :class:`~qcomm.communicator.Pipeline` carries its slices and owns
their faults until :meth:`Rounds.take_over`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import NoReturn, ParamSpec, TypeVar

import torch

from qcomm.collectives.packing import no_bytes
from qcomm.collectives.task import MeanTask
from qcomm.collectives.uncompressed_values import Bypassing, fingerprint
from qcomm.communicator import (
    UNTIMED,
    Agreed,
    Communicator,
    Fault,
    Fields,
    Group,
    Handshake,
    LateFaultError,
    Phase,
    Pipeline,
    Took,
    attempt,
    deal_to_tell,
)
from qcomm.transport import Traffic

__all__ = ["Rounds", "agree_on_smallest", "announce_late", "end_well", "refuse", "refuse_early"]

P = ParamSpec("P")
T = TypeVar("T")


def refuse(fault: Fault | None, communicator: Communicator) -> NoReturn:
    """Tells the other ranks of a fault in place of a collective, and raises it on all ranks.

    It works whatever the others are about to do.

    Args:
        fault: of this rank, which has no task for the collective.
        communicator: of the group.

    Raises:
        CollectiveError: naming this rank.
        ValueError: there is no fault.
    """
    if fault is None:
        raise ValueError("a rank without a task needs a fault")
    nothing = [0] * communicator.world_size
    pending = communicator.begin()
    communicator.handshake(Phase.ENCODE, Fields({}), nothing, nothing, pending or fault).finish()
    raise fault.error


def end_well(fault: Fault | None, communicator: Communicator, fields: Fields) -> Traffic:
    """Ends a sequence of collectives by a handshake alone: what any rank has still to tell is raised on all ranks.

    Args:
        fault: of this rank, beside those that collectives have left.
        communicator: of the group.
        fields: by which ranks tell that they are all at this end.

    Returns:
        The bytes of the headers.

    Raises:
        CollectiveError: naming the rank that failed.
        ConfigMismatchError: some rank is not at the end.
    """
    nothing = [0] * communicator.world_size
    pending = communicator.begin()
    return communicator.handshake(Phase.ENCODE, fields, nothing, nothing, pending or fault).finish().traffic


def agree_on_smallest(nanoseconds: int, communicator: Communicator, operation: str) -> Agreed:
    """Agrees on the smallest time of all ranks, by a handshake alone; ``last_time`` of the result is 1 more.

    What this rank has still to tell is left for the next collective.

    Args:
        nanoseconds: of this rank; 0 if it has none, and then ``last_time`` is 0.
        communicator: of the group.
        operation: by which ranks tell that they all agree on the same.

    Raises:
        CollectiveError: naming the rank that failed.
        ConfigMismatchError: some rank is elsewhere.
    """
    nothing, pending = [0] * communicator.world_size, communicator.begin()
    if pending is not None:
        communicator.announce_later(pending)
    took, fields = Took(1, nanoseconds) if nanoseconds else UNTIMED, Fields({"operation": operation})
    return communicator.handshake(Phase.ENCODE, fields, nothing, nothing, None, took).finish()


def refuse_early(fault: Fault, group: Group, secret: object, connections: object = None) -> NoReturn:
    """Tells the other ranks of a fault in the arguments of a dealt call, if they can be told, and raises it here.

    Args:
        fault: of this rank.
        group: of the call.
        secret, connections: that the caller passed, perhaps the fault.
    """
    communicator = deal_to_tell(group, secret, connections)
    if communicator is not None:
        communicator.submit(lambda: refuse(fault, communicator), alone=False)
    raise fault.error


def announce_late(fault: Fault, communicator: Communicator) -> NoReturn:
    """Raises a fault after the last exchange here, and on the other ranks in the next collective."""
    communicator.announce_later(fault)
    text = (
        f"rank {communicator.name} failed while {fault.phase}: {type(fault.error).__name__}: {fault.error}; the others "
        "are told in the next collective"
    )
    raise LateFaultError(text) from fault.error


class Rounds:
    """One collective under way. A context manager: leaving it without an error means that this rank has its result.

    Args:
        task: of the collective.
        communicator: of the group.
        own_time: of this rank's last collective of the kind, for the headers.
        bypassing: collectives of the caller that run without an agreement; None where none may.

    Attributes:
        rank, world_size: this process within the group, and the number of ranks in it.
        agreed: the result of the first handshake; None before it, and where it failed.
        turn: is held while a strategy computes by other means than :meth:`compute`.
        waited: nanoseconds spent on the agreement alone, in which the rank has not worked for its values.
    """

    def __init__(
        self,
        task: MeanTask,
        communicator: Communicator,
        own_time: Took = UNTIMED,
        bypassing: Bypassing | None = None,
    ) -> None:
        self.task = task
        self.rank, self.world_size = communicator.rank, communicator.world_size
        self.bypassing = bypassing
        self.agreed: Agreed | None = None
        self.waited = 0
        self.turn = communicator.turn
        self._communicator = communicator
        self._own_time = own_time
        self._fields = task.fields
        self._exchanges = 0
        self._fault = communicator.begin()
        if bypassing is not None:
            communicator.means.update(bypassing.means)

    def __enter__(self) -> "Rounds":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            if self._fault is not None:
                announce_late(self._fault, self._communicator)
            self.task.telemetry.mark(self.task.index, "done")

    @property
    def fault(self) -> Fault | None:
        """Returns the failure that keeps this rank from computing further steps."""
        return self._fault

    def require_equal(self, name: str, value: str) -> None:
        """Adds a field to those that later handshakes compare."""
        self._fields = self._fields.extended(name, value)

    def compute(self, phase: Phase, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Returns the result of a step of this rank; None where it, or an earlier one, failed."""
        if self._fault is not None:
            return None
        with self.turn:
            result, self._fault = attempt(phase, step, *args, **kwargs)
        return result

    def note_mean(self) -> None:
        """Keeps the fingerprint of the result, which the next handshake compares."""
        task = self.task
        name = f"bucket {task.index}, step {task.step}" if task.step else f"collective {self._communicator.number}"
        found = self.compute(Phase.DECODE, fingerprint, [task.buffer])
        if found is not None:
            self._communicator.means.note(name, found)

    def take_over(self, fault: Fault | None, traffic: Mapping[str, Traffic]) -> None:
        """Continues after a pipeline, with its late fault, and counts its traffic by kind."""
        self._fault = fault
        self.task.telemetry.add_traffics(traffic)

    def exchange(
        self,
        phase: Phase,
        kind: str,
        packets: Sequence[torch.Tensor] | None,
        limits: Sequence[int],
    ) -> list[torch.Tensor]:
        """Sends packet r to each rank r and returns each rank's packet for this one; raises a fault on all ranks.

        Args:
            phase: that every rank has just finished.
            kind: of the bytes, for telemetry: "phase1", "phase2", "inside" or "overhead".
            packets: W of them, of no bytes where a rank gets nothing; None after a fault.
            limits: maximum bytes that each rank can send here, 0 where it sends nothing.
        """
        task, world_size = self.task, self.world_size
        outgoing = packets or [no_bytes()] * world_size
        self._exchanges += 1
        task.telemetry.mark(task.index, f"exchange_{self._exchanges}")
        with task.telemetry.timed("communication_seconds"):
            sizes = [packet.numel() for packet in outgoing]
            arrived = self._finish(self._start(phase, sizes, limits, outgoing)).packets
        received = sum(packet.numel() for packet in arrived.values())
        task.telemetry.add_traffic(kind, Traffic(sum(sizes) - sizes[self.rank], received))
        incoming = [arrived.get(rank, no_bytes()) for rank in range(world_size)]
        incoming[self.rank] = outgoing[self.rank]
        return incoming

    def agree(self) -> None:
        """Runs the first handshake, of a strategy that exchanges its packets by other means."""
        with self.task.telemetry.timed("communication_seconds"):
            self._finish(self.start_agreeing())

    def start_agreeing(self, following: int = 0) -> Handshake:
        """Begins :meth:`agree`; this rank may compute before it calls :meth:`finish_agreeing`, which it must.

        Args:
            following: messages that this rank sends to each other one meanwhile, as it must.
        """
        nothing = [0] * self.world_size
        return self._start(Phase.ENCODE, nothing, nothing, following=following)

    def finish_agreeing(self, handshake: Handshake) -> None:
        """Ends :meth:`agree`."""
        self._finish(handshake)

    def sum(self, buffers: Sequence[torch.Tensor]) -> None:
        """Replaces each of ``buffers`` by its sum over all ranks."""
        self._communicator.sum(buffers)

    def pipeline(self, handshake: Handshake) -> Pipeline:
        """Returns the messages of a collective in slices, under way while the rank computes.

        Args:
            handshake: begun, with one message following, which the pipeline sends.
        """
        return self._communicator.pipeline(self._fault, partial(self.finish_agreeing, handshake))

    def _start(
        self,
        phase: Phase,
        sizes: Sequence[int],
        limits: Sequence[int],
        packets: Sequence[torch.Tensor] | None = None,
        following: int = 0,
    ) -> Handshake:
        return self._communicator.handshake(
            phase, self._fields, sizes, limits, self._fault, self._own_time, packets, following
        )

    def _finish(self, handshake: Handshake) -> Agreed:
        agreed = handshake.finish()
        if self.agreed is None:
            self.agreed, self.waited = agreed, self.waited + agreed.waited
        self.task.telemetry.add_traffic("overhead", agreed.traffic)
        return agreed
