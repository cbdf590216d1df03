"""``MpiGroup``: the ranks of an MPI communicator, as a counterpart of the process groups of ``torch.distributed``."""

import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import default_pg_timeout

from qcomm.transport.base import TransportError
from qcomm.transport.mpi import MpiTransport
from qcomm.transport.mpi_exit import expect_before_exit
from qcomm.transport.mpi_library import MpiMismatchError, import_mpi
from qcomm.transport.polling import poll_until

__all__ = ["MpiGroup"]


class MpiGroup:
    """A group whose messages travel over MPI: for ``group=`` of ``all_reduce``, ``process_group=`` of ``attach``.

    A collective: every rank of the communicator makes one, at the same point of the program, as with
    ``torch.distributed.new_group``. ``qcomm.all_reduce`` does not need ``torch.distributed``. DDP itself still needs
    its process group, of the same number of ranks in the same order. Results are the same bits as over gloo. Tensors
    are on the CPU. A CUDA-aware MPI has no benefit, because collectives on CUDA tensors go over NCCL.

    MPI has to be initialised for several threads, because a background thread of qcomm sends and receives. mpi4py does
    so by default. The communicator is duplicated, so that messages never meet those of the program. Do not fork
    processes that use the group.

    Args:
        comm: an ``mpi4py.MPI.Intracomm``; ``MPI.COMM_WORLD`` by default.
        timeout: maximum time that a rank waits for another; by default that of torch's process groups, 30 minutes.

    Attributes:
        rank: this process, within the group.
        size: number of ranks.

    Raises:
        TypeError: ``comm`` is no intracommunicator of mpi4py's.
        ValueError: ``comm`` is null, or ``timeout`` is not positive.
        RuntimeError: mpi4py is missing, MPI is not initialised or already finalized, or was initialised for fewer
            threads; the message names the level.
        CollectiveError: another rank did not make one within the timeout.

    Example:
        ``mpirun -np 4 python average.py``, and in average.py::

            import torch
            import qcomm
            with qcomm.MpiGroup() as group:
                tensor = torch.randn(1_000_000)
                qcomm.all_reduce(tensor, group=group)
    """

    def __init__(self, comm: Any = None, timeout: timedelta = default_pg_timeout) -> None:
        mpi = _import_mpi()
        if not isinstance(timeout, timedelta):
            raise TypeError(f"timeout must be a datetime.timedelta, got {type(timeout).__name__}")
        if timeout <= timedelta(0):
            raise ValueError(f"timeout must be positive, got {timeout}")
        if comm is None:
            comm = mpi.COMM_WORLD
        if not isinstance(comm, mpi.Intracomm):
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {type(comm).__name__}")
        if comm == mpi.COMM_NULL:
            raise ValueError("comm must not be MPI.COMM_NULL: only ranks of the communicator make a group of it")
        _check_threads(mpi)
        own, request = comm.Idup()
        # Failures become exceptions, whatever error handler the program gave its own communicator.
        if not poll_until(request.Test, timeout.total_seconds()):
            expect_before_exit(mpi, lambda: "" if request.Test() else "a rank that made no MpiGroup")
            raise TransportError(
                f"rank {comm.Get_rank()} of {comm.Get_size()} made an MpiGroup, and some other rank did not within "
                f"{timeout.total_seconds():g} s; every rank of the communicator has to, at the same point"
            )
        own.Set_errhandler(mpi.ERRORS_RETURN)
        members, world = own.Get_group(), mpi.COMM_WORLD.Get_group()
        ranks = mpi.Group.Translate_ranks(members, None, world)
        members.Free()
        world.Free()
        self._transport = MpiTransport(mpi, own, ranks, timeout)
        self.rank, self.size = self._transport.rank, self._transport.world_size
        self._is_closed = False
        self._closers: list[Callable[[], None]] = []
        weakref.finalize(self, self._transport.close)

    @property
    def transport(self) -> MpiTransport:
        """Returns the transport that carries the messages."""
        return self._transport

    @property
    def is_closed(self) -> bool:
        """Returns True if the group was closed; after a final failure it is not closed, but can only fail again."""
        return self._is_closed

    def before_close(self, closer: Callable[[], None]) -> None:
        """Registers ``closer``, to be called when the group is closed."""
        self._closers.append(closer)

    def close(self) -> None:
        """Ends the group after the collectives under way and frees its communicator.

        Every rank should call it; a second call has no effect. The group also ends when the object is deleted, and at
        the end of the process, before MPI is finalized.
        """
        self._is_closed = True
        for closer in self._closers:
            closer()
        self._transport.close()

    def __enter__(self) -> "MpiGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.is_closed else ""
        return f"MpiGroup(rank {self.rank} of {self.size}{state})"


def _import_mpi() -> Any:
    try:
        MPI = import_mpi(start=True)
    except MpiMismatchError:
        raise
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        raise RuntimeError(
            f"MpiGroup needs mpi4py and an MPI library for it: pip install 'qcomm[mpi]' ({error})"
        ) from error
    if MPI.Is_finalized():
        raise RuntimeError(
            "MPI has been finalized; import mpi4py.MPI before qcomm.init_from_environment, which otherwise ends the "
            "MPI that it starts"
        )
    if not MPI.Is_initialized():
        raise RuntimeError(
            "MPI is not initialised: leave mpi4py.rc.initialize at True, or call "
            "MPI.Init_thread(MPI.THREAD_MULTIPLE) first"
        )
    return MPI


def _check_threads(mpi: Any) -> None:
    """Raises unless several threads may call MPI: qcomm's thread calls it while the program's may."""
    names = {
        mpi.THREAD_SINGLE: "MPI_THREAD_SINGLE",
        mpi.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
        mpi.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
    }
    level = mpi.Query_thread()
    if level < mpi.THREAD_MULTIPLE:
        raise RuntimeError(
            f"MPI provides {names.get(level, level)}, and MpiGroup needs MPI_THREAD_MULTIPLE, because a thread of its "
            "own sends and receives: leave mpi4py.rc.thread_level at 'multiple' before importing mpi4py.MPI, or call "
            "MPI.Init_thread(MPI.THREAD_MULTIPLE); where that is what was asked for, this MPI library was built without"
        )
