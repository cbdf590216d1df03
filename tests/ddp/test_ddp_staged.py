"""The hook of a model on the test device: gradients, residuals and bytes of the CPU, in DDP's modes."""

import copy
from contextlib import suppress
from unittest import mock

import ddp_modes
import late_device
import pytest
import torch
import torch.distributed as dist
from ddp_modes import GRIDS, MIN_ELEMENTS, batch
from distributed import assert_same_on_all_ranks, attach, world
from late_device import ORDERS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qcomm.collectives import BYPASSED
from qcomm.communicator.groups import get_communicator
from qcomm.staging import copies
from qcomm.staging.buffers import LIMIT

pytestmark = pytest.mark.world

STEPS = 4


def convolutions():
    layers = [layer for _ in range(5) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.Tanh())]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


# The device's group norm needs a layout that channels_last is not.
MODES = {**ddp_modes.MODES, "channels_last": (convolutions, *ddp_modes.MODES["channels_last"][1:])}


def device_group():
    """A process group of the device alone, made once in a process."""
    if not hasattr(late_device, "group"):
        late_device.group = dist.new_group(backend="late_gloo")
    return late_device.group


def on_both(mode, **options):
    """Models of that mode with their states, on the CPU and on the device."""
    factory, _, _, ddp_options, _ = MODES[mode]
    torch.manual_seed(0)
    plain = factory()
    cpu = DistributedDataParallel(copy.deepcopy(plain), bucket_cap_mb=0.002, **ddp_options)
    moved = copy.deepcopy(plain).to("late")
    device = DistributedDataParallel(moved, bucket_cap_mb=0.002, process_group=device_group(), **ddp_options)
    options = {"min_elements": MIN_ELEMENTS, **options}
    # The device's has a group without gloo for the CPU.
    return [(model, attach(model, **options)) for model in (cpu, device)]


def step_of(model, mode, step, rank):
    """One step of SGD; returns the gradients, on the CPU."""
    _, shape, dtype, _, passes = MODES[mode]
    place = next(model.parameters()).device
    for part in range(passes):
        inputs = batch(shape, dtype, step, rank, part).to(place)
        if part < passes - 1:
            with model.no_sync():
                model(inputs).square().sum().backward()
        else:
            model(inputs).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-1e-4)
    found = [gradient.cpu().clone() for gradient in gradients]
    model.zero_grad()
    return found


def assert_equal(found, expected, what):
    assert len(found) == len(expected), what
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), (what, number)


def check_equal(rank, mode, seed=0, **options):
    """Trains on both, and compares gradients after each step, residuals and counters in the end."""
    (cpu, expected), (device, state) = on_both(mode, **options)
    with late_device.order(seed):
        for step in range(STEPS):
            assert_equal(step_of(device, mode, step, rank), step_of(cpu, mode, step, rank), step)
    residuals = [s.state_dict()["error_feedback"] for s in (state, expected)]
    if residuals[1] is not None:
        assert residuals[0]["local"].keys() == residuals[1]["local"].keys()
        for name, residual in residuals[1]["local"].items():
            assert torch.equal(residuals[0]["local"][name], residual), name
    stats = [s.stats() for s in (state, expected)]
    for name in ("steps", "buckets", "bytes_sent", "bytes_received", "bits_per_element", "strategies", "residual_norm"):
        assert stats[0][name] == stats[1][name], name
    assert stats[0]["copy_seconds"] > 0 == stats[1]["copy_seconds"]


@world(2, on_device=True)
@pytest.mark.parametrize("mode", MODES)
def test_mode(rank, world_size, mode):
    for seed in (0, 1):
        check_equal(rank, mode, seed)
        torch.accelerator.synchronize()


@world(2, 3, 4, on_device=True)
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "exact_sum"])
def test_strategy(rank, world_size, strategy):
    for grid in GRIDS.values():
        check_equal(rank, "plain", 2, strategy=strategy, grid=grid)


