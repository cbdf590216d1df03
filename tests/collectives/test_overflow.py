"""Means of values whose sum is no number of their dtype: they come out, alike on all ranks, and harm no neighbour."""

import pytest
import torch
from distributed import assert_same_on_all_ranks, world

import qcomm
from qcomm.collectives import BucketLayout, TensorSpec
from qcomm.collectives.exact_sum_grid import Summary, share
from qcomm.collectives.packing import keep_in_range, recover

COUNT = 5001
STRATEGIES = ("two_phase", "all_gather", "exact_sum", "hierarchical", "none", "bf16")
GRIDS = (qcomm.SigmaGrid(0.25), qcomm.SigmaGrid(1.0), qcomm.RangeGrid(c=2))
LARGEST = {torch.float32: 2.5e38, torch.float64: 1.3e308, torch.bfloat16: 2.5e38, torch.float16: 6e4}


def near_the_end(rank, dtype, kind):
    generator = torch.Generator().manual_seed(rank)
    values = torch.rand(COUNT, generator=generator, dtype=torch.float64)
    if kind == "spread":  # to both ends, but of one sign on all ranks
        signs = torch.rand(COUNT, generator=torch.Generator().manual_seed(99), dtype=torch.float64) - 0.5
        values = signs.sign() * (0.5 + 0.5 * values)
    elif kind == "close":
        values = 1.0 - 0.01 * values
    else:
        values = torch.ones_like(values)
    return (values * LARGEST[dtype]).to(dtype)


def mean_of(parts):
    return sum(part.double() / len(parts) for part in parts)


@world(2, 3)
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_a_mean_near_the_largest_number_comes_out(rank, world_size, dtype):
    for kind in ("spread", "close", "constant"):
        parts = [near_the_end(other, dtype, kind) for other in range(world_size)]
        wanted = mean_of(parts)
        for strategy in STRATEGIES:
            for grid in GRIDS if strategy not in ("none", "bf16") else GRIDS[:1]:
                for min_elements in (1, COUNT + 1):
                    got = parts[rank].clone()
                    options = {"ranks_per_node": 1, "min_elements": min_elements, "strategy": strategy}
                    qcomm.all_reduce(got, grid, **options)
                    case = f"{strategy} {grid} {kind} {min_elements}"
                    assert_same_on_all_ranks(got)
                    assert got.isfinite().all(), case
                    exact = min_elements > COUNT and strategy != "bf16"
                    allowed = 8 * torch.finfo(dtype).eps if exact else 0.02 if strategy == "bf16" else 1.0
                    error = float(((got.double() - wanted) / LARGEST[dtype]).abs().max())
                    assert error <= allowed, f"{case}: {error}"


@world(2, 3)
def test_neighbours_of_an_overflow_keep_their_bits(rank, world_size):
    generator = torch.Generator().manual_seed(rank)
    tiny = torch.randn(COUNT, generator=generator) * 1e-39
    for strategy in ("two_phase", "all_gather", "exact_sum", "hierarchical"):
        alone, beside = tiny.clone(), tiny.clone()
        alone[::1000], beside[::1000] = 1.0, 3e38
        for tensor in (alone, beside):
            qcomm.all_reduce(tensor, strategy=strategy, ranks_per_node=1, min_elements=COUNT + 1)
        assert torch.allclose(beside[::1000], torch.tensor(3e38)), strategy
        alone[::1000] = beside[::1000]
        assert torch.equal(alone, beside) and alone.count_nonzero() > COUNT // 2, strategy


@world(2)
def test_values_that_are_infinite_are_no_overflow(rank, world_size):
    for strategy in ("two_phase", "all_gather", "exact_sum", "hierarchical"):
        tensor = torch.ones(100)
        tensor[3] = torch.inf if rank else 1.0
        tensor[4] = torch.nan if rank else 1.0
        tensor[5] = -torch.inf if rank else torch.inf
        qcomm.all_reduce(tensor, strategy=strategy, ranks_per_node=1)
        assert tensor[3] == torch.inf and tensor[4].isnan() and tensor[5].isnan() and tensor.isfinite().sum() == 97


def test_recovered_values_are_rounded_once():
    largest = torch.finfo(torch.float32).max
    terms = [torch.full((3,), largest) for _ in range(11)]
    terms[0][1:] = torch.tensor([-largest, torch.inf])
    mean = sum(terms) / 11
    recover(mean, 11, terms)
    assert mean.tolist() == [largest, float(torch.tensor(9 / 11 * largest)), torch.inf]


def test_levels_beyond_a_narrow_dtype_are_its_largest_number():
    layout = BucketLayout([TensorSpec("a", 0, 4, True), TensorSpec("b", 4, 1, False)], 1)
    values = torch.tensor([7e4, -7e4, torch.nan, 1.0, torch.inf])
    keep_in_range(values, layout.whole, torch.float32)
    assert values[0] == 7e4
    keep_in_range(values, layout.whole, torch.float16)
    assert values[[0, 1, 3, 4]].tolist() == [65504.0, -65504.0, 1.0, torch.inf] and values[2].isnan()


def test_sums_that_might_overflow_are_on_no_shared_grid():
    ordinary, large = (Summary(-x, x, 100 * x * x, 4.0) for x in (1.0, 1.2e38))
    for grid in (qcomm.SigmaGrid(0.25), qcomm.RangeGrid()):
        assert share(grid, [ordinary] * 3, 300, torch.float32).step > 0
        assert share(grid, [large] * 3, 300, torch.float32).step == 0
        assert share(grid, [large] * 3, 300, torch.float64).step > 0
