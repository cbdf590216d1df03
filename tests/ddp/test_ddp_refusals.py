"""Options, models and hooks that the hook refuses, on every rank and before anything changes."""

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, exact_mean, mlp, wrap
from distributed import attach, world
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qcomm

pytestmark = pytest.mark.world


def check_works(rank):
    """Nothing is out of step between the ranks."""
    model = wrap()
    attach(model)
    assert error_of(model, rank) is None


@world(3)
@pytest.mark.parametrize(
    ("option", "common", "odd", "field"),
    [
        (
            "grid",
            qcomm.SigmaGrid(1.0),
            qcomm.SigmaGrid(2.0),
            "grid: SigmaGrid(step=1.0, coding='auto') on ranks 0 1, SigmaGrid(step=2.0",
        ),
        ("error_feedback", True, False, "error_feedback: True on ranks 0 1, False on rank 2"),
        ("min_elements", 100, 101, "min_elements: 100 on ranks 0 1, 101 on rank 2"),
        ("warmup_steps", 3, 4, "warmup_steps: 3 on ranks 0 1, 4 on rank 2"),
        ("small_step", 0.5, None, "small_step: 0.5 on ranks 0 1, None on rank 2"),
        ("exclude", [], ["a"], "exclude: [] on ranks 0 1, ['a'] on rank 2"),
        ("strategy", "auto", "two_phase", "strategy: auto on ranks 0 1, two_phase on rank 2"),
    ],
    ids=["grid", "error_feedback", "min_elements", "warmup_steps", "small_step", "exclude", "strategy"],
)
def test_mismatch_names_the_option_on_every_rank(rank, world_size, option, common, odd, field):
    model = wrap()
    state = attach(model, **{option: odd if rank == 2 else common})
    error = error_of(model, rank)
    assert "ConfigMismatchError" in str(error) and field in str(error), error
    assert isinstance(state.exception(), qcomm.ConfigMismatchError)
    check_works(rank)


@world(3)
def test_mismatch_names_models_whose_parameters_have_other_names(rank, world_size):
    odd = rank == 2
    model = wrap(nn.Sequential(*mlp()) if rank else nn.ModuleDict({"layers": mlp()})["layers"])
    state = attach(model)
    state._table._names = {key: (reference, name + "x" * odd) for key, (reference, name) in state._table._names.items()}
    assert "layout: 12 tensors" in str(error_of(model, rank))
    check_works(rank)


@world(2)
def test_values_that_differ_behind_the_cut_are_seen_to_differ(rank, world_size):
    pattern = "x" * 10_000 + str(rank)
    model = wrap()
    attach(model, exclude=[pattern])
    error = str(error_of(model, rank))
    assert "ConfigMismatchError" in error and "exclude: ['xxx" in error and len(error) < 20_000


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


def sparse_lookup():
    return Lookup(sparse=True)


@world(2)
@pytest.mark.parametrize(
    ("factory", "error", "match"),
    [
        (Complex, TypeError, "parameter 'phase' is complex"),
        (sparse_lookup, ValueError, "module 'table' makes sparse gradients"),
    ],
    ids=["complex", "sparse"],
)
def test_models_that_cannot_be_compressed_are_refused(rank, world_size, factory, error, match):
    model = wrap(factory())
    with pytest.raises(error, match=match):
        attach(model)
    assert not model._comm_hooks
    check_works(rank)


@world(2)
def test_models_without_ddp_are_refused(rank, world_size):
    with pytest.raises(TypeError, match=r"must be a torch.nn.parallel.DistributedDataParallel, got Linear"):
        attach(nn.Linear(2, 2))
    check_works(rank)


def check_untouched(model, rank, world_size):
    """The model has no hook, so its gradients are those of DDP's own all-reduce."""
    assert not model._comm_hooks
    plain = backward(model, rank)
    assert all(torch.allclose(a, b) for a, b in zip(plain, exact_mean(rank, world_size), strict=True))


