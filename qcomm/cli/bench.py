"""``qcomm bench``: measures codec and link, prints a table, and writes the profile by which ``auto`` chooses."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import torch.distributed as dist
import typer

from qcomm.codec import Grid, RangeGrid, SigmaGrid
from qcomm.collectives import CodecProfile, LinkProfile, Profile, measure_codec, measure_link, slowest
from qcomm.recipes import USER_ERROR, RecipeError, launch, launched_world_size
from qcomm.transport import GlooTransport, MpiGroup, Transport

__all__ = ["BENCH_HELP", "bench"]

SYNTHETIC = ("gauss", "laplace")
GRIDS = ("sigma", "range")
MIB = 1 << 20

BENCH_HELP = """Measure this machine: the codec, and with several ranks the links between them.

All ranks work at once, as in training. Without a launcher --ranks starts so many processes here; then the link is
this machine's loopback.

[bold]Examples[/bold]

The codec alone: [green]qcomm bench[/green]

A profile of a cluster: [green]mpirun -np 4 qcomm bench --save-profile profile.json[/green]

Then, in a program: [green]qcomm.attach(model, strategy="auto", profile="profile.json")[/green]
"""


@dataclass(frozen=True)
class _Bench:
    """What every rank measures."""

    data: str
    mib: float
    grid: Grid
    threads: int
    message_mib: float
    ranks_per_node: int
    repeats: int
    mpi: bool
    save_profile: Path | None


def bench(
    data: Annotated[
        str, typer.Option(help=f"Values: {', '.join(SYNTHETIC)}, or a file with a tensor that torch.save wrote.")
    ] = "gauss",
    mib: Annotated[float, typer.Option(help="MiB of float32 values, without a file.")] = 25.0,
    grid: Annotated[str, typer.Option(help=f"One of {', '.join(GRIDS)}.")] = "sigma",
    step: Annotated[float, typer.Option(help="Of the sigma grid, in standard deviations.")] = 1.0,
    c: Annotated[float, typer.Option("--c", help="Of the range grid, bits above the entropy.")] = 6.0,
    threads: Annotated[int, typer.Option(help="Of the codec, per rank.")] = 1,
    ranks: Annotated[
        int | None, typer.Option(help="Processes to start here.", show_default="1, or the launcher's")
    ] = None,
    message_mib: Annotated[float, typer.Option(help="MiB of a message on the link.")] = 4.0,
    ranks_per_node: Annotated[
        int, typer.Option(help="Measure links inside nodes of so many ranks and between nodes apart; 1: all alike.")
    ] = 1,
    mpi: Annotated[bool, typer.Option("--mpi", help="Measure the link over MPI; under mpirun.")] = False,
    repeats: Annotated[int, typer.Option(help="Of each measurement; medians count.")] = 20,
    save_profile: Annotated[
        Path | None, typer.Option(help="Write the profile, which attach and all_reduce read: profile=FILE.")
    ] = None,
) -> None:
    """Check what can be checked without ranks, and launch."""
    try:
        for name, value in (
            ("--threads", threads),
            ("--ranks-per-node", ranks_per_node),
            ("--repeats", repeats),
            ("--mib", mib),
            ("--message-mib", message_mib),
        ):
            if not value > 0:
                raise RecipeError(f"{name} is {value}; it must be positive")
        if grid not in GRIDS:
            raise RecipeError(f"--grid is {grid!r}; it must be one of {', '.join(GRIDS)}")
        try:
            chosen: Grid = SigmaGrid(step=step) if grid == "sigma" else RangeGrid(c=c)
        except ValueError as error:
            raise RecipeError(f"--grid {grid}: {error}") from error
        launched = launched_world_size()
        size = launched or ranks or 1
        if size == 1 and save_profile is not None:
            raise RecipeError("--save-profile needs a link to measure: use a launcher, or --ranks 2 for this machine's")
        if size % ranks_per_node or (ranks_per_node > 1 and size == ranks_per_node):
            raise RecipeError(f"--ranks-per-node is {ranks_per_node}; {size} ranks must be several such nodes")
        if mpi and launched is None:
            raise RecipeError("--mpi needs the ranks of mpirun: mpirun -np 4 qcomm bench --mpi")
        if mpi:
            _start_mpi()
        arguments = _Bench(data, mib, chosen, threads, message_mib, ranks_per_node, repeats, mpi, save_profile)
        launch(_run, ranks if launched is not None else size, 1, arguments)
    except RecipeError as error:
        _fail(str(error))


def _start_mpi() -> None:
    """Before the launch, which ends the MPI that it starts itself."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RecipeError(f"--mpi needs mpi4py and an MPI library: pip install 'qcomm[mpi]' ({error})") from error
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)


