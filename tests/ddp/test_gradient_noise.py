"""Gradient noise measured in the hook: known answers, the formulas of all ranks, and the steps that are left out."""

import copy
import math
import pickle
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, wrap
from distributed import assert_same_on_all_ranks, attach, gathered, world
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.ddp import gradient_noise, tail_index
from qcomm.reference import noise_figures, two_batch_figures
from qcomm.reference import tail_index as reference_tail_index

SIZES = {"large": 4096, "other": 2048, "small": 100}
BATCH = 8


class Given(nn.Module):
    """A model whose gradients are its inputs."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, nn.Parameter(torch.zeros(size, dtype=dtype)))

    def forward(self, gradients):
        return sum((getattr(self, name) * gradients[name]).sum() for name in SIZES)


def wrap_given(dtype=torch.float32, **options):
    # Buckets of two tensors and of one, so that names and sizes matter.
    return DistributedDataParallel(Given(dtype), bucket_cap_mb=0.012, **options)


def true_gradient():
    generator = torch.Generator().manual_seed(5)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in SIZES.items()}


def deviations():
    """Of one sample's gradient, element by element."""
    generator = torch.Generator().manual_seed(6)
    return {name: 0.3 + torch.rand(size, generator=generator) for name, size in SIZES.items()}


def drawn(rank, step, batch=BATCH, widths=None):
    """The mean gradient of a batch: the true one, and Gaussian noise."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    widths = deviations() if widths is None else widths
    return {
        name: mean + widths[name] * torch.randn(mean.shape, generator=generator) / math.sqrt(batch)
        for name, mean in true_gradient().items()
    }


def step_of(model, gradients):
    model.zero_grad()
    model(gradients).backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def exact_mean(gradients):
    everyone = gathered(gradients)
    return {name: sum(each[name].double() for each in everyone) / len(everyone) for name in gradients}


STRATEGIES = {
    "none": {"strategy": "none"},
    "two_phase": {"strategy": "two_phase", "grid": qcomm.SigmaGrid(1.0)},
    "coarse": {"strategy": "two_phase", "grid": qcomm.SigmaGrid(2.0)},
    "without feedback": {"strategy": "two_phase", "error_feedback": False},
    "all_gather": {"strategy": "all_gather", "grid": qcomm.RangeGrid(num_bits=3)},
}


@world(2, 3)
@pytest.mark.parametrize("case", STRATEGIES)
def test_known_noise_is_found_within_a_tenth(rank, world_size, case):
    model, noise = wrap_given(), qcomm.GradientNoise(BATCH, every=1)
    qcomm.attach(model, noise=noise, **STRATEGIES[case])
    lost, steps = 0.0, 48
    for step in range(steps):
        gradients = drawn(rank, step)
        got, exact = step_of(model, gradients), exact_mean(gradients)
        lost += sum(float((got[name] - exact[name]).square().sum()) for name in SIZES) / steps
    trace = {name: float(widths.square().sum()) for name, widths in deviations().items()}
    norm = {name: float(mean.square().sum()) for name, mean in true_gradient().items()}
    total = noise.total()
    assert total.steps == steps
    assert total.trace == pytest.approx(sum(trace.values()), rel=0.1)
    assert total.squared_norm == pytest.approx(sum(norm.values()), rel=0.1)
    assert total.noise_scale == pytest.approx(sum(trace.values()) / sum(norm.values()), rel=0.1)
    if case != "without feedback":  # rounding is correlated with values there, by a few per cent
        assert abs(total.noise_scale - sum(trace.values()) / sum(norm.values())) < 4 * total.noise_scale_error
    if case == "none":
        assert abs(total.quantization) < 0.05 * total.trace / (BATCH * world_size)
    else:
        assert total.quantization == pytest.approx(lost, rel=0.1)
    for name in ("large", "other"):
        assert noise.tensors()[name].trace == pytest.approx(trace[name], rel=0.1)
        assert noise.tensors()[name].noise_scale == pytest.approx(trace[name] / norm[name], rel=0.2)


@world(2)
@pytest.mark.parametrize(("law", "index"), [("gaussian", 2.0), ("cauchy", 1.0)])
def test_known_tails_are_found_within_a_tenth(rank, world_size, law, index):
    model, noise = wrap_given(), qcomm.GradientNoise(BATCH, every=1)
    qcomm.attach(model, noise=noise, strategy="none")
    for step in range(48):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        values = {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}
        if law == "cauchy":
            values = {name: tensor / torch.randn(tensor.shape, generator=generator) for name, tensor in values.items()}
        step_of(model, values)
    for estimate in (noise.total(), noise.tensors()["large"], noise.tensors()["other"]):
        assert abs(estimate.tail_index - index) < 0.1
        assert abs(estimate.tail_index_over_steps - index) < 0.1
    assert noise.tensors()["small"].tail_index is None and noise.tensors()["small"].tail_index_over_steps is None


@world(2)
def test_widths_that_differ_look_like_tails_over_elements_and_not_over_steps(rank, world_size):
    """Every element is Gaussian; a tenth of them are 30 times wider, and a third are always 0."""
    model, noise = wrap_given(), qcomm.GradientNoise(BATCH, every=1)
    qcomm.attach(model, noise=noise, strategy="none")
    widths = {name: torch.where(torch.rand(size) < 0.1, 30.0, 1.0) for name, size in SIZES.items()}
    dead = {name: torch.rand(size) < 1 / 3 for name, size in SIZES.items()}
    dist.broadcast_object_list(shared := [widths, dead], src=0)
    widths, dead = shared
    for step in range(32):
        values = drawn(rank, step, widths=widths)
        step_of(model, {name: tensor.masked_fill(dead[name], 0.0) for name, tensor in values.items()})
    assert noise.total().tail_index < 1.5 and abs(noise.total().tail_index_over_steps - 2) < 0.1


@world(2, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["none", "two_phase"])
def test_a_step_has_the_figures_of_the_reference(rank, world_size, strategy, dtype):
    model, noise = wrap_given(dtype), qcomm.GradientNoise(BATCH, every=1)
    state = qcomm.attach(model, noise=noise, strategy=strategy)
    for step in range(4):  # DDP has other buckets in its first step, and from the third one there is no handshake
        state.reset_stats()
        gradients = {name: tensor.to(dtype) for name, tensor in drawn(rank, step).items()}
        mean = step_of(model, gradients)
        everyone = gathered(gradients)
        for name, estimate in noise.tensors().items():
            wanted = noise_figures([each[name] for each in everyone], mean[name], rank, BATCH)
            size = float(gradients[name].double().square().sum())
            got = estimate.trace, estimate.squared_norm, estimate.quantization
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5 * size * BATCH), name
        if strategy == "none" and dtype == torch.float64:
            small = sum(float(t.square().sum()) for each in everyone for t in each.values()) / world_size
            big = sum(float(tensor.square().sum()) for tensor in mean.values())
            ranks = gathered(noise.total())
            averaged = [sum(getattr(r, name) for r in ranks) / world_size for name in ("trace", "squared_norm")]
            assert averaged == pytest.approx(two_batch_figures(small, big, BATCH, BATCH * world_size), rel=1e-9)


@world(3)
def test_ranks_with_other_batch_sizes_see_the_same_noise(rank, world_size):
    model, noise = wrap_given(), qcomm.GradientNoise(4, every=1)
    qcomm.attach(model, noise=noise, strategy="two_phase")
    for step in range(48):
        noise.batch_size = 4 * (1 + (rank + step) % 3)
        step_of(model, drawn(rank, step, noise.batch_size))
    trace = sum(float(widths.square().sum()) for widths in deviations().values())
    norm = sum(float(mean.square().sum()) for mean in true_gradient().values())
    assert noise.total().trace == pytest.approx(trace, rel=0.05)
    assert noise.total().squared_norm == pytest.approx(norm, rel=0.1)


@world(2)
def test_accumulated_gradients_count_all_their_samples(rank, world_size):
    """The mean of two micro-batches is one batch of twice the size, in one measured step."""
    model, noise = wrap_given(), qcomm.GradientNoise(2 * BATCH, every=1)
    qcomm.attach(model, noise=noise, strategy="two_phase")
    for step in range(24):
        model.zero_grad()
        for part, context in enumerate((model.no_sync(), nullcontext())):
            with context:
                (model(drawn(rank, 2 * step + part)) / 2).backward()
    trace = sum(float(widths.square().sum()) for widths in deviations().values())
    assert noise.total().steps == 24 and noise.total().trace == pytest.approx(trace, rel=0.05)


@world(2)
def test_the_scale_of_the_loss_is_taken_out(rank, world_size):
    scales = iter([1.0, 1024.0, 2.0**40])
    current = torch.tensor(1.0)
    model, noise = wrap_given(), qcomm.GradientNoise(BATCH, every=1)
    state = attach(model, noise=noise, grad_scale=lambda: current, error_feedback=False)
    step_of(model, drawn(rank, 0))  # DDP has other buckets in its first step
    found = []
    for scale in scales:
        current.fill_(scale)
        state.reset_stats()
        model.zero_grad()
        (model(drawn(rank, 0)) * scale).backward()
        found.append(noise.total())
    for other in found[1:]:
        assert other.trace == pytest.approx(found[0].trace, rel=1e-4)
        assert other.squared_norm == pytest.approx(found[0].squared_norm, rel=1e-4)


@world(2)
@pytest.mark.parametrize("strategy", ["none", "two_phase"])
def test_gradients_are_the_same_bits_with_it_also_if_one_rank_has_it(rank, world_size, strategy):
    model, other = wrap(), wrap()
    noise = qcomm.GradientNoise(BATCH, every=1) if rank == 0 else None
    attach(model, noise=noise, strategy=strategy, min_elements=100)
    attach(other, strategy=strategy, min_elements=100)
    for step in range(5):
        got = backward(model, rank, step)
        assert all(torch.equal(a, b) for a, b in zip(got, backward(other, rank, step), strict=True))
        assert_same_on_all_ranks(*got)
    assert noise is None or noise.total().steps == 5


@world(2)
def test_only_whole_and_finite_steps_count(rank, world_size):
    model, noise = wrap_given(), qcomm.GradientNoise(BATCH, every=2)
    qcomm.attach(model, noise=noise, strategy="two_phase")
    counts = []
    for step in range(8):
        gradients = drawn(rank, step)
        if step in (3, 4) and rank == 0:
            gradients["other"][7] = torch.inf
        step_of(model, gradients)
        counts.append(noise.total().steps)
    # Every second step, without the one that is not finite.
    assert counts == [0, 1, 1, 1, 1, 2, 2, 3]
    assert all(math.isfinite(value) for value in (noise.total().trace, noise.total().squared_norm))


@world(2)
def test_a_step_that_fails_and_one_without_data_do_not_count(rank, world_size):
    current = torch.tensor(1.0)
    model, noise = wrap(), qcomm.GradientNoise(BATCH, every=1)
    attach(model, noise=noise, min_elements=100, grad_scale=lambda: current)
    backward(model, rank)
    current.fill_(math.nan if rank == 1 else 1.0)
    assert "grad_scale must be positive" in str(error_of(model, rank)) and noise.total().steps == 1
    current.fill_(1.0)
    backward(model, rank)
    assert noise.total().steps == 2
    with model.join():
        for step in range(2 + rank):  # rank 0 takes part in the last step with zeros
            backward(model, rank, step)
    assert noise.total().steps == 2


@world(2)
def test_a_measurement_that_fails_is_told_to_all(rank, world_size):
    model = wrap()
    attach(model, noise=qcomm.GradientNoise(BATCH, every=1), min_elements=100)
    backward(model, rank)
    failing = mock.patch.object(gradient_noise, "noise_figures", side_effect=MemoryError("no memory for it"))
    with failing if rank == 1 else nullcontext():
        backward(model, rank)
    assert "rank 1 failed while preparing the exchange: MemoryError: no memory for it" in str(error_of(model, rank))
    assert error_of(model, rank) is None


@world(2)
def test_it_needs_names_and_belongs_to_one_model(rank, world_size):
    noise = qcomm.GradientNoise(BATCH, every=1)
    model = wrap()
    model.register_comm_hook(qcomm.CompressionState(noise=noise, strategy="two_phase"), qcomm.compression_hook)
    assert "noise needs the parameters' names: use qcomm.attach" in str(error_of(model, rank))
    model, other = wrap(), wrap()
    state = attach(model, noise=noise)
    with pytest.raises(ValueError, match="noise serves another model, which is still there"):
        attach(other, noise=noise)
    backward(model, rank)
    again = DistributedDataParallel(model.module, bucket_cap_mb=0.002)
    attach(again, state=state)
    backward(again, rank)
    assert noise.total().steps == 2


@world(1)
def test_a_group_of_one_is_refused(rank, world_size):
    model = wrap()
    with pytest.raises(ValueError, match="noise needs at least two ranks"):
        attach(model, noise=qcomm.GradientNoise(BATCH, every=1))
    attach(model)  # nothing is registered yet


@world(2)
def test_measurements_survive_a_checkpoint(rank, world_size):
    model, noise = wrap(), qcomm.GradientNoise(BATCH, every=1)
    state = attach(model, noise=noise, min_elements=100)
    for step in range(3):
        backward(model, rank, step)
    saved, before = state.state_dict(), noise.total()
    assert state.stats()["noise"]["total"]["trace"] == before.trace
    assert set(state.stats()["noise"]["tensors"]) == {name for name, _ in model.module.named_parameters()}
    other = wrap()
    resumed = attach(other, noise=qcomm.GradientNoise(BATCH, every=1), min_elements=100)
    resumed.load_state_dict(saved)
    assert resumed.noise.total() == before
    backward(other, rank, 3)  # in the buckets of the checkpoint
    backward(model, rank, 3)
    assert resumed.noise.total() == noise.total() and noise.total().steps == 4
    without = attach(wrap(), min_elements=100)
    without.load_state_dict(saved)
    assert "noise" not in without.stats()
    for bad in ([1.0], {"total": [0.0] * 11, "tensors": {"x": [math.nan] * 11}}, {"total": "x", "tensors": {}}):
        with pytest.raises(ValueError, match="state_dict is damaged: gradient_noise"):
            resumed.load_state_dict({**saved, "gradient_noise": bad})
    assert resumed.noise.total().steps == 4
    with pytest.warns(UserWarning, match="a pickled CompressionState"):
        copied = pickle.loads(pickle.dumps(state))
    assert copied.noise.total() == noise.total() and copied.noise is not noise
    assert copied.reducer._noise is copied.noise
    attach(wrap(), state=copied)
    state.reset_stats()
    assert noise.total().steps == 0 and copy.deepcopy(noise).total().noise_scale is None


def test_the_tail_index_is_that_of_the_reference():
    values = torch.randn(32 * 40, generator=torch.Generator().manual_seed(0))
    assert tail_index(values) == pytest.approx(reference_tail_index(values, 32), rel=1e-5)
    with_zeros = torch.stack([values, torch.zeros_like(values)], 1)
    assert tail_index(with_zeros) == tail_index(values)


@pytest.mark.parametrize(("law", "index"), [("gaussian", 2.0), ("cauchy", 1.0), ("widths", 2.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_tail_indices_of_a_tensor(law, index, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(100_000, generator=generator)
    if law == "cauchy":
        values /= torch.randn(values.shape, generator=generator)
    if law == "widths":
        values *= torch.where(torch.rand(values.shape, generator=generator) < 0.1, 30.0, 1.0)
        assert tail_index(values) < 1.5
    else:
        assert abs(tail_index(values) - index) < 0.1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"values": torch.zeros(1000)}, "values must have at least 256 elements other than 0, got 0"),
        ({"values": torch.ones(1000), "group": 1}, "group must be in 2..500 for these values, got 1"),
        ({"values": torch.ones(1000), "group": 501}, "group must be in 2..500 for these values, got 501"),
    ],
)
def test_tensors_without_a_tail_index(arguments, error):
    with pytest.raises(ValueError, match=error):
        tail_index(**arguments)


@pytest.mark.parametrize(
    ("options", "kind", "error"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8.0}, TypeError, "batch_size must be an int, got float"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got bool"),
        ({"batch_size": 8, "every": 0}, ValueError, "every must be at least 1, got 0"),
    ],
)
def test_wrong_options(options, kind, error):
    with pytest.raises(kind, match=error):
        qcomm.GradientNoise(**options)


def test_wrong_noise_of_a_state():
    with pytest.raises(TypeError, match=r"noise must be a qcomm\.GradientNoise or None, got int"):
        qcomm.CompressionState(noise=32)
    noise = qcomm.GradientNoise(8)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        noise.batch_size = -1
    assert noise.batch_size == 8
