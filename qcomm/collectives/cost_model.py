"""The cost model of the strategies: the alpha-beta model of links, with terms for the codec.

The model predicts the seconds of one collective. There are W ranks. V bytes of values are in float32 or float64, and
v bytes of the buffer in its own dtype. alpha is the latency of one message, beta = 1 / bandwidth, and mu the time that
a rank takes for a message itself. The codec takes e and d seconds per byte of uncompressed values to encode and to
decode, and r is its ratio. In an exchange among w ranks the messages to all others are under way at once, with their
headers. ``x(m, w)`` is such an exchange, in which a rank sends m bytes in all::

    x(m, w)        t alpha + (W - 1) mu + beta m       t = 1; 3 where packets are tails; 0 for w = 1
    none           x(0, W) + 2 (W - 1) (alpha + mu) + 2 (W - 1) / W * v * beta                a header, gloo's ring
    bf16           the same with half of v, excluded values beside it, and d V to convert there and back;
                   like none unless v is of float32
    all_gather     e V + x((W - 1) V / r, W) + d W V
    two_phase      in the order of qcomm.collectives.two_phase_schedule, for each of the slices:
                   e U, beta T, d U + e V / W, beta T, d V          U = (W - 1) / W * V, T = U / r, each over slices;
                   a slice arrives t alpha after the link has carried it, the second one leaves after the headers came
    exact_sum      x(0, W) + 2 e V + x(T, W) + d V + e V / W + x(T', W) + d V    T' with log2(W) / 2 more bits
    hierarchical   x((a - 1) / a * V, a) + (e + 2 d) V / a + e V / W + 2 x(T'', b) + x((a - 1) / a * v, a)
                                                                                 T'' = (b - 1) / b * V / a / r

A packet above MESSAGE_BYTES is a tail: it follows a message that tells of it, when its receiver has asked for it, which
are two trips more. In hierarchical all ranks exchange headers before each of the four exchanges, also those inside.

In two_phase a rank does not encode its own part of the buffer, and codec and link work at the same time. Nothing else
overlaps in this model, and all ranks send at once without slowing each other down. The model distinguishes strategies
that differ widely. Only a trial can tell which of two close ones is faster. Of several collectives on the channels of a
group, the planner's simulator shares link and codec (:mod:`qcomm.planner.simulator`).

R. Hockney, "The communication challenge for MPP", Parallel Computing 20, 1994; R. Thakur et al., "Optimization of
collective communication operations in MPICH", IJHPCA 19, 2005.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcomm.collectives.two_phase_schedule import MOST_SLICES, SLICE_ELEMENTS, Step, schedule
from qcomm.transport import MESSAGE_BYTES

__all__ = [
    "PLAUSIBLE",
    "CodecProfile",
    "LinkProfile",
    "Profile",
    "TwoPhase",
    "Workload",
    "bytes_sent",
    "candidates",
    "exchange_latency",
    "hierarchical_latencies",
    "seconds",
    "two_phase_times",
]

FORMAT = 1
# A strategy is left out if on every plausible machine another one takes less than 1 / MARGIN of its time.
MARGIN = 1.25
# mu: a send, a receive, and a header of Python's; an assumption.
MESSAGE_SECONDS = 20e-6
TAIL_TRIPS = 2  # more than those of a packet that travels with its header


def _positive(name: str, value: object, least: float = 0.0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0.0 and value >= least):
        raise ValueError(f"{name} must be {f'at least {least:g}' if least else 'positive'} and finite, got {value}")


@dataclass(frozen=True)
class LinkProfile:
    """The links that carry messages between ranks.

    Args:
        gb_per_s: 10^9 bytes a second that a rank sends while it receives as many.
        latency_us: microseconds until a message of few bytes has arrived.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    gb_per_s: float
    latency_us: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _positive(field.name, getattr(self, field.name))


