"""``connections="auto"``: the rule, the agreement of all ranks on one number, and ranks that fail meanwhile."""

import socket
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import attempt
from averager_model import move, network
from ddp_model import backward, wrap
from distributed import all_reduce, assert_same_on_all_ranks, attach, gathered, world
from hypothesis import given
from hypothesis import strategies as st
from sharded_model import attach as attach_sharded
from sharded_model import backward as backward_sharded
from sharded_model import net, shard
from torch.distributed.device_mesh import DeviceMesh
from wires import Wires, on_all_ranks

import qcomm
from qcomm.communicator import CHANNELS
from qcomm.communicator.groups import _places
from qcomm.transport import ConnectionOptions, GlooTransport, KeyFile, TransportError, auto_connections, secure
from qcomm.transport.auto_connections import (
    MOST_AUTOMATIC,
    TRIP_SECONDS,
    agree_on_connections,
    congestion_control,
    wanted_connections,
)
from qcomm.transport.gloo_connections import GlooConnections

SECONDS = st.floats(0, 1e4)
LOSS_BASED = st.sampled_from(["cubic", "reno", "htcp", ""])


def new_group():
    return dist.new_group(ranks=list(range(dist.get_world_size())))


def links(stack, seconds, control="cubic"):
    """This rank measures such a link while the stack is open."""
    stack.enter_context(mock.patch.object(auto_connections, "_trip_seconds", return_value=seconds))
    stack.enter_context(mock.patch.object(auto_connections, "congestion_control", return_value=control))


def connections_of(group):
    """On each channel, as the transport counts them, and as gloo has them."""
    counted = [communicator.connections for communicator in _places[group].communicators]
    made = [communicator._transport._gloo for communicator in _places[group].communicators]
    assert counted == [len(gloo._groups) if isinstance(gloo, GlooConnections) else 1 for gloo in made]
    return counted


@given(SECONDS, SECONDS, LOSS_BASED)
def test_a_longer_path_never_has_fewer_connections(one, other, control):
    shorter, longer = sorted((one, other))
    assert 1 <= wanted_connections(shorter, control) <= wanted_connections(longer, control) <= MOST_AUTOMATIC


@given(SECONDS, LOSS_BASED)
def test_together_they_carry_what_one_carries_over_a_short_path(seconds, control):
    """By the formula of Mathis, for every share of lost packets, within one connection's part."""
    connections = wanted_connections(seconds, control)
    if seconds < 2 * TRIP_SECONDS:
        assert connections == 1
    elif connections < MOST_AUTOMATIC:
        assert connections / seconds <= 1 / TRIP_SECONDS < (connections + 1) / seconds
    else:
        assert seconds >= MOST_AUTOMATIC * TRIP_SECONDS


@given(SECONDS, st.sampled_from(["bbr", "bbr2", "bbr3"]))
def test_bbr_takes_one(seconds, control):
    assert wanted_connections(seconds, control) == 1


def test_the_congestion_control_is_that_of_the_kernel():
    setting = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    if not setting.exists():
        pytest.skip("this system does not tell its congestion control")
    assert congestion_control() == setting.read_text().strip()


def test_a_system_that_does_not_tell_its_congestion_control(monkeypatch):
    with mock.patch.object(socket.socket, "getsockopt", side_effect=OSError("no such option")):
        assert congestion_control() == ""
    monkeypatch.delattr(socket, "TCP_CONGESTION", raising=False)
    assert congestion_control() == ""


@world(3)
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(0.0003, "cubic")] * 3, 1),
        ([(0.0003, "cubic"), (0.045, "cubic"), (0.0003, "cubic")], 4),
        ([(0.3, "bbr")] * 3, 1),
        ([(0.3, "bbr"), (0.3, "bbr"), (0.031, "")], 3),
    ],
)
def test_ranks_that_measure_different_things_agree(rank, world_size, found, expected):
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(rank))
    wanted = values.clone()
    all_reduce(wanted)
    group = new_group()
    with ExitStack() as stack:
        links(stack, *found[rank])
        all_reduce(values, group=group, connections="auto")
        assert connections_of(group) == [expected] * CHANNELS
    assert torch.equal(values, wanted)
    # Later uses find the connections there, whatever a measurement would say now.
    all_reduce(values, group=group)
    all_reduce(values, group=group, connections="auto")
    assert connections_of(group) == [expected] * CHANNELS


@world(2)
def test_a_measured_number_is_the_same_on_all_ranks(rank, world_size):
    group = new_group()
    all_reduce(torch.ones(5000), group=group, connections="auto")
    first, other = gathered(connections_of(group))
    assert first == other and 1 <= first[0] <= MOST_AUTOMATIC


