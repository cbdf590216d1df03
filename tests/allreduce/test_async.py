"""Several all-reduces under way: at once, the same bits on any number of channels, each error raised by its own."""

import threading
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import check_works
from distributed import TIMEOUT, all_reduce, assert_same_on_all_ranks, gathered, world

import qcomm
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator import groups
from qcomm.communicator.pipeline import Pipeline
from qcomm.transport import TransportError

pytestmark = pytest.mark.world

COUNT = 6  # more than channels


def tensors(rank, count=COUNT, more=100):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(3000 + more * number, generator=generator) for number in range(count)]


def start_all(values, **options):
    return [all_reduce(value, async_op=True, **options) for value in values]


def errors_of(works):
    errors = []
    for work in works:
        try:
            work.wait(TIMEOUT)
        except qcomm.CollectiveError as error:
            errors.append(error)
        else:
            errors.append(None)
    return errors


@world(2, seconds=TIMEOUT.total_seconds())
def test_one_does_not_wait_for_the_messages_of_the_one_before_it(rank, world_size):
    group = dist.new_group()
    for _ in range(groups.CHANNELS):
        check_works(rank, world_size, group)
    first, receive = groups.get_communicator(group)._thread, Pipeline.receive
    values, works, started, held = tensors(rank, groups.CHANNELS), [], threading.Event(), []

    def late(self, *arguments):
        """The first one's messages are taken when those behind it have ended."""
        if threading.current_thread() is first:
            assert started.wait(TIMEOUT.total_seconds())
            for work in works[1:]:
                work.get_future().wait()
            held.append(work)
        return receive(self, *arguments)

    with mock.patch.object(Pipeline, "receive", late) if rank == 1 else nullcontext():
        works += start_all(values, group=group)
        started.set()
        works[0].wait(TIMEOUT)
    assert bool(held) == (rank == 1) and all(work.is_success() for work in works)
    assert_same_on_all_ranks(*values)


@world(3)
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "exact_sum", "none"])
def test_the_number_of_channels_does_not_change_a_bit(rank, world_size, strategy):
    results = []
    for channels in (1, 3, 4):
        with mock.patch.object(groups, "CHANNELS", channels):
            group, values = dist.new_group(), tensors(rank)
            assert errors_of(start_all(values, strategy=strategy, group=group)) == [None] * COUNT
        results.append(values)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert_same_on_all_ranks(*results[0])


@world(3)
def test_a_fault_is_raised_by_the_handle_of_its_tensor_alone(rank, world_size):
    values, encode = tensors(rank), MeanSteps.encode

    def fail(self, number):
        if self._task.buffer.numel() == 3200:
            raise ZeroDivisionError("boom")
        return encode(self, number)

    with mock.patch.object(MeanSteps, "encode", fail) if rank == 1 else nullcontext():
        works = start_all(values)
        errors = errors_of(works)
    assert [error is not None for error in errors] == [value.numel() == 3200 for value in values]
    assert "rank 1 failed while compressing its values: ZeroDivisionError: boom" in str(errors[2])
    assert_same_on_all_ranks(*[value for value, error in zip(values, errors, strict=True) if error is None])
    check_works(rank, world_size)


@world(3)
def test_an_argument_that_one_rank_cannot_take_is_told_to_that_call_of_the_others(rank, world_size):
    values = tensors(rank)
    works = start_all(values[:3])
    if rank == 1:
        with pytest.raises(ValueError, match="min_elements must be >= 0"):
            all_reduce(values[3], min_elements=-1)
        works.append(None)
    else:
        works.append(all_reduce(values[3], async_op=True))
    works += start_all(values[4:])
    errors = errors_of([work for work in works if work is not None])
    expected = [None] * (COUNT - (rank == 1))
    if rank != 1:
        assert "rank 1 failed while preparing the exchange: ValueError: min_elements" in str(errors[3])
        errors[3] = None
    assert errors == expected
    check_works(rank, world_size)


@world(3, seconds=TIMEOUT.total_seconds() / 2)
def test_a_group_without_one_channel_has_none(rank, world_size):
    """Whatever is under way ends, and all later calls fail on all ranks, soon."""
    group = dist.new_group()
    check_works(rank, world_size, group)
    send = Pipeline.send

    def out_of_memory(self, exchange, slice_number, packets):
        if exchange == 2 and threading.current_thread() is broken:
            raise MemoryError("no memory")
        send(self, exchange, slice_number, packets)

    check_works(rank, world_size, group)
    broken = groups.get_communicator(group, channel=2, channels=4)._thread
    with mock.patch.object(Pipeline, "send", out_of_memory) if rank == 1 else nullcontext():
        work = all_reduce(torch.ones(5000), group=group, async_op=True)  # the third, on channel 2
        with pytest.raises(MemoryError if rank == 1 else TransportError):
            work.wait(TIMEOUT)
    for error in errors_of(start_all(tensors(rank), group=group)):
        assert isinstance(error, TransportError), error
        assert "left this group without connections" in str(error) or "no answer from rank" in str(error), error
    check_works(rank, world_size)  # other groups are not concerned


@world(2)
def test_ranks_that_differ_meet_on_one_channel(rank, world_size):
    """One waits at once and the other later; they differ in strategies; they call different functions."""
    for number in range(3):
        work = all_reduce(torch.full((3000,), float(rank)), async_op=(rank + number) % 2 == 0)
        if work is not None:
            work.wait(TIMEOUT)
    with pytest.raises(qcomm.ConfigMismatchError, match="strategy: auto on rank 0, two_phase on rank 1"):
        all_reduce(torch.zeros(3000), strategy=("auto", "two_phase")[rank])
    check_works(rank, world_size)
    other = all_reduce if rank == 0 else lambda tensor: qcomm.broadcast_parameters([tensor])
    with pytest.raises(qcomm.ConfigMismatchError, match="operation: all_reduce on rank 0, broadcast_parameters"):
        other(torch.zeros(3000))
    check_works(rank, world_size)


@world(2)
def test_strategies_under_trial_are_the_same_on_all_ranks(rank, world_size):
    """A call with "auto" runs alone, and beside others that do not."""
    values = tensors(rank, 24, more=0)
    kinds = ["auto" if number % 3 else "two_phase" for number in range(len(values))]
    works = [all_reduce(value, async_op=True, strategy=kind) for value, kind in zip(values, kinds, strict=True)]
    assert errors_of(works) == [None] * len(works)
    found = [work.stats()["strategies"][0] for work in works]
    assert gathered(found) == [found] * world_size and found[::3] == ["two_phase"] * 8
    assert {"none", "two_phase"} <= set(found)
    assert_same_on_all_ranks(*values)
