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


def scaled(shape: tuple[int, int], columns: slice, factor: float) -> torch.Tensor:
    scale = torch.ones(shape)
    scale[:, columns] = factor
    return scale.flatten()


# Structures that a sample with a pattern would always meet, or never.
STRUCTURES = {
    "first columns small": scaled((256, 256), slice(0, 32), 0.01),
    "an outlier column": scaled((256, 256), slice(40, 41), 100.0),
    "a huge column": scaled((256, 256), slice(40, 41), 1000.0),
    "an outlier column of a wide matrix": scaled((32, 2048), slice(300, 301), 100.0),
    "an outlier row": torch.ones(65_536).index_fill_(0, torch.arange(1792, 2048), 100.0),
    "a single value": torch.ones(65_536).index_fill_(0, torch.tensor([12_345]), 1000.0),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_residuals_come_to_rest_whatever_the_structure(name):
    """As those of measured steps do: the sample may miss what is large, but not what it leaves behind."""
    scale, grid = STRUCTURES[name], qcomm.SigmaGrid(step=3.2)
    norms, sizes = {}, {}
    for forecasts in (False, True):
        generator, residual, rms, total = torch.Generator().manual_seed(0), torch.zeros(65_536), None, 0
        signs = torch.where(torch.rand(65_536, generator=generator) < 0.5, -1.0, 1.0)
        for _ in range(200):
            # What does not change from step to step makes the largest residuals.
            values = scale * (signs + torch.randn(65_536, generator=generator))
            quantizer = choose(values, grid, residual, 1.0, rms=rms if forecasts else None).quantizer
            samples = Samples()
            total += encode([samples.of(0, Segment(values, quantizer, residual))]).numel()
            rms = samples.forecasts().get(0)
        norms[forecasts], sizes[forecasts] = float(residual.norm()), total
    assert norms[True] < 2 * norms[False]
    assert sizes[True] == pytest.approx(sizes[False], rel=0.25)


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


def one_layer():
    """A model of one weight, which is cut among the ranks, its state and the weight."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 256, bias=False))
    state = attach(model, grid=qcomm.SigmaGrid(step=3.4), strategy="two_phase", min_elements=0)
    return model, state, *model.parameters()


@world(2)
def test_a_value_that_is_not_finite_in_the_own_part_is_counted_and_takes_no_residual(rank, world_size):
    """Nothing measures that part once steps are forecast."""
    model, state, weight = one_layer()
    poisoned = False

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[0, 0] = math.nan if poisoned and rank == 0 else gradient[0, 0]
        return gradient

    weight.register_hook(poison)
    for step in range(5):
        backward(model, rank, step)
    before = state.state_dict()["error_feedback"]
    poisoned = True
    backward(model, rank, 5)
    after = state.state_dict()["error_feedback"]
    assert bool(weight.grad[0, 0].isnan()) and not bool(weight.grad[255].isnan().any())
    assert state.stats()["nonfinite_tensors"] == (rank == 0)
    for kind in ("local", "owner"):
        assert all(torch.as_tensor(part[-1]).isfinite().all() for part in after[kind].values())
    if rank == 0:
        assert torch.equal(after["owner"]["weight"][1], before["owner"]["weight"][1])


@world(2)
def test_a_residual_of_the_own_part_waits_while_values_are_not_finite(rank, world_size):
    """A checkpoint of other owners leaves residuals there, and its forecasts spare the measuring."""
    model, state, weight = one_layer()
    poisoned = False

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, math.nan) if poisoned and rank == 0 else gradient

    weight.register_hook(poison)
    for step in range(5):
        backward(model, rank, step)
    checkpoint = state.state_dict()
    residuals = checkpoint["error_feedback"]
    assert residuals["rms"]["local"].keys() == {"weight"}
    start, owned = residuals["owner"]["weight"]
    own = slice(start, start + owned.numel())
    residuals["local"]["weight"][own] = 0.25
    state.load_state_dict(checkpoint)
    poisoned = True
    backward(model, rank, 5)
    assert state.stats()["nonfinite_tensors"] == (rank == 0)
    poisoned = False
    backward(model, rank, 6)
    local = state.state_dict()["error_feedback"]["local"]["weight"]
    assert bool((local[own] == 0.0).all())  # sent, with the first values that were finite
