"""A resumed run is the undisturbed one, bit for bit, although DDP's first step has other buckets."""

import copy
import io
import tempfile
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ddp_model import mlp, wrap
from distributed import gathered, world

import qcomm
from qcomm.ddp import regroup

pytestmark = pytest.mark.world

OPTIONS = {
    "two_phase": {"strategy": "two_phase"},
    "two_phase runs": {"strategy": "two_phase", "grid": qcomm.SigmaGrid(3.2)},
    "two_phase range": {"strategy": "two_phase", "grid": qcomm.RangeGrid(c=2)},
    "all_gather": {"strategy": "all_gather"},
    "exact_sum": {"strategy": "exact_sum"},
    "hierarchical": {"strategy": "hierarchical", "ranks_per_node": 1},
    "none": {"strategy": "none"},
    "bf16": {"strategy": "bf16"},
    "without feedback": {"strategy": "two_phase", "error_feedback": False},
}


def start(options, dtype=torch.float32):
    model = wrap(mlp().to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, optimizer, qcomm.attach(model, min_elements=100, **options)


def train(model, optimizer, rank, steps):
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(8, 48, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)
        model(inputs).square().sum().backward()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def load(kept, model, optimizer, state):
    """Returns a run to where ``kept`` was saved: the dictionaries of model, optimizer and hook."""
    for target, saved in zip((model, optimizer, state), kept, strict=True):
        target.load_state_dict(saved)


def kept_and_expected(rank, model, optimizer, state):
    """Trains; returns what five steps leave, and the weights after four more."""
    train(model, optimizer, rank, range(5))
    kept = copy.deepcopy([model.state_dict(), optimizer.state_dict(), state.state_dict()])
    return kept, train(model, optimizer, rank, range(5, 9))


@world(2, 3)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in OPTIONS]
    + [(name, dtype) for name in ("two_phase", "none") for dtype in (torch.bfloat16, torch.float64)],
    ids=str,
)
def test_a_resumed_run_is_bit_exact(rank, world_size, name, dtype):
    kept, expected = kept_and_expected(rank, *start(OPTIONS[name], dtype))
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    model, optimizer, state = start(OPTIONS[name], dtype)
    load(torch.load(file, weights_only=True), model, optimizer, state)
    assert torch.equal(train(model, optimizer, rank, range(5, 9)), expected)


@world(2)
@pytest.mark.parametrize("name", ["two_phase", "two_phase runs"])
def test_a_run_resumed_by_distributed_checkpoint_is_bit_exact(rank, world_size, name):
    folder = gathered(tempfile.mkdtemp())[0]
    (weights, momenta, hook), expected = kept_and_expected(rank, *start(OPTIONS[name]))
    dcp.save({"model": weights, "hook": hook}, checkpoint_id=folder)
    model, optimizer, state = start(OPTIONS[name])
    loaded = {"model": model.state_dict()}
    dcp.load(loaded, checkpoint_id=folder)
    load((loaded["model"], momenta, qcomm.load_rank_states(folder, "hook")), model, optimizer, state)
    assert torch.equal(train(model, optimizer, rank, range(5, 9)), expected)


@world(2)
def test_a_state_that_goes_back_resumes_on_its_own_model(rank, world_size):
    """As after a loss that became infinite: model and hook return to an earlier step, DDP's buckets stay."""
    model, optimizer, state = start(OPTIONS["two_phase"])
    kept, expected = kept_and_expected(rank, model, optimizer, state)
    load(kept, model, optimizer, state)
    assert torch.equal(train(model, optimizer, rank, range(5, 9)), expected)


@world(2)
def test_a_state_that_was_loaded_and_saved_again_resumes_as_well(rank, world_size):
    (weights, momenta, hook), expected = kept_and_expected(rank, *start(OPTIONS["two_phase"]))
    passed_on = qcomm.CompressionState(min_elements=100, **OPTIONS["two_phase"])
    passed_on.load_state_dict(hook)
    assert passed_on.state_dict()["buckets"] == hook["buckets"]
    model, optimizer, state = start(OPTIONS["two_phase"])
    load((weights, momenta, passed_on.state_dict()), model, optimizer, state)
    assert torch.equal(train(model, optimizer, rank, range(5, 9)), expected)


@world(2)
def test_a_rank_without_memory_for_the_first_step_tells_the_others(rank, world_size):
    model, optimizer, state = start(OPTIONS["two_phase"])
    train(model, optimizer, rank, range(5))
    saved = state.state_dict()
    model, optimizer, state = start(OPTIONS["two_phase"])
    state.load_state_dict(saved)
    wanting = mock.patch.object(regroup.Regrouped, "__init__", side_effect=MemoryError("none left"))
    with wanting if rank == 1 else nullcontext(), pytest.raises(RuntimeError) as caught:
        train(model, optimizer, rank, [5])
    assert "rank 1 failed while preparing the exchange: MemoryError: none left" in str(caught.value), caught.value
    train(model, optimizer, rank, range(6, 8))


@world(2)
def test_an_error_of_the_first_step_is_raised_and_the_next_one_works(rank, world_size):
    model, optimizer, state = start(OPTIONS["two_phase"])
    train(model, optimizer, rank, range(5))
    saved = state.state_dict()
    model, optimizer, state = start(OPTIONS["two_phase"] | {"grad_scale": 1.0})
    state.load_state_dict(saved)
    state.grad_scale = -1.0 if rank == 1 else 1.0
    with pytest.raises(RuntimeError, match="rank 1 failed while preparing the exchange: ValueError: grad_scale") as e:
        train(model, optimizer, rank, range(5, 6))
    assert "Unable to cast" not in str(e.value)
    state.grad_scale = 1.0
    train(model, optimizer, rank, range(5, 8))


@world(2)
@pytest.mark.parametrize("change", ["an older checkpoint", "other buckets", "a parameter twice"])
def test_buckets_that_do_not_fit_are_left_to_ddp(rank, world_size, change):
    model, optimizer, state = start(OPTIONS["two_phase"])
    train(model, optimizer, rank, range(5))
    ((key, (entries,)),) = state.state_dict().items()
    buckets = entries.pop("buckets")
    assert len(buckets) > 2
    if change != "an older checkpoint":
        entries["buckets"] = buckets[1:] if change == "other buckets" else [*buckets, ["0.weight"]]
    model, optimizer, state = start(OPTIONS["two_phase"])
    state.load_state_dict({key: (entries,)})
    train(model, optimizer, rank, range(5, 8))
    assert state.stats()["steps"] == 3


@pytest.mark.parametrize("buckets", ["0.weight", [["0.weight", 3]], [5], {"0": ["a"]}])
def test_a_damaged_list_of_buckets_is_refused(buckets):
    state = qcomm.CompressionState()
    saved = {**state.state_dict(), "buckets": buckets}
    with pytest.raises(ValueError, match="state_dict is damaged: buckets must be lists of names, got "):
        state.load_state_dict(saved)


@world(2)
def test_buckets_by_name_follow_ddp(rank, world_size):
    model, optimizer, state = start(OPTIONS["two_phase"])
    assert state.state_dict()["buckets"] == []
    names = [name for name, _ in model.module.named_parameters()]
    orders = []
    for step in range(3):
        train(model, optimizer, rank, [step])
        orders.append(state.state_dict()["buckets"])
        assert sorted(name for bucket in orders[-1] for name in bucket) == sorted(names)
    assert len(orders[0]) == 1 < len(orders[1]) and orders[1] == orders[2]
    assert dist.get_world_size() == world_size
