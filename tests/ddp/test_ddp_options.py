"""The hook's options, AMP, join and wrappers, and that communication overlaps with backward."""

import copy
import threading
from itertools import pairwise

import pytest
import torch
from ddp_model import backward, error_of, exact_mean, inputs, wrap
from distributed import all_reduce, assert_same_on_all_ranks, attach, counting_bytes, gathered, world
from residuals import owed
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import qcomm
from qcomm.transport.base import TransportError

pytestmark = pytest.mark.world


@world(2, 3)
def test_warm_up_steps_are_exact(rank, world_size):
    wanted = exact_mean(rank, world_size)
    model = wrap()
    state = attach(model, warmup_steps=2, min_elements=0)
    for step in range(4):
        same = all(torch.equal(a, b) for a, b in zip(backward(model, rank), wanted, strict=True))
        assert same == (step < 2), step
    assert state.stats()["steps"] == 4


@world(2)
@pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "no feedback"])
def test_a_step_coarsens_in_stages(rank, world_size, feedback):
    """Four stages of two steps, then the grid's own step; nothing is lost on the way, and ranks stay equal."""
    model = wrap()
    grid = qcomm.SigmaGrid(step=3.2 if feedback else 2.0)
    state = attach(model, grid=grid, error_feedback=feedback, warmup_steps=8, warmup_step=0.5, min_elements=100)
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    bits, steps = [], []
    for step in range(10):
        state.reset_stats()
        for total, got, want in zip(sums, backward(model, rank, step), exact_mean(rank, world_size, step), strict=True):
            total.add_(got.double() - want)
        assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
        bits.append(state.stats()["bits_per_element"])
        steps.append(state.reducer._stage)
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3, None, None]
    # DDP has other buckets in its first step.
    assert bits[1] > bits[3] > bits[5] > bits[7] > bits[9]
    if feedback:
        residuals = gathered(state.state_dict()["error_feedback"])
        for (name, parameter), missing in zip(model.module.named_parameters(), sums, strict=True):
            kept = owed(residuals, name, parameter.numel())
            assert torch.allclose(-missing.flatten(), kept, rtol=0, atol=1e-4), name


@world(2)
def test_a_checkpoint_goes_on_in_its_stage(rank, world_size):
    options = {"grid": qcomm.SigmaGrid(step=3.0), "warmup_steps": 8, "warmup_step": 1.0, "min_elements": 100}
    model = wrap()
    state = attach(model, **options)
    for step in range(5):
        backward(model, rank, step)
    other = wrap()
    resumed = attach(other, **options)
    backward(other, rank, 0)
    resumed.load_state_dict(state.state_dict())
    for step in range(5, 10):
        backward(model, rank, step)
        backward(other, rank, step)
        assert resumed.reducer._stage == state.reducer._stage == (None if step >= 8 else step // 2)


@world(2, 3)
def test_excluded_parameters_are_exact(rank, world_size):
    wanted = exact_mean(rank, world_size)
    model = wrap()
    state = attach(model, exclude=["*.bias", "4.*"], min_elements=0)
    for _ in range(2):
        for (name, _), got, want in zip(model.module.named_parameters(), backward(model, rank), wanted, strict=True):
            assert torch.equal(got, want) == (name.endswith(".bias") or name.startswith("4.")), name
    assert set(state.stats()["tensors"]) == {f"{layer}.weight" for layer in (0, 2, 6, 8, 10)}


@world(2, 3)
@pytest.mark.parametrize(
    "options",
    [{"small_step": None}, {"error_feedback": False}, {"grid": qcomm.RangeGrid()}],
    ids=["small_step", "error_feedback", "grid"],
)
def test_small_parameters_are_exact_where_they_are_not_merged(rank, world_size, options):
    wanted = exact_mean(rank, world_size)
    model = wrap()
    attach(model, min_elements=100, **options)
    for (name, _), got, want in zip(model.module.named_parameters(), backward(model, rank), wanted, strict=True):
        assert torch.equal(got, want) == name.endswith(".bias"), name


@world(2, 3)
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "exact_sum", "hierarchical"])
def test_small_parameters_are_quantized_finely_and_together(rank, world_size, strategy):
    """Nothing is lost over time, fewer bytes are sent, and excluded parameters are exact."""
    sent = {}
    for small_step in (0.5, None):
        model = wrap()
        options = {"ranks_per_node": 1} if strategy == "hierarchical" else {}
        state = attach(
            model,
            grid=qcomm.SigmaGrid(3.0),
            min_elements=100,
            small_step=small_step,
            exclude=["2.bias"],
            strategy=strategy,
            **options,
        )
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
        for step in range(3):
            for total, got, want in zip(
                sums, backward(model, rank, step), exact_mean(rank, world_size, step), strict=True
            ):
                total.add_(got.double() - want)
        tensors, sent[small_step] = state.stats()["tensors"], state.stats()["bytes_sent"]
        saved = gathered(state.state_dict()["error_feedback"])
        for (name, parameter), missing in zip(model.module.named_parameters(), sums, strict=True):
            exact = name == "2.bias" or (small_step is None and name.endswith(".bias"))
            assert (name in tensors) == (not exact)
            kept = owed(saved, name, parameter.numel())
            assert torch.allclose(-missing.flatten(), kept, rtol=0, atol=1e-4), name
            assert bool(kept.any()) == (not exact), name
    assert sent[0.5] < sent[None]


