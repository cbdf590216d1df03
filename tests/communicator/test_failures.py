"""What goes wrong on one rank is an error on all, soon, and names the rank; what is only wrong once does not last."""

import gc
import subprocess
import sys
import threading
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import (
    TIMEOUT,
    all_reduce,
    assert_same_on_all_ranks,
    counting_bytes,
    die,
    gathered,
    run,
    run_alone,
    sliced,
)

import qcomm
from qcomm.collectives import two_phase_steps as mean_steps
from qcomm.collectives import uncompressed as plain
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator import groups
from qcomm.communicator.groups import get_communicator
from qcomm.communicator.messages import Pipeline
from qcomm.transport.base import TransportError
from qcomm.transport.gloo import GlooTransport

pytestmark = pytest.mark.world


def check_works(rank, world_size, group=None):
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(rank))
    all_reduce(tensor, group=group)
    assert tensor.isfinite().all()
    if group is None:
        assert_same_on_all_ranks(tensor)


def failing(name, message="boom"):
    """Makes a step of ``mean_steps`` raise on this rank."""
    owner = MeanSteps if hasattr(MeanSteps, name) else mean_steps
    return mock.patch.object(owner, name, side_effect=ZeroDivisionError(message))


def attempt(**options):
    """The error of one all_reduce, or None."""
    try:
        all_reduce(torch.randn(5000), **options)
    except (qcomm.CollectiveError, qcomm.ConfigMismatchError) as error:
        return error
    return None


def case_faults(rank, world_size):
    check_works(rank, world_size)
    for name, phase in (
        ("begin", "compressing its values"),
        ("encode", "compressing its values"),
        ("choose", "compressing its values"),
        ("reduce", "averaging its chunk"),
    ):
        with failing(name) if rank == 1 else nullcontext():
            error = attempt()
        assert f"rank 1 failed while {phase}: ZeroDivisionError: boom" in str(error), error
        assert (rank == 1) == isinstance(error.__cause__, ZeroDivisionError)
        check_works(rank, world_size)
    # Two ranks at once: both are named.
    with failing("encode", f"boom {rank}") if rank != 1 else nullcontext():
        error = attempt()
    assert (
        "rank 0 failed" in str(error)
        and "boom 0" in str(error)
        and "rank 2 failed" in str(error)
        and "boom 2" in str(error)
    )
    # After the last exchange the others have their result already: they hear of it in the next collective.
    with failing("decode") if rank == 1 else nullcontext():
        error = attempt()
    assert (error is not None) == (rank == 1)
    error = attempt()
    assert "rank 1 failed while decoding the result: ZeroDivisionError: boom" in str(error)
    check_works(rank, world_size)
    # A long message arrives cut, and characters of several bytes whole.
    with failing("encode", "ü" * 100_000) if rank == 1 else nullcontext():
        error = attempt()
    assert "ZeroDivisionError: üü" in str(error)
    check_works(rank, world_size)


def test_a_fault_reaches_all_ranks_and_does_not_last():
    run(3, case_faults)


