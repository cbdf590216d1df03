"""The hook under DDP's modes: ranks equal bit for bit, within the grids' bound, nothing lost with error feedback."""

import copy

import pytest
import torch
from ddp_modes import GRIDS, MODES, check_mode, gradients, mlp
from distributed import attach, world
from torch.nn.parallel import DistributedDataParallel

import qcomm

pytestmark = pytest.mark.world


with_and_without_feedback = pytest.mark.parametrize("error_feedback", [True, False], ids=["feedback", "no_feedback"])


# Half of the combinations: in every mode each pair of world size, grid and feedback occurs.
@world()
@pytest.mark.parametrize(
    ("world_size", "grid", "error_feedback"),
    [(2, "sigma", True), (2, "range", False), (3, "sigma", False), (3, "range", True)],
)
@pytest.mark.parametrize("mode", MODES)
def test_mode(rank, world_size, mode, grid, error_feedback):
    check_mode(rank, world_size, mode, GRIDS[grid], error_feedback)


@world(2)
@with_and_without_feedback
def test_coarse_grid(rank, world_size, error_feedback):
    check_mode(rank, world_size, "plain", qcomm.SigmaGrid(step=2.0), error_feedback)


STRATEGIES = [(3, "all_gather"), (3, "exact_sum"), (4, "hierarchical")]
OTHER_MODES = ["plain", "unused", "float64", "bfloat16", "tiny"]


# Half of the combinations, in which every triple of strategy, mode, grid and feedback occurs.
@world()
@pytest.mark.parametrize(
    ("world_size", "strategy", "mode", "grid", "error_feedback"),
    [
        (*strategy, mode, grid, (i + j + k) % 2 == 0)
        for i, strategy in enumerate(STRATEGIES)
        for j, mode in enumerate(OTHER_MODES)
        for k, grid in enumerate(GRIDS)
    ],
)
def test_other_strategies(rank, world_size, strategy, mode, grid, error_feedback):
    check_mode(rank, world_size, mode, GRIDS[grid], error_feedback, strategy)


@world(5)
@pytest.mark.parametrize(("grid", "error_feedback"), [("sigma", True), ("range", False)])
@pytest.mark.parametrize("mode", ["plain", "unused", "tiny"])
def test_five_ranks(rank, world_size, mode, grid, error_feedback):
    check_mode(rank, world_size, mode, GRIDS[grid], error_feedback)


@world(1)
@pytest.mark.parametrize("strategy", ["auto", "none", "exact_sum", "all_gather", "two_phase"])
def test_world_of_one(rank, world_size, strategy):
    torch.manual_seed(0)
    plain = mlp()
    inputs = torch.randn(8, 48)
    plain(inputs).square().sum().backward()
    model = DistributedDataParallel(copy.deepcopy(plain))
    model.zero_grad()
    state = attach(model, strategy=strategy)
    model(inputs).square().sum().backward()
    same = all(
        torch.equal(a, b) for a, b in zip(gradients(model.module).values(), gradients(plain).values(), strict=True)
    )
    assert same == (strategy in ("auto", "none"))
    assert state.stats()["bytes_sent"] == 0 and state.stats()["steps"] == 1
    assert state.stats()["elements"] == sum(p.numel() for p in plain.parameters())
    assert (state.stats()["bits_per_element"] > 0) == (strategy != "auto")
