"""Sealed messages: they open as what was sealed, at their own place, and nowhere else."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from wires import WiredTransport, Wires, on_all_ranks

from qcomm.transport import TransportError, sealed
from qcomm.transport.ring_sum import ring_sum

pytest.importorskip("cryptography", reason="cryptography is not installed")

MESSAGE = torch.arange(5, dtype=torch.int32)
DTYPES = (torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.float64)
Direction, SealedTransport = sealed.Direction, sealed.SealedTransport


def key_of(source, target, run):
    return bytes([source, target, run]) + bytes(29)


def seal(transport, run=0):
    """Seals a transport with the keys of a run, as an agreement would."""
    sending = {peer: Direction(key_of(transport.rank, peer, run)) for peer in transport.peers}
    receiving = {peer: Direction(key_of(peer, transport.rank, run)) for peer in transport.peers}
    return SealedTransport(transport, sending, receiving)


def make(world_size=2, run=0):
    """Wires, and the sealed transport of each rank."""
    wires = Wires()
    return wires, [seal(WiredTransport(wires, rank, world_size), run) for rank in range(world_size)]


def carry(sender, receiver, message, tag=0, buffer=None):
    """Sends a message and returns what arrived."""
    buffer = torch.empty_like(message) if buffer is None else buffer
    transfer = receiver.start_receive(sender.rank, buffer, tag)
    sender.start_send(receiver.rank, message, tag)
    receiver.finish([transfer], "testing")
    return buffer


def altered(*messages):
    """Meddling that has these messages arrive in place of any."""
    return lambda source, target, tag, data: messages


def check_refused(sender, receiver, message=MESSAGE, tag=0):
    """A message is refused with the sender's rank and the phase, its buffer stays, and the connections are closed."""
    buffer = torch.full_like(message, 77)
    with pytest.raises(
        TransportError, match=rf"rank {10 + receiver.rank}, testing: the message of rank\(s\) 1\d is not"
    ):
        carry(sender, receiver, message, tag, buffer)
    assert bool((buffer == 77).all())
    assert receiver.is_closed and receiver._inner.blamed == {sender.rank}  # which the others are told


