"""bench/wan.py: what its links do to packets, by the hub's arithmetic without rights and by real ones as root."""

import argparse
import hashlib
import heapq
import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from processes import is_gone

BENCH = Path(__file__).parents[2] / "bench"
OVERHEAD = 14
MEGABYTES = 24
# On host 1: gets MEGABYTES of known bytes from host 0, which sends them over TCP, and prints their digest.
TRANSFER = f"""
import hashlib, os, random, socket
data = random.Random(5).randbytes({MEGABYTES} << 20)
if os.environ["RANK"] == "0":
    with socket.create_server((os.environ["MASTER_ADDR"], 29501)) as server, server.accept()[0] as other:
        other.sendall(data)
        other.shutdown(socket.SHUT_WR)
        other.recv(1)
else:
    digest = hashlib.sha256()
    other = None
    while other is None:
        try:
            other = socket.create_connection((os.environ["MASTER_ADDR"], 29501))
        except ConnectionRefusedError:
            pass  # host 0 is not there yet
    with other:
        while part := other.recv(1 << 20):
            digest.update(part)
    print(digest.hexdigest(), flush=True)
"""


@pytest.fixture(scope="module")
def wan():
    sys.path.insert(0, str(BENCH))
    try:
        import netlab  # noqa: F401  # the fixture below takes it from here
        import wan
    finally:
        sys.path.remove(str(BENCH))
    return wan


@pytest.fixture(scope="module")
def netlab(wan):
    """The module, where the machine allows links with delay."""
    import netlab

    try:
        with netlab.Netlab(1, wan=wan.Wan(delay_ms=1)):
            pass
    except netlab.NetlabError as error:
        pytest.skip(f"no links with delay: {error}")
    return netlab


@pytest.fixture(scope="module")
def replay(wan):
    """Packets (ns, from, to, bytes) -> the ns when each has arrived, "lost" or "full", by the hub's program."""
    try:
        program = wan.build_hub()
    except wan.HubError as error:
        pytest.skip(str(error))

    def run(links, hosts, rate, packets):
        options = wan.options_of_hub(links, links.of_hosts(hosts, rate), [str(host) for host in range(hosts)])
        trace = "".join(f"{at} {source} {to} {size}\n" for at, source, to, size in packets)
        done = subprocess.run([program, "replay", *options], input=trace, capture_output=True, text=True, check=True)
        return [fate if fate in {"lost", "full"} else int(fate) for fate in done.stdout.split()]

    return run


class Twin:
    """The model of the links in Python, without losses and jitter. Times are in seconds."""

    def __init__(self, links):
        self.links = links
        self.free = {}  # direction of a host -> when its line is free
        self.leaving = {}  # of those in its queue, when they leave

    def through(self, direction, host, at, carried, packets):
        """When it has left a line, None if the queue is full."""
        link = self.links[host]
        rate = link.up if direction == "up" else link.down
        queue = [left for left in self.leaving.get((direction, host), []) if left > at]
        free = self.free.get((direction, host), 0.0)
        if len(queue) >= packets if packets else free - at > link.queue_ms / 1e3:
            return None
        left = max(free, at) + (8 * carried / rate if rate else 0)
        self.free[direction, host] = left
        self.leaving[direction, host] = [*queue, left]
        return left

    def fates(self, trace, packets=0):
        found, ways = [None] * len(trace), []
        for number, (at, source, to, size) in enumerate(trace):
            left = self.through("up", source, at / 1e9, size + OVERHEAD, packets)
            if left is None:
                found[number] = "full"
                continue
            delay = (self.links[source].delay_ms + self.links[to].delay_ms) / 1e3
            heapq.heappush(ways, (left + delay, number, to, size))
        while ways:
            at, number, to, size = heapq.heappop(ways)
            arrived = self.through("down", to, at, size + OVERHEAD, packets)
            found[number] = "full" if arrived is None else 1e9 * arrived
        return found


