"""Links with delay, jitter, loss, and rates of their own in each direction, for the hosts of netlab.py.

This is what tc offers where the kernel has netem, and works without it: the hosts have TUN devices, and a hub in user
space (wan_hub/, compiled on first use) carries their packets. docs/measurements.md says what it models, and how
exactly.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).resolve().with_name("wan_hub")
BUILD = SOURCES.parent.parent / "build" / "wan-hub"
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra")
UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MTU = 1500
FRAME = MTU + 14  # of a full packet, as tc counts it: with an Ethernet header
# The most that goes through the hub as one packet: TCP segments of this much time at the host's rate. More of them cost
# less processor time, and make the traffic more bursty.
BATCH_SECONDS = 250e-6
MOST_SEGMENTS = 65535 // MTU
SHORTEST_QUEUE_MS = 50.0  # as of netlab's links without delay
MOST_SEED = 2**32 - 1
CLOSING_SECONDS = 10.0


class HubError(RuntimeError):
    """The hub cannot be compiled or started, or has ended, and why."""


def bits_per_second(rate: str) -> float:
    """A rate in bits a second, as tc writes it.

    Example:
        >>> bits_per_second("2.5mbit")
        2500000.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?bit)", rate)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"rate must be a number with bit, kbit, mbit or gbit, such as 100mbit, got {rate!r}")
    return float(match[1]) * UNITS[match[2]]


def share(text: str) -> float:
    """A share as a fraction or in percent.

    Example:
        >>> share("0.1%"), share("0.001")
        (0.001, 0.001)
    """
    number = re.fullmatch(r"(\d+(?:\.\d*)?(?:e-?\d+)?)(%?)", text)
    found = float(number[1]) / (100 if number[2] else 1) if number else -1.0
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, or in percent such as 0.1%, got {text!r}")
    return found


@dataclass(frozen=True)
class Wan:
    """What packets meet between hosts, beside a rate.

    A value for each host is given as many values as there are hosts.

    Args:
        delay_ms: one way, between any two hosts.
        host_delays_ms: in its place, of each host; between two it is their sum.
        jitter_ms: at most this is added to a packet's delay, uniformly.
        reorder: whether packets between the same two hosts may overtake each other through jitter.
        loss: share of packets that are lost, independently of each other.
        up: rate of each host's sending, as tc writes it; by default netlab's rate.
        down: the same of its receiving.
        queue_ms: length of the queue of each direction of each host, in time at its rate. By default 50, or the round
            trip where that is longer: what one TCP stream needs to fill the link.
        queue_packets: in its place, in packets.
        seed: of losses and jitter. The n-th packet that leaves a host is lost, or not, whatever the time.
        control: TCP's congestion control on all hosts, such as cubic; the machine's own if it is empty. The kernel
            refuses one that is not in net.ipv4.tcp_allowed_congestion_control.
    """

    delay_ms: float = 0.0
    host_delays_ms: tuple[float, ...] = ()
    jitter_ms: float = 0.0
    reorder: bool = False
    loss: float = 0.0
    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    queue_ms: float | None = None
    queue_packets: int = 0
    seed: int = 0
    control: str = ""

    def __post_init__(self) -> None:
        for name in ("delay_ms", "jitter_ms", "queue_ms", "queue_packets", "seed"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed > MOST_SEED:
            raise ValueError(f"seed must be at most {MOST_SEED}, got {self.seed}")
        if not re.fullmatch(r"\w*", self.control):
            raise ValueError(f"control must be a name such as cubic, got {self.control!r}")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"loss must be in 0..1, got {self.loss}")
        if not all(delay >= 0 for delay in self.host_delays_ms):
            raise ValueError(f"host_delays_ms must not be negative, got {self.host_delays_ms}")
        if self.delay_ms and self.host_delays_ms:
            raise ValueError("delay_ms and host_delays_ms exclude each other")

    def of_hosts(self, hosts: int, rate: str | None) -> list["HostLink"]:
        """The links of so many hosts, whose rate is ``rate`` (None for no limit) where no other is given."""
        for name in ("host_delays_ms", "up", "down"):
            if len(getattr(self, name)) not in {0, hosts}:
                raise ValueError(f"{name} must have a value for each of {hosts} hosts, got {getattr(self, name)}")
        up, down = (
            tuple(map(bits_per_second, given or ((rate,) * hosts if rate else ()))) for given in (self.up, self.down)
        )
        delays = self.host_delays_ms or (self.delay_ms / 2,) * hosts
        queue_ms = self.queue_ms
        if queue_ms is None:
            queue_ms = max(SHORTEST_QUEUE_MS, 2 * sum(sorted(delays)[-2:]))
        return [
            HostLink(up[host] if up else 0.0, down[host] if down else 0.0, delays[host], queue_ms)
            for host in range(hosts)
        ]


