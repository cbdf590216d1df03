"""Weights on the test device: averagers and DiLoCo give the bits of the CPU, in every order of the device's work."""

import copy

import late_device
import pytest
import torch
from averager_model import averager, flat
from diloco_model import diloco
from distributed import assert_same_on_all_ranks, world
from late_device import ORDERS
from torch import nn

pytestmark = pytest.mark.world


def pair(dtype=torch.float32):
    """The same model on the CPU and on the device."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48)).to(dtype)
    return model, copy.deepcopy(model).to("late")


def move_both(models, rank, step):
    """The same movement, which the device's stream has still to compute when the next call is made."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    with torch.no_grad():
        for parameters in zip(*[model.parameters() for model in models], strict=True):
            noise = (0.01 * torch.randn(parameters[0].shape, generator=generator)).to(parameters[0].dtype)
            for parameter in parameters:
                parameter.add_(noise.to(parameter.device))


@world(2, on_device=True)
@pytest.mark.parametrize("options", [{}, {"exchange": "weights"}], ids=["difference", "weights"])
def test_an_averager(rank, world_size, options):
    for seed in ORDERS:
        with late_device.order(seed):
            models = pair()
            averagers = [averager(**options) for _ in models]
            for step in range(3):
                move_both(models, rank, step)
                for model, one in zip(models, averagers, strict=True):
                    one.average_parameters(model.parameters())
            assert all(parameter.device.type == "late" for parameter in models[1].parameters())
            assert torch.equal(flat(models[0].parameters()), flat([p.cpu() for p in models[1].parameters()]))
            assert_same_on_all_ranks(*[parameter.cpu() for parameter in models[1].parameters()])


DILOCO = {
    "plain": {"period": 2},
    "streamed": {"period": 4, "fragments": 2, "delay": 1},
    "bfloat16": {"period": 2, "alpha": 0.5, "dtype": torch.bfloat16},
}


@world(2, on_device=True)
@pytest.mark.parametrize("name", DILOCO)
def test_diloco(rank, world_size, name):
    """Also what a run on the CPU resumes from one on the device; anchor and outer optimizer are in host memory."""
    options = dict(DILOCO[name])
    dtype = options.pop("dtype", torch.float32)
    for seed in ORDERS:
        with late_device.order(seed):
            models = pair(dtype)
            both = [diloco(model, **options) for model in models]
            for step in range(1, 9):
                move_both(models, rank, step)
                for one in both:
                    one.step()
                if step == 5:
                    both[0].load_state_dict(both[1].state_dict())
            assert all(parameter.device.type == "late" for parameter in models[1].parameters())
            assert torch.equal(flat(models[0].parameters()), flat([p.cpu() for p in models[1].parameters()]))
            assert torch.equal(flat(both[0].anchor().values()), flat(both[1].anchor().values()))
            assert_same_on_all_ranks(*both[1].anchor().values())
            assert all(tensor.is_cpu for tensor in both[1]._outer.anchor.values())


@world(2, on_device=True)
def test_a_rank_on_the_cpu_and_one_on_a_device(rank, world_size):
    models = pair()
    model = models[rank]
    ours = diloco(model, period=2)
    for step in range(1, 7):
        move_both(models, rank, step)
        ours.step()
        assert_same_on_all_ranks(*ours.anchor().values())
    assert_same_on_all_ranks(*[parameter.cpu() for parameter in model.parameters()])


@world(1, on_device=True)
def test_the_codec_of_the_device_is_refused(rank, world_size):
    with pytest.raises(ValueError, match="device_codec must be False: weights are compared"):
        averager(device_codec=True)
