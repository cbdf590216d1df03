"""Launch of the ranks of a run, either by a launcher or as processes that are spawned on this machine."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from qcomm.recipes.errors import RecipeError
from qcomm.transport import find_place, init_from_environment

USER_ERROR = 2  # exit code for errors that the user can correct


class _World(NamedTuple):
    """The rendezvous of the ranks, their number, and torch's threads in each of them.

    ``rendezvous`` is None if the launcher defines it.
    """

    rendezvous: str | None
    ranks: int
    threads: int


def launched_world_size() -> int | None:
    """Returns the number of ranks that torchrun, mpirun or srun started; None without a launcher.

    Raises:
        RecipeError: the launcher's variables make no sense.
    """
    try:
        place = find_place()
    except ValueError as error:
        raise RecipeError(f"the launcher's environment: {error}") from error
    return None if place is None else place.world_size


def launch(function: Callable[..., None], ranks: int | None, threads: int, *arguments: Any) -> None:
    """Calls ``function(*arguments)`` on every rank with a gloo process group.

    Args:
        function: function that is importable by name. It runs in spawned processes, unless a launcher started this
            process or there is one rank.
        ranks: number of ranks to spawn here; None takes the ranks of the launcher. Spawned ranks meet in a file, so
            that no port has to be free.
        threads: torch's threads per rank.
        arguments: picklable.

    Raises:
        RecipeError: ``ranks`` contradicts the launcher, or the ranks have no rendezvous.
        SystemExit: code 2, after a rank has printed an error of the user's.
        torch.multiprocessing.spawn.ProcessRaisedException: a rank failed otherwise; the others were ended.
    """
    launched = launched_world_size()
    if launched is not None:
        if ranks not in (None, launched):
            raise RecipeError(f"--ranks is {ranks}, but the launcher started {launched}; leave --ranks out")
        _run_here(0, _World(None, launched, threads), function, arguments)
        return
    if ranks is None or ranks < 1:
        raise RecipeError(f"--ranks is {ranks}; without a launcher it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="qcomm-") as folder:
        world = _World(Path(folder, "rendezvous").as_uri(), ranks, threads)
        if ranks == 1:
            _run_here(0, world, function, arguments)
            return
        told = Path(folder, "told")
        context = start_processes(
            _rank_main, args=(world, told, function, arguments), nprocs=ranks, start_method="spawn", join=False
        )
        try:
            while not context.join():
                pass  # it returns when one process has ended well
        except (ProcessExitedException, ProcessRaisedException):
            # The rank that is first to fail may be one that lost its peer, which is then killed before it can end with
            # a code of its own: the file counts.
            if told.exists():
                raise SystemExit(USER_ERROR) from None
            raise


def _rank_main(rank: int, world: _World, told: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        _run(rank, world, function, arguments)
    except RecipeError as error:
        # Ends with the process group standing: taking it down first would let other ranks fail before this one.
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        told.touch()
        raise SystemExit(USER_ERROR) from None
    dist.destroy_process_group()


def _run_here(rank: int, world: _World, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        _run(rank, world, function, arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(rank: int, world: _World, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(world.threads)
    if world.rendezvous is None:
        try:
            init_from_environment()
        except RuntimeError as error:
            raise RecipeError(str(error)) from error
    else:
        dist.init_process_group("gloo", init_method=world.rendezvous, rank=rank, world_size=world.ranks)
    function(*arguments)
    dist.barrier()  # no rank takes its sockets away while another still reads
