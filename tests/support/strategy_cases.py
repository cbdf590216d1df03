"""Demands on every strategy: the twin's bits, within its bound, for its bytes; faults that reach all ranks."""

from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import twin
from distributed import assert_same_on_all_ranks, counting_bytes, gathered
from strategy_twins import TWINS

import qcomm
from qcomm.collectives.layout import BucketLayout, TensorSpec

GRIDS = [
    qcomm.SigmaGrid(step=1.0),
    qcomm.SigmaGrid(step=2.0),
    qcomm.SigmaGrid(step=0.05),
    qcomm.RangeGrid(c=2),
    qcomm.RangeGrid("paper"),
]
KINDS = ("gauss", "heavy", "constant", "spike", "zero on rank 0")
COUNTS = (0, 1, 2, 3, 31, 32, 33, 64, 1023, 4097, 100_003)


def values(kind, count, seed, dtype=torch.float32):
    """Test data of one rank."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64) * (1 + seed)
    if kind == "heavy":
        x = x / (0.05 + torch.rand(count, generator=generator, dtype=torch.float64))
    elif kind == "constant":
        x = torch.full((count,), 0.25 + seed, dtype=torch.float64)
    elif kind == "spike":
        x = torch.zeros(count, dtype=torch.float64)
        x[count // 2 : count // 2 + 1] = 3.0 + seed
    elif kind == "zero on rank 0" and seed == 0:
        x = torch.zeros(count, dtype=torch.float64)
    return x.to(dtype)


def check(rank, strategy, grid, inputs, min_elements=0, **options):
    """One all-reduce of ``inputs``, one a rank, against the twin; returns the result."""
    dtype, count, world_size = inputs[0].dtype, inputs[0].numel(), len(inputs)
    wire = [x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in inputs]
    layout = BucketLayout([TensorSpec("tensor", 0, count, count >= max(min_elements, 1))], world_size)
    expected = TWINS[strategy](wire, layout, grid, dtype.itemsize, **options)
    tensor = inputs[rank].clone()
    with counting_bytes() if world_size > 1 else nullcontext() as counting:
        work = qcomm.all_reduce(tensor, grid, min_elements=min_elements, strategy=strategy, async_op=True, **options)
        work.wait()
    message = f"{strategy} {options} {grid} {count} {dtype} min_elements={min_elements}"
    assert torch.equal(tensor, expected.result.to(dtype)), message
    assert_same_on_all_ranks(tensor)
    exact = torch.stack([x.double() for x in inputs]).mean(0)
    allowed = expected.bound.double() + twin.rounding(wire, dtype)
    assert bool(((tensor.double() - exact).abs() <= allowed).all()), message
    stats = work.stats()
    assert (stats["bytes_sent"], stats["bytes_received"]) == (expected.sent[rank], expected.received[rank]), message
    if counting is not None:
        assert (counting.sent, counting.received()) == (expected.sent[rank], expected.received[rank]), message
    assert stats["strategies"] == {0: strategy}
    return tensor


def check_kinds(rank, world_size, strategy, grid, **options):
    """Sizes, distributions and dtypes."""
    for count in COUNTS:
        check(rank, strategy, grid, [values("gauss", count, seed) for seed in range(world_size)], **options)
    for kind in KINDS:
        check(rank, strategy, grid, [values(kind, 5000, seed) for seed in range(world_size)], **options)
    for count, min_elements in ((1023, 1024), (5000, 0)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            inputs = [values("gauss", count, seed, dtype) for seed in range(world_size)]
            check(rank, strategy, grid, inputs, min_elements, **options)


def error_of(strategy, count=5000, **options):
    """The error of one all-reduce, or None."""
    try:
        qcomm.all_reduce(torch.randn(count), strategy=strategy, **options)
    except (qcomm.CollectiveError, qcomm.ConfigMismatchError) as error:
        return error
    return None


def check_works(rank, world_size, strategy, **options):
    inputs = [values("gauss", 5000, seed) for seed in range(world_size)]
    check(rank, strategy, qcomm.SigmaGrid(step=1.0), inputs, **options)


def check_faults(rank, world_size, strategy, module, steps, last, **options):
    """A fault of rank 1 in each of ``steps``, name -> text, reaches all ranks and does not last.

    That in ``last``, after the last exchange, reaches the others in the next collective.
    """
    check_works(rank, world_size, strategy, **options)
    boom = ZeroDivisionError("boom")
    for name, text in steps.items():
        with mock.patch.object(module, name, side_effect=boom) if rank == 1 else nullcontext():
            error = error_of(strategy, **options)
        assert f"rank 1 failed while {text}: ZeroDivisionError: boom" in str(error), error
        assert (rank == 1) == isinstance(error.__cause__, ZeroDivisionError)
        check_works(rank, world_size, strategy, **options)
    with mock.patch.object(module, last, side_effect=boom) if rank == 1 else nullcontext():
        error = error_of(strategy, **options)
    assert (error is not None) == (rank == 1)
    error = error_of(strategy, **options)
    assert "rank 1 failed while decoding the result: ZeroDivisionError: boom" in str(error)
    check_works(rank, world_size, strategy, **options)
    # A bad argument of one rank, which does not come as far as the strategy.
    if rank == 1:
        try:
            qcomm.all_reduce(torch.zeros(5000, dtype=torch.int64), strategy=strategy, **options)
        except TypeError:
            error = "rank 1 failed while preparing the exchange: TypeError"
    else:
        error = error_of(strategy, **options)
    assert "rank 1 failed while preparing the exchange: TypeError" in str(error)
    # Other ranks want another strategy.
    error = error_of(strategy if rank == 1 else "two_phase", **(options if rank == 1 else {}))
    assert isinstance(error, qcomm.ConfigMismatchError), error
    assert "strategy: " in str(error) and f"{strategy} on rank 1" in str(error), error
    check_works(rank, world_size, strategy, **options)
    assert all(gathered(True))


def check_lie(rank, world_size, strategy, module, name, lie, match, **options):
    """What rank 1 sends instead of the result of ``module.name`` is refused, and every rank gets an error."""
    group = dist.new_group()  # its connections may be gone afterwards
    with mock.patch.object(module, name, return_value=lie) if rank == 1 else nullcontext():
        error = error_of(strategy, group=group, **options)
    assert isinstance(error, qcomm.CollectiveError), error
    assert any(match in str(other) for other in gathered(str(error))), error
    check_works(rank, world_size, strategy, **options)
