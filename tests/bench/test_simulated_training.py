"""The simulated ranks of the accuracy study: the collective's and torch's own bits, and nothing that gets lost."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

import qcomm
from qcomm.collectives import BucketLayout, ErrorFeedback, MeanTask, ReduceOptions, Telemetry, TensorSpec, average
from qcomm.communicator import Fields, connect

BENCH = Path(__file__).parents[2] / "bench"
SHAPES = [torch.Size(shape) for shape in ((64, 8, 3, 3), (64,), (40, 65), (10, 10), (64, 16, 3, 3))]
SIZES = [shape.numel() for shape in SHAPES]
STEPS = 6


@pytest.fixture
def exchanges(monkeypatch):
    """bench/simulated_exchange.py."""
    monkeypatch.syspath_prepend(str(BENCH))
    import simulated_exchange

    return simulated_exchange


def gradients(rank, step):
    """The flat gradients of a rank: other scales, and a constant part beneath the noise."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    parts = [(1 + number) * (0.3 + torch.randn(size, generator=generator)) for number, size in enumerate(SIZES)]
    return torch.cat(parts)


def simulated(exchanges, method, ranks, steps=STEPS):
    """The exchange after some steps, and its mean of each step."""
    bucket = exchanges.Bucket(0, tuple(f"tensor {number}" for number in range(len(SHAPES))), tuple(SHAPES))
    exchange, means = exchanges.build_exchange(method, ranks), []
    for step in range(steps):
        buffers = [gradients(rank, step) for rank in range(ranks)]
        exchange.average(bucket, buffers)
        means.append(buffers[0])
    return exchange, means


class GradBucket:
    """What hooks ask of DDP's bucket, which Python cannot make."""

    def __init__(self, buffer):
        self._buffer = buffer

    def buffer(self):
        return self._buffer

    def index(self):
        return 0

    def is_last(self):
        return True

    def parameters(self):
        return self.gradients()

    def gradients(self):
        return [part.view(shape) for part, shape in zip(self._buffer.split(SIZES), SHAPES, strict=True)]


def qcomm_over_gloo(rank, world_size, step):
    options = ReduceOptions(qcomm.SigmaGrid(step=step), strategy="two_phase").for_world(world_size)
    specs = [
        TensorSpec(f"tensor {number}", sum(SIZES[:number]), size, options.is_compressed(size), True)
        for number, size in enumerate(SIZES)
    ]
    layout, feedback, telemetry = BucketLayout(options.merge_small(specs), world_size), ErrorFeedback(), Telemetry()
    communicator, means = connect(dist.group.WORLD, alone=False), []
    for number in range(STEPS):
        buffer = gradients(rank, number)
        task = MeanTask(buffer, layout, options, Fields(options.describe()), telemetry, feedback)
        communicator.submit(partial(average, task, communicator)).future.wait()
        means.append(buffer)
    return means, telemetry.stats()


def power_sgd_over_gloo(rank, _world_size, approximation):
    state, means = PowerSGDState(dist.group.WORLD, approximation, start_powerSGD_iter=2), []
    for number in range(STEPS):
        buffer = gradients(rank, number)
        means.append(powerSGD_hook(state, GradBucket(buffer)).wait().clone())
    return means


@pytest.mark.world
@pytest.mark.parametrize("step", [1.0, 2.0, 3.2, 3.4])
def test_two_simulated_ranks_are_the_collective(exchanges, step):
    exchange, means = simulated(exchanges, f"qcomm k={step:g}", 2)
    found = exchange.stats()
    ranks = run(2, qcomm_over_gloo, step)
    for rank_means, _ in ranks:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(means, rank_means, strict=True))
    # The collective's own headers are counted as overhead.
    sent = sum(stats["bytes_sent"] - stats["bytes_sent_overhead"] for _, stats in ranks) / 2
    assert found["bytes_sent"] == sent
    assert all(stats["bits_per_element_phase2"] == found["bits_per_element_phase2"] for _, stats in ranks)


@pytest.mark.world
@pytest.mark.parametrize("approximation", [1, 2, 4])
def test_power_sgd_is_that_of_torch(exchanges, one_thread, approximation):
    _, means = simulated(exchanges, f"powersgd r={approximation}", 2)
    for rank_means in run(2, power_sgd_over_gloo, approximation):
        for ours, theirs in zip(means, rank_means, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", ["powersgd r=2", "top-k 1%", "sign"])
def test_error_feedback_of_peers_loses_nothing(exchanges, method, ranks):
    exchange, means = simulated(exchanges, method, ranks)
    given = sum(gradients(rank, step).double() for rank in range(ranks) for step in range(STEPS)) / ranks
    kept = torch.zeros(sum(SIZES), dtype=torch.float64)
    if method.startswith("powersgd"):
        kept += sum(error.double() for error in exchange.errors[0]) / ranks
    else:
        for number, part in enumerate(kept.split(SIZES)):
            for error in exchange.errors.get(f"tensor {number}", []):
                part.add_(error.double() / ranks)
    torch.testing.assert_close(sum(mean.double() for mean in means) + kept, given, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [3.2, 3.4])
def test_error_feedback_of_four_simulated_ranks_loses_nothing(exchanges, step):
    exchange, means = simulated(exchanges, f"qcomm k={step:g}", 4)
    given = sum(gradients(rank, number).double() for rank in range(4) for number in range(STEPS)) / 4
    states = [feedback.state_dict() for feedback in exchange.feedback]
    for number, (total, part) in enumerate(zip(given.split(SIZES), sum(means).double().split(SIZES), strict=True)):
        kept = torch.zeros(SIZES[number], dtype=torch.float64)
        for state in states:
            kept += state["local"].get(f"tensor {number}", torch.zeros(SIZES[number])).double() / 4
            start, residual = state["owner"].get(f"tensor {number}", (0, torch.zeros(0)))
            kept[start : start + len(residual)] += residual.double()
        torch.testing.assert_close(part + kept, total, rtol=1e-4, atol=1e-4)


def test_bytes_of_peers(exchanges):
    small = sum(size for size in SIZES if size < 1024)
    ring = 2 * 3 / 4 * 4
    large = [size for size in SIZES if size >= 1024]
    sent = {
        method: simulated(exchanges, method, 4, 1)[0].stats()["bytes_sent"] for method in ("fp32", "top-k 1%", "sign")
    }
    assert sent["fp32"] == ring * sum(SIZES)
    assert sent["top-k 1%"] == ring * small + 3 * 8 * sum(round(size / 100) for size in large)
    assert sent["sign"] == ring * small + 3 * sum(size // 8 + 4 for size in large)
    # Two steps of fp32, then one of factors. The vector and, where factors do not halve it, a matrix are exact.
    for rank, exact in ((2, 64), (4, 64 + 100)):
        after = [simulated(exchanges, f"powersgd r={rank}", 4, steps)[0].stats()["bytes_sent"] for steps in (2, 3)]
        factors = rank * ((64 + 72) + (40 + 65) + (64 + 144) + (10 + 10 if rank == 2 else 0)) + exact
        assert after == [2 * ring * sum(SIZES), 2 * ring * sum(SIZES) + ring * factors]


def test_unknown_methods_are_refused(exchanges):
    with pytest.raises(ValueError, match="method is 'nonsense'"):
        exchanges.build_exchange("nonsense", 2)
    with pytest.raises(ValueError, match="step must be at most"):
        exchanges.build_exchange("qcomm k=3.6", 2)
