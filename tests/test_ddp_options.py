"""The hook's options and refusals, AMP, faults during backward, and that communication overlaps with backward."""

import copy
import threading
from contextlib import nullcontext
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import TIMEOUT, assert_same_on_all_ranks, counting_bytes, die, gathered, run, run_alone
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm import ddp_buckets, two_phase
from qcomm.transport import TransportError

pytestmark = pytest.mark.world


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(48, 48), nn.Tanh())])


def wrap(model=None, **options):
    return DistributedDataParallel(mlp() if model is None else model, bucket_cap_mb=0.002, **options)


def inputs(rank, step=0):
    return torch.randn(8, 48, generator=torch.Generator().manual_seed(100 * step + rank))


def backward(model, rank, step=0, scale=1.0):
    model.zero_grad()
    (model(inputs(rank, step)).square().sum() * scale).backward()
    return [p.grad.clone() for p in model.parameters()]


def error_of(model, rank):
    """What backward raises, or None."""
    try:
        backward(model, rank)
    except RuntimeError as error:
        return error
    return None


def exact_mean(rank, world_size, step=0):
    """Gradients averaged in rank order, in float32: what raw values have to give."""
    total = None
    for other in range(world_size):
        model = mlp()
        model(inputs(other, step)).square().sum().backward()
        part = [p.grad for p in model.parameters()]
        total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
    return [g / world_size for g in total]


def case_warmup_and_exclude(rank, world_size):
    wanted = exact_mean(rank, world_size)
    model = wrap()
    state = qcomm.attach(model, warmup_steps=2, min_elements=0)
    for step in range(4):
        same = all(torch.equal(a, b) for a, b in zip(backward(model, rank), wanted, strict=True))
        assert same == (step < 2), step
    assert state.stats()["steps"] == 4
    model = wrap()
    state = qcomm.attach(model, exclude=["*.bias", "4.*"], min_elements=0)
    for _ in range(2):
        for (name, _), got, want in zip(model.module.named_parameters(), backward(model, rank), wanted, strict=True):
            assert torch.equal(got, want) == (name.endswith(".bias") or name.startswith("4.")), name
    assert set(state.stats()["tensors"]) == {f"{layer}.weight" for layer in (0, 2, 6, 8, 10)}
    model = wrap()
    state = qcomm.attach(model, min_elements=100)
    for (name, _), got, want in zip(model.module.named_parameters(), backward(model, rank), wanted, strict=True):
        assert torch.equal(got, want) == name.endswith(".bias"), name


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_not_compressed_is_exact(world_size):
    run(world_size, case_warmup_and_exclude)


def case_registered_by_hand(rank, world_size):
    model, other = wrap(), wrap()
    state = qcomm.CompressionState(min_elements=100)
    model.register_comm_hook(state, qcomm.compression_hook)
    attached = qcomm.attach(other, min_elements=100)
    for step in range(4):
        for a, b in zip(backward(model, rank, step), backward(other, rank, step), strict=True):
            assert torch.equal(a, b)
    names = list(attached.state_dict()["error_feedback"]["local"])
    assert len(state.state_dict()["error_feedback"]["local"]) == len(names)
    assert all(name.startswith("parameter ") for name in state.stats()["tensors"])
    # A new model and a saved state: parameters are numbered alike, so residuals find their parameters.
    restored, continued = qcomm.CompressionState(min_elements=100), wrap()
    restored.load_state_dict(state.state_dict())
    continued.register_comm_hook(restored, qcomm.compression_hook)
    backward(continued, rank, 5)
    model = wrap()
    model.register_comm_hook(qcomm.CompressionState(exclude=["*.bias"]), qcomm.compression_hook)
    assert "exclude needs the parameters' names" in str(error_of(model, rank))


def test_a_hook_registered_by_hand_does_the_same():
    run(2, case_registered_by_hand)


