"""Common parts of DiLoCo's tests: a network that trains, and the algorithm for all ranks at once in plain torch."""

import copy

import torch
from torch import nn

import qcomm


def network(dtype=torch.float32):
    """Two large matrices and small tensors; the same on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48), nn.Tanh(), nn.Linear(48, 48)).to(dtype)


def diloco(model, outer=None, period=4, **options):
    options.setdefault("strategy", "two_phase")
    return qcomm.DiLoCo(model, outer, period=period, **options)


def train_step(model, rank, step, rate=0.05):
    """A step of plain gradient descent on characters of a rank's own."""
    x = torch.randn(16, 48, generator=torch.Generator().manual_seed(100 * step + rank))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x = x.to(parameters[0].device, parameters[0].dtype)
    loss = (model(x) - x).square().mean()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.sub_(rate * gradient)


class SlowDiLoCo:
    """DiLoCo of all ranks in one process, in float32, without compression: what the algorithm is.

    Args:
        model: of every rank at the beginning.
        ranks: number of ranks.
        outer: of ``qcomm.DiLoCo``.
        fragments: the names of the parameters of each.
    """

    def __init__(self, model, ranks, outer, period, fragments, delay, alpha):
        self.models = [copy.deepcopy(model) for _ in range(ranks)]
        self.anchor = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
        self.outer = outer(list(self.anchor.values()))
        self.period, self.fragments, self.delay, self.alpha = period, fragments, delay, alpha
        self.begin = [(number + 1) * period // len(fragments) % period for number in range(len(fragments))]
        self.sent, self.steps = {}, 0

    def step(self):
        self.steps += 1
        weights = [dict(model.named_parameters()) for model in self.models]
        for names, begin in zip(self.fragments, self.begin, strict=True):
            if self.steps % self.period == begin:
                mean = {n: sum(self.anchor[n].detach() - w[n].detach() for w in weights) / len(weights) for n in names}
                self.sent[self.steps + self.delay] = mean
        for name, gradient in self.sent.pop(self.steps, {}).items():
            self.anchor[name].grad = gradient
        if any(parameter.grad is not None for parameter in self.anchor.values()):
            self.outer.step()
            with torch.no_grad():
                for name in [n for n, parameter in self.anchor.items() if parameter.grad is not None]:
                    for w in weights:
                        w[name].copy_(torch.lerp(self.anchor[name], w[name], self.alpha))
            self.outer.zero_grad(set_to_none=True)
