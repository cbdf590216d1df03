"""Programs as users write them: models, and ways of training them, each with the gradients that it has to have.

A program is run twice on every rank, as it would be on one machine and with DDP. The means of a run have to be the
exact ones but for the residuals that error feedback still keeps.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from distributed import assert_same_on_all_ranks, attach, gathered
from residuals import owed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SIZE = 48
TOKENS = 90


def numbers(generator):
    return torch.randn(6, SIZE, generator=generator)


def text(generator):
    return torch.randint(0, TOKENS, (3, 8), generator=generator)


class TiedTransformer(nn.Module):
    """A block of attention between an embedding and a head that share their weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, SIZE)
        self.block = nn.TransformerEncoderLayer(SIZE, 4, 2 * SIZE, dropout=0.0, batch_first=True)
        self.head = nn.Linear(SIZE, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.block(self.embedding(tokens)))


class Recurrent(nn.Module):
    """A loop over time, which uses each weight in every turn."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cells = nn.Embedding(TOKENS, SIZE), nn.LSTM(SIZE, SIZE, 2, batch_first=True)

    def forward(self, tokens):
        return self.cells(self.embedding(tokens))[0]


class Experts(nn.Module):
    """Each row goes to one expert: some have rows on one rank only, the last has none on any."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(SIZE, 4)
        self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(5))

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        chosen, y = weights.argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, expert(x[rows]) * weights[rows, min(number, 3), None])
        return y


class OddSizes(nn.Module):
    """Parameters without elements, without dimensions, and of a single element."""

    def __init__(self):
        super().__init__()
        self.nothing, self.scale = nn.Parameter(torch.empty(0, 7)), nn.Parameter(torch.tensor(2.0))
        self.one, self.layer = nn.Parameter(torch.ones(1)), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.layer(x) * self.scale * self.one + self.nothing.sum()


class Adapters(nn.Module):
    """A frozen layer between small ones that are trained."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE).requires_grad_(False)
        self.adapters = nn.ModuleDict({"down[0]": nn.Linear(SIZE, 8, bias=False), "up": nn.Linear(8, SIZE, bias=False)})

    def forward(self, x):
        return self.layer(x) + self.adapters["up"](self.adapters["down[0]"](x))


def layers():
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(SIZE, SIZE), nn.Tanh())])


def large_and_small():
    """A layer larger than a bucket, and many tiny ones."""
    return nn.Sequential(nn.Linear(SIZE, 600), nn.Linear(600, 4), *[nn.Linear(4, 4) for _ in range(30)])


def backward(model, x):
    model(x).square().mean().backward()


def step_of_one_pass(model, draw):
    backward(model, draw())


def step_of_three_passes(model, draw):
    """Without no_sync: each pass averages the sum of its own gradients and of what has been averaged."""
    for _ in range(3):
        backward(model, draw())


def step_with_no_sync(model, draw):
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        backward(model, draw())
    backward(model, draw())


def step_in_a_thread(model, draw):
    """Each step in a thread of its own."""
    faults, x = [], draw()

    def run():
        try:
            backward(model, x)
        except RuntimeError as error:
            faults.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not faults, faults


def step_beside_own_collectives(model, draw):
    """The program's own collectives on the model's group, before, within and after the step."""
    if not isinstance(model, DistributedDataParallel):
        backward(model, draw())
        return
    mine = torch.full((5000,), float(dist.get_rank() + 1))
    work = dist.all_reduce(mine, async_op=True)
    y = model(draw())
    dist.broadcast(torch.ones(3), 0)
    y.square().mean().backward()
    assert gathered("after") == ["after"] * dist.get_world_size()
    work.wait()
    assert float(mine[0]) == sum(range(1, dist.get_world_size() + 1))


class Program(NamedTuple):
    """A model, the inputs of a rank, options of DDP, and a step."""

    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], torch.Tensor] = numbers
    options: dict = {}  # noqa: RUF012 - of a named tuple, which is not changed
    step: Callable = step_of_one_pass


PROGRAMS = {
    "tied transformer": Program(TiedTransformer, text),
    "tied transformer, unused": Program(TiedTransformer, text, {"find_unused_parameters": True}),
    "tied transformer, static": Program(TiedTransformer, text, {"static_graph": True}),
    "recurrent": Program(Recurrent, text, {"gradient_as_bucket_view": True}),
    "experts": Program(Experts, options={"find_unused_parameters": True}),
    "odd sizes": Program(OddSizes),
    "adapters": Program(Adapters),
    "buckets of nothing": Program(large_and_small, options={"bucket_cap_mb": 1e-6}),
    "one bucket": Program(large_and_small, options={"bucket_cap_mb": 4000}),
    "three passes": Program(layers, step=step_of_three_passes),
    "in a thread": Program(layers, step=step_in_a_thread),
    "own collectives": Program(layers, step=step_beside_own_collectives),
    "no_sync": Program(layers, step=step_with_no_sync),
}
STEPS = 5  # with "none" the last three of them bypass the handshake


def run(rank, world_size, program, strategy):
    """Runs a program and checks its gradients after each step; returns the state."""
    torch.manual_seed(0)
    plain = program.model()
    model = DistributedDataParallel(copy.deepcopy(plain), **{"bucket_cap_mb": 0.005} | program.options)
    state = attach(model, strategy=strategy, min_elements=100)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    got = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trained.items()}
    want = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trained.items()}
    for step in range(STEPS):
        for network in (model, plain):
            generator = torch.Generator().manual_seed(100 * step + rank)
            network.zero_grad()
            program.step(network, lambda generator=generator: program.inputs(generator))
        assert_same_on_all_ranks(*[p.grad for p in model.parameters() if p.grad is not None])
        averaged = dict(model.module.named_parameters())
        for name, parameter in trained.items():
            exact = torch.zeros_like(got[name]) if parameter.grad is None else parameter.grad.double()
            dist.all_reduce(exact)
            want[name] += exact / world_size
            if averaged[name].grad is not None:
                got[name] += averaged[name].grad
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    kept = gathered(state.state_dict()["error_feedback"])
    for name, missing in ((name, want[name] - got[name]) for name in trained):
        allowed = 1e-5 * STEPS * float(want[name].abs().max() if missing.numel() else 0.0) + 1e-9
        error = missing.flatten() - owed(kept, name, missing.numel())
        assert bool((error.abs() <= allowed).all()), (name, float(error.abs().max()), allowed)
    return state


def steps_of(model, optimizer, rank, steps):
    """Plain training of a model of layers; parameters are equal on all ranks after each step."""
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, numbers(torch.Generator().manual_seed(100 * step + rank)))
        optimizer.step()
        assert_same_on_all_ranks(*model.parameters())
