"""Weights of a pipeline are those of a loop in one process; its options, reports, and what it refuses."""

import pytest
import torch
import torch.distributed as dist
from distributed import gathered, world
from partition_models import CLASSES, WIDTHS, batches, optimizer, same, stage, trained
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm import ConfigMismatchError, LossFilter, PartitionPipeline, RangeGrid
from qcomm.partitions.messages import HEADER_BYTES
from qcomm.partitions.sequential import SequentialPartitions

pytestmark = pytest.mark.world


def line_of(rank, partitions, **options):
    own = stage(rank)
    return own, PartitionPipeline(own, optimizer(own), partitions, **options)


@world(2, 4)
@pytest.mark.parametrize("bits", [None, 4, 6, 8])
def test_weights_are_those_of_a_loop_in_one_process(rank, world_size, bits):
    grid = None if bits is None else RangeGrid(num_bits=bits)
    own, line = line_of(rank, world_size, grid=grid, queue_batches=2)
    epochs = [batches(5, seed=1), batches(3, seed=2), []]
    reports = [line.run_epoch(data if line.is_first else None) for data in epochs]
    line.close()
    assert same(own.state_dict(), trained(world_size, epochs, grid)[rank])
    assert [report.batches for report in reports] == [5, 3, 0]
    assert [report.samples for report in reports] == [5 * 24, 3 * 24, 0]


@world(3)
def test_a_filter_decides_what_goes_on_and_labels_follow(rank, world_size):
    chosen = LossFilter(0.25, from_epoch=1)
    own, line = line_of(rank, world_size, sample_filter=chosen if rank == 0 else None)
    epochs = [batches(4, seed=1), batches(4, seed=2)]
    reports = [line.run_epoch(data if line.is_first else None) for data in epochs]
    line.close()
    expected = trained(world_size, epochs, RangeGrid(num_bits=6), chosen.kept)
    assert same(own.state_dict(), expected[rank])
    assert [report.samples for report in reports] == [96, 96 if rank == 0 else 72]


@world(3)
def test_reports_count_what_was_sent(rank, world_size):
    _, line = line_of(rank, world_size, grid=None)
    report = line.run_epoch(batches(3) if line.is_first else None)
    line.close()
    values = 0 if line.is_last else 3 * 24 * (4 * WIDTHS[rank + 1] + 8)
    assert report.uncompressed_bytes == values
    assert report.sent_bytes == (0 if line.is_last else values + 4 * HEADER_BYTES)
    assert 0 <= report.waiting_seconds <= report.seconds and 0 <= report.utilisation <= 1


@world(4)
def test_ddp_inside_a_partition(rank, world_size):
    """Two lines of two partitions, each on half of every batch, make the weights of a line on whole batches."""
    own = stage(rank // 2)
    line = PartitionPipeline(own, optimizer(own), 2, grid=None)
    assert isinstance(line.module, DistributedDataParallel) and line.partition == rank // 2
    whole = batches(4, seed=3)
    half = [(values.chunk(2)[rank % 2], labels.chunk(2)[rank % 2]) for values, labels in whole]
    line.run_epoch(half if line.is_first else None)
    line.close()
    expected = trained(2, [whole])[rank // 2]
    assert all(torch.allclose(own.state_dict()[name], expected[name], atol=1e-5) for name in expected)
    others = gathered(own.state_dict())
    assert same(others[0], others[1]) and same(others[2], others[3])


@world(2)
def test_values_that_are_changed_after_they_were_handed_over(rank, world_size):
    """A loader that fills one buffer again and again, in front of a partition that only reshapes it."""
    epochs = [batches(6, seed=4)]
    received = []

    class First(nn.Module):
        def forward(self, values):
            return values.view(len(values), -1)

    class Second(nn.Module):
        def forward(self, values):
            received.append(values.clone())
            return values

    def reused():
        buffer = torch.empty(24, WIDTHS[0])
        for values, labels in epochs[0]:
            yield buffer.copy_(values), labels

    own = qcomm.LocalStage(First() if rank == 0 else Second(), nn.Linear(WIDTHS[0], CLASSES))
    line = PartitionPipeline(own, optimizer(own), 2, grid=None)
    line.run_epoch(reused() if line.is_first else None)
    line.close()
    if rank == 1:
        assert all(torch.equal(got, sent) for got, (sent, _) in zip(received, epochs[0], strict=True))


@world(3)
def test_ranks_with_other_options_are_told(rank, world_size):
    own = stage(rank)
    with pytest.raises(ConfigMismatchError, match=r'rank 1 has .*"queue_batches": "5"'):
        PartitionPipeline(own, optimizer(own), 3, queue_batches=5 if rank == 1 else 4)


@world(2)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"partitions": 3}, ValueError, "partitions must be at least 2 and divide the 2 ranks, got 3"),
        ({"partitions": 1}, ValueError, "partitions must be at least 2"),
        ({"partitions": "2"}, TypeError, "partitions must be an int, got str"),
        ({"partitions": 2, "queue_batches": 0}, ValueError, "queue_batches must be at least 1, got 0"),
        ({"partitions": 2, "max_batch_bytes": 1.5}, TypeError, "max_batch_bytes must be an int, got float"),
        ({"partitions": 2, "grid": 6}, TypeError, "grid must be a RangeGrid, a SigmaGrid or None, got int"),
        ({"partitions": 2, "stage": nn.Linear(2, 2)}, TypeError, "stage must be a LocalStage, got Linear"),
    ],
)
def test_wrong_options(rank, world_size, options, error, match):
    own = options.pop("stage", stage(rank))
    with pytest.raises(error, match=match):
        PartitionPipeline(own, optimizer(own), **options)
    dist.barrier()


@pytest.mark.parametrize("grid", [None, RangeGrid(num_bits=6)])
def test_the_sequential_trainer_is_the_loop(grid):
    stages = [stage(number) for number in range(3)]
    keep = LossFilter(0.5)
    sequential = SequentialPartitions(stages, [optimizer(each) for each in stages], grid=grid, sample_filter=keep)
    epochs = [batches(3, seed=7), batches(2, seed=8)]
    reports = [sequential.run_epoch(data) for data in epochs]
    expected = trained(3, epochs, grid, keep.kept)
    assert all(same(each.state_dict(), wanted) for each, wanted in zip(stages, expected, strict=True))
    assert [report.samples for report in reports[0]] == [72, 36, 36]
    assert reports[0][2].sent_bytes == 0 < reports[0][1].sent_bytes


def test_one_optimizer_per_stage():
    with pytest.raises(ValueError, match="optimizers must be one per stage, got 0 for 1 stages"):
        SequentialPartitions([stage(0)], [])


def test_a_head_that_changes_features_in_place_is_refused():
    own = qcomm.LocalStage(nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="head must not change its input in place"):
        own(torch.ones(2, 4))


def test_a_loss_of_the_whole_batch_is_refused():
    own = stage(0)
    sequential = SequentialPartitions([own], [optimizer(own)], loss=nn.functional.cross_entropy)
    with pytest.raises(ValueError, match=r"loss must return one number per sample, of shape \(24,\), got \(\)"):
        sequential.run_epoch(batches(1))
