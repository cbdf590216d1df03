"""Random stalls: queues of bounded length never deadlock, and hold no more batches than they say."""

from contextlib import nullcontext
from unittest import mock

import pytest
from distributed import world
from partition_models import batches, optimizer, stage
from partition_soak import stalled_training

from qcomm import PartitionPipeline
from qcomm.partitions import links
from qcomm.partitions.links import Inbox, Outbox

pytestmark = pytest.mark.world


@world(3, 4)
@pytest.mark.parametrize("seed", range(6))
def test_stalls_of_every_partition(rank, world_size, seed):
    stalled_training(rank, world_size, seed, world_size)


@world(4)
@pytest.mark.parametrize("seed", range(6, 9))
def test_stalls_with_ddp_inside_of_partitions(rank, world_size, seed):
    stalled_training(rank, world_size, seed, 2)


@world(2)
@pytest.mark.parametrize("length", [1, 3])
def test_a_fast_partition_is_stopped_by_a_full_queue(rank, world_size, length):
    """The receiver takes a batch only when the queue is as full as it gets; never does a batch more come."""
    put, outstanding = Outbox.put, []

    def noting(self, header, payload):
        put(self, header, payload)
        outstanding.append(len(self._credits))

    own = stage(rank)
    line = PartitionPipeline(own, optimizer(own), 2, queue_batches=length)
    taken, take = [], Inbox.take

    def late(self):
        found = take(self)
        taken.append(self._batches.qsize())
        return found

    with mock.patch.object(Outbox, "put", noting), mock.patch.object(Inbox, "take", late):
        line.run_epoch(batches(12) if line.is_first else None)
    line.close()
    if rank == 0:
        assert len(outstanding) == 12 and max(outstanding) <= length and outstanding[length - 1] >= 1
    else:
        assert len(taken) == 13 and max(taken) <= length


@world(2)
def test_an_epoch_ends_when_those_behind_have_finished_it(rank, world_size):
    """The first partition returns after the last one has said so, which is after its last step."""
    events = []
    control, take_credit = links.control, Outbox._wait_for

    def sent(kind, epoch, number):
        events.append(kind.name)
        return control(kind, epoch, number)

    def waited(self, posted, kind, number):
        take_credit(self, posted, kind, number)
        events.append(kind.name)

    own = stage(rank)
    line = PartitionPipeline(own, optimizer(own), 2)
    noting = mock.patch.object(links, "control", sent) if rank == 1 else nullcontext()
    with noting, mock.patch.object(Outbox, "_wait_for", waited):
        line.run_epoch(batches(5) if line.is_first else None)
    line.close()
    assert events == ["CREDIT"] * 5 + ["DONE"]
