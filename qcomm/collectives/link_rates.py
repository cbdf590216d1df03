"""The rates of all ranks' links, measured."""

import time
from pathlib import Path

import torch

from qcomm.codec import CPU
from qcomm.collectives.options import ReduceOptions
from qcomm.communicator import (
    Communicator,
    Fields,
    Group,
    Phase,
    check_connections,
    deal,
    get_world_size,
    resolve_group,
)
from qcomm.transport import KeyFile

__all__ = ["measure_link_rates"]

FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 26
ENOUGH_SECONDS = 0.1  # of an exchange whose rate counts
TRIPS = 5  # and as long as so many messages of one byte


def measure_link_rates(
    process_group: Group | None = None,
    *,
    secret: KeyFile | Path | str | None = None,
    connections: int | str | None = None,
) -> tuple[float, ...]:
    """Measures what the link of each rank carries, by messages between all pairs; for the option ``link_rates``.

    Every rank exchanges messages with one other at a time, in both directions, as in a training step. The fastest of
    these exchanges is the rate of its link, since a partner may be slow. It takes a second or two a rank, and longer
    where links differ much. A collective: all ranks of the group call it, while nothing else uses their links.

    Args:
        process_group: by default the default process group.
        secret: of the group's connections, as the hook will have it, see :class:`qcomm.collectives.ReduceOptions`.
        connections: the same.

    Returns:
        Mb/s by rank of the group, equal on all ranks.

    Raises:
        TypeError, ValueError: naming the argument.
        OSError: the key file cannot be read.
        CollectiveError: a rank is gone.

    Example:
        >>> import tempfile
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> measure_link_rates()  # a rank alone has no links
        (1.0,)
        >>> dist.destroy_process_group()
    """
    group = resolve_group(process_group)
    options = ReduceOptions(secret=secret, connections=connections).connection_options
    if get_world_size(group) == 1:
        return (1.0,)
    check_connections(group, options)
    communicator = deal(group, options)
    return communicator.submit(lambda: _measure(communicator), alone=True).result()


def _measure(communicator: Communicator) -> tuple[float, ...]:
    ranks, own = communicator.world_size, communicator.rank
    nothing = [0] * ranks
    fault = communicator.begin()
    communicator.handshake(Phase.ENCODE, Fields({"operation": "measure_link_rates"}), nothing, nothing, fault).finish()
    rates = [0.0] * ranks
    for turn in range(ranks):
        # Every pair meets in one round. A rank may rest in it.
        partners = [(turn - rank) % ranks for rank in range(ranks)]
        pairs = [rank for rank in range(ranks) if partners[rank] != rank]
        size, trip = FIRST_BYTES, min(_exchange(communicator, partners[own], 1) for _ in range(3))
        while True:
            _exchange(communicator, partners[own], size)  # windows grow
            told = _tell(communicator, [_exchange(communicator, partners[own], size), trip])
            seconds = {rank: max(told[rank][0], told[partners[rank]][0]) for rank in pairs}
            trips = {rank: max(told[rank][1], told[partners[rank]][1]) for rank in pairs}
            if size >= MOST_BYTES or all(seconds[rank] > max(ENOUGH_SECONDS, TRIPS * trips[rank]) for rank in pairs):
                break
            size *= 2
        for rank in pairs:
            # A tenth is left for the bytes where few take as long as many.
            rates[rank] = max(rates[rank], 8e-6 * size / max(seconds[rank] - trips[rank], 0.1 * seconds[rank]))
    return tuple(float(f"{rate:.3g}") for rate in rates)


def _exchange(communicator: Communicator, partner: int, size: int) -> float:
    """Returns the seconds of an exchange of ``size`` bytes with one rank; of nothing, with the rank itself."""
    outgoing = torch.zeros(size, dtype=torch.uint8, device=CPU)
    incoming = torch.empty_like(outgoing)
    begin = time.perf_counter()
    if partner != communicator.rank:
        communicator.swap(partner, outgoing, incoming)
    return time.perf_counter() - begin


def _tell(communicator: Communicator, values: list[float]) -> list[list[float]]:
    """Returns what each rank passed, on all ranks; they go on together."""
    own = torch.tensor(values, dtype=torch.float64, device=CPU)
    every = [own.clone() for _ in range(communicator.world_size)]
    communicator.exchange([own] * communicator.world_size, every, Phase.PREPARE)
    every[communicator.rank] = own
    return [each.tolist() for each in every]