def _run(options: _Bench) -> None:
    """One rank's measurements; rank 0 prints and writes."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    values = _values(options.data, options.mib, rank)
    if world_size == 1:
        codec = measure_codec(values, options.grid, options.threads, options.repeats)
        _print(_codec_rows(codec))
        return
    try:
        group = MpiGroup() if options.mpi else None
    except RuntimeError as error:
        raise RecipeError(f"--mpi: {error}") from error
    if group is not None and (group.rank, group.size) != (rank, world_size):
        raise RecipeError(
            f"--mpi: MPI's rank {group.rank} of {group.size} is not the launcher's {rank} of {world_size}"
        )
    transport: Transport = (
        GlooTransport(dist.distributed_c10d._get_default_group()) if group is None else group.transport
    )
    try:
        profile = _profile(options, transport, values)
    finally:
        transport.close()
    if rank == 0:
        _print(_codec_rows(profile.codec) + _link_rows("link", profile.link) + _link_rows("inside", profile.inside))
        if options.save_profile is not None:
            profile.save(options.save_profile)
            typer.echo(f"written to {options.save_profile}")


def _profile(options: _Bench, transport: Transport, values: torch.Tensor) -> Profile:
    """What all ranks can do at once."""
    world_size, rank, node = transport.world_size, transport.rank, options.ranks_per_node
    transport.exchange_small([torch.zeros(1)] * world_size, "beginning together")
    codec = measure_codec(values, options.grid, options.threads, options.repeats)
    size = max(1, int(options.message_mib * MIB))
    link = measure_link(transport, range(rank % node, world_size, node), size, options.repeats)
    inside: LinkProfile | None = None
    if node > 1:
        first = rank - rank % node
        inside = measure_link(transport, range(first, first + node), size, options.repeats)
    return slowest(transport, Profile(link, codec, inside))


def _values(data: str, mib: float, rank: int) -> torch.Tensor:
    if data in SYNTHETIC:
        count = max(1, int(mib * MIB / 4))
        generator = torch.Generator().manual_seed(rank)
        if data == "gauss":
            return torch.randn(count, generator=generator)
        magnitudes = torch.empty(count).exponential_(generator=generator)
        return magnitudes * (1 - 2 * torch.randint(2, (count,), generator=generator))
    try:
        loaded = torch.load(data, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RecipeError(
            f"--data is {data!r}; it must be one of {', '.join(SYNTHETIC)}, or a file: {error}"
        ) from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise RecipeError(f"--data: {data} is no file of torch.save's: {error}") from error
    if not isinstance(loaded, torch.Tensor) or not loaded.is_floating_point() or not loaded.numel():
        raise RecipeError(
            f"--data: {data} must hold a tensor of floating-point values, it holds {type(loaded).__name__}"
        )
    if not bool(loaded.isfinite().all()):
        raise RecipeError(f"--data: {data} must hold finite values")
    return loaded.detach().float().flatten().contiguous()


def _codec_rows(codec: CodecProfile) -> list[tuple[str, str]]:
    return [
        ("codec, encode", f"{codec.encode_gb_per_s:.2f} GB/s of float32 values"),
        ("codec, decode", f"{codec.decode_gb_per_s:.2f} GB/s of float32 values"),
        ("codec, ratio", f"{codec.ratio:.1f} x, {32 / codec.ratio:.2f} bits a value"),
    ]


def _link_rows(name: str, link: LinkProfile | None) -> list[tuple[str, str]]:
    if link is None:
        return []
    return [
        (f"{name}, rate", f"{link.gb_per_s:.3f} GB/s each way at once"),
        (f"{name}, latency", f"{link.latency_us:.0f} us"),
    ]


def _print(rows: Sequence[tuple[str, str]]) -> None:
    for name, value in rows:
        typer.echo(f"{name:<16} {value}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(USER_ERROR)
