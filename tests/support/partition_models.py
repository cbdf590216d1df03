"""Small partitions, data, and their training by a loop that knows nothing of stages, trainers or messages."""

import torch
from torch import nn
from torch.nn import functional

import qcomm

WIDTHS = (12, 16, 10, 14, 8)
CLASSES = 5


def batches(count, seed=0, size=24, features=WIDTHS[0]):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, features, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator))
        for _ in range(count)
    ]


def stage(number):
    """Partition ``number`` of a model, the same weights in every process."""
    torch.manual_seed(100 + number)
    partition = nn.Sequential(nn.Linear(WIDTHS[number], WIDTHS[number + 1]), nn.ReLU())
    return qcomm.LocalStage(partition, nn.Linear(WIDTHS[number + 1], CLASSES))


def optimizer(stage):
    return torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9)


def trained(partitions, epochs, grid=None, keep=None):
    """Weights of each partition, trained one after another by hand; ``keep(losses, epoch)``: places that go on."""
    stages = [stage(number) for number in range(partitions)]
    optimizers = [optimizer(each) for each in stages]
    for epoch, data in enumerate(epochs):
        for batch in data:
            values, labels = batch
            for number, (each, own) in enumerate(zip(stages, optimizers, strict=True)):
                features = each.partition(values)
                losses = functional.cross_entropy(each.head(features), labels, reduction="none")
                own.zero_grad()
                losses.mean().backward()
                own.step()
                values = features.detach()
                if number == 0 and keep is not None:
                    kept = keep(losses.detach(), epoch)
                    values, labels = values[kept], labels[kept]
                if grid is not None:
                    values = qcomm.decompress(qcomm.compress(values, grid))
    return [each.state_dict() for each in stages]


def same(state, other):
    return all(torch.equal(state[name], other[name]) for name in state | other)
