"""What the hook refuses, and what remains when a step fails."""

import copy
import pickle
import threading
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, exact_mean, mlp, wrap
from distributed import TIMEOUT, all_reduce, assert_same_on_all_ranks, attach, die, gathered, run, run_alone
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator.groups import get_communicator
from qcomm.ddp import buckets as ddp_buckets

pytestmark = pytest.mark.world


def failing(name):
    """Makes the first call of ``MeanSteps.<name>`` raise on this rank."""
    original = getattr(MeanSteps, name)
    effects = iter([ZeroDivisionError("boom")])

    def once(self, *args):
        for error in effects:
            raise error
        return original(self, *args)

    return mock.patch.object(MeanSteps, name, once)


def case_mismatch(rank, world_size):
    odd = rank == 2
    for options, field in (
        (
            {"grid": qcomm.SigmaGrid(2.0 if odd else 1.0)},
            "grid: SigmaGrid(step=1.0, coding='auto') on ranks 0 1, SigmaGrid(step=2.0",
        ),
        ({"error_feedback": not odd}, "error_feedback: True on ranks 0 1, False on rank 2"),
        ({"min_elements": 100 + odd}, "min_elements: 100 on ranks 0 1, 101 on rank 2"),
        ({"warmup_steps": 3 + odd}, "warmup_steps: 3 on ranks 0 1, 4 on rank 2"),
        ({"exclude": ["a"] if odd else []}, "exclude: [] on ranks 0 1, ['a'] on rank 2"),
        ({"strategy": "two_phase" if odd else "auto"}, "strategy: auto on ranks 0 1, two_phase on rank 2"),
    ):
        model = wrap()
        state = attach(model, **options)
        error = error_of(model, rank)
        assert "ConfigMismatchError" in str(error) and field in str(error), error
        assert isinstance(state.exception(), qcomm.ConfigMismatchError)
    # Models of the same sizes whose parameters have other names.
    model = wrap(nn.Sequential(*mlp()) if rank else nn.ModuleDict({"layers": mlp()})["layers"])
    state = attach(model)
    state._table._names = {key: (reference, name + "x" * odd) for key, (reference, name) in state._table._names.items()}
    assert "layout: 12 tensors" in str(error_of(model, rank))
    # Nothing is out of step afterwards.
    model = wrap()
    attach(model)
    assert error_of(model, rank) is None


def test_mismatch_names_the_option_on_every_rank():
    run(3, case_mismatch)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.real = nn.Linear(4, 4)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x):
        return (self.real(x) * self.phase).abs()


class Lookup(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=sparse)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.table(x))


def case_refused(rank, world_size):
    for factory, error, match in (
        (lambda: wrap(Complex()), TypeError, "parameter 'phase' is complex"),
        (lambda: wrap(Lookup(sparse=True)), ValueError, "module 'table' makes sparse gradients"),
        (
            lambda: nn.Linear(2, 2),
            TypeError,
            "ddp_model must be a torch.nn.parallel.DistributedDataParallel, got Linear",
        ),
    ):
        model = factory()
        with pytest.raises(error, match=match):
            attach(model)
        assert not getattr(model, "_comm_hooks", [])
    model = wrap()
    for options, error, match in (
        ({"grid": 3}, TypeError, "grid must be"),
        ({"min_elements": -5}, ValueError, "min_elements must be >= 0, got -5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be >= 0, got -1"),
        ({"warmup_steps": 2.5}, TypeError, "warmup_steps must be an int"),
        ({"exclude": "*.bias"}, TypeError, "exclude must be a sequence of patterns"),
        ({"grad_scale": -1.0}, ValueError, "grad_scale must be positive and finite, got -1.0"),
        ({"grad_scale": "auto"}, TypeError, "grad_scale must be a number"),
        ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale must have one element"),
        ({"error_feedback": 1}, TypeError, "error_feedback must be a bool"),
        ({"strategy": "ring"}, ValueError, "strategy must be one of"),
        ({"steps": 1}, TypeError, "unexpected keyword argument 'steps'"),
    ):
        with pytest.raises(error, match=match):
            attach(model, **options)
    assert not model._comm_hooks
    pair = dist.new_group([0])
    if rank == 0:
        with pytest.raises(ValueError, match=r"process_group must have the model's ranks \[0, 1\], got ranks \[0\]"):
            attach(model, process_group=pair)
    plain = backward(model, rank)  # the model is as it was: DDP's own all-reduce
    assert all(torch.allclose(a, b) for a, b in zip(plain, exact_mean(rank, world_size), strict=True))
    attach(model)
    with pytest.raises(RuntimeError, match=r"has a communication hook already \(compression_hook\)"):
        attach(model)
    precision = torch.nn.parallel.distributed._MixedPrecision(param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="mixed_precision"):
        attach(wrap(nn.Linear(4, 4), mixed_precision=precision))
    # What attach refuses, a hook registered by hand refuses at the end of backward, on all ranks, and DDP can go on.
    for factory, argument, match in (
        (Complex, torch.ones(2, 4), "complex parameters are not supported"),
        (lambda: Lookup(sparse=True), torch.zeros(3, dtype=torch.int64), "sparse gradients are not supported"),
    ):
        model = DistributedDataParallel(factory())
        model.register_comm_hook(qcomm.CompressionState(), qcomm.compression_hook)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=match):
                model(argument).sum().backward()
    model = wrap()
    model.register_comm_hook("no state", qcomm.compression_hook)
    assert "state must be a qcomm.CompressionState, got str" in str(error_of(model, rank))
    with pytest.raises(TypeError, match="python_reducer"):
        qcomm.compression_hook(qcomm.CompressionState(), (torch.ones(2), torch.ones(2)))
    model = wrap()
    attach(model)
    assert error_of(model, rank) is None