BAD_OPTIONS = [
    ({"grid": 3}, TypeError, "grid must be"),
    ({"min_elements": -5}, ValueError, "min_elements must be >= 0, got -5"),
    ({"warmup_steps": -1}, ValueError, "warmup_steps must be >= 0, got -1"),
    ({"warmup_steps": 2.5}, TypeError, "warmup_steps must be an int"),
    ({"warmup_step": 1.0}, ValueError, "warmup_step must be None without warmup_steps"),
    ({"warmup_step": 2.0, "warmup_steps": 5}, ValueError, "warmup_step must be at most the grid's step, 1.0"),
    ({"warmup_step": 0.0, "warmup_steps": 5}, ValueError, "warmup_step must be a step of the grid"),
    ({"warmup_step": "1", "warmup_steps": 5}, TypeError, "warmup_step must be a real number or None, got str"),
    (
        {"warmup_step": 1.0, "warmup_steps": 5, "grid": qcomm.RangeGrid()},
        ValueError,
        "warmup_step must be None with a RangeGrid",
    ),
    ({"small_step": -0.5}, ValueError, "small_step must be a step of the grid"),
    ({"small_step": "0.5"}, TypeError, "small_step must be a real number or None, got str"),
    ({"exclude": "*.bias"}, TypeError, "exclude must be a sequence of patterns"),
    ({"grad_scale": -1.0}, ValueError, "grad_scale must be positive and finite, got -1.0"),
    ({"grad_scale": "auto"}, TypeError, "grad_scale must be a number"),
    ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale must have one element"),
    ({"error_feedback": 1}, TypeError, "error_feedback must be a bool"),
    ({"strategy": "ring"}, ValueError, "strategy must be one of"),
    ({"steps": 1}, TypeError, "unexpected keyword argument 'steps'"),
]


@world(2)
@pytest.mark.parametrize(("options", "error", "match"), BAD_OPTIONS, ids=[str(options) for options, *_ in BAD_OPTIONS])
def test_bad_options_are_refused(rank, world_size, options, error, match):
    model = wrap()
    with pytest.raises(error, match=match):
        attach(model, **options)
    check_untouched(model, rank, world_size)


@world(2)
def test_a_group_of_other_ranks_is_refused(rank, world_size):
    model = wrap()
    pair = dist.new_group([0])
    if rank == 0:
        with pytest.raises(ValueError, match=r"process_group must have the model's ranks \[0, 1\], got ranks \[0\]"):
            attach(model, process_group=pair)
    check_untouched(model, rank, world_size)


@world(2)
def test_a_second_hook_is_refused(rank, world_size):
    model = wrap()
    attach(model)
    with pytest.raises(RuntimeError, match=r"has a communication hook already \(compression_hook\)"):
        attach(model)
    assert error_of(model, rank) is None


@world(2)
def test_ddps_own_mixed_precision_is_refused(rank, world_size):
    precision = torch.nn.parallel.distributed._MixedPrecision(param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="mixed_precision"):
        attach(wrap(nn.Linear(4, 4), mixed_precision=precision))
    check_works(rank)


@world(2)
@pytest.mark.parametrize(
    ("factory", "argument", "match"),
    [
        (Complex, torch.ones(2, 4), "complex parameters are not supported"),
        (sparse_lookup, torch.zeros(3, dtype=torch.int64), "sparse gradients are not supported"),
    ],
    ids=["complex", "sparse"],
)
def test_a_hook_registered_by_hand_refuses_at_the_end_of_backward(rank, world_size, factory, argument, match):
    model = DistributedDataParallel(factory())
    model.register_comm_hook(qcomm.CompressionState(), qcomm.compression_hook)
    for _ in range(2):  # DDP can go on
        with pytest.raises(RuntimeError, match=match):
            model(argument).sum().backward()
    check_works(rank)


@world(2)
def test_a_hook_without_a_state_is_refused(rank, world_size):
    model = wrap()
    model.register_comm_hook("no state", qcomm.compression_hook)
    assert "state must be a qcomm.CompressionState, got str" in str(error_of(model, rank))
    check_works(rank)


@world(2)
def test_the_python_reducer_is_refused(rank, world_size):
    with pytest.raises(TypeError, match="python_reducer"):
        qcomm.compression_hook(qcomm.CompressionState(), (torch.ones(2), torch.ones(2)))
    check_works(rank)