def case_scale(rank, world_size):
    reference = wrap()
    qcomm.attach(reference, min_elements=100)
    scales = [1024.0, 2048.0, 2048.0, 512.0]
    current = torch.tensor(1.0)
    for grad_scale in (current, lambda: float(current), lambda: current):
        model = wrap()
        state = qcomm.attach(model, min_elements=100, grad_scale=grad_scale)
        reference_state = qcomm.attach(wrap(), min_elements=100)
        reference = wrap()
        reference_state = qcomm.attach(reference, min_elements=100)
        for step, scale in enumerate(scales):
            current.fill_(scale)
            for a, b in zip(backward(model, rank, step, scale), backward(reference, rank, step), strict=True):
                assert torch.equal(a, scale * b)  # powers of two: exact
        for name, residual in state.state_dict()["error_feedback"]["local"].items():
            assert torch.equal(residual, reference_state.state_dict()["error_feedback"]["local"][name])
    for bad in (torch.inf, torch.nan, 0.0, -2.0):
        current.fill_(bad if rank == 1 else 1.0)
        error = error_of(model, rank)
        assert "rank 1 failed while preparing the exchange: ValueError: grad_scale must be positive and finite" in str(
            error
        )
    current.fill_(1.0 + rank)
    error = error_of(model, rank)
    assert "grad_scale: 1.0 on rank 0, 2.0 on rank 1" in str(error) and isinstance(
        state.exception(), qcomm.ConfigMismatchError
    )
    current.fill_(1.0)
    assert error_of(model, rank) is None


def test_grad_scale_is_taken_out_and_put_back():
    run(2, case_scale)


def case_scaler(rank, world_size, grid):
    model = wrap()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    state = qcomm.attach(model, grid=grid, min_elements=100, grad_scale=scaler.get_scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    skipped = 0
    for step in range(8):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = model(inputs(rank, step)).square().sum()
        poisoned = step in (2, 5)
        if poisoned and rank == step % 2:
            loss = loss * torch.inf
        kept = state.state_dict()["error_feedback"]
        scaler.scale(loss).backward()
        assert all(bool(p.grad.isfinite().all()) != poisoned for p in model.parameters())
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
        assert moved != poisoned
        skipped += poisoned
        assert scaler.get_scale() == scale / 2 if poisoned else scaler.get_scale() >= scale
        residuals = state.state_dict()["error_feedback"]
        assert all(bool(r.isfinite().all()) for r in residuals["local"].values())
        assert all(bool(r.isfinite().all()) for _, r in residuals["owner"].values())
        if poisoned:  # what could not be sent is still there
            assert all(torch.equal(r, residuals["owner"][name][1]) for name, (_, r) in kept["owner"].items())
            untouched = all(torch.equal(r, residuals["local"][name]) for name, r in kept["local"].items())
            assert untouched == (rank == step % 2)
        assert_same_on_all_ranks(*model.parameters())
    assert skipped == 2 and state.stats()["nonfinite_tensors"] > 0


@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(step=1.0), qcomm.RangeGrid(c=2)], ids=["sigma", "range"])
def test_grad_scaler_skips_and_recovers(grid):
    run(2, case_scaler, grid)


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
        state = qcomm.attach(model, **options)
        error = error_of(model, rank)
        assert "ConfigMismatchError" in str(error) and field in str(error), error
        assert isinstance(state.exception(), qcomm.ConfigMismatchError)
    # Models of the same sizes whose parameters have other names.
    model = wrap(nn.Sequential(*mlp()) if rank else nn.ModuleDict({"layers": mlp()})["layers"])
    state = qcomm.attach(model)
    state._table._names = {key: (reference, name + "x" * odd) for key, (reference, name) in state._table._names.items()}
    assert "layout: 12 tensors" in str(error_of(model, rank))
    # Nothing is out of step afterwards.
    model = wrap()
    qcomm.attach(model)
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
            qcomm.attach(model)
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
            qcomm.attach(model, **options)
    assert not model._comm_hooks
    pair = dist.new_group([0])
    if rank == 0:
        with pytest.raises(ValueError, match=r"process_group must have the model's ranks \[0, 1\], got ranks \[0\]"):
            qcomm.attach(model, process_group=pair)
    plain = backward(model, rank)  # the model is as it was: DDP's own all-reduce
    assert all(torch.allclose(a, b) for a, b in zip(plain, exact_mean(rank, world_size), strict=True))
    qcomm.attach(model)
    with pytest.raises(RuntimeError, match=r"has a communication hook already \(compression_hook\)"):
        qcomm.attach(model)
    precision = torch.nn.parallel.distributed._MixedPrecision(param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="mixed_precision"):
        qcomm.attach(wrap(nn.Linear(4, 4), mixed_precision=precision))
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
    qcomm.attach(model)
    assert error_of(model, rank) is None


