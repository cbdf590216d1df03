"""Steps of the hook that fail: the error on all ranks, and the state and the groups afterwards."""

import copy
import pickle
import threading
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, inputs, wrap
from distributed import TIMEOUT, all_reduce, assert_same_on_all_ranks, attach, die, gathered, world
from torch import nn

import qcomm
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator.groups import get_communicator
from qcomm.ddp import buckets as ddp_buckets
from qcomm.ddp import reducer

pytestmark = pytest.mark.world


def failing(name):
    """Makes the first call of ``MeanSteps.<name>`` for bucket 0 raise on this rank."""
    original = getattr(MeanSteps, name)
    effects = iter([ZeroDivisionError("boom")])

    def once(self, *args):
        for error in effects if self._task.index == 0 else ():
            raise error
        return original(self, *args)

    return mock.patch.object(MeanSteps, name, once)


# The phase that an error names, and a function that is called in it.
PHASES = {
    "compressing": (MeanSteps, "encode"),
    "averaging": (MeanSteps, "reduce"),
    "preparing": (ddp_buckets, "_check_buffer"),
}


@world(3)
@pytest.mark.parametrize("phase", PHASES)
def test_a_fault_in_one_bucket_is_raised_by_backward_on_all_ranks(rank, world_size, phase):
    model = wrap()
    state = attach(model, min_elements=100)
    backward(model, rank)
    target, name = PHASES[phase]
    original = getattr(target, name)
    calls = []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise ZeroDivisionError("boom")
        return original(*args)

    with mock.patch.object(target, name, fail_second) if rank == 1 else nullcontext():
        error = error_of(model, rank)
    assert f"rank 1 failed while {phase}" in str(error) and "ZeroDivisionError: boom" in str(error), error
    assert isinstance(state.exception(), qcomm.CollectiveError)
    for _ in range(2):
        assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])


@world(2, alone=True, dying=(0,), seconds=TIMEOUT.total_seconds() / 2)
def test_a_killed_rank_ends_backward_on_the_others(rank, world_size):
    model = wrap()
    state = attach(model)
    backward(model, rank)
    if rank == 0:
        mock.patch.object(MeanSteps, "reduce", side_effect=die).start()
    assert "no answer from rank(s)" in str(error_of(model, rank))
    assert isinstance(state.exception(), qcomm.CollectiveError)


@world(3)
def test_after_a_failure_the_rest_of_the_step_is_left_alone(rank, world_size):
    """Of all buckets on the channel of the one that failed; :mod:`test_channels` has the others."""
    with mock.patch.object(reducer, "CHANNELS", 1):
        check_rest_of_the_step(rank)


def check_rest_of_the_step(rank):
    model = wrap()
    state = attach(model, min_elements=0)
    for step in range(2):  # the second step has the final buckets
        backward(model, rank, step)
    checkpoint = copy.deepcopy(state.state_dict())
    kept = checkpoint["error_feedback"]["local"]
    state.telemetry.timeline = timeline = []
    state.reset_stats()
    with failing("encode") if rank == 1 else nullcontext():
        assert "rank 1 failed while compressing" in str(error_of(model, rank))
    assert "rank 1 failed" in str(state.exception())
    all_reduce(torch.ones(2000))  # comes after whatever the worker still had to do
    # Nobody reads or writes the memory of the other buckets, which the next step may be using.
    events = {(index, event) for index, event, _ in timeline}
    assert {index for index, _ in events} >= {0, 1, 2}
    assert all(event == "ready" for index, event in events if index > 0)
    residuals = state.state_dict()["error_feedback"]["local"]
    changed = {name for name, residual in kept.items() if not torch.equal(residual, residuals[name])}
    assert not changed if rank == 1 else 0 < len(changed) < len(kept)
    assert state.stats()["bits_per_element"] == 0.0 == state.stats()["elements"]
    assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
    # A fault at the very end of a bucket is known to this rank alone until the next one begins.
    with failing("decode") if rank == 1 else nullcontext():
        timeline.clear()
        error = error_of(model, rank)
    assert "failed while decoding" in str(error)
    all_reduce(torch.ones(2000))
    events = {(index, event) for index, event, _ in timeline}
    assert not {(index, event) for index, event in events if index > 1 and event != "ready"}
    assert (1, "reduce") not in events
    assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
    # Who goes back to a checkpoint runs the step that failed again.
    with failing("encode") if rank == 1 else nullcontext():
        assert error_of(model, rank) is not None
    state.load_state_dict({**checkpoint, "steps": state.state_dict()["steps"] - 1})
    assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])


@world(2)
def test_a_scale_that_cannot_be_read_fails_one_step(rank, world_size):
    model, scale = wrap(), mock.Mock(return_value=2.0)
    state = attach(model, grad_scale=scale)
    backward(model, rank)
    scale.side_effect = [ZeroDivisionError("boom")] if rank == 1 else None
    assert "rank 1 failed while preparing the exchange: ZeroDivisionError: boom" in str(error_of(model, rank))
    scale.side_effect = None
    assert error_of(model, rank) is None
    assert set(gathered(state.stats()["steps"])) == {3} and scale.call_count == 3