@world(2)
def test_everything_that_takes_a_number_takes_auto(rank, world_size):
    groups = [new_group() for _ in range(5)]
    with ExitStack() as stack:
        links(stack, 0.025)
        models = [wrap(process_group=groups[0]), wrap(process_group=new_group())]
        attach(models[0], min_elements=100, connections="auto")
        attach(models[1], min_elements=100)
        for step in range(3):
            assert all(map(torch.equal, *(backward(model, rank, step) for model in models)))
        layer = network()
        averager = qcomm.CompressedModelAverager(1, process_group=groups[1], strategy="two_phase", connections="auto")
        move(layer, rank, 0)
        averager.average_parameters(layer.parameters())
        assert_same_on_all_ranks(*layer.parameters())
        outer = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
        qcomm.DiLoCo(layer, outer, period=1, process_group=groups[2], connections="auto").step()
        assert len(qcomm.measure_link_rates(groups[3], connections="auto")) == 2
        whole = shard(net(), DeviceMesh.from_group(groups[4], "cpu"))
        attach_sharded(whole, connections="auto")
        backward_sharded(whole, rank)
        for group in groups:
            assert set(connections_of(group)) == {2}


@world(3)
def test_ranks_that_differ_are_told_and_so_is_a_later_use(rank, world_size):
    group = new_group()
    with pytest.raises(qcomm.ConfigMismatchError, match=r"connections: rank \d has (auto|3), rank \d has (auto|3)$"):
        qcomm.all_reduce(torch.ones(5000), group=group, connections="auto" if rank == 1 else 3)
    for first, later, there in (("auto", 1, "auto"), (None, "auto", "1")):
        group = new_group()
        qcomm.all_reduce(torch.ones(5000), group=group, connections=first)
        text = f"connections must be the same for all uses of a group, got {later}: its ranks have {there}"
        with pytest.raises(ValueError, match=text):
            qcomm.all_reduce(torch.ones(5000), group=group, connections=later)


@world(3)
def test_a_rank_that_fails_while_it_measures_leaves_no_other_waiting(rank, world_size):
    group = new_group()
    with ExitStack() as stack:
        links(stack, 0.05)
        if rank == 1:
            failing = mock.patch.object(auto_connections, "congestion_control", side_effect=MemoryError("none left"))
            stack.enter_context(failing)
            with pytest.raises(MemoryError, match="none left"):
                all_reduce(torch.ones(5000), group=group, connections="auto")
        else:
            error = attempt(group=group, connections="auto")
            assert "agreeing on the number of connections: no answer from rank(s) 1 (" in str(error), error
        assert not _places[group].communicators


@pytest.mark.parametrize("wish", [0, MOST_AUTOMATIC + 1, -1, 1 << 40])
def test_an_impossible_wish_is_an_error_on_all_ranks(wish):
    def act(transport):
        with mock.patch.object(auto_connections, "WISH", _Wishes(wish)) if transport.rank == 1 else ExitStack():
            return agree_on_connections(transport)

    results = on_all_ranks(3, act)
    assert all("the number of connections that rank 11 wants was damaged" in str(result) for result in results)


def test_a_damaged_wish_is_an_error():
    def meddle(source, target, tag, data):
        return [bytes([data[0] ^ 2, *data[1:]])] if len(data) > 1 and source == 0 else [data]

    wires = Wires()
    wires.meddle = meddle
    own, other = on_all_ranks(2, agree_on_connections, wires)
    assert own in range(1, MOST_AUTOMATIC + 1)
    assert isinstance(other, TransportError) and "that rank 10 wants was damaged" in str(other)


@world(2)
def test_a_sealed_group_agrees_in_sealed_messages(rank, world_size, key):
    sent, start = [], GlooTransport.start_send

    def record(transport, target, message, tag):
        sent.append(message.nbytes)
        return start(transport, target, message, tag)

    with ExitStack() as stack:
        links(stack, 0.04)
        stack.enter_context(mock.patch.object(GlooTransport, "start_send", record))
        transport = secure(GlooTransport(new_group()), ConnectionOptions(KeyFile.of(key), "auto"))
    assert transport.connections == 4
    # The greeting, the proof, and the wish with the length and the tag of a sealed message.
    assert sent == [80, 1 + 24, 16 + 24]
    message = torch.arange(100_000, dtype=torch.int32)
    received = transport.exchange_small([message] * 2, "testing")
    assert torch.equal(received[1 - rank], message)
    transport.close()


@pytest.fixture
def key(tmp_path):
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("0123456789abcdef" * 4)
    return path


class _Wishes:
    """Wishes of one number, whatever is packed."""

    size = auto_connections.WISH.size
    unpack_from = auto_connections.WISH.unpack_from

    def __init__(self, wish):
        self._wish = wish

    def pack(self, _):
        return auto_connections.CHECKSUM.pack(self._wish)
