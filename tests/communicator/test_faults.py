"""Faults and lost connections of one rank: an error on all ranks, soon, that names it and does not last."""

import atexit
import threading
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import attempt, check_works
from distributed import TIMEOUT, all_reduce, die, sliced, world

import qcomm
from qcomm.collectives import two_phase_steps as mean_steps
from qcomm.collectives import uncompressed
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator.handshake import HEADER_WORDS, header_checksum
from qcomm.communicator.pipeline import Pipeline
from qcomm.transport.base import Mail, Transport, TransportError

pytestmark = pytest.mark.world


def failing(name, message="boom"):
    """Makes a step of ``mean_steps`` raise on this rank."""
    owner = MeanSteps if hasattr(MeanSteps, name) else mean_steps
    return mock.patch.object(owner, name, side_effect=ZeroDivisionError(message))


@world(3)
@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("begin", "compressing its values"),
        ("encode", "compressing its values"),
        ("choose", "compressing its values"),
        ("reduce", "averaging its chunk"),
    ],
    ids=["begin", "encode", "choose", "reduce"],
)
def test_a_fault_reaches_all_ranks_and_does_not_last(rank, world_size, name, phase):
    check_works(rank, world_size)
    with failing(name) if rank == 1 else nullcontext():
        error = attempt()
    assert f"rank 1 failed while {phase}: ZeroDivisionError: boom" in str(error), error
    assert (rank == 1) == isinstance(error.__cause__, ZeroDivisionError)
    check_works(rank, world_size)


@world(3)
def test_two_ranks_that_fail_are_both_named(rank, world_size):
    with failing("encode", f"boom {rank}") if rank != 1 else nullcontext():
        error = attempt()
    assert (
        "rank 0 failed" in str(error)
        and "boom 0" in str(error)
        and "rank 2 failed" in str(error)
        and "boom 2" in str(error)
    )
    check_works(rank, world_size)


@world(3)
def test_a_fault_after_the_last_exchange_is_told_in_the_next_collective(rank, world_size):
    with failing("decode") if rank == 1 else nullcontext():
        error = attempt()
    assert (error is not None) == (rank == 1)
    error = attempt()
    assert "rank 1 failed while decoding the result: ZeroDivisionError: boom" in str(error)
    check_works(rank, world_size)


@world(3)
def test_a_long_message_arrives_cut_and_its_characters_whole(rank, world_size):
    with failing("encode", "ü" * 100_000) if rank == 1 else nullcontext():
        error = attempt()
    assert "ZeroDivisionError: üü" in str(error)
    check_works(rank, world_size)