@world(2, on_device=True)
@pytest.mark.parametrize("kind", ["number", "tensor", "function"])
def test_grad_scale(rank, world_size, kind):
    found = []
    for model, state in on_both("plain"):
        place = next(model.parameters()).device
        scales = {"number": 512.0, "tensor": torch.tensor(512.0, device=place), "function": lambda: 512.0}
        state.grad_scale = scales[kind]
        found.append([step_of(model, "plain", step, rank) for step in range(STEPS)])
    for got, expected in zip(*found[::-1], strict=True):
        assert_equal(got, expected, "gradients")


@world(2, on_device=True)
def test_a_gradient_that_is_not_finite(rank, world_size):
    """Its tensor is NaN on every rank, and residuals are those of the CPU."""
    found, residuals = [], []
    for model, state in on_both("plain"):
        step_of(model, "plain", 0, rank)
        x = torch.full((8, 48), float("nan") if rank else 1.0, device=next(model.parameters()).device)
        model(x).square().sum().backward()
        found.append([parameter.grad.isnan().all().item() for parameter in model.parameters()])
        residuals.append(state.state_dict()["error_feedback"]["local"])
    assert all(found[0]) and found[0] == found[1]
    assert all(torch.equal(residuals[1][name], residual) for name, residual in residuals[0].items())


@world(2, on_device=True)
def test_a_copy_that_fails(rank, world_size):
    """Backward raises on all ranks, the rest of the step is skipped, and the next step has the CPU's bits."""
    (cpu, _), (device, state) = on_both("plain", error_feedback=False)
    for step in range(2):
        assert_equal(step_of(device, "plain", step, rank), step_of(cpu, "plain", step, rank), step)
    for number in (0, 3):
        if rank == 1:
            torch.ops.late.fail_copy(number)
        with suppress(RuntimeError) if number else pytest.raises(RuntimeError, match="late: a copy failed"):
            device(batch((8, 48), torch.float32, 2, rank, 0).to("late")).square().sum().backward()
        torch.ops.late.fail_copy(-1)
        device.zero_grad()
        assert "late: a copy failed" in str(state.exception())
    communicator = get_communicator(device_group())
    communicator.submit(lambda: None).wait()  # the worker has skipped the rest of the step
    assert all(staging.buffers._taken == 0 for staging in copies._stagings[communicator].values())
    with suppress(RuntimeError):  # where the last fault was that of a copy back, the others raise now
        device(batch((8, 48), torch.float32, 2, rank, 0).to("late")).square().sum().backward()
    device.zero_grad()
    for step in range(3, 5):
        assert_equal(step_of(device, "plain", step, rank), step_of(cpu, "plain", step, rank), step)


@world(2, on_device=True)
def test_a_checkpoint_moves_between_cpu_and_device(rank, world_size):
    (cpu, expected), (device, state) = on_both("plain")
    for step in range(2):
        step_of(device, "plain", step, rank)
    saved = state.state_dict()
    assert all(residual.is_cpu for residual in saved["error_feedback"]["local"].values())
    expected.load_state_dict(saved)
    for name, residual in expected.state_dict()["error_feedback"]["local"].items():
        assert torch.equal(residual, saved["error_feedback"]["local"][name])
    cpu.module.load_state_dict(device.module.state_dict())
    step_of(cpu, "plain", 2, rank)
    state.load_state_dict(expected.state_dict())
    assert_same_on_all_ranks(*step_of(device, "plain", 3, rank))


@world(2, on_device=True)
@pytest.mark.parametrize("strategy", ["none", "bf16", "auto"])
def test_uncompressed_steps_are_not_bypassed(rank, world_size, strategy):
    """They need the host, and gloo's sum would make backward wait for the device."""
    (cpu, _), (device, state) = on_both("plain", strategy=strategy)
    for step in range(BYPASSED + 5):
        before = get_communicator(device_group()).collectives
        found, buckets = step_of(device, "plain", step, rank), state.stats()["buckets"]
        if strategy != "auto":
            assert_equal(found, step_of(cpu, "plain", step, rank), step)
        assert_same_on_all_ranks(*found)
        assert get_communicator(device_group()).collectives - before == buckets
        state.reset_stats()