@world(2)
def test_bits_by_the_rms_of_gradients(rank, world_size):
    model = wrap()
    state = attach(model, grid=qcomm.RangeGrid(c=5, bits="rms"), min_elements=100)
    for step in range(3):
        got = backward(model, rank, step, 1e-3)
        assert_same_on_all_ranks(*got)
    assert {tensor["num_bits"] for tensor in state.stats()["tensors"].values()} == {5}
    for a, b in zip(got, exact_mean(rank, world_size, 2), strict=True):
        assert float((a - 1e-3 * b).norm()) < 0.2 * 1e-3 * float(b.norm())
    backward(model, rank, 3, 1e3)
    assert {tensor["num_bits"] for tensor in state.stats()["tensors"].values()} == {9}
    model = wrap()
    attach(model, grid=qcomm.RangeGrid(bits="rms"), strategy="exact_sum", min_elements=100)
    assert "bits must be 'entropy' where N follows from it, as in strategy 'exact_sum'" in str(error_of(model, rank))


@world(2)
def test_a_hook_registered_by_hand_does_the_same(rank, world_size):
    model, other = wrap(), wrap()
    state = qcomm.CompressionState(min_elements=100, strategy="two_phase")
    model.register_comm_hook(state, qcomm.compression_hook)
    attached = attach(other, min_elements=100)
    for step in range(4):
        for a, b in zip(backward(model, rank, step), backward(other, rank, step), strict=True):
            assert torch.equal(a, b)
    names = list(attached.state_dict()["error_feedback"]["local"])
    assert len(state.state_dict()["error_feedback"]["local"]) == len(names)
    assert all(name.startswith("parameter ") for name in state.stats()["tensors"])
    # A new model and a saved state: parameters are numbered alike, so residuals find their parameters.
    restored, continued = qcomm.CompressionState(min_elements=100, strategy="two_phase"), wrap()
    restored.load_state_dict(state.state_dict())
    continued.register_comm_hook(restored, qcomm.compression_hook)
    backward(continued, rank, 5)
    model = wrap()
    model.register_comm_hook(qcomm.CompressionState(exclude=["*.bias"], strategy="two_phase"), qcomm.compression_hook)
    assert "exclude needs the parameters' names" in str(error_of(model, rank))


# How a state reads the scale that a tensor has at the moment.
SCALES = {
    "a tensor": lambda current: current,
    "a function's number": lambda current: lambda: float(current),
    "a function's tensor": lambda current: lambda: current,
}


@world(2)
@pytest.mark.parametrize("form", SCALES)
def test_grad_scale_is_taken_out_and_put_back(rank, world_size, form):
    current = torch.tensor(1.0)
    model, reference = wrap(), wrap()
    state = attach(model, min_elements=100, grad_scale=SCALES[form](current))
    reference_state = attach(reference, min_elements=100)
    for step, scale in enumerate([1024.0, 2048.0, 2048.0, 512.0]):
        current.fill_(scale)
        for a, b in zip(backward(model, rank, step, scale), backward(reference, rank, step), strict=True):
            assert torch.equal(a, scale * b)  # powers of two: exact
    for name, residual in state.state_dict()["error_feedback"]["local"].items():
        assert torch.equal(residual, reference_state.state_dict()["error_feedback"]["local"][name])


@world(2)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0, -2.0])
def test_a_scale_that_is_not_positive_and_finite_fails_one_step(rank, world_size, bad):
    current = torch.tensor(1.0)
    model = wrap()
    attach(model, min_elements=100, grad_scale=lambda: current)
    backward(model, rank)
    current.fill_(bad if rank == 1 else 1.0)
    error = error_of(model, rank)
    assert "rank 1 failed while preparing the exchange: ValueError: grad_scale must be positive and finite" in str(
        error
    )
    current.fill_(1.0)
    assert error_of(model, rank) is None


@world(2)
def test_scales_that_differ_fail_one_step(rank, world_size):
    current = torch.tensor(1.0)
    model = wrap()
    state = attach(model, min_elements=100, grad_scale=lambda: current)
    backward(model, rank)
    current.fill_(1.0 + rank)
    error = error_of(model, rank)
    assert "grad_scale: 1.0 on rank 0, 2.0 on rank 1" in str(error) and isinstance(
        state.exception(), qcomm.ConfigMismatchError
    )
    current.fill_(1.0)
    assert error_of(model, rank) is None


