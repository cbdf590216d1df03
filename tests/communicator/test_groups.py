"""Groups of ranks: those that overlap, are made again or connect at once, their threads, bytes and ends."""

import gc
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import check_works
from distributed import all_reduce, counting_bytes, gathered, sliced, world

import qcomm
from qcomm.communicator import groups
from qcomm.communicator.groups import get_communicator
from qcomm.transport.base import Transport, TransportError
from qcomm.transport.gloo import GlooTransport

pytestmark = pytest.mark.world


@world(3)
def test_groups_that_overlap_and_groups_made_again(rank, world_size):
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


@world(2, seconds=30)
def test_groups_connect_independently(rank, world_size):
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


@world(2, alone=True)
def test_ranks_meet_over_ipv6_and_in_groups_that_are_watched(rank, world_size):
    """The store at ::1, and TORCH_DISTRIBUTED_DEBUG=DETAIL, which wraps the group."""
    port = [0]
    if rank == 0:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            port = [probe.getsockname()[1]]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    dist.init_process_group("gloo", init_method=f"tcp://[::1]:{port[0]}", rank=rank, world_size=world_size)
    check_works(rank, world_size)
    check_works(rank, world_size, dist.new_group())


@world(2)
def test_threads_end_with_their_groups(rank, world_size):
    def workers():
        return sum(thread.name.startswith("qcomm") for thread in threading.enumerate())

    check_works(rank, world_size)
    before, known = workers(), len(groups._places)
    for _ in range(3):
        group = dist.new_group()
        assert get_communicator(group) is get_communicator(group)
        check_works(rank, world_size, group)
        assert workers() == before + groups.CHANNELS
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


@world(2, 3, 5)
def test_bytes_in_stats_are_those_handed_to_gloo(rank, world_size):
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


@world(2, seconds=60)
def test_groups_whose_connections_broke_leave_no_threads_behind(rank, world_size):
    """A run that goes on in new groups after its errors: what these have cost is given back."""

    def break_one():
        group = dist.new_group()
        check_works(rank, world_size, group)
        failing = mock.patch.object(Transport, "finish", side_effect=MemoryError("no memory"))
        with failing if rank == 1 else nullcontext(), pytest.raises((MemoryError, TransportError)):
            all_reduce(torch.zeros(5000), group=group)
        dist.destroy_process_group(group)

    def number_of_threads():
        check_works(rank, world_size)  # any call joins the threads of groups that have ended
        gc.collect()
        return len(list(Path("/proc/self/task").iterdir()))

    break_one()
    before = number_of_threads()
    for _ in range(5):
        break_one()
    # A thread of gloo's may end a moment after its group.
    assert min(number_of_threads() for _ in range(3)) < before + 3, "each group has at least three"
