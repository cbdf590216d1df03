"""The hook in programs as users write them: models, ways of training, and torch's switches."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from distributed import assert_same_on_all_ranks, attach, world
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from user_programs import PROGRAMS, SIZE, backward, layers, numbers, run, steps_of

import qcomm

pytestmark = pytest.mark.world


def inputs(rank, step):
    return numbers(torch.Generator().manual_seed(100 * step + rank))


@world(2)
@pytest.mark.parametrize("strategy", ["two_phase", "none"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_lost(rank, world_size, name, strategy):
    state = run(rank, world_size, PROGRAMS[name], strategy)
    if name == "adapters":
        assert set(state.stats()["tensors"]) <= {"adapters.down[0].weight", "adapters.up.weight"}


@world(2)
def test_names_with_brackets_can_be_excluded(rank, world_size):
    model = DistributedDataParallel(PROGRAMS["adapters"].model())
    state = attach(model, exclude=["adapters.down[[]0]*"], min_elements=1)
    backward(model, inputs(rank, 0))
    assert list(state.stats()["tensors"]) == ["adapters.up.weight"]


@world(2)
@pytest.mark.parametrize("strategy", ["two_phase", "none"])
def test_two_models_of_which_one_takes_gradients_twice_a_step(rank, world_size, strategy):
    """A generator's backward goes through the critic, whose gradients are reduced again in its own step."""
    generator, critic = DistributedDataParallel(layers()), DistributedDataParallel(layers())
    states = [attach(model, strategy=strategy) for model in (generator, critic)]
    for step in range(5):
        generator.zero_grad()
        critic(generator(inputs(rank, step))).square().mean().backward()
        critic.zero_grad()
        backward(critic, inputs(rank, step))
        assert_same_on_all_ranks(*[p.grad for model in (generator, critic) for p in model.parameters()])
    assert [state.stats()["steps"] for state in states] == [5, 10]


@world(2)
@pytest.mark.parametrize("strategy", ["two_phase", "none"])
def test_a_layer_that_is_frozen_for_some_steps(rank, world_size, strategy):
    model = DistributedDataParallel(layers(), bucket_cap_mb=0.005, find_unused_parameters=True)
    attach(model, strategy=strategy)
    frozen = list(model.module[2].parameters())
    for step in range(12):
        for parameter in frozen:
            parameter.requires_grad_(not 4 <= step < 8)
        model.zero_grad(set_to_none=step % 2 == 0)
        backward(model, inputs(rank, step))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert_same_on_all_ranks(*gradients)
        if 4 < step < 8:
            assert all(p.grad is None or not p.grad.any() for p in frozen)


@world(2)
def test_a_layer_that_is_added_after_wrapping(rank, world_size):
    model = DistributedDataParallel(layers())
    state = attach(model)
    backward(model, inputs(rank, 0))
    model.module.append(nn.Linear(SIZE, SIZE))
    backward(model, inputs(rank, 1))
    assert_same_on_all_ranks(*[p.grad for p in list(model.parameters())[:-2]])
    grown = DistributedDataParallel(model.module)
    assert attach(grown, state=state) is state
    grown.zero_grad()
    backward(grown, inputs(rank, 2))
    assert_same_on_all_ranks(*[p.grad for p in grown.parameters()])


@world(2)
@pytest.mark.parametrize("both", [False, True], ids=["outer", "both"])
def test_a_model_that_is_wrapped_twice(rank, world_size, both):
    inner = DistributedDataParallel(layers())
    outer = DistributedDataParallel(inner)
    for model in (inner, outer) if both else (outer,):
        attach(model)
    for step in range(4):
        outer.zero_grad()
        backward(outer, inputs(rank, step))
        assert_same_on_all_ranks(*[p.grad for p in outer.parameters()])


@world(2)
def test_an_optimizer_that_is_spread_over_ranks(rank, world_size):
    torch.manual_seed(0)
    model = DistributedDataParallel(layers(), bucket_cap_mb=0.005)
    attach(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    steps_of(model, optimizer, rank, 4)
    optimizer.consolidate_state_dict(0)
    if rank == 0:
        optimizer.load_state_dict(optimizer.state_dict())
    steps_of(model, optimizer, rank, 2)


@world(2)
def test_an_optimizer_in_backward_is_refused_with_the_reason(rank, world_size):
    module = layers()
    _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.01})
    with pytest.raises(ValueError, match="has an optimizer that runs in backward"):
        attach(DistributedDataParallel(module))


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SWITCHES = {
    "none": nullcontext,
    "anomaly": torch.autograd.detect_anomaly,
    "deterministic": deterministic,
    "flop counter": lambda: FlopCounterMode(display=False),
    "device": lambda: torch.device("cpu"),
}


@world(2)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "none"])
def test_switches_of_torch_change_no_gradient(rank, world_size, strategy):
    results = {}
    for name, switch in SWITCHES.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(layers(), bucket_cap_mb=0.005)
        attach(model, strategy=strategy)
        with switch():
            for step in range(4):
                model.zero_grad()
                backward(model, inputs(rank, step))
        results[name] = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        assert torch.equal(results[name], results["none"]), name


@world(2)
def test_a_model_of_fsdp_is_refused_wherever_it_is_passed(rank, world_size):
    from torch.distributed.fsdp import fully_shard  # compiles nothing else here

    module = layers()
    fully_shard(module)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.parallel\.DistributedDataParallel"):
        attach(module)
    for call in (
        lambda: qcomm.broadcast_parameters(module),
        lambda: qcomm.CompressedModelAverager(1).average_parameters(module.parameters()),
        lambda: qcomm.all_reduce(next(module.parameters())),
        lambda: qcomm.save(module.state_dict(), "/dev/null"),
    ):
        with pytest.raises((TypeError, qcomm.CollectiveError), match="to_local"):
            call()
