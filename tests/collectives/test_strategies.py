"""Uncompressed and compressed means behind one interface, and the choice between them, alike on all ranks."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, exact_mean, wrap
from distributed import all_reduce, assert_same_on_all_ranks, attach, gathered, world
from slow_strategies import all_slow_but

import qcomm
from qcomm.collectives import strategies, tuner
from qcomm.collectives.layout import BucketLayout, TensorSpec
from qcomm.collectives.options import ReduceOptions
from qcomm.collectives.two_phase_steps import MeanSteps


@world(2, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_uncompressed_mean(rank, world_size, dtype):
    x = torch.randn(5001, generator=torch.Generator().manual_seed(rank)).to(dtype)
    tensor = x.clone()
    work = all_reduce(tensor, strategy="none", async_op=True)
    work.wait()
    assert_same_on_all_ranks(tensor)
    wanted = sum(x.double() for x in gathered(x)) / world_size
    assert float((tensor.double() - wanted).abs().max()) <= 8 * torch.finfo(dtype).eps * float(wanted.abs().max() + 1)
    stats = work.stats()
    itemsize = x.element_size()
    assert stats["bits_per_element"] == 8 * itemsize == stats["bits_per_element_phase1"]
    assert stats["bytes_sent_phase1"] == 5001 * itemsize * (world_size - 1) // world_size
    assert stats["strategies"] == {0: "none"}
    bad = torch.ones(5001, dtype=dtype)
    bad[7] = torch.inf if rank == 1 else 1.0
    all_reduce(bad, strategy="none")
    assert not bad[7].isfinite() and bad.isfinite().sum() == 5000


@world(2, 3)
@pytest.mark.parametrize("step", [1.0, 3.4], ids="step {:g}".format)
def test_an_uncompressed_step_sends_what_error_feedback_kept(rank, world_size, step):
    """Compressed steps, then an uncompressed one: what was kept arrives, and nothing is lost or kept."""
    model = wrap()
    state = attach(model, grid=qcomm.SigmaGrid(step), min_elements=100, grad_scale=4.0)
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for number in range(6):
        state.reconfigure(strategy="none" if number == 5 else "two_phase")
        got = backward(model, rank, number, scale=4.0)
        for total, g, wanted in zip(sums, got, exact_mean(rank, world_size, number), strict=True):
            total.add_(g.double() / 4 - wanted)
        if number == 4:
            assert state.stats()["residual_norm"] > 0 and max(float(total.abs().max()) for total in sums) > 1e-3
    assert state.stats()["residual_norm"] == 0.0
    assert max(float(total.abs().max()) for total in sums) < 1e-4
    assert state.stats()["strategies"] == dict.fromkeys(state.stats()["strategies"], "none")
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])


@world()
@pytest.mark.parametrize(
    ("world_size", "names", "options"),
    [
        (3, ("two_phase", "all_gather", "exact_sum"), {}),
        (4, ("two_phase", "hierarchical", "exact_sum"), {"ranks_per_node": 2}),
        (4, ("hierarchical", "all_gather", "two_phase"), {"ranks_per_node": 4}),
    ],
)
def test_strategies_hand_their_residuals_to_each_other(rank, world_size, names, options):
    """Whatever one strategy keeps, the others send, and residuals of a coarse grid are large."""
    model = wrap()
    state = attach(model, grid=qcomm.SigmaGrid(3.2), min_elements=100, grad_scale=4.0, **options)
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for step in range(9):
        state.reconfigure(strategy="none" if step == 8 else names[step % len(names)])
        got = backward(model, rank, step, scale=4.0)
        for total, g, wanted in zip(sums, got, exact_mean(rank, world_size, step), strict=True):
            total.add_(g.double() / 4 - wanted)
        assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
        if step == 7:
            assert state.stats()["residual_norm"] > 0 and max(float(total.abs().max()) for total in sums) > 1e-3
    assert state.stats()["residual_norm"] == 0.0
    assert max(float(total.abs().max()) for total in sums) < 1e-4


def error_of_auto(tensor):
    """What an all-reduce raises, or None; and how it was done."""
    work = qcomm.all_reduce(tensor, strategy="auto", async_op=True)
    try:
        work.wait()
    except qcomm.CollectiveError as error:
        return str(error), {}
    return None, work.stats()["strategies"]


@world()
@pytest.mark.parametrize(
    ("world_size", "winner", "elements"),
    [(2, "two_phase", 5003), (2, "none", 5004), (2, "all_gather", 5005), (3, "two_phase", 5006)],
)
def test_auto_takes_the_faster_way(rank, world_size, winner, elements):
    tried = strategies.automatic_strategies(
        BucketLayout([TensorSpec("", 0, elements, True)], world_size), torch.float32, ReduceOptions()
    )
    assert winner in tried
    with all_slow_but(winner, 0.03):
        for _ in range(len(tried) * tuner.ROUNDS + 1):
            assert error_of_auto(torch.randn(elements))[0] is None
        # A fault of one rank in between does not take the ranks out of step, at either end of a collective.
        for name in ("encode", "decode"):
            failing = mock.patch.object(MeanSteps, name, side_effect=ZeroDivisionError("boom"))
            with failing if rank == 1 else nullcontext():
                errors = [error_of_auto(torch.randn(elements))[0] for _ in range(2)]
            assert any(errors) == (winner == "two_phase")
        for _ in range(3):
            error, chosen = error_of_auto(torch.randn(elements))
        assert error is None and gathered(chosen) == [{0: winner}] * world_size


@world(4)
def test_auto_considers_nodes_where_it_is_told_of_them(rank, world_size):
    work = None
    with all_slow_but("hierarchical", 0.05):
        for _ in range(len(strategies.AUTOMATIC) * tuner.ROUNDS + 2):
            work = qcomm.all_reduce(torch.randn(30_011), strategy="auto", ranks_per_node=2, async_op=True)
            work.wait()
    assert work.stats()["strategies"] == {0: "hierarchical"}


@world(2)
def test_auto_chooses_for_each_bucket(rank, world_size):
    group = dist.new_group()  # with a tuner that knows nothing yet
    model = wrap(process_group=group)
    state = qcomm.attach(model, min_elements=100)
    with all_slow_but("two_phase", 0.06):
        for step in range(len(strategies.AUTOMATIC) * tuner.ROUNDS + 2):
            backward(model, rank, step)
            assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
    chosen = state.stats()["strategies"]
    assert gathered(chosen) == [chosen] * world_size
    # The first step had one bucket of everything; those of the steps after it had time for their trials.
    assert [chosen[index] for index in sorted(chosen)][1:] == ["two_phase"] * (len(chosen) - 1)
    assert error_of(model, rank) is None
    dist.destroy_process_group(group)
