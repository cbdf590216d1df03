"""Weights on the test device: averagers and DiLoCo give the bits of the CPU, in every order of the device's work."""

import copy

import late_device
import pytest
import torch
from averager_model import averager, flat
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


@world(1, on_device=True)
def test_the_codec_of_the_device_is_refused(rank, world_size):
    with pytest.raises(ValueError, match="device_codec must be False: weights are compared"):
        averager(device_codec=True)