@dataclass(frozen=True)
class CodecProfile:
    """The speed and the ratio of a rank's codec, on the threads it has.

    Args:
        encode_gb_per_s, decode_gb_per_s: 10^9 bytes of uncompressed values a second.
        ratio: bytes of uncompressed values by bytes of packets, at least 1.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    encode_gb_per_s: float
    decode_gb_per_s: float
    ratio: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _positive(field.name, getattr(self, field.name), least=1.0 if field.name == "ratio" else 0.0)


@dataclass(frozen=True)
class Profile:
    """A machine: its links, its codec, and, if it has nodes, the links inside them.

    Example:
        >>> profile = Profile(LinkProfile(gb_per_s=0.125, latency_us=60.0), CodecProfile(2.0, 4.0, ratio=15.0))
        >>> workload = Workload(elements=6_553_600, world_size=4)
        >>> seconds("two_phase", workload, profile) < seconds("none", workload, profile)
        True
    """

    link: LinkProfile
    codec: CodecProfile
    inside: LinkProfile | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("link", LinkProfile), ("codec", CodecProfile), ("inside", (LinkProfile, type(None)))):
            if not isinstance(getattr(self, name), kinds):
                raise TypeError(f"{name} must not be a {type(getattr(self, name)).__name__}")

    def describe(self) -> str:
        """Returns the profile as text, for the comparison between ranks.

        Two texts are equal if and only if the profiles are.

        Example:
            >>> Profile(LinkProfile(0.125, 60.0), CodecProfile(2.0, 4.0, 15.0)).describe()
            'link 0.125 GB/s 60.0 us, codec 2.0 4.0 GB/s 15.0 x'
        """
        link, codec = dataclasses.astuple(self.link), dataclasses.astuple(self.codec)
        text = "link {!r} GB/s {!r} us, codec {!r} {!r} GB/s {!r} x".format(*link, *codec)
        if self.inside is not None:
            text += ", inside {!r} GB/s {!r} us".format(*dataclasses.astuple(self.inside))
        return text

    def save(self, path: Path | str) -> None:
        """Writes the profile as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Profile":
        """Reads a profile that :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file holds no such profile; the message names the fault.
        """
        try:
            found = json.loads(Path(path).read_text())
            if not isinstance(found, Mapping) or found.get("format") != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}")
            inside = found.get("inside")
            return cls(
                LinkProfile(**_fields(found, "link")),
                CodecProfile(**_fields(found, "codec")),
                None if inside is None else LinkProfile(**_fields(found, "inside")),
            )
        except (TypeError, ValueError) as error:  # json's own errors are ValueErrors
            raise ValueError(f"{path} is not a profile: {error}") from error