@world(2)
@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(step=1.0), qcomm.RangeGrid(c=2)], ids=["sigma", "range"])
def test_grad_scaler_skips_and_recovers(rank, world_size, grid):
    model = wrap()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    state = attach(model, grid=grid, min_elements=100, grad_scale=scaler.get_scale)
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


@world(2, 3)
def test_communication_overlaps_with_backward(rank, world_size):
    model = wrap()
    state = attach(model)
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


@world(2, 3)
def test_bytes_in_stats_are_those_handed_to_gloo(rank, world_size):
    model = wrap()
    state = attach(model, min_elements=100, warmup_steps=1)
    with counting_bytes() as counting:
        for step in range(4):
            backward(model, rank, step)
    stats = state.stats()
    elements = sum(p.numel() for p in model.parameters())
    assert (stats["bytes_sent"], stats["bytes_received"]) == (counting.sent, counting.received())
    assert stats["elements"] == 4 * elements and stats["bytes_uncompressed"] == 16 * elements
    assert stats["elements_compressed"] == 3 * sum(p.numel() for p in model.parameters())
    state.reset_stats()
    assert state.stats()["bytes_sent"] == 0 and state.stats()["steps"] == 0
    backward(model, rank)
    stats = state.stats()
    assert stats["steps"] == 1
    tensor = stats["tensors"]["0.weight"]
    assert tensor["grid"] == "sigma" and tensor["num_bits"] == 4 and tensor["step"] > 0
    assert 1.9 < stats["bits_per_element_phase1"] < 4 and stats["residual_norm"] > 0


@world(2)
def test_join_with_uneven_inputs(rank, world_size):
    model = wrap()
    state = attach(model, min_elements=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    steps = 3 + 2 * rank  # rank 0 runs out first and shadows the others with zeros
    with model.join():
        for step in range(steps):
            optimizer.zero_grad()
            model(inputs(rank, step)).square().sum().backward()
            optimizer.step()
    assert_same_on_all_ranks(*model.parameters())
    assert set(gathered(state.stats()["steps"])) == {3 + 2 * (world_size - 1)}


@world(2)
def test_the_hook_inside_torchs_fp16_wrapper(rank, world_size):
    model = wrap()
    state = qcomm.CompressionState(min_elements=100, strategy="two_phase")
    model.register_comm_hook(state, default_hooks.fp16_compress_wrapper(qcomm.compression_hook))
    for step in range(3):
        got = backward(model, rank, step)
    assert_same_on_all_ranks(*got)
    for a, b in zip(got, exact_mean(rank, world_size, 2), strict=True):
        assert float((a - b).norm()) < 0.8 * float(b.norm())
    assert state.stats()["bits_per_element_phase1"] < 3.5


@world(2)
def test_two_models_share_a_group(rank, world_size):
    models = [wrap(), wrap()]
    states = [attach(models[0]), attach(models[1], grid=qcomm.RangeGrid(c=2))]
    for step in range(3):
        for model in models:
            model.zero_grad()
        sum(model(inputs(rank, step)).square().sum() for model in models).backward()
        tensor = torch.full((2000,), float(rank))
        all_reduce(tensor)
        assert torch.equal(tensor, torch.full((2000,), (world_size - 1) / 2))
        assert_same_on_all_ranks(*[p.grad for model in models for p in model.parameters()])
    assert [state.stats()["steps"] for state in states] == [3, 3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        models[0](inputs(rank)).float().square().sum().backward()
    assert_same_on_all_ranks(*[p.grad for p in models[0].parameters()])


def test_copying_a_model_and_process_errors():
    state = qcomm.CompressionState()
    assert state.stats()["bytes_sent"] == 0 and state.error_feedback.norm() == 0.0
    with pytest.raises(ValueError, match="state_dict must be of format 2"):
        state.load_state_dict({**state.state_dict(), "format": 1})
    with pytest.raises(RuntimeError, match="is not initialised: call"):
        all_reduce(torch.ones(3))
    assert issubclass(TransportError, qcomm.CollectiveError)
    assert copy.deepcopy(qcomm.SigmaGrid()) == qcomm.SigmaGrid()


def test_options_behind_error_feedback_have_names():
    with pytest.raises(TypeError, match="positional arguments"):
        qcomm.CompressionState(None, qcomm.SigmaGrid(), True, 1024)


@pytest.mark.parametrize("name", ["grid", "strategy", "num_threads", "warmup_steps"])
def test_an_option_is_not_changed_by_assignment(name):
    """It would change nothing, in silence."""
    with pytest.raises(AttributeError):
        setattr(qcomm.CompressionState(), name, getattr(qcomm.CompressionState(), name))


@pytest.mark.filterwarnings("ignore:a pickled CompressionState")
def test_a_copy_of_a_state_has_no_group():
    state = qcomm.CompressionState(strategy="two_phase")
    state.reducer.group = object()
    assert copy.copy(state).process_group is None and state.process_group is not None
