"""The command ``qcomm bench``: rates of codec and link, and the profile by which ``auto`` chooses."""

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import typer

from qcomm.cli.options import option, takes
from qcomm.codec import Grid, RangeGrid, SigmaGrid
from qcomm.collectives import CodecProfile, LinkProfile, Profile, measure_codec, measure_link, slowest
from qcomm.recipes import RecipeError, launch, launched_world_size
from qcomm.transport import GlooTransport, MpiGroup, Transport

__all__ = ["BENCH_HELP", "bench"]

SYNTHETIC = ("gauss", "laplace")
GRIDS = ("sigma", "range")
MIB = 1 << 20
DISTANT_US = 1000.0

BENCH_HELP = """Measure this machine: the codec, and with several ranks the links between them.

All ranks work at once, as in training. Without a launcher --ranks starts so many processes here; then the link is
this machine's loopback.

[bold]Examples[/bold]

The codec alone: [green]qcomm bench[/green]

A profile of a cluster: [green]mpirun -np 4 qcomm bench --save-profile profile.json[/green]

Then, in a program: [green]qcomm.attach(model, strategy="auto", profile="profile.json")[/green]
"""


@dataclass(frozen=True)
class BenchOptions:
    """The options of ``qcomm bench``, which every rank receives.

    Raises:
        RecipeError: a value that is out of its range.
    """

    data: str = field(
        default="gauss",
        metadata=option("Values: {choices}, or a file with a tensor that torch.save wrote.", choices=SYNTHETIC),
    )
    mib: float = field(default=25.0, metadata=option("MiB of float32 values, without a file."))
    grid: str = field(default="sigma", metadata=option("One of {choices}.", choices=GRIDS))
    step: float = field(default=1.0, metadata=option("Of the sigma grid, in standard deviations."))
    c: float = field(default=6.0, metadata=option("Of the range grid, bits above the entropy."))
    threads: int = field(default=1, metadata=option("Of the codec, per rank."))
    ranks: int | None = field(default=None, metadata=option("Processes to start here.", shown="1, or the launcher's"))
    message_mib: float = field(default=4.0, metadata=option("MiB of a message on the link."))
    ranks_per_node: int = field(
        default=1,
        metadata=option("Measure links inside nodes of so many ranks and between nodes apart; 1: all alike."),
    )
    mpi: bool = field(default=False, metadata=option("Measure the link over MPI; under mpirun.", flag="--mpi"))
    repeats: int = field(default=20, metadata=option("Of each measurement; medians count."))
    save_profile: Path | None = field(
        default=None, metadata=option("Write the profile, which attach and all_reduce read: profile=FILE.")
    )

    def __post_init__(self) -> None:
        for name in ("threads", "ranks_per_node", "repeats", "mib", "message_mib"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")
        if self.grid not in GRIDS:
            raise RecipeError(f"--grid is {self.grid!r}; it must be one of {', '.join(GRIDS)}")
        try:
            _ = self.chosen_grid
        except ValueError as error:
            raise RecipeError(f"--grid {self.grid}: {error}") from error

    @property
    def chosen_grid(self) -> Grid:
        """The grid with its step or its bits."""
        return SigmaGrid(step=self.step) if self.grid == "sigma" else RangeGrid(c=self.c)


@takes(BenchOptions, RecipeError)
def bench(options: BenchOptions) -> None:
    """Checks the parts that need no ranks, and launches."""
    launched = launched_world_size()
    size = launched or options.ranks or 1
    _check_world(options, size)
    if options.mpi:
        if launched is None:
            raise RecipeError("--mpi needs the ranks of mpirun: mpirun -np 4 qcomm bench --mpi")
        _start_mpi()
    launch(_run, options.ranks if launched is not None else size, 1, options)


def _check_world(options: BenchOptions, size: int) -> None:
    node = options.ranks_per_node
    if size == 1 and options.save_profile is not None:
        raise RecipeError("--save-profile needs a link to measure: use a launcher, or --ranks 2 for this machine's")
    if size % node or (node > 1 and size == node):
        raise RecipeError(f"--ranks-per-node is {node}; {size} ranks must be several such nodes")


def _start_mpi() -> None:
    """Initializes MPI before the launch, which ends the MPI that it starts itself."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RecipeError(f"--mpi needs mpi4py and an MPI library: pip install 'qcomm[mpi]' ({error})") from error
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)


def _run(options: BenchOptions) -> None:
    """Measures on this rank; rank 0 prints and writes."""
    world_size, rank, load = dist.get_world_size(), dist.get_rank(), os.getloadavg()[0]
    values = _values(options.data, options.mib, rank)
    if world_size == 1:
        codec = measure_codec(values, options.chosen_grid, options.threads, options.repeats)
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
        for text in _doubts(load, profile):
            typer.echo(f"warning: {text}", err=True)
        _print(_codec_rows(profile.codec) + _link_rows("link", profile.link) + _link_rows("inside", profile.inside))
        if options.save_profile is not None:
            profile.save(options.save_profile)
            typer.echo(f"written to {options.save_profile}")


def _profile(options: BenchOptions, transport: Transport, values: torch.Tensor) -> Profile:
    """Measures codec and links while all ranks work, and returns the slowest of each."""
    world_size, rank, node = transport.world_size, transport.rank, options.ranks_per_node
    transport.exchange_small([torch.zeros(1, dtype=torch.float32)] * world_size, "beginning together")
    codec = measure_codec(values, options.chosen_grid, options.threads, options.repeats)
    size = max(1, int(options.message_mib * MIB))
    link = measure_link(transport, range(rank % node, world_size, node), size, options.repeats)
    inside: LinkProfile | None = None
    if node > 1:
        first = rank - rank % node
        inside = measure_link(transport, range(first, first + node), size, options.repeats)
    return slowest(transport, Profile(link, codec, inside))


def _doubts(load: float, profile: Profile) -> list[str]:
    """Says why the figures may not be those of training.

    Args:
        load: processes that were running or waiting on rank 0's host, before the measurement.
        profile: that was measured.
    """
    found, cores = [], os.cpu_count() or 1
    if load > cores:
        found.append(
            f"this host was busy (load {load:.1f} on {cores} cores): rates and latencies are those of a busy host, and "
            "auto and qcomm plan will believe them"
        )
    if profile.link.latency_us > DISTANT_US:
        found.append(
            f"the link's latency is {profile.link.latency_us / 1e3:.1f} ms, as between cities; hosts that are near "
            "each other were busy"
        )
    return found


def _values(data: str, mib: float, rank: int) -> torch.Tensor:
    if data in SYNTHETIC:
        count = max(1, int(mib * MIB / 4))
        generator = torch.Generator().manual_seed(rank)
        if data == "gauss":
            return torch.randn(count, generator=generator, dtype=torch.float32)
        magnitudes = torch.empty(count, dtype=torch.float32).exponential_(generator=generator)
        return magnitudes * (1 - 2 * torch.randint(2, (count,), generator=generator, dtype=torch.int64))
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
