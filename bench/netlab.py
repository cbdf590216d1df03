"""Hosts with slow links on one machine: network namespaces, joined by limited or distant links. Linux, as root.

    python bench/netlab.py --hosts 2 --rate 1gbit -- python train.py       # once on every host, as torchrun would
    python bench/netlab.py --hosts 4 --rate 100mbit -- sh -c 'echo $RANK of $WORLD_SIZE'
    python bench/netlab.py --hosts 4 --rate 100mbit --delay-ms 50 --loss 0.1% -- python train.py
    python bench/netlab.py --up 100mbit,20mbit --down 1gbit,50mbit --host-delays-ms 1,40 -- python train.py

Every host has one interface, eth0, whose rate is limited in both directions, as a network card's is. Links with delay,
jitter, loss, or two rates are those of wan.py, in the place of tc's. A command finds RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME. Exit status: the first that is not 0 on any host, the
others are ended then; 77 where there are no network namespaces or no rights. The hosts are removed whatever ends the
command or netlab. After SIGKILL to netlab itself, the next one removes them, with what runs there.
"""

import argparse
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from wan import MTU, Hub, HubError, Wan, add_wan_options, wan_from

UNAVAILABLE = 77  # what test drivers take for "skipped"
SUBNET = "10.213.77"
PORT = 29400
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Bytes that may pass at once. Below a few packets at the rate's timer tick a link does not reach its rate.
BURST = {"100mbit": "64kb", "1gbit": "256kb", "10gbit": "1mb"}
# Of a TUN device, in packets. The hub's own queues are the links'; what a busy hub has not read yet must not be lost.
UNREAD = 10_000
OWNED = re.compile(r"ql(\d+)t(\d+)n\d+-")
_numbers = itertools.count()


class NetlabError(RuntimeError):
    """The namespaces cannot be made, and why."""


