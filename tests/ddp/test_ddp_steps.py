"""Steps of the hook where a step may consist of any of the buckets."""

import copy
import inspect

import pytest
import torch
from distributed import assert_same_on_all_ranks, attach, world
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import qcomm
from qcomm.ddp.steps import Steps

skips = pytest.mark.skipif(
    "skip_all_reduce_unused_params" not in inspect.signature(DistributedDataParallel).parameters,
    reason="this torch has no skip_all_reduce_unused_params",
)
SIZE = 48


class Branches(nn.Module):
    """Layers of which a step takes one. Each is a bucket of its own."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in range(4))

    def forward(self, x, number):
        return self.branches[number](x)


def in_one_pass(steps, *indices):
    """Begins buckets within one pass of the autograd engine; returns which of them began a step."""
    began = []
    x = torch.ones(1, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda _: began.extend(steps.begin(index) for index in indices))
    y.backward()
    return began


def test_a_pass_of_backward_is_a_step_where_buckets_are_skipped():
    steps = Steps()
    steps.skips_buckets = True
    assert in_one_pass(steps, 0) == [True]
    assert in_one_pass(steps, 1) == [True]
    assert in_one_pass(steps, 2, 3) == [True, False]
    assert in_one_pass(steps, 0, 3) == [True, False]
    # Without backward, as of a rank that has joined, steps are told apart by their buckets.
    assert [steps.begin(index) for index in (0, 1, 0, 1)] == [True, False, True, False]
    assert steps.number == 6


def test_passes_inside_of_backward_are_no_steps_elsewhere():
    steps = Steps()
    assert in_one_pass(steps, 0) == [True]
    assert in_one_pass(steps, 1) == [False]
    assert in_one_pass(steps, 0, 1) == [True, False]
    assert steps.number == 2


@skips
@pytest.mark.world
@world(2)
@pytest.mark.parametrize("strategy", ["two_phase", "none"])
def test_skipped_buckets_leave_steps_scales_and_sums_right(rank, world_size, strategy):
    torch.manual_seed(0)
    plain, scales = Branches(), []

    def scale():
        scales.append(2.0 ** (12 - min(len(scales), 12)))
        return scales[-1]

    model = DistributedDataParallel(
        copy.deepcopy(plain), bucket_cap_mb=0.005, find_unused_parameters=True, skip_all_reduce_unused_params=True
    )
    state = attach(model, grid=qcomm.SigmaGrid(2.0), strategy=strategy, grad_scale=scale, warmup_steps=2)
    got, want = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
    steps = 40
    for step in range(steps):
        number = 3 - step % 4 if step % 8 < 4 else step % 4
        factor = 2.0 ** (12 - min(step, 12))
        model.zero_grad()
        x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(2 * step + rank))
        (model(x, number).square().sum() * factor).backward()
        assert scales[-1] == factor and len(scales) == step + 1
        gradient = model.module.branches[number].weight.grad
        assert_same_on_all_ranks(gradient)
        got += gradient / factor
        for other in range(world_size):
            x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(2 * step + other))
            plain.zero_grad()
            plain(x, number).square().sum().backward()
            want += plain.branches[number].weight.grad / world_size
    assert state.stats()["steps"] == steps == state.state_dict()["steps"]
    assert float((got - want).norm() / want.norm()) < (0.2 if strategy == "two_phase" else 1e-5)
    if strategy == "two_phase":
        assert state.stats()["elements_compressed"] == (steps - 2) * SIZE * SIZE


class Checkpointed(nn.Module):
    """Layers that run again within backward, in passes of the engine of their own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return x


@pytest.mark.world
@world(2)
def test_checkpointed_layers_are_one_step(rank, world_size):
    model = DistributedDataParallel(Checkpointed(), bucket_cap_mb=0.005)
    state = attach(model)
    for step in range(3):
        x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(2 * step + rank), requires_grad=True)
        model(x).square().sum().backward()
        assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
    assert state.stats()["steps"] == 3