@world(1, on_device=True)
@pytest.mark.parametrize("strategy", ["auto", "two_phase"])
def test_a_world_of_one(rank, world_size, strategy):
    (cpu, _), (device, _) = on_both("plain", strategy=strategy)
    for step in range(3):
        assert_equal(step_of(device, "plain", step, rank), step_of(cpu, "plain", step, rank), step)


@world(2, on_device=True)
def test_host_memory_is_bounded(rank, world_size):
    """Three of the largest bucket, once the first step's buffer, the whole model's, is gone."""
    before = torch.ops.late.pinned_bytes()
    group = dist.new_group(backend="late_gloo")
    torch.manual_seed(0)
    moved = nn.Sequential(*[nn.Linear(100, 100) for _ in range(8)]).to("late")
    model = DistributedDataParallel(moved, bucket_cap_mb=0.04, process_group=group)
    state = attach(model, min_elements=MIN_ELEMENTS)
    sizes = []
    for _ in range(30):
        model(torch.ones(3, 100, device="late")).square().sum().backward()
        sizes.append(torch.ops.late.pinned_bytes() - before)
    assert state.stats()["buckets"] > 70
    assert sizes[0] == sum(4 * parameter.numel() for parameter in model.parameters())
    assert sizes[-1] <= LIMIT * 2 * 4 * 10_100


@world(2, on_device=True)
def test_a_planted_fault_is_noticed(rank, world_size):
    """The hook's Future without the stream of the copy back: DDP's wait is none then, and gradients are old ones."""
    (cpu, _), (device, _) = on_both("plain", error_feedback=False)
    step_of(device, "plain", 0, rank), step_of(cpu, "plain", 0, rank)
    restore, found = copies.Staged.restore, []

    def elsewhere(self):
        restore(self)
        torch.accelerator.set_stream(torch.Stream("late"))

    for seed in ORDERS:
        for planted in (True, False):
            with (
                late_device.order(seed),
                mock.patch.object(copies.Staged, "restore", elsewhere if planted else restore),
            ):
                got, expected = step_of(device, "plain", 1, rank), step_of(cpu, "plain", 1, rank)
            torch.accelerator.synchronize()
            found.append((planted, all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))))
            device.module.load_state_dict(cpu.module.state_dict())
    assert not all(equal for planted, equal in found if planted)
    assert all(equal for planted, equal in found if not planted)


class Exact(nn.Module):
    """A model whose gradients are its inputs, bit for bit on any device."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([torch.zeros(1000 + 300 * number) for number in range(9)])

    def forward(self, inputs):
        return sum((layer * inputs[: layer.numel()]).sum() for layer in self.layers)


def check_exact(rank, device, **options):
    """Trains on the CPU and on a device whose kernels may round in other ways; compares gradients and residuals."""
    found = []
    for place in ("cpu", device):
        model = DistributedDataParallel(Exact().to(place), bucket_cap_mb=0.01, **(options if place == device else {}))
        state = attach(model, min_elements=MIN_ELEMENTS)
        found.append([])
        for step in range(STEPS):
            model.zero_grad()
            inputs = torch.randn(4000, generator=torch.Generator().manual_seed(10 * step + rank))
            model(inputs.to(place)).backward()
            found[-1] += [parameter.grad.cpu() for parameter in model.parameters()]
        found[-1] += [residual for _, residual in sorted(state.state_dict()["error_feedback"]["local"].items())]
    assert_equal(found[1], found[0], "gradients and residuals")


@world(2, on_device=True)
def test_exact_gradients(rank, world_size):
    for seed in ORDERS:
        with late_device.order(seed):
            check_exact(rank, "late", process_group=device_group())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@world(1, 2)
def test_exact_gradients_on_a_gpu(rank, world_size):
    """Ranks may share one GPU: DDP's own messages travel over gloo."""
    check_exact(rank, f"cuda:{rank % torch.cuda.device_count()}")