def test_what_cannot_be_served_is_refused():
    run(2, case_refused)


def case_faults(rank, world_size):
    model = wrap()
    state = qcomm.attach(model, min_elements=100)
    backward(model, rank)
    for target, name, phase in (
        (two_phase, "_encode_values", "compressing"),
        (two_phase, "_reduce_chunk", "averaging"),
        (ddp_buckets, "_check_buffer", "preparing"),
    ):
        original = getattr(target, name)
        calls = []

        def fail_second(*args, calls=calls, original=original):
            calls.append(args)
            if len(calls) == 2:
                raise ZeroDivisionError("boom")
            return original(*args)

        with mock.patch.object(target, name, side_effect=fail_second) if rank == 1 else nullcontext():
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
    state = qcomm.attach(model)
    backward(model, rank)
    if rank == 0:
        mock.patch.object(two_phase, "_reduce_chunk", side_effect=lambda *_: die()).start()
    assert "no answer from rank(s)" in str(error_of(model, rank))
    assert isinstance(state.exception(), qcomm.CollectiveError)


def test_a_killed_rank_ends_backward_on_the_others():
    run_alone(2, case_killed, dying=(0,), seconds=TIMEOUT.total_seconds() / 2)


def case_overlap(rank, world_size):
    model = wrap()
    state = qcomm.attach(model)
    for _ in range(2):  # the second step has the final buckets
        backward(model, rank)
    state.telemetry.timeline = timeline = []
    communicating, moved_on = threading.Event(), threading.Event()
    waited = {}

    def observe(index, event):
        # The worker has begun to exchange bucket 0, and does not go on before backward has.
        if (index, event) == (0, "exchange_1"):
            communicating.set()
            waited["worker"] = moved_on.wait(20.0)

    def during_backward(_):
        # Backward has come to the first layer, whose bucket is the last, and does not go on before the worker
        # communicates.
        waited["backward"] = communicating.wait(20.0)
        state.telemetry.mark(-1, "backward of the first layer")
        moved_on.set()

    state.telemetry.observer = observe
    hidden = model.module[0].register_forward_hook(
        lambda _module, _inputs, output: output.register_hook(during_backward) and None
    )
    backward(model, rank)
    hidden.remove()
    assert waited == {"worker": True, "backward": True}
    order = [(index, event) for index, event, _ in timeline]
    last = max(index for index, _ in order)
    assert last >= 3
    # A hook that blocks, or one that communicates after backward only, would have waited for good.
    assert (
        order.index((0, "ready"))
        < order.index((0, "exchange_1"))
        < order.index((-1, "backward of the first layer"))
        < order.index((last, "ready"))
    )
    assert order.index((-1, "backward of the first layer")) < order.index((0, "exchange_2")) < order.index((0, "done"))
    events = ["ready", "encode", "exchange_1", "reduce", "exchange_2", "decode", "done"]
    for index in range(last + 1):
        assert [event for i, event in order if i == index] == events
    assert all(a[2] <= b[2] for a, b in pairwise(timeline))


