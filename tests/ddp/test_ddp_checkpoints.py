"""The hook's state and the averager's through checkpoints that all ranks share, and states that do not fit."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from averager_model import averager, move, network
from ddp_model import backward, error_of, mlp, wrap
from distributed import assert_same_on_all_ranks, attach, gathered, run, world
from torch import nn

import qcomm

pytestmark = pytest.mark.world


class Wrapped:
    """An object that ``torch.distributed.checkpoint`` asks for its state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state.state_dict()

    def load_state_dict(self, state_dict):
        self.state.load_state_dict(state_dict)


def kept(feedback_states, world_size):
    """mean(e) + o: what will still be sent, as one float64 tensor by name."""
    total = {}
    for state in feedback_states:
        for name, residual in state["local"].items():
            total[name] = total.get(name, 0.0) + residual.double() / world_size
        for name, (start, residual) in state["owner"].items():
            total[name][start : start + residual.numel()] += residual.double()
    return total


def feedback_of(state):
    return copy.deepcopy(state.state_dict()["error_feedback"])


def equal(one, other):
    return one["local"].keys() == other["local"].keys() and all(
        torch.equal(residual, other["local"][name]) for name, residual in one["local"].items()
    )


def averager_feedback(compressed):
    return copy.deepcopy(compressed.state_dict()["exchanges"][0]["error_feedback"])


def case_save(rank, world_size, folder):
    """Trains, and saves hook and averager in one checkpoint, as a Stateful object and as a dictionary."""
    ddp_model, model, compressed = wrap(), network(), averager()
    state = attach(ddp_model, min_elements=100)
    for step in range(3):
        backward(ddp_model, rank, step)
        move(model, rank, step)
        compressed.average_parameters(model.named_parameters())
    dcp.save({"hook": state.state_dict(), "averager": Wrapped(compressed)}, checkpoint_id=folder)
    future = dcp.async_save({"hook": Wrapped(state)}, checkpoint_id=f"{folder}/async")
    future.result()
    return feedback_of(state), averager_feedback(compressed), model.state_dict()


def case_load(rank, world_size, folder, saved):
    """Goes on from the checkpoint with fresh objects, returns the residuals that they have then, and trains."""
    model, compressed = network(), averager()
    model.load_state_dict(saved[0][2])
    for how in ("dictionary", "stateful", "async") if len(saved) == world_size else ("dictionary",):
        ddp_model = wrap()
        state = attach(ddp_model, min_elements=100)
        source = f"{folder}/async" if how == "async" else folder
        target = {"hook": Wrapped(state) if how == "stateful" else state.state_dict()}
        if len(saved) == world_size:
            dcp.load(target, checkpoint_id=source)
            if how != "stateful":
                state.load_state_dict(target["hook"])
            assert equal(feedback_of(state), saved[rank][0]), how
        else:
            with pytest.raises(
                BaseException, match=f"Missing key in checkpoint state_dict: hook.rank . of {world_size}"
            ):
                dcp.load(target, checkpoint_id=source)
        ddp_model = wrap()
        state = attach(ddp_model, min_elements=100)
        state.load_state_dict(qcomm.load_rank_states(source, "hook"))
        loaded = feedback_of(state)
        backward(ddp_model, rank, 3)
        assert_same_on_all_ranks(*[p.grad for p in ddp_model.parameters()])
        assert state.state_dict()["steps"] == 4
    compressed.load_state_dict(qcomm.load_rank_states(folder, "averager"))
    loaded_averager = averager_feedback(compressed)
    move(model, rank, 3)
    compressed.average_parameters(model.named_parameters())
    assert_same_on_all_ranks(*model.parameters())
    return loaded, loaded_averager


@pytest.mark.parametrize(("old", "new"), [(2, 2), (2, 3), (3, 2)])
def test_residuals_survive_a_checkpoint_that_all_ranks_share(tmp_path, old, new):
    saved = run(old, case_save, str(tmp_path))
    assert not equal(saved[0][0], saved[1][0])
    loaded = run(new, case_load, str(tmp_path), saved)
    for number in (0, 1):
        before = kept([result[number] for result in saved], old)
        after = kept([result[number] for result in loaded], old)
        assert before.keys() == after.keys() and before
        for name, value in before.items():
            assert torch.allclose(after[name], value, rtol=0, atol=1e-6), name
            assert bool(value.any()), name