@hypothesis.given(st.lists(st.tuples(st.integers(0, 70), st.sampled_from(DTYPES), st.integers(0, 3), st.booleans())))
@hypothesis.settings(deadline=None)
def test_messages_arrive_as_they_were(messages):
    wires, (first, second) = make()
    for count, dtype, tag, back in messages:
        sender, receiver = (second, first) if back else (first, second)
        message = torch.arange(count).to(dtype)
        buffer = torch.full((count + 3,), 9).to(dtype)
        carry(sender, receiver, message, tag, buffer)
        assert torch.equal(buffer[:count], message) and bool((buffer[count:] == 9).all())
        assert len(wires.carried[-1][3]) == message.nbytes + 24
        # Twelve bytes or more would not be there by chance.
        data = bytes(message.view(torch.uint8).tolist())
        assert len(data) < 12 or data not in wires.carried[-1][3]


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 95, 96, 97, 200])
def test_messages_of_several_segments(size, monkeypatch):
    monkeypatch.setattr(sealed, "SEGMENT_BYTES", 32)
    wires, (first, second) = make()
    message = torch.arange(size, dtype=torch.uint8)
    assert torch.equal(carry(first, second, message), message)
    data, segments = wires.carried[-1][3], max(1, -(-size // 32))
    assert len(data) == 8 + size + 16 * segments
    for cut in range(1, segments):  # as if the message had ended with a segment
        _, (first, second) = make()
        shorter = (32 * cut).to_bytes(8, "little") + data[8 : 8 + 48 * cut]
        second._inner._wires.meddle = altered(shorter)
        with pytest.raises(TransportError, match="is not the one that was sealed"):
            carry(first, second, message)


def test_every_flipped_bit_is_noticed():
    wires, (first, second) = make()
    carry(first, second, MESSAGE)
    data = wires.carried[-1][3]
    for bit in range(8 * len(data)):
        wires, (first, second) = make()
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        wires.meddle = altered(bytes(flipped))
        check_refused(first, second)


def test_every_truncated_message_is_noticed():
    """Where a message ends early, its buffer keeps what was in memory before."""
    wires, (first, second) = make()
    carry(first, second, MESSAGE)
    data = wires.carried[-1][3]
    for length in range(len(data)):
        wires, (first, second) = make()
        wires.meddle = altered(data[:length])
        check_refused(first, second)


@pytest.mark.parametrize("tags", [(0, 0), (0, 1)], ids=["of one tag", "of two tags"])
def test_swapped_messages_are_noticed(tags):
    wires, (first, second) = make()
    held = []

    def swap(source, target, tag, data):
        held.append(data)
        return []

    wires.meddle = swap
    buffers = [torch.empty_like(MESSAGE) for _ in tags]
    transfers = [second.start_receive(0, buffer, tag) for buffer, tag in zip(buffers, tags, strict=True)]
    for tag in tags:
        first.start_send(1, MESSAGE, tag)
    for tag, data in zip(tags, reversed(held), strict=True):
        wires.queue_of(0, 1, tag).put(data)
    with pytest.raises(TransportError, match=r"rank 11, testing: the message of rank\(s\) 10 is not"):
        second.finish(transfers, "testing")


def test_messages_of_several_tags_end_in_any_order():
    _, (first, second) = make()
    buffers = {tag: [torch.empty_like(MESSAGE) for _ in range(3)] for tag in range(4)}
    posted = {tag: [second.start_receive(0, buffer, tag) for buffer in buffers[tag]] for tag in (2, 0, 3, 1)}
    for number in range(3):
        for tag in (1, 3, 0, 2):
            first.start_send(1, MESSAGE + 10 * tag + number, tag)
    for tag in (3, 0, 2, 1):
        second.finish(posted[tag], "testing")
        assert [int(buffer[0]) for buffer in buffers[tag]] == [10 * tag + number for number in range(3)]


def test_a_repeated_message_is_noticed():
    wires, (first, second) = make()
    carry(first, second, MESSAGE)
    wires.meddle = altered(wires.carried[-1][3])
    check_refused(first, second)


def test_a_withheld_message_is_noticed_by_the_next():
    wires, (first, second) = make()
    wires.meddle = altered()
    first.start_send(1, MESSAGE, 0)
    wires.meddle = None
    check_refused(first, second)


def test_a_message_that_is_sent_back_is_noticed():
    wires, (first, second) = make()
    first.start_send(1, MESSAGE, 0)
    wires.meddle = altered(wires.carried[-1][3])
    check_refused(second, first)


def test_a_message_of_another_run_is_noticed():
    wires, (first, second) = make(run=1)
    carry(first, second, MESSAGE)
    earlier = wires.carried[-1][3]
    wires, (first, second) = make(run=2)
    wires.meddle = altered(earlier)
    check_refused(first, second)


def test_a_message_of_another_rank_or_to_another_is_noticed():
    for source, target in ((2, 1), (0, 2)):
        wires, transports = make(3)
        carry(transports[source], transports[target], MESSAGE)
        wires.meddle = altered(wires.carried[-1][3])
        check_refused(transports[0], transports[1])


def test_a_forged_length_is_bounded():
    """It claims more than the buffer holds: nothing is read or written beside it."""
    for claim in (len(MESSAGE) * 4 + 1, 2**31, 2**63, 2**64 - 1):
        wires, (first, second) = make()
        wires.meddle = altered(claim.to_bytes(8, "little") + bytes(36))
        check_refused(first, second)


def test_no_nonce_is_used_twice(monkeypatch):
    monkeypatch.setattr(sealed, "SEGMENT_BYTES", 32)
    used = []

    class Watched:
        def __init__(self, cipher):
            self._cipher = cipher

        def encrypt(self, nonce, data, associated):
            used.append((id(self), nonce))
            return self._cipher.encrypt(nonce, data, associated)

    _, transports = make(3)
    for transport in transports:
        for direction in transport._sending.values():
            direction._cipher = Watched(direction._cipher)
    messages = 0
    for tag in (0, 1, 2, 1000, 2**30):
        for size in (0, 1, 32, 33, 100):
            for sender in transports:
                for target in sender.peers:
                    carry(sender, transports[target], torch.zeros(size, dtype=torch.uint8), tag)
                    messages += max(1, -(-size // 32))
    assert len(used) == len(set(used)) == messages


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_those_of_open_messages(world_size, dtype):
    def values(rank):
        return torch.randn(1001, generator=torch.Generator().manual_seed(rank)).to(dtype)

    def add(transport):
        buffers = [values(transport.rank), values(-transport.rank - 1)[:7]]
        seal(transport).sum(buffers, "testing")
        return buffers

    def add_openly(transport):
        buffers = [values(transport.rank), values(-transport.rank - 1)[:7]]
        for buffer in buffers:
            ring_sum(transport, buffer, "testing")
        return buffers

    found, expected = on_all_ranks(world_size, add), on_all_ranks(world_size, add_openly)
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_an_altered_term_of_a_sum_names_rank_and_phase():
    wires = Wires()

    def flip(source, target, tag, data):
        return [data[:-1] + bytes([data[-1] ^ 1])] if (source, tag) == (0, 1) else [data]

    wires.meddle = flip
    buffer = torch.ones(100)
    errors = on_all_ranks(2, lambda transport: seal(transport).sum([buffer.clone()], "summing values"), wires)
    assert str(errors[1]).startswith("rank 11, summing values: the message of rank(s) 10 is not")
    assert errors[0] is None  # it learns of it from closed connections, in the next exchange


def test_a_rank_that_does_not_answer_is_named_as_before(monkeypatch):
    monkeypatch.setattr("wires.SECONDS", 0.01)
    _, (_, second) = make()
    transfer = second.start_receive(0, torch.empty_like(MESSAGE), 0)
    with pytest.raises(TransportError, match=r"rank 11, testing: no answer from rank\(s\) 10"):
        second.finish([transfer], "testing")


def test_a_rank_that_fails_says_so_as_it_does_unsealed():
    wires, (_, second) = make()
    second.fail()
    assert wires.failed == [1] and second.is_closed