def run_tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NetlabError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def check_available() -> None:
    """Raises NetlabError with what is missing."""
    if sys.platform != "linux":
        raise NetlabError(f"network namespaces are Linux's; this is {sys.platform}")
    if os.geteuid() != 0:
        raise NetlabError("making network namespaces needs root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NetlabError(f"`{tool}` is not installed (Debian: apt-get install iproute2)")


def started_at(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if there is none. Its number may be another's later."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()[19]


def remove_namespaces(names: Iterable[str]) -> None:
    """Ends what runs in namespaces and removes them; what is not there is no error."""
    for name in names:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        for pid in pids.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has just ended by itself
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def remove_stale() -> None:
    """Removes the hosts of programs that were killed before they could."""
    names = [line.split()[0] for line in run_tool("ip", "netns", "list").splitlines()]
    owners = [(name, OWNED.match(name)) for name in names]
    remove_namespaces(name for name, owner in owners if owner and started_at(int(owner[1])) != owner[2])


class Netlab:
    """``hosts`` namespaces that are joined. A context manager; leaving it ends what runs on the hosts and removes them.

    A signal that ends the program leaves them, unless it called :func:`end_cleanly`.

    Args:
        hosts: 1 to 250.
        rate: as tc writes it, e.g. "100mbit"; None for no limit.
        wan: delays, losses and other rates; None for a bridge, whose only limit is the rate.
    """

    def __init__(self, hosts: int, rate: str | None = None, wan: Wan | None = None) -> None:
        if not 1 <= hosts <= 250:
            raise ValueError(f"hosts must be in 1..250, got {hosts}")
        self._links = wan.of_hosts(hosts, rate) if wan is not None else []
        check_available()
        self.hosts, self.rate, self.wan = hosts, rate, wan
        self._name = f"ql{os.getpid()}t{started_at(os.getpid())}n{next(_numbers)}"
        self._namespaces: list[str] = []
        self._hub: Hub | None = None

    def __enter__(self) -> "Netlab":
        try:
            remove_stale()
            if self.wan is None:
                self._join_by_bridge()
            else:
                self._join_by_hub(self.wan)
        except BaseException:
            self.close()
            raise
        return self

    def _join_by_bridge(self) -> None:
        # The bridge is in a namespace of its own, so that nothing of the machine's network changes.
        bridge = self._add_namespace("hub")
        run_tool("ip", "-n", bridge, "link", "add", "bridge", "type", "bridge")
        run_tool("ip", "-n", bridge, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            self._add_host(bridge, host)

    def _join_by_hub(self, wan: Wan) -> None:
        names = [self._add_namespace(str(host)) for host in range(self.hosts)]
        try:
            self._hub = Hub(wan, self._links, names)
        except HubError as error:
            raise NetlabError(str(error)) from error
        for host, (name, link) in enumerate(zip(names, self._links, strict=True)):
            device = ("ip", "-n", name, "link", "set", "eth0")
            run_tool(*device, "mtu", str(MTU), "txqueuelen", str(UNREAD), "gso_max_segs", str(link.segments()))
            run_tool("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            run_tool(*device, "up")
            if wan.control:
                setting = f"echo {wan.control} > /proc/sys/net/ipv4/tcp_congestion_control"
                run_tool("ip", "netns", "exec", name, "sh", "-c", setting)

    def hub_figures(self) -> dict[str, Any]:
        """What the hub did so far, see :meth:`wan.Hub.figures`.

        Raises:
            NetlabError: there is none, or it has ended.
        """
        if self._hub is None:
            raise NetlabError("there is no hub: links have no delay, or the hosts are removed")
        try:
            return self._hub.figures()
        except HubError as error:
            raise NetlabError(str(error)) from error

    def _add_namespace(self, suffix: str) -> str:
        name = f"{self._name}-{suffix}"
        run_tool("ip", "netns", "add", name)
        self._namespaces.append(name)
        run_tool("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _add_host(self, hub: str, host: int) -> None:
        name, port = self._add_namespace(str(host)), f"port{host}"
        run_tool("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", hub)
        run_tool("ip", "-n", hub, "link", "set", port, "master", "bridge")
        run_tool("ip", "-n", hub, "link", "set", port, "up")
        run_tool("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        run_tool("ip", "-n", name, "link", "set", "eth0", "up")
        if self.rate is not None:
            for namespace, device in ((name, "eth0"), (hub, port)):
                limit = ("tbf", "rate", self.rate, "burst", BURST.get(self.rate, "256kb"), "latency", "50ms")
                run_tool("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *limit)

    def address(self, host: int) -> str:
        """The IP address of a host."""
        return f"{SUBNET}.{host + 1}"

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str] | None = None, **options: object
    ) -> "subprocess.Popen[bytes]":
        """Starts a command on a host, in a session of its own; ``options`` go to Popen."""
        inside = ["ip", "netns", "exec", f"{self._name}-{host}", *command]
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            inside, env={**os.environ, **(environment or {})}, start_new_session=True, **options
        )

    def run(self, command: Sequence[str], timeout: float | None = None, **options: object) -> int:
        """Runs ``command`` on every host, with torchrun's variables; the first status that is not 0, otherwise 0.

        ``options`` go to Popen.

        Raises:
            TimeoutError: it is not done after ``timeout`` seconds; it was ended.
            NetlabError: the hub ended before it.
        """
        processes = []
        for host in range(self.hosts):
            environment = {
                "RANK": str(host), "WORLD_SIZE": str(self.hosts), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": self.address(0), "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "eth0",
            }  # fmt: skip
            processes.append(self.start(host, command, environment, **options))
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            return wait_for_all(processes, deadline, None if self._hub is None else self._hub.process)
        finally:
            for process in processes:
                end(process)

    def close(self) -> None:
        """Ends what runs on the hosts and removes them. May be called twice."""
        remove_namespaces(reversed(self._namespaces))
        self._namespaces.clear()
        if self._hub is not None:
            self._hub.close()
            self._hub = None

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def wait_for_all(
    processes: Sequence["subprocess.Popen[bytes]"],
    deadline: float | None,
    hub: "subprocess.Popen[str] | None" = None,
) -> int:
    """The first status that is not 0 (then others may still run), or 0 when all have ended. The hub must not end."""
    watched: dict[int, subprocess.Popen[Any]] = {os.pidfd_open(process.pid): process for process in processes}
    if hub is not None:
        watched[os.pidfd_open(hub.pid)] = hub
    try:
        poll = select.poll()
        for descriptor in watched:
            poll.register(descriptor)
        left = {descriptor for descriptor, process in watched.items() if process is not hub}
        while left:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = poll.poll(None if remaining is None else 1000 * remaining)
            if not ready:
                raise TimeoutError("the command is not done on every host")
            for descriptor, _ in ready:
                poll.unregister(descriptor)
                left.discard(descriptor)
                status = watched[descriptor].wait()
                if watched[descriptor] is hub:
                    raise NetlabError(f"the hub ended with status {status}")
                if status != 0:
                    return status if status > 0 else 128 - status
        return 0
    finally:
        for descriptor in watched:
            os.close(descriptor)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kills a process and what it started, if it is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_cleanly() -> None:
    """Lets signals that end a program leave its context managers first; called on its main thread."""
    for number in ENDING:
        signal.signal(number, end_once)


def end_once(number: int, _: object) -> NoReturn:
    """Ends like an exception, so that the hosts are removed, which no further signal stops."""
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def texts(given: str) -> tuple[str, ...]:
    return tuple(given.split(","))


def numbers(given: str) -> tuple[float, ...]:
    return tuple(float(number) for number in given.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rate", help="of each host's link, e.g. 100mbit, 1gbit, 10gbit; no limit without it")
    add_wan_options(parser)
    parser.add_argument("--up", type=texts, default=(), help="rates of sending, one for each host: 100mbit,20mbit")
    parser.add_argument("--down", type=texts, default=(), help="rates of receiving, one for each host")
    parser.add_argument("--host-delays-ms", type=numbers, default=(), help="of each host; two hosts' add up")
    parser.add_argument("--reorder", action="store_true", help="packets may overtake each other through jitter")
    parser.add_argument("--queue-ms", type=float, help="length of each queue of a link; default: 50, or a round trip")
    parser.add_argument("--queue-packets", type=int, default=0, help="in its place, in packets")
    parser.add_argument("--seed", type=int, default=0, help="of losses and jitter")
    parser.add_argument("--timeout", type=float, help="seconds after which the command is ended")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: what every host runs")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command: put it after --")
    asked = {
        name: getattr(arguments, name)
        for name in ("up", "down", "host_delays_ms", "reorder", "queue_ms", "queue_packets", "seed")
    }
    end_cleanly()
    try:
        wan = replace(wan_from(arguments) or Wan(), **asked)
        with Netlab(arguments.hosts, arguments.rate, None if wan == Wan() else wan) as lab:
            return lab.run(command, arguments.timeout)
    except ValueError as error:
        parser.error(str(error))
    except NetlabError as error:
        print(f"netlab: {error}", file=sys.stderr)
        return UNAVAILABLE
    except TimeoutError as error:
        print(f"netlab: {error} after {arguments.timeout:g} s", file=sys.stderr)
        return 124


if __name__ == "__main__":
    sys.exit(main())