def test_a_state_of_no_group_and_a_checkpoint_without_it(tmp_path):
    state = qcomm.CompressionState()
    saved = state.state_dict()
    assert list(saved) == ["rank 0 of 1"] and saved["steps"] == 0
    assert copy.copy(saved)["steps"] == copy.deepcopy(saved)["steps"] == 0
    with pytest.raises(KeyError):
        saved["nothing"]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    state.load_state_dict(torch.load(file, weights_only=True))
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": torch.ones(2), "rank 0 of 1": torch.ones(2)}, checkpoint_id=str(tmp_path))
    with pytest.raises(ValueError, match=r"has no complete states at key 'hook': .*of every rank of one job, got \[\]"):
        qcomm.load_rank_states(str(tmp_path), "hook")


# What one rank loads and the others do not, and what the error says of it.
ODD_LOADS = {
    "another number of ranks": (
        lambda good: {**good, "error_feedback": {**good["error_feedback"], "world_size": 5}},
        "step 2 of 2 ranks, run {run} on rank 0, step 2 of 5 ranks, run {run} on rank 1",
    ),
    "another step": (lambda good: {**good, "steps": 7}, "step 2 of 2 ranks, run {run} on rank 0, step 7 of 2 ranks"),
    "another run": (
        lambda good: {**good, "run": "other"},
        "run {run} on rank 0, step 2 of 2 ranks, run other on rank 1",
    ),
    "nothing": (lambda good: None, "step 2 of 2 ranks, run {run} on rank 0, nothing on rank 1"),
}


@world(2)
def test_ranks_that_load_states_of_different_runs(rank, world_size):
    model = wrap()
    state = attach(model, min_elements=100)
    for step in range(2):
        backward(model, rank, step)
    good = state.state_dict()
    for case, (change, text) in ODD_LOADS.items():
        model = wrap()
        state = attach(model, min_elements=100)
        saved = change(good) if rank == 1 else good
        if saved is not None:
            state.load_state_dict(saved)
        error = str(error_of(model, rank))
        assert "in loaded state: step 2 of 2" in error and text.format(run=good["run"]) in error, (case, error)
        assert isinstance(state.exception(), qcomm.ConfigMismatchError)
        state.load_state_dict(good)  # now they agree
        assert error_of(model, rank) is None
    # A rank without residuals goes on from the same place.
    model = wrap()
    state = attach(model, min_elements=100)
    state.load_state_dict({**good, "error_feedback": None} if rank == 1 else good)
    assert error_of(model, rank) is None
    assert len(set(gathered(state.state_dict()["steps"]))) == 1


@world(2)
def test_a_state_of_another_model_is_refused_when_it_is_loaded_or_attached(rank, world_size):
    model = wrap()
    state = attach(model, min_elements=100)
    backward(model, rank)
    good = copy.deepcopy(state.state_dict())
    narrow = mlp()
    narrow[0] = nn.Linear(40, 48)
    for other, match in (
        (mlp()[:2], "there is a residual of '.*', which the model does not have .it has '0.weight', '0.bias'."),
        (narrow, "the residual of '0.weight' has 2304 elements, the model's parameter 1920"),
    ):
        ddp_model = wrap(other)
        fresh = attach(ddp_model)
        with pytest.raises(ValueError, match=match):
            fresh.load_state_dict(good)
        assert fresh.state_dict()["steps"] == 0 and fresh.error_feedback.norm() == 0.0
        early = qcomm.CompressionState(strategy="two_phase")
        early.load_state_dict(good)  # it knows no model yet
        ddp_model = wrap(other)
        with pytest.raises(ValueError, match=match):
            attach(ddp_model, state=early)
        assert not ddp_model._comm_hooks