@pytest.mark.parametrize("packets", [0, 7])
def test_rates_delays_and_queues_are_those_of_the_model(wan, replay, packets):
    generator = random.Random(packets)
    links = wan.Wan(
        host_delays_ms=(0.5, 20.0, 0.0, 3.0), up=("100mbit", "10mbit", "1gbit", "2.5mbit"),
        down=("10mbit", "100mbit", "33mbit", "1gbit"), queue_ms=8.0, queue_packets=packets,
    )  # fmt: skip
    at, trace = 0, []
    for _ in range(4000):
        at += generator.choice([0, 1000, 150_000, 900_000])
        source, to = generator.sample(range(4), 2)
        trace.append((at, source, to, generator.choice([40, 576, 1500])))
    expected, found = Twin(links.of_hosts(4, None)).fates(trace, packets), replay(links, 4, None, trace)
    assert [fate == "full" for fate in found] == [fate == "full" for fate in expected]
    assert 0.05 < found.count("full") / len(found) < 0.8
    assert all(abs(a - b) <= 2 for a, b in zip(found, expected, strict=True) if a != "full")


def test_a_link_without_a_limit_only_delays(wan, replay):
    assert replay(wan.Wan(delay_ms=7), 2, None, [(0, 0, 1, 1500), (0, 0, 1, 1500), (5, 1, 0, 40)]) == [
        7_000_000, 7_000_000, 7_000_005,
    ]  # fmt: skip


def test_losses_are_drawn_from_the_seed(wan, replay):
    trace = [(1000 * number, number % 2, 1 - number % 2, 100) for number in range(20_000)]
    lost = {}
    for seed in (1, 1, 2):
        fates = replay(wan.Wan(delay_ms=1, loss=0.01, seed=seed), 2, "1gbit", trace)
        numbers = [number for number, fate in enumerate(fates) if fate == "lost"]
        assert lost.setdefault(seed, numbers) == numbers
        # Binomial: within five standard errors.
        assert abs(len(numbers) - 200) < 5 * math.sqrt(200)
        assert 60 < sum(number % 2 for number in numbers) < 140
    assert lost[1] != lost[2]
    # Neither the time nor the size of a packet changes its fate.
    other = [(777 * at, source, to, 1500) for at, source, to, _ in trace]
    fates = replay(wan.Wan(delay_ms=30, loss=0.01, seed=1), 2, "10mbit", other)
    assert [number for number, fate in enumerate(fates) if fate == "lost"] == lost[1]


@pytest.mark.parametrize("reorder", [False, True])
def test_jitter(wan, replay, reorder):
    trace = [(20_000 * number, 0, 1, 100) for number in range(2000)]
    links = wan.Wan(delay_ms=2, jitter_ms=3, reorder=reorder)
    fates = replay(links, 2, None, trace)
    extra = [fate - at - 2_000_000 for fate, (at, *_) in zip(fates, trace, strict=True)]
    assert min(extra) >= 0 and max(extra) <= 3_000_000
    assert any(later < before for before, later in itertools.pairwise(fates)) == reorder
    if reorder:
        assert 1_350_000 < sum(extra) / len(extra) < 1_650_000


