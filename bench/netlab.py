"""Hosts with slow links on one machine: network namespaces on a bridge, their rate limited by tc. Linux, as root.

    python bench/netlab.py --hosts 2 --rate 1gbit -- python train.py       # once on every host, as torchrun would
    python bench/netlab.py --hosts 4 --rate 100mbit -- sh -c 'echo $RANK of $WORLD_SIZE'

Every host has one interface, eth0, whose rate is limited in both directions, as a network card's is. A command finds
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME. Exit status:
the first that is not 0 on any host, the others are ended then; 77 where there are no network namespaces or no rights.
The hosts are removed whatever ends the command or netlab, except SIGKILL to netlab itself: `ip netns` then lists
namespaces that begin with "ql".
"""

import argparse
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NoReturn

UNAVAILABLE = 77  # what test drivers take for "skipped"
SUBNET = "10.213.77"
PORT = 29400
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Bytes that may pass at once. Below a few packets at the rate's timer tick a link does not reach its rate.
BURST = {"100mbit": "64kb", "1gbit": "256kb", "10gbit": "1mb"}


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


class Netlab:
    """``hosts`` namespaces on a bridge. A context manager; leaving it ends what runs on the hosts and removes them.

    A signal that ends the program leaves them, unless it called :func:`end_cleanly`.

    Args:
        hosts: 1 to 250.
        rate: as tc writes it, e.g. "100mbit"; None for no limit.
    """

    def __init__(self, hosts: int, rate: str | None = None) -> None:
        if not 1 <= hosts <= 250:
            raise ValueError(f"hosts must be in 1..250, got {hosts}")
        check_available()
        self.hosts, self.rate = hosts, rate
        self._name = f"ql{secrets.token_hex(3)}"  # interface names have at most 15 characters
        self._namespaces: list[str] = []

    def __enter__(self) -> "Netlab":
        try:
            # The bridge is in a namespace of its own, so that nothing of the machine's network changes.
            hub = self._add_namespace("hub")
            run_tool("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
            run_tool("ip", "-n", hub, "link", "set", "bridge", "up")
            for host in range(self.hosts):
                self._add_host(hub, host)
        except BaseException:
            self.close()
            raise
        return self

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
        inside = ["ip", "netns", "exec", self._namespaces[host + 1], *command]
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            inside, env={**os.environ, **(environment or {})}, start_new_session=True, **options
        )

    def run(self, command: Sequence[str], timeout: float | None = None, **options: object) -> int:
        """Runs ``command`` on every host, with torchrun's variables; the first status that is not 0, otherwise 0.

        ``options`` go to Popen.

        Raises:
            TimeoutError: it is not done after ``timeout`` seconds; it was ended.
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
            return wait_for_all(processes, deadline)
        finally:
            for process in processes:
                end(process)

    def close(self) -> None:
        """Ends what runs on the hosts and removes them. May be called twice."""
        for name in reversed(self._namespaces):
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in pids.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it has just ended by itself
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        self._namespaces.clear()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def wait_for_all(processes: Sequence["subprocess.Popen[bytes]"], deadline: float | None) -> int:
    """The first status that is not 0 (then others may still run), or 0 when all have ended."""
    watched = {os.pidfd_open(process.pid): process for process in processes}
    try:
        poll = select.poll()
        for descriptor in watched:
            poll.register(descriptor)
        left = set(watched)
        while left:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = poll.poll(None if remaining is None else 1000 * remaining)
            if not ready:
                raise TimeoutError("the command is not done on every host")
            for descriptor, _ in ready:
                poll.unregister(descriptor)
                left.discard(descriptor)
                status = watched[descriptor].wait()
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rate", help="of each host's link, e.g. 100mbit, 1gbit, 10gbit; no limit without it")
    parser.add_argument("--timeout", type=float, help="seconds after which the command is ended")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: what every host runs")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command: put it after --")
    end_cleanly()
    try:
        with Netlab(arguments.hosts, arguments.rate) as lab:
            return lab.run(command, arguments.timeout)
    except NetlabError as error:
        print(f"netlab: {error}", file=sys.stderr)
        return UNAVAILABLE
    except TimeoutError as error:
        print(f"netlab: {error} after {arguments.timeout:g} s", file=sys.stderr)
        return 124


if __name__ == "__main__":
    sys.exit(main())
