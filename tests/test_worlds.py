"""``@world`` of tests/support/distributed.py: arguments reach all ranks, and the failure of one fails the test."""

import os

import pytest
import torch.distributed as dist
from distributed import gathered, world


@world(1, 2)
@pytest.mark.parametrize("number", [3, 5])
def test_sizes_parameters_and_fixtures(rank, world_size, tmp_path, number):
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size)
    assert tmp_path.is_dir() and number in (3, 5)
    assert gathered((rank, tmp_path, number)) == [(other, tmp_path, number) for other in range(world_size)]


@world()
@pytest.mark.parametrize(("world_size", "last"), [(1, 0), (2, 1)])
def test_a_size_that_depends_on_another_argument(rank, world_size, last):
    assert max(gathered(rank)) == last == world_size - 1


@world(2)
def fail_on_rank_1(rank, world_size):
    assert rank != 1, "boom"


@pytest.mark.world
def test_a_failure_shows_the_rank_and_its_traceback():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2:\nTraceback.*in fail_on_rank_1.*AssertionError: boom"):
        fail_on_rank_1()


@world(2, alone=True)
def end_rank_1(rank, world_size):
    if rank == 1:
        os._exit(7)


@world(2, alone=True, dying=(1,))
def test_a_rank_that_has_to_end(rank, world_size):
    if rank == 1:
        os._exit(7)


@pytest.mark.world
def test_a_rank_that_ends_is_a_failure():
    with pytest.raises(AssertionError, match="rank 1 of 2:\nprocess ended with exit code 7"):
        end_rank_1()


@world(2, alone=True, seconds=2)
def wait_for_ever(rank, world_size):
    if rank == 1:
        dist.distributed_c10d._get_default_store().wait(["nothing"])


@pytest.mark.world
def test_a_rank_that_is_late_is_a_failure():
    with pytest.raises(AssertionError, match="rank 1 of 2:\nno result within 2 s"):
        wait_for_ever()
