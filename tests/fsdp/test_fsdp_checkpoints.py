"""Checkpoints of sharded models: a run goes on bit for bit, and residuals survive other numbers of ranks."""

import copy
import io
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import attach as attach_ddp
from distributed import gathered, run, world
from sharded_model import attach, backward, gradients, net, shard
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import qcomm

pytestmark = pytest.mark.world

OPTIONS = {
    "sigma": {"gradients": qcomm.SigmaGrid(1.0)},
    "runs": {"gradients": qcomm.SigmaGrid(3.2)},
    "range": {"gradients": qcomm.RangeGrid(c=2)},
    "weights": {"weights": qcomm.RangeGrid(num_bits=8)},
    "without feedback": {"error_feedback": False},
}


def start(options):
    model = shard(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return model, optimizer, attach(model, **options)


def train(model, optimizer, rank, steps):
    for step in steps:
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
    return torch.cat([parameter.full_tensor().flatten() for parameter in model.parameters()])


@world(2)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_is_bit_exact(rank, world_size, name):
    model, optimizer, state = start(OPTIONS[name])
    train(model, optimizer, rank, range(3))
    file = io.BytesIO()
    local = [parameter.to_local() for parameter in model.parameters()]
    momenta = [optimizer.state[parameter]["momentum_buffer"].to_local() for parameter in model.parameters()]
    torch.save([local, momenta, state.state_dict()], file)
    expected = train(model, optimizer, rank, range(3, 6))
    file.seek(0)
    local, momenta, hook = torch.load(file, weights_only=True)
    model, optimizer, state = start(OPTIONS[name])
    train(model, optimizer, rank, range(1))  # makes the optimizer's state
    state.load_state_dict(hook)
    with torch.no_grad():
        for parameter, weights, momentum in zip(model.parameters(), local, momenta, strict=True):
            parameter.to_local().copy_(weights)
            optimizer.state[parameter]["momentum_buffer"].to_local().copy_(momentum)
    assert torch.equal(train(model, optimizer, rank, range(3, 6)), expected)


@world(2)
def test_a_run_resumed_by_distributed_checkpoint_is_bit_exact(rank, world_size):
    folder = gathered(tempfile.mkdtemp())[0]
    model, optimizer, state = start(OPTIONS["runs"])
    train(model, optimizer, rank, range(3))
    weights, momenta = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": momenta, "hook": state.state_dict()}, checkpoint_id=folder)
    expected = train(model, optimizer, rank, range(3, 6))
    model, optimizer, state = start(OPTIONS["runs"])
    weights, momenta = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": momenta}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    state.load_state_dict(qcomm.load_rank_states(folder, "hook"))
    assert torch.equal(train(model, optimizer, rank, range(3, 6)), expected)


def residuals_of_four(rank, world_size):
    model = shard(net())
    state = attach(model)
    backward(model, rank)
    return dict(state.state_dict())


def test_residuals_go_on_with_fewer_ranks():
    states = run(4, residuals_of_four)
    run(2, resumed_by_two, states)


def resumed_by_two(rank, world_size, states):
    """Two ranks whose gradients are zero get the mean of what four ranks still had to send."""
    model = shard(net())
    state = attach(model, min_elements=20)
    state.load_state_dict([states[rank], states[rank + 2]])
    parts = [states[number][f"rank {number} of 4"][0]["error_feedback"]["local"] for number in range(4)]
    name = "2.weight"
    owed = sum(part[name].double() for part in parts) / 4
    arrived = torch.zeros(61 * 37, dtype=torch.float64)
    for step in range(6):
        model.zero_grad()
        backward(model, rank, step)
        arrived += gradients(model)[name].flatten().double()
    exact = torch.zeros_like(arrived)
    for step in range(6):
        for other in range(2):
            plain = net()
            backward(plain, other, step)
            exact += plain[2].weight.grad.flatten().double() / 2
    kept = sum(of_rank[name] for of_rank in gathered(state.state_dict()["error_feedback"]["local"])).double() / 2
    assert owed.abs().max() > 1e-3
    assert torch.allclose(arrived, exact + owed - kept, atol=2e-4)


@world(2)
def test_a_run_of_ddp_goes_on_sharded_and_back(rank, world_size):
    single = DistributedDataParallel(net())
    hook = attach_ddp(single, min_elements=20, small_step=None)
    for step in range(2):
        single.zero_grad()
        backward(single, rank, step)
    saved = hook.state_dict()
    model = shard(net())
    state = attach(model)
    state.check_state_dict(saved)
    state.load_state_dict(saved)
    before = gathered(saved["error_feedback"])
    owed = sum(of_rank["local"]["2.weight"] for of_rank in before)
    for of_rank in before:  # an owner's residual counts as often as there are ranks
        start, residual = of_rank["owner"].get("2.weight", (0, torch.empty(0)))
        owed[start : start + residual.numel()] += world_size * residual
    backward(model, rank, 2)
    kept = sum(of_rank["2.weight"] for of_rank in gathered(state.state_dict()["error_feedback"]["local"]))
    exact = 0.0
    for other in range(world_size):
        plain = net()
        backward(plain, other, 2)
        exact = exact + plain[2].weight.grad.flatten() / world_size
    found = gradients(model)["2.weight"].flatten()
    assert torch.allclose(found, exact + (owed - kept) / world_size, atol=1e-4)
    back = attach_ddp(DistributedDataParallel(net()), min_elements=20)
    back.load_state_dict(state.state_dict())
    assert back.state_dict()["steps"] == 3


DAMAGES = {
    "another format": (lambda good: {**good, "format": 1}, "must be of format 2, .*, got 1"),
    "no residuals' names": (lambda good: {**good, "has_names": False}, "residuals by the names of parameters"),
    "other parts": (lambda good: {**good, "part": "shard 0 of 2"}, "must have residuals of whole gradients"),
    "steps": (lambda good: {**good, "steps": -1}, "steps must be an int >= 0"),
    "a residual": (
        lambda good: {**good, "error_feedback": {**good["error_feedback"], "local": {"0.weight": torch.ones(3)}}},
        "residual of '0.weight' has 3 elements",
    ),
    "another model": (
        lambda good: {**good, "error_feedback": {**good["error_feedback"], "local": {"fc": torch.ones(3)}}},
        "there is a residual of 'fc'",
    ),
}


@world(2)
def test_damaged_states_are_refused_and_change_nothing(rank, world_size):
    model, _, state = start(OPTIONS["sigma"])
    backward(model, rank)
    good = state.state_dict()
    before = copy.deepcopy(dict(good))
    for damage, message in DAMAGES.values():
        for load in (state.load_state_dict, state.check_state_dict):
            with pytest.raises(ValueError, match=message):
                load(damage(good))
    after = state.state_dict()
    key = f"rank {rank} of {world_size}"
    assert after[key][0]["steps"] == before[key][0]["steps"]
    for name, residual in before[key][0]["error_feedback"]["local"].items():
        assert torch.equal(residual, after[key][0]["error_feedback"]["local"][name])


@world(2)
def test_ranks_that_resume_from_different_steps(rank, world_size):
    model, optimizer, state = start(OPTIONS["sigma"])
    train(model, optimizer, rank, range(1))
    first = state.state_dict()
    train(model, optimizer, rank, range(1, 2))
    second = state.state_dict()
    model, optimizer, state = start(OPTIONS["sigma"])
    state.load_state_dict(first if rank else second)
    with pytest.raises(qcomm.ConfigMismatchError, match=r"loaded state: step 2 of 2 ranks.* on rank 0"):
        train(model, optimizer, rank, range(1))
    assert dist.get_world_size() == world_size
