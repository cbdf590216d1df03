"""Messages between the ranks of an MPI communicator.

All are nonblocking point-to-point messages of bytes, in the same pairwise order as over gloo. MPI waits for ever or
not at all, so ``poll_until`` tests repeatedly, at growing intervals. MPI also has no connections that break. A rank
that leaves sends a *farewell*, whose receive all others post at the start. No rank then waits until the timeout for a
rank that failed. A farewell holds a byte for each rank, 1 for those because of which its sender leaves: a survivor that
leaves first is not blamed. A rank may die without a farewell. The launcher notices that: mpirun ends the job. It does
not notice a stopped rank, so the others end the job when they end (:mod:`qcomm.transport.mpi_exit`).

A receive can be cancelled, a send cannot. The memory of a send without a receiver is kept until the process ends, and
so is that of a receive whose cancellation does not end.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from qcomm.transport.base import Transfer, Transport
from qcomm.transport.lost_ranks import last_in_chains
from qcomm.transport.mpi_exit import expect_before_exit
from qcomm.transport.polling import poll_until
from qcomm.transport.ring_sum import ring_sum

__all__ = ["MpiTransport"]

# A count is an int in MPI, so larger messages go in pieces; a power of two keeps them aligned.
PIECE_BYTES = 1 << 30
FAREWELL_TAG = 32767  # the largest that every MPI has
# Messages that a rank sent before its farewell may arrive a little later than the farewell.
GRACE_SECONDS = 1.0
LEAVE_SECONDS = 2.0

# Messages that could be neither finished nor cancelled, with their memory: MPI may still read or write it.
_kept: list[object] = []


class _Message:
    """A message under way, in pieces of PIECE_BYTES and a shorter last piece, perhaps empty, which marks the end.

    Args:
        mpi: the module ``mpi4py.MPI``.
        start: ``Isend`` or ``Irecv`` of a communicator.
        tensor: contiguous; kept alive, because MPI reads or writes its memory.
        rank, tag: of the message.
        receiving: pieces are received one after another, since their number is not known.
    """

    def __init__(
        self, mpi: Any, start: Callable[..., Any], tensor: torch.Tensor, rank: int, tag: int, receiving: bool
    ) -> None:
        self._mpi, self._start, self._tensor = mpi, start, tensor
        self._rank, self._tag, self._receiving = rank, tag, receiving
        self._status = mpi.Status()
        self._position = 0
        self._requests = [self._start_piece()]
        while not receiving and self._position + PIECE_BYTES <= tensor.nbytes:
            self._position += PIECE_BYTES
            self._requests.append(self._start_piece())

    def _start_piece(self) -> Any:
        size = min(PIECE_BYTES, self._tensor.nbytes - self._position)
        # numpy has no bfloat16, and a tensor no buffer interface.
        memory = self._mpi.buffer.fromaddress(self._tensor.data_ptr() + self._position, size) if size else bytearray()
        return self._start([memory, self._mpi.BYTE], self._rank, self._tag)

    def is_done(self) -> bool:
        """Returns True if the whole message has been sent or received.

        Raises:
            RuntimeError: MPI's, as for a message larger than its buffer.
        """
        if not self._receiving:
            return bool(self._mpi.Request.Testall(self._requests))
        while self._requests[0].Test(self._status):
            if self._status.Get_count(self._mpi.BYTE) < PIECE_BYTES:
                return True
            self._position += PIECE_BYTES
            self._requests[0] = self._start_piece()
        return False

    def give_up(self) -> None:
        """Stops receiving; a transfer that cannot be stopped keeps its memory."""
        try:
            if self.is_done():
                return
        except RuntimeError:  # it failed, and so it is over
            return
        if self._receiving:
            self._requests[0].Cancel()
            if poll_until(self._requests[0].Test, GRACE_SECONDS):
                return
        _kept.append(self)


class MpiTransport(Transport):
    """The transport of an MPI communicator that it uses alone; closing the transport frees the communicator.

    Args:
        mpi: the module ``mpi4py.MPI``.
        comm: a duplicate made for this transport, whose errors are returned and not fatal.
        ranks: names of its ranks for error messages.
        timeout: maximum time that this rank waits for a message.
    """

    def __init__(self, mpi: Any, comm: Any, ranks: Sequence[int], timeout: timedelta) -> None:
        super().__init__(ranks, comm.Get_rank(), timeout)
        self._mpi, self._comm = mpi, comm
        self._process = os.getpid()
        self._closing, self._testing = threading.Lock(), threading.Lock()
        self._is_closed = False
        self._failed = False
        self._reasons = {peer: bytearray(self.world_size) for peer in self.peers}
        self._farewells = {peer: comm.Irecv([self._reasons[peer], mpi.BYTE], peer, FAREWELL_TAG) for peer in self.peers}
        self._blamed: set[int] = set()  # ranks because of which this one leaves
        self._departed: set[int] = set()
        self._silent: set[int] = set()

    @property
    def is_closed(self) -> bool:
        """Returns True if this rank has left."""
        return self._is_closed

    def start_send(self, target: int, message: torch.Tensor, tag: int) -> Transfer:
        """Sends a message, see :meth:`Transport.start_send`."""
        return self._start(self._comm.Isend, target, message, tag, receiving=False)

    def start_receive(self, source: int, buffer: torch.Tensor, tag: int) -> Transfer:
        """Receives a message, see :meth:`Transport.start_receive`."""
        return self._start(self._comm.Irecv, source, buffer, tag, receiving=True)

    def _start(
        self, start: Callable[..., Any], rank: int, message: torch.Tensor, tag: int, receiving: bool
    ) -> Transfer:
        if self._is_closed:
            raise self._closed()
        return Transfer(rank, _Message(self._mpi, start, message, rank, tag, receiving))

    def _wait(self, transfers: Sequence[Transfer]) -> list[tuple[int, RuntimeError]]:
        pending, failures = list(transfers), []
        gone_since: float | None = None

        def move() -> bool:
            """Returns True if no transfer is pending, or waiting for the pending ones is futile."""
            nonlocal gone_since
            for transfer in list(pending):
                try:
                    done = transfer.work.is_done()
                except RuntimeError as error:  # MPI's own exceptions
                    failures.append((transfer.rank, error))
                    done = True
                if done:
                    pending.remove(transfer)
            if not pending or self._is_closed:
                return True
            if gone_since is None and not self._note_departures().isdisjoint(rank for rank, _ in pending):
                gone_since = time.monotonic()
            return gone_since is not None and time.monotonic() - gone_since > GRACE_SECONDS

        poll_until(move, self.timeout.total_seconds())
        for _, message in pending:
            message.give_up()
        left = [rank for rank, _ in pending if rank in self._departed]
        if left:  # other missing ranks may only be waiting for these
            failures += [(rank, RuntimeError("it left the group")) for rank in left]
        elif pending:
            reason = "this rank closed the group" if self._is_closed else "nothing came in time"
            failures += [(rank, RuntimeError(reason)) for rank, _ in pending]
            if not self._is_closed:
                self._note_silence(rank for rank, _ in pending)
        self._failed |= bool(failures)
        return failures

    def _note_departures(self) -> set[int]:
        with self._testing:  # a request must not be tested by two threads at once
            for peer, farewell in self._farewells.items():
                if peer not in self._departed and farewell.Test():
                    self._departed.add(peer)
            return set(self._departed)

    def _blame(self, lost: Collection[int]) -> Collection[int]:
        """Names, in place of a rank that has left, those because of which it did."""
        told = {
            peer: [rank for rank, blamed in enumerate(self._reasons[peer]) if blamed]
            for peer in self._note_departures()
        }
        self._blamed = last_in_chains(lost, told, self.rank)
        return self._blamed

    def _note_silence(self, peers: Iterable[int]) -> None:
        if not self._silent:
            expect_before_exit(self._mpi, self._missing)
        self._silent.update(peers)

    def _missing(self) -> str:
        """Names the ranks that were silent and have not left since. This rank leaves, if it has not."""
        self.close()
        for peer in self._silent - self._departed:
            if self._comm.Iprobe(peer, FAREWELL_TAG):
                self._departed.add(peer)
        names = sorted(self.ranks[peer] for peer in self._silent - self._departed)
        return f"rank(s) {', '.join(map(str, names))}" if names else ""

    def abandon(self, transfers: Sequence[Transfer]) -> None:
        """Leaves the group; nothing is received any more."""
        self._failed = True
        for _, message in transfers:
            message.give_up()
        self.close()

    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """Cancels receives, see :meth:`Transport.cancel`."""
        if self._is_usable:
            for _, message in transfers:
                message.give_up()

    @property
    def _is_usable(self) -> bool:
        """Returns False where MPI has ended, and in a forked child, which must not use its parent's."""
        return not self._mpi.Is_finalized() and os.getpid() == self._process

    def fail(self, reason: str = "") -> None:
        """Leaves the group with a farewell that blames this rank; it has no room for the reason."""
        self._failed = True
        self._blamed = {self.rank}
        self.close()

    def sum(self, buffers: Sequence[torch.Tensor], what: str) -> None:
        """Sums around a ring, whose messages can be given up, unlike a collective of MPI; see :meth:`Transport.sum`."""
        if self._is_closed:
            raise self._closed()
        for buffer in buffers:
            ring_sum(self, buffer, what)

    def close(self) -> None:
        """Sends the farewell; frees the communicator if all ranks do so without failure, else leaves it to MPI's end.

        It may be called from any thread, and more than once.
        """
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        if not self._is_usable:
            return
        farewell = bytearray(rank in self._blamed for rank in range(self.world_size))
        sends = [self._comm.Isend([farewell, self._mpi.BYTE], peer, FAREWELL_TAG) for peer in self.peers]

        def all_left() -> bool:
            return bool(self._mpi.Request.Testall(sends)) and len(self._note_departures()) == len(self.peers)

        # Freeing is a collective, and the wait for it must be short.
        if not self._failed and poll_until(all_left, LEAVE_SECONDS):
            self._comm.Free()
            return
        _kept.append(sends)
        with self._testing:
            status = self._mpi.Status()
            for peer in set(self.peers) - self._departed:
                self._farewells[peer].Cancel()
                ended = poll_until(partial(self._farewells[peer].Test, status), GRACE_SECONDS)
                if not ended:
                    _kept.append(self._farewells[peer])
                elif not status.Is_cancelled():  # the farewell came first
                    self._departed.add(peer)
