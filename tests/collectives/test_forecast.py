"""Steps that are forecast: rates stay near those of measured steps, and nothing depends on them but bytes."""

import math

import pytest
import torch
from distributed import assert_same_on_all_ranks, attach, world
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.codec import Coding, Quantizer, Segment, encode, measure, plan
from qcomm.collectives.packing import Samples, choose

COUNT = 40_000


def sizes_of(name: str, steps: int) -> list[float]:
    """The RMS of the gradient at each step."""
    generator = torch.Generator().manual_seed(1)
    walk = torch.exp(torch.cumsum(0.05 * torch.randn(steps, generator=generator), 0))
    each = torch.exp(0.3 * torch.randn(steps, generator=generator))
    return {
        "steady": [1.0] * steps,
        "a random walk of 5 % a step": walk.tolist(),
        "steps that differ by a third": each.tolist(),
        "falling to a hundredth": [0.01 ** (step / steps) for step in range(steps)],
        "jumps by 10": [10.0 if step // 40 % 2 else 1.0 for step in range(steps)],
    }[name]


SIZES = [
    "steady",
    "a random walk of 5 % a step",
    "steps that differ by a third",
    "falling to a hundredth",
    "jumps by 10",
]


def bits(grid: qcomm.SigmaGrid, sizes: list[float], forecasts: bool) -> list[float]:
    """Bits a value of each step's packet."""
    generator, residual, rms, found = torch.Generator().manual_seed(0), torch.zeros(COUNT), None, []
    for size in sizes:
        values = size * torch.randn(COUNT, generator=generator)
        quantizer = choose(values, grid, residual, 1.0, rms=rms if forecasts else None).quantizer
        samples = Samples()
        packet = encode([samples.of(0, Segment(values, quantizer, residual))])
        rms = samples.forecasts().get(0)
        found.append(8 * packet.numel() / COUNT)
    return found


@pytest.mark.parametrize("k", [3.2, 3.4])
@pytest.mark.parametrize("name", SIZES)
def test_the_rate_is_within_a_tenth_of_that_of_measured_steps(name, k):
    sizes = sizes_of(name, 240)
    measured = bits(qcomm.SigmaGrid(step=k), sizes, forecasts=False)
    foreseen = bits(qcomm.SigmaGrid(step=k), sizes, forecasts=True)
    assert sum(foreseen) == pytest.approx(sum(measured), rel=0.1)
    assert sum(foreseen[:20]) == pytest.approx(sum(measured[:20]), rel=0.1)


def test_a_jump_by_a_thousand_costs_a_few_packets():
    sizes = [1.0] * 30 + [1000.0] * 30
    found = bits(qcomm.SigmaGrid(step=3.4), sizes, forecasts=True)
    assert max(found) < 3.1  # levels of 3 bits at most
    assert sum(b > 2 * sum(found[-10:]) / 10 for b in found[31:]) <= 5


def test_a_forecast_decides_where_runs_are_coded_and_nowhere_else():
    values, residual = torch.randn(5000), torch.zeros(5000)
    coarse, fine = qcomm.SigmaGrid(step=3.0), qcomm.SigmaGrid(step=1.0)
    assert choose(values, coarse, residual, 1.0, rms=7.0).quantizer.step == 21.0
    for grid, kept, rms in [(coarse, None, 7.0), (fine, residual, 7.0), (coarse, residual, 1e-45)]:
        found = choose(values, grid, kept, 1.0, rms=rms)
        assert found == choose(values, grid, kept, 1.0)
    assert choose(values, qcomm.RangeGrid(), residual, 1.0, rms=7.0).quantizer.coding != Coding.RUNS
    assert choose(torch.zeros(100), coarse, torch.ones(100), 1.0, rms=7.0) == (Quantizer.constant(0.0), None)


def test_a_block_that_is_not_finite_gives_no_forecast():
    values, residual = torch.randn(4096), torch.zeros(4096)
    quantizer = plan(measure(values, residual), qcomm.SigmaGrid(step=3.0), values, residual)
    values[17] = math.nan
    samples = Samples()
    encode([samples.of(5, Segment(values, quantizer, residual))])
    assert samples.forecasts() == {} and samples.not_finite() == {5}


def wrap(seed: int = 0) -> DistributedDataParallel:
    torch.manual_seed(seed)
    return DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)))


def backward(model: DistributedDataParallel, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    model.zero_grad()
    model(torch.randn(8, 64, generator=generator)).square().mean().backward()


@world(2, 3)
def test_ranks_stay_equal_and_residuals_add_up(rank, world_size):
    """sum_t out_t = sum_t mean(g_t) - what is kept, with forecasts from the second step on."""
    exact_model, model = wrap(), wrap()
    attach(exact_model, strategy="none")
    state = attach(model, grid=qcomm.SigmaGrid(step=3.4), strategy="two_phase", min_elements=0)
    sums, wanted = 0.0, 0.0
    for step in range(12):
        backward(model, rank, step)
        backward(exact_model, rank, step)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert_same_on_all_ranks(gradient)
        sums = sums + gradient.double()
        wanted = wanted + torch.cat([p.grad.flatten() for p in exact_model.parameters()]).double()
    rms = state.state_dict()["error_feedback"]["rms"]
    assert {"0.weight", "2.weight"} & set(rms["local"]) and rms["owner"]
    assert state.stats()["tensors"]["0.weight"]["coding"] == "runs"
    kept = float((wanted - sums).norm()) / wanted.numel() ** 0.5
    step_rms = max(tensor["step"] for tensor in state.stats()["tensors"].values())
    assert kept < step_rms  # at most half a step of values and half of means


@world(2)
def test_a_gradient_that_is_not_finite_reaches_all_ranks_and_leaves_residuals_finite(rank, world_size):
    model = wrap()
    state = attach(model, grid=qcomm.SigmaGrid(step=3.4), strategy="two_phase", min_elements=0)
    for step in range(5):
        backward(model, rank, step)
    model.zero_grad()
    loss = model(torch.randn(8, 64)).square().mean()
    (loss * (math.inf if rank == 1 else 1.0)).backward()
    assert all(not bool(p.grad.isfinite().all()) for p in model.parameters() if p.numel() > 64)
    residuals = state.state_dict()["error_feedback"]["local"]
    assert all(bool(residual.isfinite().all()) for residual in residuals.values())
    assert (state.stats()["nonfinite_tensors"] > 0) == (rank == 1)
    for step in range(3):
        backward(model, rank, 10 + step)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert bool(gradient.isfinite().all())
    assert_same_on_all_ranks(gradient)
