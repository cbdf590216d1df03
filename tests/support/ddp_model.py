"""A small DDP model of several buckets, one backward of it, and the gradients it has to have."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

AGREED = 2  # steps before the first bypass: DDP rebuilds its buckets after the first step


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(48, 48), nn.Tanh())])


def wrap(model=None, **options):
    return DistributedDataParallel(mlp() if model is None else model, bucket_cap_mb=0.002, **options)


def inputs(rank, step=0):
    return torch.randn(8, 48, generator=torch.Generator().manual_seed(100 * step + rank))


def backward(model, rank, step=0, scale=1.0):
    model.zero_grad()
    (model(inputs(rank, step)).square().sum() * scale).backward()
    return [p.grad.clone() for p in model.parameters()]


def error_of(model, rank):
    """What backward raises, or None."""
    try:
        backward(model, rank)
    except RuntimeError as error:
        return error
    return None


def exact_mean(rank, world_size, step=0):
    """Gradients averaged in rank order, in float32: what raw values have to give."""
    total = None
    for other in range(world_size):
        model = mlp()
        model(inputs(other, step)).square().sum().backward()
        part = [p.grad for p in model.parameters()]
        total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
    return [g / world_size for g in total]
