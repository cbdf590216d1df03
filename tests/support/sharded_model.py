"""Small models that are sharded over a world, and the gradients that they have to have."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qcomm.fsdp


def net(dtype=torch.float32):
    """Three layers, none of which 2 or 4 ranks cut evenly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 37), nn.Tanh(), nn.Linear(37, 61), nn.Tanh(), nn.Linear(61, 3))
    return model.to(dtype)


def shard(model, mesh=None, units=(0, 2), **options):
    """``fully_shard`` on the layers ``units``, and on the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for number in units:
        fully_shard(model[number], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def attach(model, **options):
    """``qcomm.fsdp.attach``, compressing small tensors, too."""
    return qcomm.fsdp.attach(model, **{"min_elements": 20, **options})


def inputs(rank, step=0, dtype=torch.float32):
    return torch.randn(8, 48, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


@contextmanager
def failing(victim, owner, step):
    """Lets one rank run out of memory in a step of an exchange."""
    patched = mock.patch.object(owner, step, side_effect=MemoryError("none left"))
    with patched if dist.get_rank() == victim else nullcontext():
        yield


def backward(model, rank, step=0, scale=1.0, dtype=torch.float32):
    (model(inputs(rank, step, dtype)).float().square().sum() * scale).backward()


def gradients(model):
    """Name -> the whole gradient, on every rank."""
    return {
        name: parameter.grad.full_tensor().detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def local_gradients(rank, step=0, model=None, scale=1.0):
    """Name -> the gradient of one rank, without sharding."""
    model = net() if model is None else model
    model.zero_grad()
    backward(model, rank, step, scale)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact_means(world_size, step=0):
    """Name -> the mean of all ranks' gradients, added in rank order in float32."""
    of_ranks = [local_gradients(rank, step) for rank in range(world_size)]
    return {name: torch.stack([g[name] for g in of_ranks]).sum(0) / world_size for name in of_ranks[0]}


def half_a_step(of_ranks, step, name):
    """Most by which quantization changes a mean: half a step of each rank's grid."""
    steps = [step * grads[name].square().mean().sqrt() for grads in of_ranks]
    return sum(steps) / len(steps) / 2 * 1.001 + 1e-6
