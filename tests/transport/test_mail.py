"""Messages in one order to each rank, whatever their size, and none left where ranks do not agree."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import attempt, check_works
from distributed import all_reduce, assert_same_on_all_ranks, sliced, world

import qcomm
from qcomm.communicator import pipeline
from qcomm.communicator.groups import get_communicator
from qcomm.communicator.handshake import HEADER_WORDS, MOST_FOLLOWING, header_checksum
from qcomm.transport.base import DEPTH, FRONT_BYTES, MESSAGE_BYTES, Mail, TransportError
from qcomm.transport.gloo import GlooTransport

pytestmark = pytest.mark.world


def message_of(rank, number, size):
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


@world(3)
def test_messages_arrive_in_their_order_also_more_than_are_awaited(rank, world_size):
    transport = GlooTransport(dist.new_group())
    mail = Mail(transport)
    sizes = [0, 1, FRONT_BYTES - 1, FRONT_BYTES, 5000, MESSAGE_BYTES, *range(10, 10 + DEPTH)]
    for target in transport.targets:
        for number, size in enumerate(sizes):
            mail.send(target, message_of(rank, number, size))
    for number, size in enumerate(sizes):
        for source, buffer in mail.take("testing").items():
            assert torch.equal(buffer[:size], message_of(source, number, size))
            assert not buffer[size:FRONT_BYTES].any()
    mail.flush("testing")
    mail.close()


@world(2)
def test_tails_wait_until_they_are_released_or_are_forgotten(rank, world_size):
    transport = GlooTransport(dist.new_group())
    mail, other = Mail(transport), 1 - rank
    size = MESSAGE_BYTES + 12_345
    mail.hold_tails()
    mail.send_tail(other, message_of(rank, 0, 77))
    mail.release_tails(wanted=False)
    mail.hold_tails()
    mail.send_tail(other, message_of(rank, 1, size))
    mail.release_tails(wanted=True)
    mail.send_tail(other, message_of(rank, 2, 5))
    for number, length in ((1, size), (2, 5)):
        assert torch.equal(mail.take_tails({other: length}, "testing")[other], message_of(other, number, length))
    mail.flush("testing")
    mail.close()


@world(3)
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "exact_sum", "hierarchical"])
def test_packets_that_fit_in_no_message_have_the_same_bits(rank, world_size, strategy):
    """As large as the largest buffers, in small."""
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(rank))
    expected, tensor = values.clone(), values.clone()
    options = {"strategy": strategy, "ranks_per_node": 1} if strategy == "hierarchical" else {"strategy": strategy}
    with sliced(2000):
        all_reduce(expected, **options)
        with (
            mock.patch("qcomm.communicator.handshake.MESSAGE_BYTES", 1000),
            mock.patch.object(pipeline, "ROOM", 1000),
        ):
            all_reduce(tensor, **options)
    assert torch.equal(tensor, expected)
    assert_same_on_all_ranks(tensor)


@world(3)
@pytest.mark.parametrize("room", [MESSAGE_BYTES, 1000])
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather"])
def test_ranks_that_do_not_agree_leave_no_message_behind(rank, world_size, strategy, room):
    """Values travel before the headers have met. Who runs another collective has to drop them."""
    rooms = (mock.patch("qcomm.communicator.handshake.MESSAGE_BYTES", room), mock.patch.object(pipeline, "ROOM", room))
    with rooms[0], rooms[1]:
        for number in range(3):
            if rank == number:
                with pytest.raises(TypeError, match="tensor"):  # this rank tells of a fault in place of a collective
                    all_reduce([1.0], strategy=strategy)
            else:
                error = attempt(strategy=strategy)
                assert f"rank {number} failed while preparing the exchange: TypeError" in str(error), error
            check_works(rank, world_size)
            error = attempt(strategy=strategy if rank == number else "none")
            assert isinstance(error, qcomm.ConfigMismatchError) and "strategy" in str(error), error
            check_works(rank, world_size)
            error = attempt(strategy=strategy, min_elements=rank)
            assert isinstance(error, qcomm.ConfigMismatchError) and "min_elements" in str(error), error
            check_works(rank, world_size)


@world(2, seconds=30)
@pytest.mark.parametrize("following", [MOST_FOLLOWING + 1, 1 << 40, -1])
def test_an_impossible_number_of_messages_is_an_error_at_once(rank, world_size, following):
    group = dist.new_group()
    check_works(rank, world_size, group)
    send = Mail.send

    def lie(self, target, message):
        if message.numel() == 8 * HEADER_WORDS:
            words = message.view(torch.int64).tolist()[:-1]
            words[9] = following
            message = torch.tensor([*words, header_checksum(words)]).view(torch.uint8)
        send(self, target, message)

    with mock.patch.object(Mail, "send", lie) if rank == 1 else nullcontext():
        error = attempt(group=group, min_elements=rank)  # they do not agree, so the others' messages are dropped
    assert isinstance(error, (TransportError, qcomm.ConfigMismatchError)), error
    assert rank == 1 or "impossible numbers of messages" in str(error), error
    check_works(rank, world_size)


@world(2)
@pytest.mark.parametrize("strategy", ["none", "bf16", "two_phase", "all_gather", "exact_sum"])
def test_no_message_is_kept_longer_than_it_takes(rank, world_size, strategy):
    """Also of headers alone, of refusals, and of agreements after the mean."""
    mail = get_communicator(dist.group.WORLD)._mail
    for verify in ("interval", "step"):
        for number in range(3):
            all_reduce(torch.randn(5000), strategy=strategy, verify=verify)
            assert not mail._sends
            assert attempt(strategy=strategy, min_elements=rank) is not None
            if rank == number % 2:
                with pytest.raises(TypeError, match="tensor"):
                    all_reduce([1.0], strategy=strategy)
            else:
                assert attempt(strategy=strategy) is not None
            assert len(mail._sends) <= 2 * DEPTH
