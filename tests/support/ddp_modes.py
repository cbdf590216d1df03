"""DDP's modes, and the check of a model that trains in one: equal gradients, within the bound, nothing lost."""

import copy
from unittest import mock

import torch
import torch.distributed as dist
import twin
from distributed import assert_same_on_all_ranks, attach, gathered
from residuals import owed
from strategy_twins import TWINS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.collectives import two_phase
from qcomm.collectives.two_phase_schedule import cut_slices
from qcomm.ddp import reducer

STEPS = 6
MIN_ELEMENTS = 200
OPTIONS = {"two_phase": {}, "all_gather": {}, "exact_sum": {}, "hierarchical": {"ranks_per_node": 2}}
GRIDS = {"sigma": qcomm.SigmaGrid(step=1.0), "range": qcomm.RangeGrid(c=2)}


class Branches(nn.Module):
    """Which of two branches is used alternates, and one more never is."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(*[nn.Linear(48, 48) for _ in range(3)])
        self.branches = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.branches[self.calls % 2](self.trunk(x))


class MixedDtypes(nn.Module):
    """float32 layers behind float64 ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48)).double()
        self.second = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))

    def forward(self, x):
        return self.second(self.first(x.double()).float())


def mlp(dtype=torch.float32):
    return nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(48, 48), nn.Tanh())]).to(dtype)


def convolutions():
    model = nn.Sequential(
        *[layer for _ in range(5) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16))]
    )
    return model.to(memory_format=torch.channels_last)


# name: (model, shape of a batch, dtype of a batch, options of DDP, passes of backward a step)
MODES = {
    "plain": (mlp, (8, 48), torch.float32, {}, 1),
    "bucket view": (mlp, (8, 48), torch.float32, {"gradient_as_bucket_view": True}, 1),
    "static graph": (mlp, (8, 48), torch.float32, {"static_graph": True}, 1),
    "no_sync": (mlp, (8, 48), torch.float32, {}, 2),
    "unused": (Branches, (8, 48), torch.float32, {"find_unused_parameters": True}, 1),
    "channels_last": (convolutions, (2, 16, 6, 6), torch.float32, {}, 1),
    "float64": (lambda: mlp(torch.float64), (8, 48), torch.float64, {}, 1),
    "bfloat16": (lambda: mlp(torch.bfloat16), (8, 48), torch.bfloat16, {}, 1),
    "mixed dtypes": (MixedDtypes, (8, 48), torch.float32, {}, 1),
    "tiny": (lambda: nn.Linear(3, 2), (4, 3), torch.float32, {}, 1),
}


def batch(shape, dtype, step, rank, part):
    generator = torch.Generator().manual_seed(1_000_000 * step + 1000 * rank + part)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def gradients(model):
    """name -> float64 gradient; zeros where there is none."""
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().double().clone()
        for name, p in model.named_parameters()
    }


def in_memory_order(tensor, mode):
    """1-D, as it lies in a bucket."""
    return (tensor.permute(0, 2, 3, 1) if mode == "channels_last" and tensor.dim() == 4 else tensor).reshape(-1)


class Spy:
    """Notes what buckets contained, with their layouts, before they were averaged, in any order."""

    def __init__(self):
        self.seen = {}

    def __call__(self, task, communicator, bypassing, uncompressed):
        self.seen[task.index] = task.buffer.clone(), task.layout
        average(task, communicator, bypassing, uncompressed)

    @property
    def tasks(self):
        return [self.seen[index] for index in sorted(self.seen)]


average = reducer.average


def bounds(spied, grid, strategy):
    """name -> bound of the error of each element, from the buckets of all ranks: without residuals."""
    result = {}
    for buckets in zip(*gathered(spied), strict=True):
        layout, dtype = buckets[0][1], buckets[0][0].dtype
        wire = [buffer.double() if dtype == torch.float64 else buffer.float() for buffer, _ in buckets]
        if strategy == "two_phase":
            _, bound = twin.mean(wire, layout, grid, len(cut_slices(layout, two_phase.SLICE_ELEMENTS)))
        else:
            bound = TWINS[strategy](wire, layout, grid, **OPTIONS[strategy])[1]
        for tensor in layout.parameters:
            part = slice(tensor.offset, tensor.offset + tensor.numel)
            result[tensor.key] = bound[part].double() + twin.rounding([buffer[part] for buffer in wire], dtype)
    return result


def check_mode(rank, world_size, mode, grid, error_feedback, strategy="two_phase", **more):
    """Trains a model of that mode for some steps, and checks its gradients and residuals after each."""
    factory, shape, dtype, options, passes = MODES[mode]
    torch.manual_seed(0)
    plain = factory()
    model = DistributedDataParallel(copy.deepcopy(plain), bucket_cap_mb=0.002, **options)
    state = attach(
        model,
        grid=grid,
        error_feedback=error_feedback,
        min_elements=MIN_ELEMENTS,
        strategy=strategy,
        **OPTIONS[strategy],
        **more,
    )
    sums = [{name: torch.zeros(p.shape, dtype=torch.float64) for name, p in plain.named_parameters()} for _ in range(2)]
    largest = 0.0
    for step in range(STEPS):
        plain.load_state_dict(model.module.state_dict())
        spy = Spy()
        with mock.patch.object(reducer, "average", spy):
            for part in range(passes):
                inputs = batch(shape, dtype, step, rank, part)
                if part < passes - 1:
                    with model.no_sync():
                        model(inputs).square().sum().backward()
                else:
                    model(inputs).square().sum().backward()
                plain(inputs).square().sum().backward()
        averaged, exact = gradients(model.module), gradients(plain)
        total = torch.cat([gradient.reshape(-1) for gradient in exact.values()])
        dist.all_reduce(total)
        parts = (total / world_size).split([gradient.numel() for gradient in exact.values()])
        exact = {name: part.view_as(gradient) for (name, gradient), part in zip(exact.items(), parts, strict=True)}
        assert_same_on_all_ranks(*[parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        if step == 0 or not error_feedback:
            for name, bound in bounds(spy.tasks, grid, strategy).items():
                error = in_memory_order((averaged[name] - exact[name]).abs(), mode)
                assert bool((error <= bound).all()), (step, name)
        for name in exact:
            sums[0][name] += averaged[name]
            sums[1][name] += exact[name]
            largest = max(largest, float(averaged[name].abs().max()))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-1e-4)
        model.zero_grad()
        plain.zero_grad()
    stats = state.stats()
    assert stats["steps"] == STEPS
    if mode not in ("tiny", "static graph", "mixed dtypes"):
        assert stats["buckets"] >= 4 * (STEPS - 1)  # the first step has one bucket, except with find_unused_parameters
    if error_feedback:
        check_nothing_is_lost(
            state,
            mode,
            sums,
            largest * STEPS * (twin.rounding([torch.ones(1)] * world_size, next(plain.parameters()).dtype)),
        )


def check_nothing_is_lost(state, mode, sums, tolerance):
    """sum(out) == sum(mean(g)) - (mean(e) + o), for every parameter."""
    saved = gathered(state.state_dict()["error_feedback"])
    for name, got in sums[0].items():
        kept = owed(saved, name, got.numel())
        missing = in_memory_order(sums[1][name] - got, mode)
        assert torch.allclose(missing, kept, rtol=0, atol=tolerance), (
            name,
            float((missing - kept).abs().max()),
            tolerance,
        )
