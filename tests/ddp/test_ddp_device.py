"""The hook and ``all_reduce`` with ``device_codec``: DDP's modes over emulated kernels, and what is refused."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, exact_mean, wrap
from ddp_modes import GRIDS, check_mode
from distributed import assert_same_on_all_ranks, attach, world
from emulated_core import emulated_device

import qcomm
from qcomm import RangeGrid, SigmaGrid
from qcomm.collectives_cuda.two_phase import check_group

pytestmark = pytest.mark.world


@world(2)
@pytest.mark.parametrize(
    ("mode", "grid", "error_feedback"),
    [
        ("plain", "sigma", False),
        ("unused", "sigma", True),
        ("mixed dtypes", "range", True),
        ("bfloat16", "sigma", True),
    ],
)
def test_mode(rank, world_size, emulated_path, mode, grid, error_feedback):
    with emulated_device(emulated_path):
        check_mode(rank, world_size, mode, GRIDS[grid], error_feedback, device_codec=True)


@world(1, 3)
@pytest.mark.parametrize(
    "options",
    [{}, {"grid": RangeGrid(c=2)}, {"grad_scale": torch.tensor(512.0)}, {"warmup_steps": 2}],
    ids=["defaults", "range", "grad_scale", "warmup_steps"],
)
def test_gradients_of_the_cpu(rank, world_size, emulated_path, options):
    """The same gradients, bit for bit, as where the tensors are taken for what they are."""
    found = []
    for device in (nullcontext(), emulated_device(emulated_path)):
        with device:
            model = wrap()
            state = attach(model, min_elements=200, device_codec=True, **options)
            found.append([torch.cat([g.flatten() for g in backward(model, rank, step)]) for step in range(4)])
            stats, residuals = state.stats(), state.state_dict()
        found[-1] += [residuals["error_feedback"]["local"][key] for key in sorted(residuals["error_feedback"]["local"])]
        found[-1].append(torch.tensor([stats["bits_per_element_compressed"], stats["residual_norm"]]))
    assert len(found[0]) == len(found[1])
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)


@world(2)
def test_a_checkpoint_moves_between_cpu_and_device(rank, world_size, emulated_path):
    """What was saved on the CPU goes on on a device, and what was saved there, on the CPU, as if nothing had moved."""
    first = wrap()
    state = attach(first, min_elements=200, device_codec=True)
    for step in range(2):
        backward(first, rank, step)
    found = []
    for devices in ((nullcontext, nullcontext), (lambda: emulated_device(emulated_path), nullcontext)):
        saved, found = state.state_dict(), [*found, []]
        for number, device in enumerate(devices):
            with device():
                model = wrap()
                moved = attach(model, min_elements=200, device_codec=True)
                moved.load_state_dict(saved)
                for step in range(2):
                    found[-1] += backward(model, rank, 2 + 2 * number + step)
                saved = moved.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@world(2)
@pytest.mark.parametrize("strategy", ["none", "bf16"])
def test_the_uncompressed_strategies(rank, world_size, emulated_path, strategy):
    with emulated_device(emulated_path):
        model = wrap()
        state = attach(model, strategy=strategy, min_elements=200, device_codec=True)
        gradients = backward(model, rank)
        expected = exact_mean(rank, world_size)
        tolerance = {"none": 1e-5, "bf16": 2**-7}[strategy]
        for name, a, b in zip(dict(model.module.named_parameters()), gradients, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-5) == (strategy == "none"), name
            assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-5
        assert_same_on_all_ranks(*gradients)
        assert set(state.stats()["strategies"].values()) == {strategy}
        assert state.stats()["bits_per_element_compressed"] == {"none": 32, "bf16": 16}[strategy]


@world(2, 3)
@pytest.mark.parametrize(
    ("grid", "dtype", "shape"),
    [
        (SigmaGrid(1.0), torch.float32, (50, 61)),
        (RangeGrid(), torch.bfloat16, (4, 700)),
        (SigmaGrid(0.5), torch.float64, (3000,)),
        (SigmaGrid(1.0), torch.float32, (3,)),
    ],
    ids=["float32", "bfloat16", "float64", "three_values"],
)
def test_all_reduce(rank, world_size, emulated_path, grid, dtype, shape):
    torch.manual_seed(rank)
    tensor = torch.randn(shape).to(dtype).transpose(0, -1)
    expected = tensor.clone()
    qcomm.all_reduce(expected, grid, strategy="two_phase")
    with emulated_device(emulated_path):
        work = qcomm.all_reduce(tensor, grid, strategy="two_phase", async_op=True, device_codec=True)
        assert work.wait()
        assert work.is_success()
        assert work.get_future().wait() is tensor
        stats = work.stats()
        assert torch.equal(tensor, expected)
        assert stats["bits_per_element"] > 0
        for strategy in ("none", "bf16"):
            qcomm.all_reduce(tensor, strategy=strategy, device_codec=True)
            assert torch.allclose(tensor.float(), expected.float(), atol=1e-6, rtol=1e-2)
    assert_same_on_all_ranks(tensor)


@world(2, 3)
@pytest.mark.parametrize("strategy", ["all_gather", "exact_sum", "hierarchical"])
def test_all_reduce_refuses_other_strategies(rank, world_size, emulated_path, strategy):
    tensor = torch.randn(50, 61)
    with (
        emulated_device(emulated_path),
        pytest.raises(ValueError, match=f"strategy must be one of .* for CUDA tensors, got '{strategy}'"),
    ):
        qcomm.all_reduce(tensor, strategy=strategy, device_codec=True)


@world(2)
def test_the_hook_refuses_other_strategies(rank, world_size, emulated_path):
    with emulated_device(emulated_path):
        model = wrap()
        with pytest.raises(ValueError, match="for CUDA tensors, got 'exact_sum'"):
            attach(model, strategy="exact_sum", device_codec=True)
        state = qcomm.CompressionState(strategy="exact_sum", device_codec=True)
        model.register_comm_hook(state, qcomm.compression_hook)
        assert "strategy must be one of ('auto', 'none', 'bf16', 'two_phase') for CUDA tensors" in str(
            error_of(model, rank)
        )


@world(1)
def test_a_group_that_cannot_serve_a_device_is_refused(rank, world_size):
    check_group(dist.group.WORLD, torch.device("cpu"))
    with pytest.raises(ValueError, match="group must have the backend nccl for CUDA tensors, got"):
        check_group(dist.group.WORLD, torch.device("cuda"))