def test_what_cannot_be_served_is_refused():
    run(2, case_refused)


def case_faults(rank, world_size):
    model = wrap()
    state = attach(model, min_elements=100)
    backward(model, rank)
    for target, name, phase in (
        (MeanSteps, "encode", "compressing"),
        (MeanSteps, "reduce", "averaging"),
        (ddp_buckets, "_check_buffer", "preparing"),
    ):
        original = getattr(target, name)
        calls = []

        def fail_second(*args, calls=calls, original=original):
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


def test_a_fault_in_one_bucket_is_raised_by_backward_on_all_ranks():
    run(3, case_faults)


def case_killed(rank, world_size):
    model = wrap()
    state = attach(model)
    backward(model, rank)
    if rank == 0:
        mock.patch.object(MeanSteps, "reduce", side_effect=die).start()
    assert "no answer from rank(s)" in str(error_of(model, rank))
    assert isinstance(state.exception(), qcomm.CollectiveError)


def test_a_killed_rank_ends_backward_on_the_others():
    run_alone(2, case_killed, dying=(0,), seconds=TIMEOUT.total_seconds() / 2)


def case_the_rest_of_a_failed_step(rank, world_size):
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
    assert (1, "encode") not in events
    assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
    # Who goes back to a checkpoint runs the step that failed again.
    with failing("encode") if rank == 1 else nullcontext():
        assert error_of(model, rank) is not None
    state.load_state_dict({**checkpoint, "steps": state.state_dict()["steps"] - 1})
    assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])


def test_after_a_failure_the_rest_of_the_step_is_left_alone():
    run(3, case_the_rest_of_a_failed_step)


def case_unreadable_scale(rank, world_size):
    model, scale = wrap(), mock.Mock(return_value=2.0)
    state = attach(model, grad_scale=scale)
    backward(model, rank)
    scale.side_effect = [ZeroDivisionError("boom")] if rank == 1 else None
    assert "rank 1 failed while preparing the exchange: ZeroDivisionError: boom" in str(error_of(model, rank))
    scale.side_effect = None
    assert error_of(model, rank) is None
    assert set(gathered(state.stats()["steps"])) == {3} and scale.call_count == 3


def test_a_scale_that_cannot_be_read_fails_one_step():
    run(2, case_unreadable_scale)


def case_waiting_in_a_callback(rank, world_size):
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


def test_a_callback_cannot_wait_for_the_thread_it_runs_on():
    run(2, case_waiting_in_a_callback)


def case_long_values(rank, world_size):
    pattern = "x" * 10_000 + str(rank)
    model = wrap()
    attach(model, exclude=[pattern])
    error = str(error_of(model, rank))
    assert "ConfigMismatchError" in error and "exclude: ['xxx" in error and len(error) < 20_000


def test_values_that_differ_behind_the_cut_are_seen_to_differ():
    run(2, case_long_values)


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


def test_damaged_checkpoints_are_refused_and_change_nothing(world_of_one):
    _, state = trained()
    good = state.state_dict()
    feedback = good["error_feedback"]
    for bad, match in (
        ({**good, "format": 2}, "must be of format 1"),
        ([good, None], "must be of format 1"),
        ({"format": 1}, r"it has no \['error_feedback', 'has_names', 'steps'\]"),
        ({**good, "steps": "7"}, "must be of one step"),
        ([good, {**good, "steps": 9}], "must be of one step"),
        ({**good, "steps": 9, "error_feedback": {"format": 1}}, "it needs world_size, local and owner"),
        ({**good, "error_feedback": {**feedback, "local": {"0.weight": [1.0]}}}, "must be a 1-D float32 tensor"),
        ({**good, "error_feedback": {**feedback, "owner": {"0.weight": torch.ones(3)}}}, "must be a pair"),
    ):
        with pytest.raises(ValueError, match=match):
            state.load_state_dict(bad)
        now = state.state_dict()
        assert now["steps"] == good["steps"]
        assert all(torch.equal(now["error_feedback"]["local"][key], r) for key, r in feedback["local"].items())
    state.load_state_dict({**good, "steps": 9})
    assert state.state_dict()["steps"] == 9