@pytest.mark.parametrize("world_size", [2, 3])
def test_communication_overlaps_with_backward(world_size):
    run(world_size, case_overlap)


def case_bytes(rank, world_size):
    model = wrap()
    state = qcomm.attach(model, min_elements=100, warmup_steps=1)
    with counting_bytes() as counting:
        for step in range(4):
            backward(model, rank, step)
    stats = state.stats()
    elements = sum(p.numel() for p in model.parameters())
    assert (stats["bytes_sent"], stats["bytes_received"]) == (counting.sent, counting.received)
    assert stats["elements"] == 4 * elements and stats["bytes_uncompressed"] == 16 * elements
    assert stats["elements_compressed"] == 3 * sum(p.numel() for p in model.parameters() if p.numel() >= 100)
    state.reset_stats()
    assert state.stats()["bytes_sent"] == 0 and state.stats()["steps"] == 0
    backward(model, rank)
    stats = state.stats()
    assert stats["steps"] == 1
    tensor = stats["tensors"]["0.weight"]
    assert tensor["grid"] == "sigma" and tensor["num_bits"] == 4 and tensor["step"] > 0
    assert 1.9 < stats["bits_per_element_phase1"] < 3.5 and stats["residual_norm"] > 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_in_stats_are_those_handed_to_gloo(world_size):
    run(world_size, case_bytes)


def case_join(rank, world_size):
    model = wrap()
    state = qcomm.attach(model, min_elements=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    steps = 3 + 2 * rank  # rank 0 runs out first and shadows the others with zeros
    with model.join():
        for step in range(steps):
            optimizer.zero_grad()
            model(inputs(rank, step)).square().sum().backward()
            optimizer.step()
    assert_same_on_all_ranks(*model.parameters())
    assert set(gathered(state.stats()["steps"])) == {3 + 2 * (world_size - 1)}


def test_join_with_uneven_inputs():
    run(2, case_join)


def case_wrapped(rank, world_size):
    model = wrap()
    state = qcomm.CompressionState(min_elements=100)
    model.register_comm_hook(state, default_hooks.fp16_compress_wrapper(qcomm.compression_hook))
    for step in range(3):
        got = backward(model, rank, step)
    assert_same_on_all_ranks(*got)
    for a, b in zip(got, exact_mean(rank, world_size, 2), strict=True):
        assert float((a - b).norm()) < 0.8 * float(b.norm())
    assert state.stats()["bits_per_element_phase1"] < 3.5


def test_the_hook_inside_torchs_fp16_wrapper():
    run(2, case_wrapped)


def case_two_models(rank, world_size):
    models = [wrap(), wrap()]
    states = [qcomm.attach(models[0]), qcomm.attach(models[1], grid=qcomm.RangeGrid(c=2))]
    for step in range(3):
        for model in models:
            model.zero_grad()
        sum(model(inputs(rank, step)).square().sum() for model in models).backward()
        tensor = torch.full((2000,), float(rank))
        qcomm.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((2000,), (world_size - 1) / 2))
        assert_same_on_all_ranks(*[p.grad for model in models for p in model.parameters()])
    assert [state.stats()["steps"] for state in states] == [3, 3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        models[0](inputs(rank)).float().square().sum().backward()
    assert_same_on_all_ranks(*[p.grad for p in models[0].parameters()])


def test_two_models_share_a_group():
    run(2, case_two_models)


def test_copying_a_model_and_process_errors():
    state = qcomm.CompressionState()
    assert state.stats()["bytes_sent"] == 0 and state.error_feedback.norm() == 0.0
    with pytest.raises(ValueError, match="state_dict must be of format 1"):
        state.load_state_dict({"format": 2})
    with pytest.raises(RuntimeError, match="is not initialised: call"):
        qcomm.all_reduce(torch.ones(3))
    assert issubclass(TransportError, qcomm.CollectiveError)
    assert copy.deepcopy(qcomm.SigmaGrid()) == qcomm.SigmaGrid()