@world(2)
def test_a_callback_cannot_wait_for_the_thread_it_runs_on(rank, world_size):
    errors = []

    def callback(future):
        try:
            all_reduce(torch.ones(2000))
        except RuntimeError as error:
            errors.append(str(error))

    gate = threading.Event()
    communicator = get_communicator(dist.group.WORLD)
    held = communicator.submit(gate.wait)  # the callback is there before the collective ends
    work = all_reduce(torch.ones(2000), async_op=True)
    chained = work.get_future().then(callback)
    gate.set()
    held.wait()
    chained.wait()
    assert len(errors) == 1 and "a callback waits for a collective" in errors[0], errors
    tensor = torch.full((2000,), float(rank))
    all_reduce(tensor)
    assert torch.equal(tensor, torch.full((2000,), (world_size - 1) / 2))


@pytest.fixture
def world_of_one(tmp_path):
    def begin(name):
        store = f"file://{tmp_path}/{name}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)

    begin("first")
    yield begin
    dist.destroy_process_group()


def trained(**options):
    model = wrap()
    state = attach(model, min_elements=0, strategy="two_phase", **options)
    backward(model, 0)
    return model, state


def test_one_state_serves_one_model(world_of_one):
    model, state = trained()
    other = wrap()
    with pytest.raises(ValueError, match=r"state serves another model, which is still there \(its '0.weight'"):
        attach(other, state=state)
    assert not other._comm_hooks
    backward(model, 0)
    again = wrap(model.module)
    assert attach(again, state=state) is state
    backward(again, 0)
    assert state.stats()["steps"] == 3


def test_a_state_goes_on_in_a_new_default_group(world_of_one):
    model, state = trained()
    dist.destroy_process_group()
    assert "is not initialised" in str(error_of(model, 0))
    world_of_one("second")
    assert "was destroyed" in str(error_of(model, 0))
    again = wrap(model.module)
    attach(again, state=state)
    assert state.process_group is dist.group.WORLD
    assert error_of(again, 0) is None


def test_a_pickled_state_asks_for_its_scale_again(world_of_one):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, state = trained(grad_scale=scaler.get_scale)
    with pytest.warns(UserWarning, match="no grad_scale that is not a number"):
        data = pickle.dumps(state)
    model = wrap(model.module)
    attach(model, state=pickle.loads(data))
    assert "grad_scale is unknown: the state was pickled" in str(error_of(model, 0))
    model = wrap(model.module)
    restored = pickle.loads(data)
    with pytest.raises(ValueError, match="grad_scale must be positive"):
        attach(model, state=restored, grad_scale=-1.0)
    attach(model, state=restored, grad_scale=scaler.get_scale)
    assert error_of(model, 0) is None


def with_residuals(good, **changes):
    return {**good, "error_feedback": {**good["error_feedback"], **changes}}