@world(2, 3)
def test_a_damaged_packet_is_an_error_on_all_ranks(rank, world_size):
    encode = mean_steps.encode

    def damage(segments, **options):
        packet = encode(segments, **options)
        packet[packet.numel() // 2] ^= 0x10
        return packet

    with mock.patch.object(mean_steps, "encode", side_effect=damage) if rank == 0 else nullcontext():
        error = attempt()
    assert "while averaging its chunk: PacketError: packet of rank 0" in str(error), error
    check_works(rank, world_size)


@world(3)
def test_a_packet_that_is_too_large_is_not_sent(rank, world_size):
    # The others' buffers hold so much and no more; gloo would end their processes.
    nonsense = mock.patch.object(mean_steps, "encode", return_value=torch.zeros(10_000_000, dtype=torch.uint8))
    with nonsense if rank == 1 else nullcontext():
        error = attempt()
    assert "rank 1 failed while compressing its values: PacketError: a packet of 10000000 bytes" in str(error), error
    check_works(rank, world_size)


HEADERS = {  # of a message: magic, sequence, exchange, slice, condition, bytes of the packet, 0; a checksum follows
    "magic": lambda header: [7, *header[1:]],
    "sequence": lambda header: [header[0], header[1] - 1, *header[2:]],
    "exchange": lambda header: [*header[:2], 2, *header[3:]],
    "slice": lambda header: [*header[:3], header[3] + 1, *header[4:]],
    "condition": lambda header: [*header[:4], 77, *header[5:]],
    "no packet": lambda header: [*header[:5], 0, 0],
    "a negative size": lambda header: [*header[:5], -8, 0],
    "a large size": lambda header: [*header[:5], 1 << 40, 0],
    "a packet of one that failed": lambda header: [*header[:4], 2, *header[5:]],
    "gave up for nothing": lambda header: [*header[:4], -1, 0, 0],
    "nothing at all": lambda header: [],
    "damaged": lambda header: header,
}


@world(3, seconds=TIMEOUT.total_seconds() / 2)
@pytest.mark.parametrize("change", HEADERS)
def test_an_impossible_header_ends_the_connections(rank, world_size, change):
    group = dist.new_group()
    check_works(rank, world_size, group)
    message = Pipeline._message

    def lie(self, *arguments):
        honest = message(self, *arguments)
        header = HEADERS[change](honest[:56].view(torch.int64).tolist())
        if header:
            header.append(header_checksum(header) ^ (change == "damaged"))
        return torch.cat(
            [torch.tensor(header, dtype=torch.int64).view(torch.uint8), honest[64:] if header else honest[:0]]
        )

    with mock.patch.object(Pipeline, "_message", lie) if rank == 1 else nullcontext():
        error = attempt(group=group)
    assert isinstance(error, TransportError), error
    if rank != 1 and "gave up" not in str(error):
        sealed = change not in ("damaged", "nothing at all")
        own = "rank 1 sent the header" if sealed else "the header of rank 1 for slice"
        assert own in str(error) or "no answer" in str(error)
    error = attempt(group=group)  # the connections are gone, for good
    assert "left this group without connections" in str(error)
    check_works(rank, world_size)  # those of other groups are not


@world(3, seconds=TIMEOUT.total_seconds() / 2)
@pytest.mark.parametrize("word", range(HEADER_WORDS))
@pytest.mark.parametrize("strategy", ["two_phase", "none"])
def test_a_damaged_handshake_is_noticed_at_once(rank, world_size, word, strategy):
    """One bit of rank 1's header flips on its way to rank 2; whatever it says then, no rank waits for its timeout."""
    group = dist.new_group()
    check_works(rank, world_size, group)
    send = Mail.send

    def flip(self, target, message):
        if target == 2 and message.numel() == 8 * HEADER_WORDS:
            message = message.clone()
            message.view(torch.int64)[word] ^= 1 << 3
        send(self, target, message)

    with mock.patch.object(Mail, "send", flip) if rank == 1 else nullcontext():
        error = attempt(strategy=strategy, group=group)
    assert isinstance(error, TransportError), error
    if rank == 2:
        assert "the header of rank(s) 1 was damaged on its way" in str(error)
    check_works(rank, world_size)


@world(3, seconds=TIMEOUT.total_seconds() / 2)
def test_an_unforeseen_failure_closes_the_connections(rank, world_size):
    group = dist.new_group()
    check_works(rank, world_size, group)
    # A failure where none is expected, with messages under way: nobody may wait for this rank until the timeout.
    send = Pipeline.send

    def out_of_memory(self, exchange, *arguments):
        if exchange == 2:
            raise MemoryError("no memory")
        send(self, exchange, *arguments)

    with (
        mock.patch.object(Pipeline, "send", out_of_memory) if rank == 1 else nullcontext(),
        pytest.raises(MemoryError if rank == 1 else TransportError),
        sliced(1000),
    ):
        all_reduce(torch.zeros(50_000), group=group)
    error = attempt(group=group)
    assert "an earlier collective left this group without connections" in str(error)


@world(4, seconds=TIMEOUT.total_seconds() / 2)
@pytest.mark.parametrize("strategy", ["none", "exact_sum"])
def test_a_rank_whose_failure_cannot_be_announced_is_named_and_no_other(rank, world_size, strategy):
    # What an uncompressed mean computes while its headers travel cannot be, nor what fails with messages under way.
    owner, name = {"none": (uncompressed, "_load"), "exact_sum": (Transport, "finish")}[strategy]
    group = dist.new_group()
    check_works(rank, world_size, group)
    with (
        mock.patch.object(owner, name, side_effect=MemoryError("no memory")) if rank == 1 else nullcontext(),
        pytest.raises(MemoryError if rank == 1 else TransportError) as caught,
    ):
        all_reduce(torch.zeros(50_000), group=group, strategy=strategy)
    assert rank == 1 or "no answer from rank(s) 1 (" in str(caught.value), caught.value
    check_works(rank, world_size)


@world(3, alone=True, dying=(1,), seconds=TIMEOUT.total_seconds() / 2)
@pytest.mark.parametrize(("step", "number"), [("encode", 0), ("encode", 1), ("reduce", 0), ("reduce", 1)])
def test_a_killed_rank_is_an_error_on_the_others(rank, world_size, step, number):
    # Before the timeout: the connections of a dead process are closed, which shows at once.
    check_works(rank, world_size)
    if rank == 1:
        original = getattr(MeanSteps, step)

        def die_in_a_slice(self, slice_number, *arguments):
            return original(self, slice_number, *arguments) if slice_number != number else die()

        mock.patch.object(MeanSteps, step, die_in_a_slice).start()
    with sliced(200):  # two slices
        error = attempt()
    assert isinstance(error, TransportError) and "no answer from rank(s) " in str(error), error
    assert "1" in str(error).split("rank(s) ")[1].split(" (")[0]
    error = attempt()
    assert "an earlier collective left this group without connections" in str(error)


@world(3, alone=True, dying=(1,), seconds=TIMEOUT.total_seconds() / 2)
def test_a_program_that_ends_with_an_error_tells_the_others_first(rank, world_size):
    """The others come only after the error: the end of the process waits for them."""
    check_works(rank, world_size)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        with pytest.raises(TypeError, match="must be float32"):
            all_reduce(torch.ones(5000, dtype=torch.int64))
        store.set("failed", "")
        atexit._run_exitfuncs()
        die()
    store.wait(["failed"])
    error = str(attempt())
    assert "rank 1 failed while preparing" in error and "got torch.int64" in error, error


@world(3)
def test_a_silent_rank_is_an_error_after_the_timeout(rank, world_size):
    group = dist.new_group(timeout=timedelta(seconds=3))
    check_works(rank, world_size, group)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        gate, encode = threading.Event(), MeanSteps.encode

        def late(self, number):
            assert number == 0 or gate.wait(TIMEOUT.total_seconds())
            return encode(self, number)

        with mock.patch.object(MeanSteps, "encode", late), sliced(500):
            work = all_reduce(torch.randn(5000), group=group, async_op=True)
            store.wait(["gave up 0", "gave up 2"])
            gate.set()
            # The other ranks gave up: the silent one finds closed connections when it comes back.
            with pytest.raises(TransportError, match="no answer from rank"):
                work.wait(TIMEOUT)
    else:
        with sliced(500):
            error = attempt(group=group)
        assert isinstance(error, TransportError) and "silent for 3 s" in str(error), error
        assert "1" in str(error).split("rank(s) ")[1].split(" (")[0]
        store.set(f"gave up {rank}", "1")
    check_works(rank, world_size)  # other groups are not concerned


@world(2, alone=True)
def test_a_job_that_wants_to_leave_ends_for_all(rank, world_size):
    """What is meant to end the process must not end a thread that others wait for."""
    with mock.patch.object(mean_steps, "encode", side_effect=SystemExit("enough") if rank == 1 else None) as encode:
        encode.side_effect = encode.side_effect or original_encode
        with pytest.raises(qcomm.CollectiveError) as caught:
            all_reduce(torch.ones(5000))
    assert ("ended by SystemExit: enough" in str(caught.value)) == (rank == 1)
    assert threading.active_count() > 1


original_encode = mean_steps.encode