class HostLink(NamedTuple):
    """Bits a second, 0 for no limit; milliseconds."""

    up: float
    down: float
    delay_ms: float
    queue_ms: float

    def segments(self) -> int:
        """TCP segments that the host may send as one packet."""
        if self.up == 0:
            return MOST_SEGMENTS
        return min(MOST_SEGMENTS, max(1, int(BATCH_SECONDS * self.up / 8 / FRAME)))


def build_hub() -> Path:
    """The hub's program, compiled if this version of it is not there yet.

    Raises:
        HubError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise HubError("links with delay need a C++ compiler, as the build does: g++, c++ or clang++")
    sources = b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir()))
    version = hashlib.sha256(sources + " ".join((compiler, *FLAGS)).encode()).hexdigest()[:16]
    program = BUILD / f"wan_hub-{version}"
    if not program.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / "wan_hub"
            command = [*compiler.split(), *FLAGS, "-o", str(made), str(SOURCES / "hub.cpp")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise HubError(f"`{' '.join(command)}` failed:\n{done.stderr}")
            made.replace(program)  # whole or not at all, also where two compile at once
    return program


def options_of_hub(wan: Wan, links: Sequence[HostLink], names: Sequence[str]) -> list[str]:
    """How the hub's command line says it, in seconds and bits a second."""
    segments = max(link.segments() for link in links)
    options = [f"seed={wan.seed}", f"reorder={int(wan.reorder)}", f"mtu={MTU}", f"segments={segments}"]
    for link, name in zip(links, names, strict=True):
        options += [f"host={name}", f"up={link.up:.17g}", f"down={link.down:.17g}", f"delay={link.delay_ms / 1e3:.17g}"]
        options += [f"jitter={wan.jitter_ms / 1e3:.17g}", f"loss_up={wan.loss:.17g}"]
        options += [f"queue={link.queue_ms / 1e3:.17g}", f"queue_packets={wan.queue_packets}"]
    return options


class Hub:
    """The running hub of hosts in the namespaces ``names``, in which it makes the device eth0. It ends with its owner.

    Raises:
        HubError: it cannot be compiled or started.
    """

    def __init__(self, wan: Wan, links: Sequence[HostLink], names: Sequence[str]) -> None:
        command = [str(build_hub()), "run", *options_of_hub(wan, links, names)]
        pipe = subprocess.PIPE
        # In a session of its own: Ctrl-C is its owner's, whose end, however it comes, closes the hub's input.
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1, start_new_session=True
        )
        self._read("ready")

    def _read(self, expected: str = "") -> str:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line.startswith(expected) or not line:
            reason = self.process.stderr.read().strip()
            self.close()
            raise HubError(reason or f"the hub ended with status {self.process.returncode}")
        return line

    def figures(self) -> dict[str, Any]:
        """What happened since the start: packets and bytes (with Ethernet headers) of each host, seconds of the hub."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _read says why
            self.process.stdin.write("figures\n")
        found: dict[str, Any] = json.loads(self._read())
        return found

    def close(self) -> None:
        """Ends it. May be called twice."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended before
                stream.close()
        try:
            self.process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def add_wan_options(parser: argparse.ArgumentParser) -> None:
    """The options of links that every bench between hosts has."""
    parser.add_argument(
        "--delay-ms", type=float, default=0.0, help="one way, between any two hosts; see docs/measurements.md"
    )
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="at most this is added to each packet's delay")
    parser.add_argument("--loss", type=share, default=0.0, help="share of packets that are lost, such as 0.1%%")
    parser.add_argument("--control", default="", help="TCP's congestion control, such as cubic; the machine's own")


def wan_from(arguments: argparse.Namespace) -> Wan | None:
    """The links that :func:`add_wan_options` asked for; None if tc does without the hub.

    A bench may have ``host_rates``, a rate for each host in both directions.
    """
    rates = tuple(getattr(arguments, "host_rates", ()))
    wan = Wan(
        delay_ms=arguments.delay_ms,
        jitter_ms=arguments.jitter_ms,
        loss=arguments.loss,
        control=arguments.control,
        up=rates,
        down=rates,
    )
    return None if wan == Wan() else wan
