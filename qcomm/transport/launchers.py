"""``torch.distributed`` under mpirun, srun or torchrun: rank, world size and meeting place of a process.

Each launcher tells a process its place in its own environment variables:

===================  =======================================  =====================================================
launcher             rank, world size                         rank and number of ranks on this machine
===================  =======================================  =====================================================
torchrun             RANK, WORLD_SIZE                         LOCAL_RANK, LOCAL_WORLD_SIZE
Open MPI             OMPI_COMM_WORLD_RANK, ..._SIZE           OMPI_COMM_WORLD_LOCAL_RANK, ..._LOCAL_SIZE
MPICH, Intel MPI     PMI_RANK, PMI_SIZE                       MPI_LOCALRANKID, MPI_LOCALNRANKS
SLURM's srun         SLURM_PROCID, SLURM_STEP_NUM_TASKS       SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE
===================  =======================================  =====================================================

The first launcher of this list that set both its variables counts: mpirun inside of a SLURM job is mpirun.

Ranks meet at MASTER_ADDR and MASTER_PORT. Without these variables, under srun, they meet on the step's first machine,
at a port that follows from the numbers of job and step. Otherwise rank 0 sends the others its address by MPI, for which
mpi4py is needed (``pip install 'qcomm[mpi]'``).
"""

import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

from qcomm.transport.mpi_library import MpiMismatchError, import_mpi

__all__ = ["Place", "find_place", "init_from_environment"]

# Names of rank, world size, rank on the machine, number of ranks on the machine.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Those of a step, which srun sets. A batch script, one process, has the job's own variables too.
    "SLURM": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
SLURM_PORTS = range(15000, 45000)  # below those that Linux gives to connections by default, mostly


class Place(NamedTuple):
    """This process among all that a launcher started; the local numbers are None if the launcher sets none."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns the place that the launcher gave this process; None where there is no launcher.

    Raises:
        ValueError: a variable is no number, or the numbers contradict each other.

    Example:
        >>> find_place({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"})
        Place(launcher='MPICH', rank=2, world_size=4, local_rank=0, local_world_size=2)
    """
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        if rank in environment and size in environment:
            tasks = environment.get(local_size)
            if tasks is not None and launcher == "SLURM":
                tasks = _tasks_here(tasks, environment.get("SLURM_NODEID", "0"))
            place = Place(
                launcher,
                _number(rank, environment[rank]),
                _number(size, environment[size]),
                _number(local_rank, environment[local_rank]) if local_rank in environment else None,
                _number(local_size, tasks) if tasks is not None else None,
            )
            if not place.rank < place.world_size:
                raise ValueError(f"{rank} must be below {size}, got {place.rank} and {place.world_size}")
            return place
    return None


def init_from_environment(backend: str = "gloo", timeout: timedelta | None = None) -> Place:
    """Initialises ``torch.distributed`` in a process that torchrun, mpirun or srun started.

    A collective: all processes of the launch call it. It sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as
    torchrun would, where they are known and not set yet. If it has to start MPI to find the meeting place, it also ends
    MPI. A process that fails then need not wait for the others in MPI_Finalize. A program that uses MPI itself imports
    ``mpi4py.MPI`` before.

    Args:
        backend: of the default process group.
        timeout: of the default process group; torch's own default if None.

    Returns:
        The place of this process.

    Raises:
        RuntimeError: there is no launcher, the process group exists already, or the meeting place is unknown.
        ValueError: the launcher's variables contradict each other or are not numbers.

    Example:
        ``mpirun -np 4 python train.py``, and in train.py::

            import qcomm
            qcomm.init_from_environment()
            model = torch.nn.parallel.DistributedDataParallel(...)
    """
    place = find_place()
    if place is None:
        names = ", ".join(f"{rank} and {size} of {name}" for name, (rank, size, *_) in LAUNCHERS.items())
        raise RuntimeError(f"no launcher started this process: it has none of {names}; use torchrun, mpirun or srun")
    if dist.is_initialized():
        raise RuntimeError("torch.distributed is initialised already; call init_from_environment instead, and once")
    for name, value in zip(LAUNCHERS["torchrun"], place[1:], strict=True):
        if value is not None:
            os.environ.setdefault(name, str(value))
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        meeting = _slurm_meeting(os.environ) if place.launcher == "SLURM" else None
        if meeting is None:
            store = _store_by_mpi(place, timeout or default_pg_timeout)
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
            return place
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meeting[0], str(meeting[1])
    restarted = _restarted_store(os.environ, place, timeout or default_pg_timeout)
    dist.init_process_group(
        backend,
        init_method=None if restarted is not None else "env://",
        store=restarted,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
    return place


def _restarted_store(environment: Mapping[str, str], place: Place, timeout: timedelta) -> dist.Store | None:
    """Returns the store of ranks that torchrun has restarted, None for all others.

    By default the ranks meet in the store of torchrun itself, which outlives them. Restarted ranks would find the
    addresses of those that have ended, so their keys get a prefix. On several machines the number of restarts may
    differ, because only that of the machine that failed grows.
    """
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or restarts == "0" or place.local_world_size != place.world_size:
        return None
    port = _number("MASTER_PORT", environment["MASTER_PORT"])
    store = dist.TCPStore(environment["MASTER_ADDR"], port, place.world_size, False, timeout)
    return dist.PrefixStore(f"restart-{restarts}", store)


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name} must be a number, got {text!r}")
    return int(text)


