"""The machine's codec and links, measured: the :class:`qcomm.collectives.Profile` of ``qcomm bench``.

The measured operations are those of the collectives. The codec runs with its choice of a code and with error feedback.
Messages travel in pairwise rounds through the transport of the gradients, on all ranks at once. So ranks that share a
machine's cores or its network card are measured sharing them. Each result is checked before it is timed.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple

import torch

from qcomm.codec import CPU, Grid, Segment
from qcomm.collectives.cost_model import CodecProfile, LinkProfile, Profile
from qcomm.collectives.packing import choose, pack, unpack
from qcomm.errors import CollectiveError
from qcomm.transport import Transfer, Transport, TransportError

__all__ = ["measure_codec", "measure_link", "slowest"]

LATENCY_REPEATS = 50
LATENCY_TAG = 32764  # beside those of Mail


def measure_codec(values: torch.Tensor, grid: Grid, num_threads: int = 1, repeats: int = 20) -> CodecProfile:
    """Encodes and decodes ``values`` as a collective does, error feedback included; medians.

    Args:
        values: 1-D float32, of at least one element.
        grid: the grid on which they are quantized.
        num_threads: maximum number of threads that encode and decode.
        repeats: at least 1.

    Raises:
        CollectiveError: the decoded values are not those that were encoded.

    Example:
        >>> from qcomm.codec.grids import SigmaGrid
        >>> measure_codec(torch.randn(10_000), SigmaGrid(1.0), repeats=3).ratio > 10
        True
    """
    residual, decoded = torch.zeros_like(values), torch.empty_like(values)
    packet = torch.empty(0, dtype=torch.uint8, device=CPU)
    encode_seconds, decode_seconds = [], []
    for _ in range(repeats + 1):
        residual.zero_()
        begin = time.perf_counter()
        measured = choose(values, grid, residual, 1.0, num_threads)
        packet = pack([Segment(values, *measured)], num_threads=num_threads)
        encoded = time.perf_counter()
        unpack(packet, decoded, 0, num_threads=num_threads)
        decode_seconds.append(time.perf_counter() - encoded)
        encode_seconds.append(encoded - begin)
    # The decoded values and the residual add up to the values.
    wrong = float((decoded + residual - values).abs().max())
    if not wrong <= 1e-6 * float(values.abs().max()) or float(residual.norm()) > float(values.norm()):
        raise CollectiveError(f"the codec is wrong: decoded values and residuals differ from the values by {wrong:g}")
    gigabytes = values.nbytes * 1e-9
    return CodecProfile(
        gigabytes / statistics.median(encode_seconds[1:]),  # the first one touched the memory
        gigabytes / statistics.median(decode_seconds[1:]),
        max(1.0, values.nbytes / packet.numel()),
    )


def measure_link(transport: Transport, members: Sequence[int], message_bytes: int, repeats: int = 10) -> LinkProfile:
    """Exchanges messages among some ranks, all at once for the latency, in pairwise rounds for the rate; medians.

    As in a collective, the receives of the messages that tell the latency are posted before.

    Args:
        transport: of the group. All its ranks call this, each with those that it exchanges with.
        members: at least two ranks, this one among them; every one of them passes the same.
        message_bytes: to each of the others.
        repeats: at least 1.

    Raises:
        TransportError: a rank is gone.
        CollectiveError: a message arrived with other bytes.
    """
    own, count = members.index(transport.rank), len(members)
    rounds = [(members[(own + d) % count], members[(own - d) % count]) for d in range(1, count)]

    def exchange(nbytes: int) -> float:
        outgoing = [torch.full((nbytes,), transport.rank % 256, dtype=torch.uint8, device=CPU)] * transport.world_size
        incoming = [torch.empty(nbytes, dtype=torch.uint8, device=CPU) for _ in range(transport.world_size)]
        ready = [torch.zeros(1, dtype=torch.float32, device=CPU)] * transport.world_size
        transport.exchange_small(ready, "beginning a measurement")
        begin = time.perf_counter()
        for target, source in rounds:
            transport.transfer(incoming, outgoing, [source], [target], "measuring the link")
        seconds = time.perf_counter() - begin
        if any(not bool((incoming[source] == source % 256).all()) for _, source in rounds):
            raise CollectiveError("the link is wrong: a message arrived with other bytes than were sent")
        return seconds

    def trip() -> float:
        message = torch.zeros(1, dtype=torch.uint8, device=CPU)
        started: list[Transfer] = []
        try:
            for _, source in rounds:
                started.append(transport.start_receive(source, torch.empty_like(message), LATENCY_TAG))
            transport.exchange_small(
                [torch.zeros(1, dtype=torch.float32, device=CPU)] * transport.world_size, "beginning a measurement"
            )
            begin = time.perf_counter()
            for target, _ in rounds:
                started.append(transport.start_send(target, message, LATENCY_TAG))
        except RuntimeError as error:
            transport.abandon(started)
            raise TransportError(f"measuring the link: a connection is broken: {error}") from error
        transport.finish(started, "measuring the link")
        return time.perf_counter() - begin

    latency = statistics.median([trip() for _ in range(LATENCY_REPEATS)])
    exchange(message_bytes)  # buffers and windows grow
    seconds = statistics.median([exchange(message_bytes) for _ in range(repeats)]) / len(rounds)
    # A round's receive begins with its message, which costs a trip more. On a fast link few bytes may take as long as
    # many; a tenth is left for the bytes themselves.
    return LinkProfile(message_bytes * 1e-9 / max(seconds - 2 * latency, 0.1 * seconds), latency * 1e6)


def slowest(transport: Transport, profile: Profile) -> Profile:
    """Returns a profile that every rank of the group can reach, the same on all ranks.

    It has the lowest rates, the longest latencies and the mean ratio.
    """
    inside = profile.inside
    own = torch.tensor(
        [*astuple(profile.link), *astuple(profile.codec), *(astuple(inside) if inside else (1.0, 1.0))],
        dtype=torch.float64,
        device=CPU,
    )
    every = torch.stack(transport.exchange_small([own] * transport.world_size, "comparing measurements"))
    least, most = every.amin(0).tolist(), every.amax(0).tolist()
    return Profile(
        LinkProfile(least[0], most[1]),
        CodecProfile(least[2], least[3], float(every[:, 4].mean())),
        LinkProfile(least[5], most[6]) if inside else None,
    )
