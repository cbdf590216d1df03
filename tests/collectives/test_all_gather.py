"""all_gather: one quantization, one exchange."""

import pytest
import strategy_cases
import torch
from distributed import assert_same_on_all_ranks, world

import qcomm
from qcomm.collectives import all_gather

pytestmark = pytest.mark.world


@world(1, 2, 3, 5)
@pytest.mark.parametrize("grid", strategy_cases.GRIDS, ids=str)
def test_equals_twin_within_the_bound_for_the_bytes_of_the_formula(rank, world_size, grid):
    strategy_cases.check_kinds(rank, world_size, "all_gather", grid)


@world(2, 3)
def test_faults_and_mismatches_reach_all_ranks(rank, world_size):
    steps = {"_encode": "compressing its values", "pack_chunk": "compressing its values"}
    strategy_cases.check_faults(rank, world_size, "all_gather", all_gather, steps, last="_decode")


@world(3)
def test_bytes_that_are_no_packet_are_refused(rank, world_size):
    for size, match in ((10_000_000, "rank 1 announced a packet of 10000000 bytes"), (100, "packet of rank 1")):
        lie = torch.zeros(size, dtype=torch.uint8)
        strategy_cases.check_lie(rank, world_size, "all_gather", all_gather, "_encode", lie, match)


@world(2, 3)
def test_more_exact_than_two_phase(rank, world_size):
    """The owners' second quantization is what two_phase adds."""
    inputs = [strategy_cases.values("gauss", 50_000, seed) for seed in range(world_size)]
    exact = torch.stack([x.double() for x in inputs]).mean(0)
    errors = {}
    for strategy in ("all_gather", "two_phase"):
        tensor = inputs[rank].clone()
        qcomm.all_reduce(tensor, strategy=strategy)
        errors[strategy] = float((tensor - exact).square().mean())
    assert errors["all_gather"] < 0.8 * errors["two_phase"]


@world(3)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_value_reaches_all_ranks(rank, world_size, poison):
    tensor = strategy_cases.values("gauss", 5000, rank)
    if rank == world_size - 1:
        tensor[4321] = poison
    qcomm.all_reduce(tensor, strategy="all_gather")
    assert bool(tensor.isnan().all())
    assert_same_on_all_ranks(tensor)