def _tasks_here(text: str, node: str) -> str:
    """Returns the ranks on machine ``node``, from SLURM's "2(x3),1": two on each of three machines, one on the next."""
    counts: list[str] = []
    for part in text.split(","):
        count, _, times = part.removesuffix(")").partition("(x")
        counts += [count] * _number("SLURM_STEP_TASKS_PER_NODE", times or "1")
    number = _number("SLURM_NODEID", node)
    if number >= len(counts):
        raise ValueError(f"SLURM_NODEID is {number}, but SLURM_STEP_TASKS_PER_NODE is {text!r}")
    return counts[number]


def _slurm_meeting(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Returns the step's first machine, from "node[03-07,12],other", and a port."""
    hosts = environment.get("SLURM_STEP_NODELIST")
    if not hosts:
        return None
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", hosts)[0])
    numbers = [_number(name, environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return first, SLURM_PORTS[(numbers[0] * 61 + numbers[1]) % len(SLURM_PORTS)]


def _store_by_mpi(place: Place, timeout: timedelta) -> dist.Store:
    """Returns a store that rank 0 opens at any free port, whose address it sends the others by MPI."""
    try:
        MPI = import_mpi(start=False)
    except MpiMismatchError:
        raise
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        raise RuntimeError(
            f"{place.launcher} does not tell where the ranks meet: set MASTER_ADDR and MASTER_PORT, or install mpi4py "
            f"and an MPI library for it (pip install 'qcomm[mpi]'): {error}"
        ) from error
    if MPI.Is_finalized():
        raise RuntimeError("MPI has been finalized; call init_from_environment before, or set MASTER_ADDR, MASTER_PORT")
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    try:
        return _share_store(MPI, place, timeout)
    finally:
        if ours:
            MPI.Finalize()


def _share_store(mpi: Any, place: Place, timeout: timedelta) -> dist.Store:
    world = mpi.COMM_WORLD
    if (world.rank, world.size) != (place.rank, place.world_size):
        raise RuntimeError(
            f"{place.launcher} says rank {place.rank} of {place.world_size}, mpi4py rank {world.rank} of {world.size}: "
            f"it uses another MPI, {mpi.Get_library_version().splitlines()[0]!r}"
        )
    meeting, store = None, None
    if place.rank == 0:
        # Other machines need a name that they know.
        alone = place.local_world_size == place.world_size
        address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else socket.gethostname())
        port = _number("MASTER_PORT", os.environ.get("MASTER_PORT", "0"))
        try:
            store = dist.TCPStore(address, port, place.world_size, True, timeout, wait_for_workers=False)
        except RuntimeError as error:
            world.bcast((address, 0))  # otherwise the others would wait
            raise RuntimeError(f"rank 0 cannot listen at MASTER_ADDR {address}, MASTER_PORT {port}: {error}") from error
        meeting = address, store.port
    address, port = world.bcast(meeting)
    if port == 0:
        raise RuntimeError(f"rank 0 cannot listen at {address}, where the ranks are to meet")
    if store is None:
        store = dist.TCPStore(address, port, place.world_size, False, timeout)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    return store