def case_damaged_packet(rank, world_size):
    encode = mean_steps.encode

    def damage(segments, **options):
        packet = encode(segments, **options)
        packet[packet.numel() // 2] ^= 0x10
        return packet

    with mock.patch.object(mean_steps, "encode", side_effect=damage) if rank == 0 else nullcontext():
        error = attempt()
    assert "while averaging its chunk: PacketError: packet of rank 0" in str(error), error
    check_works(rank, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_damaged_packet_is_an_error_on_all_ranks(world_size):
    run(world_size, case_damaged_packet)


def case_too_large_a_packet(rank, world_size):
    # The others' buffers hold so much and no more; gloo would end their processes.
    nonsense = mock.patch.object(mean_steps, "encode", return_value=torch.zeros(10_000_000, dtype=torch.uint8))
    with nonsense if rank == 1 else nullcontext():
        error = attempt()
    assert "rank 1 failed while compressing its values: PacketError: a packet of 10000000 bytes" in str(error), error
    check_works(rank, world_size)


def test_a_packet_that_is_too_large_is_not_sent():
    run(3, case_too_large_a_packet)


HEADERS = {  # of a message: magic, sequence, exchange, slice, condition, bytes of the packet, 0, 0
    "magic": lambda header: [7, *header[1:]],
    "sequence": lambda header: [header[0], header[1] - 1, *header[2:]],
    "exchange": lambda header: [*header[:2], 2, *header[3:]],
    "slice": lambda header: [*header[:3], header[3] + 1, *header[4:]],
    "condition": lambda header: [*header[:4], 77, *header[5:]],
    "no packet": lambda header: [*header[:5], 0, 0, 0],
    "a negative size": lambda header: [*header[:5], -8, 0, 0],
    "a large size": lambda header: [*header[:5], 1 << 40, 0, 0],
    "a packet of one that failed": lambda header: [*header[:4], 2, *header[5:]],
    "gave up for nothing": lambda header: [*header[:4], -1, 0, 0, 0],
    "nothing at all": lambda header: [],
}


def case_impossible_header(rank, world_size, change):
    group = dist.new_group()
    check_works(rank, world_size, group)
    message = Pipeline._message

    def lie(self, *arguments):
        honest = message(self, *arguments)
        header = change(honest[:64].view(torch.int64).tolist())
        return torch.cat(
            [torch.tensor(header, dtype=torch.int64).view(torch.uint8), honest[64:] if header else honest[:0]]
        )

    with mock.patch.object(Pipeline, "_message", lie) if rank == 1 else nullcontext():
        error = attempt(group=group)
    assert isinstance(error, TransportError), error
    if rank != 1 and "gave up" not in str(error):
        assert "rank 1 sent the header" in str(error) or "no answer" in str(error)
    error = attempt(group=group)  # the connections are gone, for good
    assert "left this group without connections" in str(error)
    check_works(rank, world_size)  # those of other groups are not


def case_impossible_headers(rank, world_size):
    for change in HEADERS.values():
        case_impossible_header(rank, world_size, change)


def test_an_impossible_header_ends_the_connections():
    run(3, case_impossible_headers, seconds=TIMEOUT.total_seconds() / 2)


def case_unforeseen(rank, world_size):
    group = dist.new_group()
    check_works(rank, world_size, group)
    # A failure where none is expected, with messages under way: nobody may wait for this rank until the timeout.
    expect = Pipeline.expect

    def out_of_memory(self, exchange, *arguments):
        if exchange == 2:
            raise MemoryError("no memory")
        expect(self, exchange, *arguments)

    with (
        mock.patch.object(Pipeline, "expect", out_of_memory) if rank == 1 else nullcontext(),
        pytest.raises(MemoryError if rank == 1 else TransportError),
        sliced(1000),
    ):
        all_reduce(torch.zeros(50_000), group=group)
    error = attempt(group=group)
    assert "an earlier collective left this group without connections" in str(error)
    # What a plain mean computes while its headers travel can no longer be announced.
    group = dist.new_group()
    check_works(rank, world_size, group)
    with (
        mock.patch.object(plain, "_load", side_effect=MemoryError("no memory")) if rank == 1 else nullcontext(),
        pytest.raises(MemoryError if rank == 1 else TransportError),
    ):
        all_reduce(torch.zeros(50_000), group=group, strategy="none")
    check_works(rank, world_size)


def test_an_unforeseen_failure_closes_the_connections():
    run(3, case_unforeseen, seconds=TIMEOUT.total_seconds() / 2)


def case_killed(rank, world_size, step, number):
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


@pytest.mark.parametrize(("step", "number"), [("encode", 0), ("encode", 1), ("reduce", 0), ("reduce", 1)])
def test_a_killed_rank_is_an_error_on_the_others(step, number):
    # Before the timeout: the connections of a dead process are closed, which shows at once.
    run_alone(3, case_killed, step, number, dying=(1,), seconds=TIMEOUT.total_seconds() / 2)


def case_silent(rank, world_size):
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


def test_a_silent_rank_is_an_error_after_the_timeout():
    run(3, case_silent)


def case_groups(rank, world_size):
    check_works(rank, world_size)
    # Ranks that belong to different numbers of groups.
    pair = dist.new_group([0, 2])
    if rank != 1:
        tensor = torch.full((3000,), float(rank))
        all_reduce(tensor, group=pair)
        assert torch.equal(tensor, torch.ones(3000))
        with pytest.raises(qcomm.ConfigMismatchError, match=r"shape: .* on rank 0, .* on rank 2"):
            all_reduce(torch.zeros(10 + rank), group=pair)
    everyone = dist.new_group()
    for round_number in range(3):
        tensor = torch.full((3000,), float(rank + round_number))
        all_reduce(tensor, group=everyone)
        assert torch.equal(tensor, torch.full((3000,), 1.0 + round_number))
        dist.destroy_process_group(everyone)
        with pytest.raises(ValueError, match="group was destroyed"):
            all_reduce(tensor, group=everyone)
        everyone = dist.new_group()
    check_works(rank, world_size)
    # Connections made again on the store of a group that itself stays.
    for _ in range(3):
        transport = GlooTransport(dist.group.WORLD)
        answers = transport.exchange_small([torch.tensor([rank])] * world_size, "testing")
        assert torch.cat(answers).tolist() == [0, 1, 2]
        transport.close()


def test_groups_that_overlap_and_groups_made_again():
    run(3, case_groups)


def case_two_groups(rank, world_size):
    """Two threads with a group each, which ranks connect in opposite orders."""
    groups = [dist.new_group(), dist.new_group()]
    first_is_there = threading.Event()
    connecting = GlooTransport._connect
    errors = []

    def connect(transport, group):
        first_is_there.set()
        return connecting(transport, group)

    def use(group, late):
        try:
            if late:
                first_is_there.wait()
            check_works(rank, world_size, group)
        except (AssertionError, qcomm.CollectiveError) as error:
            errors.append(error)

    with mock.patch.object(GlooTransport, "_connect", connect):
        threads = [threading.Thread(target=use, args=(group, n != rank)) for n, group in enumerate(groups)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_groups_connect_independently():
    run(2, case_two_groups, seconds=30)


def case_leaving(rank, world_size):
    """What is meant to end the process must not end a thread that others wait for."""
    with mock.patch.object(mean_steps, "encode", side_effect=SystemExit("enough") if rank == 1 else None) as encode:
        encode.side_effect = encode.side_effect or original_encode
        with pytest.raises(qcomm.CollectiveError) as caught:
            all_reduce(torch.ones(5000))
    assert ("ended by SystemExit: enough" in str(caught.value)) == (rank == 1)
    assert threading.active_count() > 1


original_encode = mean_steps.encode


def test_a_job_that_wants_to_leave_ends_for_all():
    run_alone(2, case_leaving)


def case_threads(rank, world_size):
    def workers():
        return sum(thread.name.startswith("qcomm") for thread in threading.enumerate())

    check_works(rank, world_size)
    before, known = workers(), len(groups._places)
    for _ in range(3):
        group = dist.new_group()
        assert get_communicator(group) is get_communicator(group)
        check_works(rank, world_size, group)
        assert workers() == before + 1
        communicator = get_communicator(group)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        assert workers() == before and len(groups._places) == known
        with pytest.raises(qcomm.CollectiveError, match="communicator is closed"):
            communicator.submit(lambda: 1).wait()
    group = dist.new_group()
    check_works(rank, world_size, group)
    dist.destroy_process_group(group)  # while a reference is kept: noticed at the next call
    check_works(rank, world_size)
    assert workers() == before


def test_threads_end_with_their_groups():
    run(2, case_threads)


def case_bytes(rank, world_size):
    sent = received = 0
    with counting_bytes() as counting:
        for count in (0, 1, 33, 1024, 100_003):
            for grid in (qcomm.SigmaGrid(), qcomm.RangeGrid(c=2)):
                with sliced(10_000):
                    work = all_reduce(torch.randn(count), grid, async_op=True)
                    work.wait()
                sent += work.stats()["bytes_sent"]
                received += work.stats()["bytes_received"]
    assert (sent, received) == (counting.sent, counting.received()) and sent > 0
    assert sum(s for s, _ in gathered((sent, received))) == sum(r for _, r in gathered((sent, received)))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_bytes_in_stats_are_those_handed_to_gloo(world_size):
    run(world_size, case_bytes)


PROGRAM = """
import torch, torch.distributed as dist, qcomm
dist.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
qcomm.all_reduce(torch.randn(5000), strategy="two_phase")
print("ready")
{end}
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("dist.destroy_process_group()", 0), ("raise SystemExit(7)", 7)])
def test_a_process_ends_quietly(end, code, tmp_path):
    program = PROGRAM.format(store=tmp_path / "store", end=end)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "ready\n", "")