# What damages a good checkpoint, and the error that names it.
DAMAGES = {
    "another format": (lambda good: {**good, "format": 1}, "must be of format 2, .*, got 1"),
    "nothing of a rank": (
        lambda good: [good, None],
        "must be a result of .* or a list of them, got NoneType",
    ),
    "no rank": (lambda good: {"format": 2}, r"with a key such as 'rank 0 of 2', got the keys \['format'\]"),
    "no entries": (
        lambda good: {"rank 0 of 1": ({"format": 2},)},
        r"it has no \['error_feedback', 'has_names', 'run', 'steps', 'world_size'\]",
    ),
    "a rank's state in a list": (lambda good: {"rank 0 of 1": [{}]}, r"\['rank 0 of 1'\] must be a tuple of one"),
    "steps in words": (lambda good: {**good, "steps": "7"}, "steps must be an int >= 0, got '7'"),
    "a flag for steps": (lambda good: {**good, "steps": True}, "steps must be an int >= 0, got True"),
    "two steps": (lambda good: [good, {**good, "steps": 9}], r"must be of one step on all ranks, got \[1, 9\]"),
    "two runs": (lambda good: [good, {**good, "run": "b"}], "must be of one run on all ranks"),
    "a run in numbers": (lambda good: {**good, "run": 3}, "run must be a string, got 3"),
    "names in numbers": (lambda good: {**good, "has_names": 1}, "has_names must be a bool, got 1"),
    "no ranks at all": (lambda good: {**good, "world_size": 0}, "world_size must be a positive number of ranks, got 0"),
    "no residuals": (
        lambda good: {**good, "steps": 9, "error_feedback": {"format": 2}},
        "it needs world_size, local, owner and rms",
    ),
    "residuals in a list": (lambda good: {**good, "error_feedback": [1]}, "ErrorFeedback.state_dict, got list"),
    "residuals of no rank": (lambda good: with_residuals(good, world_size=0), "number of ranks that saved it, got 0"),
    "residuals of two ranks, in words": (lambda good: with_residuals(good, world_size="two"), "saved it, got 'two'"),
    "residuals of an unknown world": (lambda good: with_residuals(good, world_size=None), "saved it, got None"),
    "a forecast that is no number": (
        lambda good: with_residuals(good, rms={"local": {"a": -1.0}, "owner": {}}),
        "rms must hold positive numbers for local parameters, got -1.0 for 'a'",
    ),
    "forecasts in a list": (
        lambda good: with_residuals(good, rms={"local": [], "owner": {}}),
        r"rms\['local'\] must be",
    ),
    "a local residual in a list": (
        lambda good: with_residuals(good, local={"0.weight": [1.0]}),
        "must be a 1-D float32 tensor, got list",
    ),
    "a residual of another dtype": (
        lambda good: with_residuals(good, local={"0.weight": torch.zeros(2304, dtype=torch.float64)}),
        r"must be a 1-D float32 tensor, got torch.float64 of shape \(2304,\)",
    ),
    "a residual of another shape": (
        lambda good: with_residuals(good, local={"0.weight": torch.zeros(48, 48)}),
        r"must be a 1-D float32 tensor, got torch.float32 of shape \(48, 48\)",
    ),
    "a residual with a NaN": (
        lambda good: with_residuals(
            good, local={"0.weight": torch.zeros(2304).index_fill_(0, torch.tensor(5), torch.nan)}
        ),
        "residual of '0.weight' has 1 of 2304 values that are not finite",
    ),
    "an owner's residual with an infinity": (
        lambda good: with_residuals(good, owner={"0.weight": (0, torch.full((3,), torch.inf))}),
        "residual of '0.weight' has 3 of 3 values that are not finite",
    ),
    "an owner's residual without its place": (
        lambda good: with_residuals(good, owner={"0.weight": torch.ones(3)}),
        "must be a pair",
    ),
    "a residual of another size": (
        lambda good: with_residuals(good, local={"0.weight": torch.zeros(5)}, owner={}),
        "residual of '0.weight' has 5 elements, the model's parameter 2304",
    ),
    "a residual of another model": (
        lambda good: with_residuals(good, local={"x": torch.zeros(5)}, owner={}),
        "residual of 'x', which the model does not have .it has '0.weight', '0.bias', ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_and_change_nothing(world_of_one, damage):
    _, state = trained()
    good = state.state_dict()
    make, match = DAMAGES[damage]
    with pytest.raises(ValueError, match=match):
        state.load_state_dict(make(good))
    now = state.state_dict()
    assert now["steps"] == good["steps"]
    for key, residual in good["error_feedback"]["local"].items():
        assert torch.equal(now["error_feedback"]["local"][key], residual)
    state.load_state_dict({**good, "steps": 9})
    assert state.state_dict()["steps"] == 9


@world(2)
def test_an_error_of_backward_says_what_matters_first_and_once(rank, world_size):
    model = wrap()
    attach(model, min_elements=100)
    backward(model, rank)
    with failing("encode") if rank == 1 else nullcontext():
        text = str(error_of(model, rank))
    sentence, _, frames = text.partition("\n")
    assert sentence.endswith(
        "CollectiveError: bucket 0 was not averaged: rank 1 failed while compressing its values: ZeroDivisionError: "
        "boom. The rest of this step is not exchanged, and the next step can begin."
    ), text
    assert text.count("boom") == 1 and frames.count(".py(") <= 1, text
    with failing("decode") if rank == 1 else nullcontext():
        text = str(error_of(model, rank))
    assert "rank 1 failed while decoding the result: ZeroDivisionError: boom" in text, text
    assert error_of(model, rank) is None


class Branches(nn.Module):
    """A trunk, and branches of which a step takes one."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(48, 48)
        self.branches = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))

    def forward(self, x, number):
        return self.branches[number](self.trunk(x))


@world(2)
def test_a_model_with_unused_parameters_is_wrapped_anew_after_a_failure(rank, world_size):
    def step(number):
        model.zero_grad()
        model(inputs(rank, number), number % 3).square().sum().backward()

    torch.manual_seed(0)
    model = wrap(Branches(), find_unused_parameters=True)
    state = attach(model, min_elements=100)
    for number in range(3):
        step(number)
    with failing("encode") if rank == 1 else nullcontext(), pytest.raises(RuntimeError, match="boom") as caught:
        step(3)
    assert "qcomm.attach(ddp_model, state=state) on every rank before the next step" in str(caught.value)
    model = wrap(model.module, find_unused_parameters=True)
    assert attach(model, state=state) is state
    for number in range(4, 10):
        step(number)
        assert_same_on_all_ranks(*[p.grad for p in model.parameters() if p.grad is not None])
    assert state.state_dict()["steps"] == 10


@world(2)
def test_a_copied_model_says_that_it_has_no_hook(rank, world_size):
    model = wrap()
    state = attach(model, min_elements=100)
    backward(model, rank)
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match=r"no communication hook .* call qcomm.attach\(copy, \.\.\.\)"):
            other = copied(model)
        assert not other._comm_hooks
        sent = state.stats()["bytes_sent"]
        again = attach(other, min_elements=100)
        backward(other, rank)
        assert state.stats()["bytes_sent"] == sent and again.stats()["bits_per_element_phase1"] > 0
    assert error_of(model, rank) is None