def test_what_cannot_be_is_refused(wan, replay):
    for values, message in (
        ({"loss": 1.5}, "loss must be in 0..1, got 1.5"),
        ({"delay_ms": -1}, "delay_ms must not be negative"),
        ({"host_delays_ms": (1, -1)}, "host_delays_ms must not be negative"),
        ({"seed": 2**32}, "seed must be at most 4294967295"),
        ({"delay_ms": 1, "host_delays_ms": (1, 2)}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            wan.Wan(**values)
    with pytest.raises(ValueError, match="up must have a value for each of 3 hosts"):
        wan.Wan(up=("1gbit",)).of_hosts(3, None)
    for rate in ("", "0mbit", "100", "1mbps", "-1gbit"):
        with pytest.raises(ValueError, match="such as 100mbit"):
            wan.bits_per_second(rate)
    for text in ("", "x", "101%", "1.01", "-0.1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="a share from 0 to 1"):
            wan.share(text)
    for trace in ([(5, 0, 1, 40), (4, 0, 1, 40)], [(0, 0, 2, 40)], [(0, 0, 1, 0)], [(0, 0, 1, "x")]):
        with pytest.raises(subprocess.CalledProcessError):
            replay(wan.Wan(), 2, None, trace)
    for option in (
        "host=a seed=1",
        "seed=",
        "seed=x",
        "host=a loss_up=1.1",
        "host=a delay=-1",
        "mtu=1 host=a",
        "seed=1",
    ):
        done = subprocess.run([wan.build_hub(), "replay", *option.split()], stdin=subprocess.DEVNULL, check=False)
        assert done.returncode == 1, option


@pytest.mark.parametrize("rate", ["1gbit", "100mbit"])
def test_a_stream_survives_losses_whole(wan, netlab, tmp_path, rate):
    out = tmp_path / "out"
    with out.open("w") as output, netlab.Netlab(2, rate, wan.Wan(delay_ms=0.2, loss=0.01)) as lab:
        assert lab.run([sys.executable, "-c", TRANSFER], timeout=120, stdout=output) == 0
        figures = lab.hub_figures()
    assert out.read_text().strip() == hashlib.sha256(random.Random(5).randbytes(MEGABYTES << 20)).hexdigest()
    sender, receiver = figures["hosts"]
    least = math.ceil((MEGABYTES << 20) / 1448)
    assert sender["sent"] >= least and sender["sent_bytes"] >= (MEGABYTES << 20) + least * (52 + OVERHEAD)
    assert 0.003 * least < sender["lost"] < 0.03 * least
    assert receiver["received_bytes"] <= sender["sent_bytes"]
    assert figures["no_room"] == 0


def test_connections_are_chosen_by_what_a_path_is_like(wan, netlab, tmp_path):
    """The rule is that of tests/transport/test_auto_connections.py; these are the times and names that it is given."""
    program = "import torch, qcomm, torch.distributed as dist\nfrom qcomm.communicator import find_communicator\n"
    program += "qcomm.init_from_environment()\nqcomm.all_reduce(torch.ones(5000), connections='auto')\n"
    program += "print(find_communicator(dist.group.WORLD).connections, flush=True)\n"
    out = tmp_path / "out"
    with out.open("w") as output, netlab.Netlab(2, "100mbit", wan.Wan(delay_ms=20, control="cubic")) as lab:
        assert lab.run([sys.executable, "-c", program], timeout=120, stdout=output) == 0
    first, other = map(int, out.read_text().split())
    assert first == other and 4 <= first <= 8  # a busy machine delays messages further


def test_a_hub_that_dies_is_an_error(wan, netlab):
    with netlab.Netlab(2, "100mbit", wan.Wan(delay_ms=1)) as lab:
        killer = f"kill -9 {lab._hub.process.pid}; exec tail -f /dev/null"
        with pytest.raises(netlab.NetlabError, match="the hub ended with status -9"):
            lab.run(["sh", "-c", killer], timeout=60)
        with pytest.raises(netlab.NetlabError, match="the hub ended"):
            lab.hub_figures()


def test_a_hub_ends_with_its_owner(wan, netlab):
    program = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import netlab, wan\n"
    program += "with netlab.Netlab(2, '1gbit', wan.Wan(delay_ms=1)) as lab:\n"
    program += "    print(lab._hub.process.pid, lab._name, flush=True)\n    sys.stdin.read()\n"
    owner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    number, name = owner.stdout.readline().split()
    owner.kill()
    owner.communicate()
    assert is_gone(int(number), 20)
    with netlab.Netlab(1):  # removes what the killed one left
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert name not in listed


def test_settings_go_into_results(wan):
    parser = argparse.ArgumentParser()
    wan.add_wan_options(parser)
    assert wan.wan_from(parser.parse_args([])) is None
    found = wan.wan_from(parser.parse_args(["--delay-ms", "50", "--loss", "0.1%", "--jitter-ms", "2"]))
    assert found == wan.Wan(delay_ms=50, loss=0.001, jitter_ms=2)
    assert [link.queue_ms for link in found.of_hosts(2, "1gbit")] == [100, 100]
    assert wan.Wan(delay_ms=1).of_hosts(1, "1gbit")[0].queue_ms == wan.SHORTEST_QUEUE_MS
