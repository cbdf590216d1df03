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
from distributed import TIMEOUT, all_reduce, assert_same_on_all_ranks, counting_bytes, die, gathered, run, run_alone

import qcomm
from qcomm import communicator as communicators
from qcomm import two_phase
from qcomm.communicator import get_communicator
from qcomm.transport import Transport, TransportError

pytestmark = pytest.mark.world


def check_works(rank, world_size, group=None):
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(rank))
    all_reduce(tensor, group=group)
    assert tensor.isfinite().all()
    if group is None:
        assert_same_on_all_ranks(tensor)


def failing(name, message="boom"):
    """Makes ``two_phase.<name>`` raise on this rank."""
    return mock.patch.object(two_phase, name, side_effect=ZeroDivisionError(message))


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
        ("_encode_values", "compressing its values"),
        ("measure", "compressing its values"),
        ("_reduce_chunk", "averaging its chunk"),
    ):
        with failing(name) if rank == 1 else nullcontext():
            error = attempt()
        assert f"rank 1 failed while {phase}: ZeroDivisionError: boom" in str(error), error
        assert (rank == 1) == isinstance(error.__cause__, ZeroDivisionError)
        check_works(rank, world_size)
    # Two ranks at once: both are named.
    with failing("_encode_values", f"boom {rank}") if rank != 1 else nullcontext():
        error = attempt()
    assert (
        "rank 0 failed" in str(error)
        and "boom 0" in str(error)
        and "rank 2 failed" in str(error)
        and "boom 2" in str(error)
    )
    # After the last exchange the others have their result already: they hear of it in the next collective.
    with failing("_decode_means") if rank == 1 else nullcontext():
        error = attempt()
    assert (error is not None) == (rank == 1)
    error = attempt()
    assert "rank 1 failed while decoding the result: ZeroDivisionError: boom" in str(error)
    check_works(rank, world_size)
    # A long message arrives cut, and characters of several bytes whole.
    with failing("_encode_values", "ü" * 100_000) if rank == 1 else nullcontext():
        error = attempt()
    assert "ZeroDivisionError: üü" in str(error)
    check_works(rank, world_size)


def test_a_fault_reaches_all_ranks_and_does_not_last():
    run(3, case_faults)


def case_damaged_packet(rank, world_size):
    encode = two_phase.encode

    def damage(segments, **options):
        packet = encode(segments, **options)
        packet[packet.numel() // 2] ^= 0x10
        return packet

    with mock.patch.object(two_phase, "encode", side_effect=damage) if rank == 0 else nullcontext():
        error = attempt()
    assert "while averaging its chunk: PacketError: packet of rank 0" in str(error), error
    check_works(rank, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_damaged_packet_is_an_error_on_all_ranks(world_size):
    run(world_size, case_damaged_packet)


def case_impossible_size(rank, world_size):
    group = dist.new_group()
    check_works(rank, world_size, group)
    # A rank that announces nonsense would make gloo abort its peers, did they not look first.
    lie = mock.patch.object(
        two_phase, "_encode_values", return_value=[torch.zeros(10_000_000, dtype=torch.uint8)] * world_size
    )
    with lie if rank == 1 else nullcontext():
        error = attempt(group=group)
    assert isinstance(error, TransportError), error
    if rank != 1:
        assert "rank 1 announced a packet of 10000000 bytes" in str(error)
    error = attempt(group=group)  # the connections are gone, for good
    assert "left this group without connections" in str(error)
    check_works(rank, world_size)  # those of other groups are not


def test_an_impossible_size_is_refused_before_it_is_received():
    run(3, case_impossible_size)


def case_unforeseen(rank, world_size):
    group = dist.new_group()
    check_works(rank, world_size, group)
    # A failure where none is expected, between the headers and the packets: nobody may wait for this rank until the
    # timeout.
    with (
        mock.patch.object(two_phase.torch, "empty", side_effect=MemoryError("no memory"))
        if rank == 1
        else nullcontext(),
        pytest.raises(MemoryError if rank == 1 else TransportError),
    ):
        all_reduce(torch.zeros(5000), group=group)
    error = attempt(group=group)
    assert "an earlier collective left this group without connections" in str(error)
    check_works(rank, world_size)


def test_an_unforeseen_failure_closes_the_connections():
    run(3, case_unforeseen, seconds=TIMEOUT.total_seconds() / 2)


def case_killed(rank, world_size, phase):
    check_works(rank, world_size)
    if rank == 1:
        mock.patch.object(two_phase, phase, side_effect=lambda *_, **__: die()).start()
    error = attempt()
    assert isinstance(error, TransportError) and "no answer from rank(s) " in str(error), error
    assert "1" in str(error).split("rank(s) ")[1].split(" (")[0]
    error = attempt()
    assert "an earlier collective left this group without connections" in str(error)


@pytest.mark.parametrize("phase", ["_encode_values", "_reduce_chunk"])
def test_a_killed_rank_is_an_error_on_the_others(phase):
    # Before the timeout: the connections of a dead process are closed, which shows at once.
    run_alone(3, case_killed, phase, dying=(1,), seconds=TIMEOUT.total_seconds() / 2)


def case_silent(rank, world_size):
    group = dist.new_group(timeout=timedelta(seconds=3))
    check_works(rank, world_size, group)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        gate, encode_values = threading.Event(), two_phase._encode_values

        def late(*args):
            assert gate.wait(TIMEOUT.total_seconds())
            return encode_values(*args)

        with mock.patch.object(two_phase, "_encode_values", side_effect=late):
            work = all_reduce(torch.randn(5000), group=group, async_op=True)
            store.wait(["gave up 0", "gave up 2"])
            gate.set()
            # The other ranks gave up: the silent one finds closed connections when it comes back.
            with pytest.raises(TransportError, match="no answer from rank"):
                work.wait(TIMEOUT)
    else:
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
        transport = Transport(dist.group.WORLD)
        answers = transport.exchange_small([torch.tensor([rank])] * world_size, "testing")
        assert torch.cat(answers).tolist() == [0, 1, 2]
        transport.close()


def test_groups_that_overlap_and_groups_made_again():
    run(3, case_groups)


def case_threads(rank, world_size):
    def workers():
        return sum(thread.name.startswith("qcomm") for thread in threading.enumerate())

    check_works(rank, world_size)
    before, known = workers(), len(communicators._communicators)
    for _ in range(3):
        group = dist.new_group()
        assert get_communicator(group) is get_communicator(group)
        check_works(rank, world_size, group)
        assert workers() == before + 1
        communicator = get_communicator(group)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        assert workers() == before and len(communicators._communicators) == known
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
