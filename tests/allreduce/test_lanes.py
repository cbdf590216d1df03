"""Calls without an agreement, after "auto" has settled: right, agreed on from time to time, and their faults told."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import check_works
from distributed import TIMEOUT, assert_same_on_all_ranks, gathered, world

import qcomm
from qcomm.allreduce.lanes import Lanes
from qcomm.collectives import BYPASSED, UncompressedValues
from qcomm.communicator import groups

pytestmark = pytest.mark.world

SETTLING = 12  # calls of a kind until its strategy is settled, with one candidate and a short warm-up


@contextmanager
def settling_on(strategy):
    with (
        mock.patch("qcomm.collectives.strategies.automatic_strategies", return_value=(strategy,)),
        mock.patch("qcomm.collectives.tuner.WARM_UP", 1),
    ):
        yield


def values(rank, number=0, shape=(3000,)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * number + rank))


def settle(rank, group, **options):
    for number in range(SETTLING):
        qcomm.all_reduce(values(rank, number), group=group, **options)


def dealt(group):
    return groups._places[group].dealt


def plain_mean(tensor, dtype, group):
    mean = tensor.to(dtype) / dist.get_world_size()
    dist.all_reduce(mean, group=group)
    return mean.to(tensor.dtype)


@world(3)
@pytest.mark.parametrize(("strategy", "dtype"), [("none", torch.float32), ("bf16", torch.bfloat16)])
def test_calls_are_torchs_own_and_agree_from_time_to_time(rank, world_size, strategy, dtype):
    group = dist.new_group()
    with settling_on(strategy):
        settle(rank, group)
        before, agreements = dealt(group), []
        for number in range(2 * BYPASSED + 5):
            tensor, jobs = values(rank, number), dealt(group)
            expected = plain_mean(tensor, dtype, group)
            qcomm.all_reduce(tensor, group=group)
            assert torch.equal(tensor, expected)
            assert_same_on_all_ranks(tensor)
            agreements += [number] * (dealt(group) - jobs)
    assert dealt(group) - before == 2 and agreements[1] - agreements[0] == BYPASSED + 1


@world(2)
@pytest.mark.parametrize("strategy", ["none", "bf16", "two_phase"])
def test_several_of_a_kind_are_under_way(rank, world_size, strategy):
    group = dist.new_group()
    with settling_on(strategy):
        settle(rank, group)
        expected = [values(rank, number) for number in range(7)]
        for tensor in expected:
            qcomm.all_reduce(tensor, group=group)
        tensors = [values(rank, number) for number in range(7)]
        works = [qcomm.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
        for work in reversed(works):
            assert work.wait(TIMEOUT) and work.is_success() and work.exception() is None
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert {work.stats()["strategies"][0] for work in works} == {strategy}
    assert all(work.stats()["bytes_sent"] > 0 for work in works)


@world(2)
def test_the_handle_of_a_sum(rank, world_size):
    group = dist.new_group()
    with settling_on("none"):
        settle(rank, group)
        tensor = torch.full((3000,), float(rank))
        work = qcomm.all_reduce(tensor, group=group, async_op=True)
        assert bool((work.get_future().wait() == 0.5).all()) and work.is_completed()
        late = torch.full((3000,), float(rank))
        if rank == 0:
            work = qcomm.all_reduce(late, group=group, async_op=True)
            with pytest.raises(TimeoutError, match=r"still running after 0\.01 s"):
                work.wait(0.01)
            dist.barrier()
        else:
            dist.barrier()
            work = qcomm.all_reduce(late, group=group, async_op=True)
        assert work.wait() and bool((late == 0.5).all())
        transposed = values(rank, shape=(50, 60)).t()
        for number in range(SETTLING + 3):
            view = values(rank, number, (50, 60)).t()
            expected = plain_mean(view.contiguous(), torch.float32, group)
            qcomm.all_reduce(view, group=group)
            assert view.stride() == transposed.stride() and torch.equal(view, expected)


@world(2)
def test_who_has_no_lane(rank, world_size):
    group = dist.new_group()
    with settling_on("none"):
        for options in ({"verify": "step"}, {"strategy": "none"}):
            settle(rank, group, **options)
            before = dealt(group)
            for number in range(5):
                qcomm.all_reduce(values(rank, number), group=group, **options)
            assert dealt(group) - before == 5
    with (
        mock.patch("qcomm.allreduce.call.can_bypass", return_value=rank == 0),
        pytest.raises(qcomm.ConfigMismatchError, match="calls between agreements: 30 on rank 0, 0 on rank 1"),
    ):
        qcomm.all_reduce(values(rank, shape=(4000,)), group=group)
    check_works(rank, world_size, group)


def errors_until_agreed(rank, group, kind):
    """The texts of the errors of this kind that calls raise until ranks have agreed again."""
    errors = []
    for number in range(BYPASSED + 1):
        try:
            qcomm.all_reduce(values(rank, number), group=group)
        except kind as error:
            errors.append(str(error))
    return errors


@world(2)
def test_a_mean_that_differs_is_named_at_the_next_agreement(rank, world_size):
    group, store = dist.new_group(), UncompressedValues.fingerprint

    def damaged(self, buffer):
        buffer[7] += 1
        return store(self, buffer)

    with settling_on("none"):
        settle(rank, group)
        with mock.patch.object(UncompressedValues, "fingerprint", damaged) if rank == 1 else nullcontext():
            qcomm.all_reduce(values(rank), group=group)
        errors = errors_until_agreed(rank, group, qcomm.DivergenceError)
        assert len(errors) == 1 and "different means of call" in errors[0] and "of (3000,)" in errors[0], errors
    check_works(rank, world_size, group)


@world(2)
def test_a_fault_after_a_sum_is_told_at_the_next_agreement(rank, world_size):
    group = dist.new_group()
    boom = mock.patch.object(UncompressedValues, "store", side_effect=ZeroDivisionError("boom"))
    with settling_on("none"):
        settle(rank, group)
        with boom if rank == 1 else nullcontext():
            caught = []
            try:
                qcomm.all_reduce(values(rank), group=group)
            except qcomm.CollectiveError as error:
                caught.append(str(error))
        assert len(caught) == (rank == 1) and all("averaged, but not stored on this rank" in text for text in caught)
        errors = errors_until_agreed(rank, group, qcomm.CollectiveError)
        assert len(errors) == 1 and "rank 1 failed while decoding the result: ZeroDivisionError: boom" in errors[0]
    check_works(rank, world_size, group)


@world(2, seconds=TIMEOUT.total_seconds() / 2)
@pytest.mark.parametrize("fault", ["an argument", "no memory"])
def test_a_rank_that_cannot_take_part_leaves_nobody_waiting(rank, world_size, fault):
    """No header can say so, so the connections end."""
    group = dist.new_group()
    options = {"min_elements": -1} if fault == "an argument" and rank == 1 else {}
    failing = mock.patch.object(UncompressedValues, "load", side_effect=MemoryError("no memory"))
    with settling_on("none"):
        settle(rank, group)
        with failing if fault == "no memory" and rank == 1 else nullcontext():
            expected = ValueError if options else MemoryError
            with pytest.raises(expected if rank == 1 else qcomm.CollectiveError):
                qcomm.all_reduce(values(rank), group=group, **options)
        with pytest.raises(qcomm.CollectiveError, match="as an earlier one was not"):
            qcomm.all_reduce(values(rank), group=group)
    check_works(rank, world_size)  # other groups are not concerned


@world(2)
def test_options_that_ranks_may_choose_do_not_end_a_lane(rank, world_size):
    group = dist.new_group()
    with settling_on("none"):
        settle(rank, group)
        before = dealt(group)
        for number in range(4):
            tensor = values(rank, number)
            qcomm.all_reduce(tensor, group=group, **({"num_threads": 1 + number} if rank else {}))
            assert_same_on_all_ranks(tensor)
        assert dealt(group) == before
    with pytest.raises(TypeError, match="num_threads"):
        qcomm.all_reduce(torch.zeros(3), group=dist.new_group(), num_threads=True)


@world(1)
def test_there_are_not_ever_more_lanes(rank, world_size):
    lanes = Lanes()
    found = [lanes.find(number) for number in range(300)]
    assert found[0] is lanes.find(0) and found[-1] is None
    assert gathered(1) == [1]
