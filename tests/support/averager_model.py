"""Common parts of the averagers' tests: a small network, movements of its weights, and the mean they have to find."""

import torch
from distributed import gathered
from torch import nn

import qcomm


def network(dtype=torch.float32):
    """Two large matrices and small tensors; the same on all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.BatchNorm1d(48), nn.Tanh(), nn.Linear(48, 48))
    return model.to(dtype)


def averager(period=1, warmup_steps=0, **options):
    options.setdefault("strategy", "two_phase")
    return qcomm.CompressedModelAverager(period, warmup_steps, **options)


def post_local_sgd(model, compressed, **options):
    from torch.distributed.optim import PostLocalSGDOptimizer  # compiles TorchScript when it is imported

    return PostLocalSGDOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.05, **options), compressed)


def move(model, rank, step, size=0.01):
    """What local training does to the weights: something else on each rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * noise).to(parameter.dtype))


def train(model, optimizer, rank, steps, after=lambda step: None):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 48, generator=torch.Generator().manual_seed(100 * step + rank))
        (model(x) - x).square().mean().backward()
        optimizer.step()
        after(step)


def flat(tensors):
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def exact_mean(tensors):
    return torch.stack(gathered(flat(tensors))).mean(dim=0)
