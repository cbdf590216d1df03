"""Several connections to each rank: the same messages and bits, and the same errors, as with one."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import attempt, check_works
from ddp_model import backward, wrap
from distributed import TIMEOUT, all_reduce, assert_same_on_all_ranks, attach, die, world

import qcomm
from qcomm.collectives.options import ReduceOptions
from qcomm.communicator.groups import _places
from qcomm.transport import MOST_CONNECTIONS, GlooTransport, Mail, TransportError
from qcomm.transport.gloo_connections import LENGTH, GlooConnections

pytestmark = pytest.mark.world
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4097, 123_457]


def message_of(rank, size, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(1000 * rank + size)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype)


def new_group():
    return dist.new_group(ranks=list(range(dist.get_world_size())))


@world(3)
@pytest.mark.parametrize("connections", [1, 2, 3, 8])
def test_messages_of_any_size_arrive_in_larger_buffers_too(rank, world_size, connections):
    transport = GlooTransport(new_group())
    transport.widen(connections)
    for room in (0, 1, 7, 1000):
        for size in SIZES:
            buffers = {peer: torch.full((size + room,), 7, dtype=torch.uint8) for peer in transport.peers}
            receives = [transport.start_receive(peer, buffers[peer], 5) for peer in transport.peers if size + room]
            message = message_of(rank, size)
            sends = [transport.start_send(peer, message, 5) for peer in transport.peers if size + room]
            transport.finish([*receives, *sends], "testing")
            for peer, buffer in buffers.items():
                assert torch.equal(buffer[:size], message_of(peer, size)), (size, room)
                assert (buffer[size:] == 7).all(), (size, room)
    transport.close()


@world(2)
def test_other_dtypes_shapes_and_the_mail(rank, world_size):
    transport = GlooTransport(new_group())
    transport.widen(3)
    for value in (torch.tensor(3.5), torch.arange(6.0).view(2, 3), torch.tensor([True, False])):
        received = transport.exchange_small([value] * 2, "testing")
        assert torch.equal(received[1 - rank], value)
    mail = Mail(transport)
    for size in SIZES:
        mail.send(1 - rank, message_of(rank, size))
    for size in SIZES:
        (buffer,) = mail.take("testing").values()
        assert torch.equal(buffer[:size], message_of(1 - rank, size))
    mail.flush("testing")
    mail.close()


@world(2)
def test_a_message_that_claims_more_than_its_buffer_is_an_error(rank, world_size):
    for claimed in (101, -1, 1 << 62):
        transport = GlooTransport(new_group())
        transport.widen(2)
        if rank == 0:
            with mock.patch("qcomm.transport.gloo_connections.LENGTH", _Claims(claimed)):
                transport.finish([transport.start_send(1, message_of(0, 90), 5)], "testing")
        else:
            with pytest.raises(TransportError, match=f"has {claimed} bytes, where at most 100 are due"):
                transport.finish([transport.start_receive(0, torch.empty(100, dtype=torch.uint8), 5)], "testing")
        dist.barrier()
        transport.close()


class _Claims:
    """A length that lies."""

    size = LENGTH.size

    def __init__(self, claimed):
        self._claimed = claimed

    def pack(self, length):
        return LENGTH.pack(self._claimed)


@world(3)
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "exact_sum", "hierarchical", "none", "bf16"])
def test_means_have_the_same_bits(rank, world_size, strategy):
    options = {"strategy": strategy} | ({"ranks_per_node": 1} if strategy == "hierarchical" else {})
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(rank))
    expected = values.clone()
    all_reduce(expected, **options)
    group = new_group()
    for _ in range(2):
        tensor = values.clone()
        qcomm.all_reduce(tensor, group=group, connections=4, **options)
        assert torch.equal(tensor, expected)
    communicator, *_ = _places[group].communicators
    assert isinstance(communicator._transport._gloo, GlooConnections)
    assert_same_on_all_ranks(tensor)


@world(2)
def test_gradients_have_the_same_bits(rank, world_size):
    got = []
    for connections in (None, 3):
        model = wrap(process_group=new_group())
        state = attach(model, min_elements=100, strategy="two_phase", connections=connections)
        got.append([backward(model, rank, step) for step in range(3)])
        kinds = {type(each._transport._gloo) for each in _places[model.process_group].communicators}
        assert (GlooConnections in kinds) == (connections == 3) and len(kinds) == 1
        assert state.stats()["steps"] == 3
    for one, several in zip(*got, strict=True):
        assert all(map(torch.equal, one, several))


@world(3)
def test_ranks_that_differ_are_told_and_so_is_a_later_use(rank, world_size):
    group = new_group()
    with pytest.raises(qcomm.ConfigMismatchError, match=r"connections: rank \d has \d, rank \d has \d$"):
        qcomm.all_reduce(torch.ones(5000), group=group, connections=2 if rank == 1 else 3)
    group = new_group()
    qcomm.all_reduce(torch.ones(5000), group=group, connections=2)
    qcomm.all_reduce(torch.ones(5000), group=group)  # as many as there are
    qcomm.broadcast_parameters(torch.nn.Linear(50, 50), process_group=group)
    kind, text = ValueError, "connections must be the same for all uses of a group, got 3: its ranks have 2"
    if rank != 1:
        kind, text = (
            qcomm.CollectiveError,
            "rank 1 failed while preparing the exchange: ValueError: connections must be",
        )
    with pytest.raises(kind, match=text):
        qcomm.all_reduce(torch.ones(5000), group=group, connections=3 if rank == 1 else 2)
    tensor = torch.full((5000,), float(rank))
    qcomm.all_reduce(tensor, group=group, connections=2, strategy="none")
    assert (tensor == 1).all()


@world(2)
def test_a_rank_with_a_number_that_is_refused_tells_the_others(rank, world_size):
    for wrong, kind in ((0, ValueError), (MOST_CONNECTIONS + 1, ValueError), ("2", ValueError), (True, TypeError)):
        group = new_group()
        expected = kind if rank == 1 else qcomm.CollectiveError
        with pytest.raises(expected, match="connections must be"):
            qcomm.all_reduce(torch.ones(5000), group=group, connections=wrong if rank == 1 else None)
        qcomm.all_reduce(torch.ones(5000), group=group)


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        (0, ValueError, "connections must be 'auto' or an int from 1 to 64, got 0"),
        (65, ValueError, "connections must be 'auto' or an int from 1 to 64, got 65"),
        (2.0, TypeError, "connections must be 'auto' or an int from 1 to 64, got float"),
        (True, TypeError, "connections must be 'auto' or an int from 1 to 64, got bool"),
        ("many", ValueError, "connections must be 'auto' or an int from 1 to 64, got 'many'"),
    ],
)
def test_numbers_that_are_refused(wrong, kind, text):
    with pytest.raises(kind, match=text):
        ReduceOptions(connections=wrong)


@world(4, alone=True, dying=(2,), seconds=TIMEOUT.total_seconds() / 2)
def test_a_killed_rank_is_named_at_once_and_no_other(rank, world_size):
    group = new_group()
    check_works(rank, world_size)
    assert attempt(group=group, strategy="two_phase", connections=5) is None
    if rank == 2:
        die()
    error = attempt(group=group, strategy="two_phase", connections=5)
    assert "no answer from rank(s) 2 (" in str(error), error