def _fields(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(found.get(name), dict):
        raise ValueError(f"it has no {name!r}")
    return dict(found[name])


@dataclass(frozen=True)
class Workload:
    """The tensors that are averaged: ``elements`` of a dtype of ``item_bytes`` over ``world_size`` ranks.

    ``ranks_per_node`` of the ranks are on each node. ``raw_elements`` of the elements belong to small or excluded
    tensors and are not compressed. ``exact_elements`` of these are not rounded either.
    """

    elements: int
    world_size: int
    item_bytes: int = 4
    ranks_per_node: int = 1
    raw_elements: int = 0
    exact_elements: int = 0

    @property
    def buffer_bytes(self) -> int:
        """Returns the bytes of the buffer in its own dtype."""
        return self.elements * self.item_bytes

    @property
    def value_bytes(self) -> int:
        """Returns the bytes of the buffer in the dtype of sums."""
        return self.elements * self._value_item

    def packet_bytes(self, ratio: float) -> float:
        """Returns the bytes of the packets of all elements, those that are compressed by ``ratio``."""
        return self._value_item * (self.raw_elements + (self.elements - self.raw_elements) / ratio)

    def sum_bytes(self, ratio: float) -> float:
        """Returns the bytes of packets of sums of W symbols, which have log2(W) / 2 more bits than one."""
        bits = 8.0 * self._value_item
        return self.packet_bytes(max(1.0, bits / (bits / ratio + math.log2(self.world_size) / 2)))

    @property
    def _value_item(self) -> int:
        return max(self.item_bytes, 4)


def _share(parts: int) -> float:
    """Returns the part of a buffer cut in ``parts`` that is not a rank's own."""
    return (parts - 1) / parts


def _is_rounded(strategy: str, workload: Workload) -> bool:
    """Applies :func:`qcomm.collectives.uncompressed_values.is_rounded` to a workload."""
    return strategy == "bf16" and workload.item_bytes == 4 and 2 * workload.exact_elements < workload.elements


def bytes_sent(strategy: str, workload: Workload, ratio: float) -> tuple[float, float]:
    """Returns the bytes that a rank sends on average, without headers.

    The first number counts bytes between nodes or in a flat exchange, the second those inside a node.

    Raises:
        ValueError: the strategy is unknown.
    """
    world, values, buffer = workload.world_size, workload.value_bytes, workload.buffer_bytes
    packets = workload.packet_bytes(ratio)
    if strategy in ("none", "bf16"):
        rounded = buffer / 2 + 4 * workload.exact_elements if _is_rounded(strategy, workload) else buffer
        return 2 * _share(world) * rounded, 0.0
    if strategy == "all_gather":
        return (world - 1) * packets, 0.0
    if strategy == "two_phase":
        return 2 * _share(world) * packets, 0.0
    if strategy == "exact_sum":
        return _share(world) * (packets + workload.sum_bytes(ratio)), 0.0
    if strategy == "hierarchical":
        inner = workload.ranks_per_node
        return 2 * _share(world // inner) * packets / inner, _share(inner) * (values + buffer)
    raise ValueError(f"strategy must be a named algorithm of the mean, got {strategy!r}")


def seconds(strategy: str, workload: Workload, profile: Profile) -> float:
    """Predicts the time of one collective.

    Args:
        strategy: ``"none"``, ``"bf16"``, ``"all_gather"``, ``"two_phase"``, ``"exact_sum"`` or ``"hierarchical"``.
        workload: the tensors that are averaged.
        profile: the machine. Without ``inside`` all links are alike.

    Raises:
        ValueError: the strategy is unknown.
    """
    between, inside = bytes_sent(strategy, workload, profile.codec.ratio)
    world, inner = workload.world_size, workload.ranks_per_node
    encode, decode = 1e-9 / profile.codec.encode_gb_per_s, 1e-9 / profile.codec.decode_gb_per_s
    values, link, near = workload.value_bytes, profile.link, profile.inside or profile.link
    packets, codec, time = workload.packet_bytes(profile.codec.ratio), 0.0, 0.0
    if strategy in ("none", "bf16"):
        codec = decode * values if _is_rounded(strategy, workload) else 0.0
        time = exchange_latency(link, world) + 2 * (world - 1) * (1e-6 * link.latency_us + MESSAGE_SECONDS)
    elif strategy == "all_gather":
        codec = encode * values + decode * world * values
        time = exchange_latency(link, world, packets)
    elif strategy == "two_phase":
        return two_phase_times(workload, profile).seconds()
    elif strategy == "exact_sum":
        # Rounding to the shared grid and measuring twice take about as long as encoding.
        codec = encode * values * (2 + 1 / world) + 2 * decode * values
        sums = workload.sum_bytes(profile.codec.ratio)
        time = sum(exchange_latency(link, world, size / world) for size in (0.0, packets, sums))
    else:
        codec = encode * values * (1 / inner + 1 / world) + 2 * decode * values / inner
        time = sum(hierarchical_latencies(workload, profile)) + 1e-9 / near.gb_per_s * inside
    return codec + time + 1e-9 / link.gb_per_s * between


def exchange_latency(link: LinkProfile, ranks: int, packet_bytes: float = 0.0) -> float:
    """Returns the seconds of an exchange among ``ranks`` beside those of its bytes; 0 for one rank.

    Args:
        link: that carries the messages.
        ranks: that exchange packets.
        packet_bytes: of a packet for one rank, which is a tail above MESSAGE_BYTES.

    Example:
        >>> link = LinkProfile(gb_per_s=0.0125, latency_us=50_000.0)
        >>> round(exchange_latency(link, 4), 3), round(exchange_latency(link, 4, packet_bytes=5e6), 3)
        (0.05, 0.15)
    """
    if ranks == 1:
        return 0.0
    return _trips(packet_bytes) * 1e-6 * link.latency_us + (ranks - 1) * MESSAGE_SECONDS


def hierarchical_latencies(workload: Workload, profile: Profile) -> tuple[float, float, float, float]:
    """Returns the latencies of the exchanges of ``hierarchical``: inside, values, means, inside."""
    world, inner = workload.world_size, workload.ranks_per_node
    near, nodes = profile.inside or profile.link, world // inner
    # The headers of all ranks come with each exchange; their links are those between nodes, if there are several.
    headers = exchange_latency(profile.link if nodes > 1 else near, world)

    def inside(size: float) -> float:
        return headers + (_trips(size / inner) - 1) * 1e-6 * near.latency_us if inner > 1 else headers

    between = headers
    if nodes > 1:
        packet = workload.packet_bytes(profile.codec.ratio) / world
        between += (_trips(packet) - 1) * 1e-6 * profile.link.latency_us
    return inside(workload.value_bytes), between, between, inside(workload.buffer_bytes)


def _trips(packet_bytes: float) -> int:
    """Returns the number of consecutive trips of an exchange of packets of ``packet_bytes`` each."""
    return 1 if packet_bytes <= MESSAGE_BYTES else 1 + TAIL_TRIPS


@dataclass(frozen=True)
class TwoPhase:
    """The seconds of each slice of a ``two_phase`` mean: a rank has three steps, and two of them precede an exchange.

    Args:
        slices: number of slices.
        latency: from when the link has carried a slice until it has arrived.
        encode, reduce, decode: of the codec.
        exchange: of the link, for a slice's messages in one phase.
        handshake: until the headers have come, for which all messages but the first ones wait.

    Example:
        >>> TwoPhase(slices=1, latency=0.0, encode=1.0, exchange=3.0, reduce=1.0, decode=2.0).seconds()
        10.0
        >>> TwoPhase(slices=4, latency=0.0, encode=0.25, exchange=0.75, reduce=0.25, decode=0.5).seconds()
        6.75
    """

    slices: int
    latency: float
    encode: float
    exchange: float
    reduce: float
    decode: float
    handshake: float = 0.0

    def seconds(self) -> float:
        """Returns the time of all slices.

        A rank does its steps in the order of the schedule, and the link carries one slice at a time.
        """
        rank = link = 0.0
        arrived: dict[tuple[Step, int], float] = {}
        for step, number in schedule(self.slices):
            if step is Step.ENCODE:
                rank += self.encode
                if number > 0:
                    rank = max(rank, self.handshake)
            elif step is Step.REDUCE:
                rank = max(rank, arrived[Step.ENCODE, number]) + self.reduce
            else:
                rank = max(rank, arrived[Step.REDUCE, number]) + self.decode
                continue
            link = max(link, rank) + self.exchange
            arrived[step, number] = link + self.latency
        return rank


def two_phase_times(workload: Workload, profile: Profile) -> TwoPhase:
    """Returns the steps of ``two_phase``, whose slices are those that the library cuts."""
    world, values = workload.world_size, workload.value_bytes
    encode, decode = 1e-9 / profile.codec.encode_gb_per_s, 1e-9 / profile.codec.decode_gb_per_s
    slices = max(1, min(MOST_SLICES, workload.elements // (SLICE_ELEMENTS * world)))
    between, _ = bytes_sent("two_phase", workload, profile.codec.ratio)
    alpha = 1e-6 * profile.link.latency_us if world > 1 else 0.0
    packet = workload.packet_bytes(profile.codec.ratio) / world / slices
    return TwoPhase(
        slices,
        latency=_trips(packet) * alpha,
        encode=encode * values * _share(world) / slices,
        # A rank hands over one message after another.
        exchange=1e-9 / profile.link.gb_per_s * between / 2 / slices + (world - 1) * MESSAGE_SECONDS,
        reduce=(decode * _share(world) + encode / world) * values / slices,
        decode=decode * values / slices,
        handshake=alpha,
    )


# From 100 Mb/s to 100 Gb/s, from one switch to one campus, from a busy core to many threads, from fine grids to coarse.
PLAUSIBLE = tuple(
    Profile(LinkProfile(rate, latency), CodecProfile(codec, 2 * codec, ratio), near)
    for rate, latency, codec, ratio, near in itertools.product(
        (0.0125, 12.5), (20.0, 1000.0), (0.5, 5.0), (6.0, 28.0), (None, LinkProfile(100.0, 10.0))
    )
)


@functools.lru_cache(maxsize=4096)
def candidates(workload: Workload, names: Sequence[str], profiles: Sequence[Profile] = PLAUSIBLE) -> tuple[str, ...]:
    """Returns those of ``names`` that may be the fastest on some machine, in their order.

    The result is a pure function of the arguments, equal on all ranks. A strategy stays if its predicted time on one
    of the machines is at most MARGIN times that of the fastest.

    Args:
        workload: the tensors that are averaged.
        names: of strategies, as a tuple.
        profiles: the machines to consider, as a tuple; a single one if it was measured.

    Example:
        >>> names = "none", "all_gather", "two_phase"
        >>> candidates(Workload(10_000, 4), names), candidates(Workload(10_000_000, 32), names)
        (('none', 'all_gather', 'two_phase'), ('none', 'two_phase'))
    """
    kept = set()
    for profile in profiles:
        times = {name: seconds(name, workload, profile) for name in names}
        limit = MARGIN * min(times.values())
        kept |= {name for name, time in times.items() if time <= limit}
    return tuple(name for name in names if name in kept)
