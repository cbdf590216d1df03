"""qcomm.all_reduce over gloo: right, equal on all ranks, and refused where it has to be."""

import pytest
import torch
import torch.distributed as dist
import twin
from distributed import all_reduce, assert_same_on_all_ranks, gathered, world
from strategy_cases import COUNTS, GRIDS, KINDS, values

import qcomm
from qcomm.collectives import ReduceOptions, two_phase
from qcomm.collectives.layout import BucketLayout, TensorSpec
from qcomm.collectives.two_phase_schedule import cut_slices

pytestmark = pytest.mark.world

WORLDS = [1, 2, 3, 5]


def check_against_twin(rank, world_size, grid, kind, count, dtype, min_elements):
    inputs = [values(kind, count, seed, dtype) for seed in range(world_size)]
    wire = torch.float64 if dtype == torch.float64 else torch.float32
    layout = BucketLayout([TensorSpec("tensor", 0, count, count >= max(min_elements, 1))], world_size)
    slices = len(cut_slices(layout, two_phase.SLICE_ELEMENTS))
    expected, bound = twin.mean([x.to(wire) for x in inputs], layout, grid, slices)
    tensor = inputs[rank].clone()
    assert all_reduce(tensor, grid, min_elements=min_elements, strategy="two_phase") is None
    message = f"{grid} {kind} {count} {dtype} min_elements={min_elements}"
    assert torch.equal(tensor, expected.to(dtype)), message
    assert_same_on_all_ranks(tensor)
    exact = torch.stack([x.double() for x in inputs]).mean(0)
    allowed = bound.double() + twin.rounding([x.to(wire) for x in inputs], dtype)
    assert bool(((tensor.double() - exact).abs() <= allowed).all()), message


@world(*WORLDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_twin_and_keeps_the_bound(rank, world_size, grid):
    for count in COUNTS:
        check_against_twin(rank, world_size, grid, "gauss", count, torch.float32, min_elements=0)
    check_against_twin(rank, world_size, grid, "gauss", 1023, torch.float32, min_elements=1024)
    for kind in KINDS[1:]:
        check_against_twin(rank, world_size, grid, kind, 5000, torch.float32, min_elements=0)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_against_twin(rank, world_size, grid, "gauss", 5000, dtype, min_elements=0)
        check_against_twin(rank, world_size, grid, "gauss", 100, dtype, min_elements=1024)


MEAN_GRIDS = [
    (qcomm.SigmaGrid(step=0.5), None, qcomm.SigmaGrid(step=0.5)),
    (qcomm.SigmaGrid(step=2.0, coding="pair"), None, qcomm.SigmaGrid(step=1.0, coding="pair")),
    (qcomm.SigmaGrid(step=2.5), None, qcomm.SigmaGrid(step=2.5)),
    (qcomm.SigmaGrid(step=2.0), 3, qcomm.SigmaGrid(step=3.0)),
    (qcomm.SigmaGrid(step=3.4), 0.5, qcomm.SigmaGrid(step=0.5)),
    (qcomm.RangeGrid(c=2), None, qcomm.RangeGrid(c=2)),
]


@pytest.mark.parametrize(("grid", "mean_step", "expected"), MEAN_GRIDS, ids=str)
def test_the_grid_of_means(grid, mean_step, expected):
    assert ReduceOptions(grid, mean_step=mean_step).mean_grid == expected


REFUSED_MEAN_STEPS = [
    (qcomm.RangeGrid(), 1.0, ValueError, "mean_step must be None with a RangeGrid"),
    (qcomm.SigmaGrid(), 17.0, ValueError, r"mean_step must be a step of the grid: step must be in \[2\*\*-12, 16\]"),
    (qcomm.SigmaGrid(), float("nan"), ValueError, "mean_step must be a step of the grid"),
    (qcomm.SigmaGrid(coding="pair"), 0.5, ValueError, "mean_step must be a step of the grid: coding 'pair' needs step"),
    (qcomm.SigmaGrid(), "1", TypeError, "mean_step must be a real number or None, got str"),
    (qcomm.SigmaGrid(), True, TypeError, "mean_step must be a real number or None, got bool"),
]


@pytest.mark.parametrize(("grid", "mean_step", "error", "message"), REFUSED_MEAN_STEPS, ids=str)
def test_a_mean_step_that_cannot_be_is_refused(grid, mean_step, error, message):
    with pytest.raises(error, match=message):
        ReduceOptions(grid, mean_step=mean_step)


@world(2, 3)
@pytest.mark.parametrize("strategy", ["two_phase", "hierarchical"])
def test_the_mean_is_as_coarse_as_asked(rank, world_size, strategy):
    """Levels of the result are multiples of the mean's step, whatever the step of the values is."""
    x = values("gauss", 6144, rank, torch.float32)
    exact = x.clone()
    dist.all_reduce(exact)
    qcomm.all_reduce(x, qcomm.SigmaGrid(step=0.25), mean_step=3.0, strategy=strategy, ranks_per_node=1, min_elements=0)
    pieces = x.split(x.numel() // world_size)
    for piece, part in zip(pieces, (exact / world_size).split(x.numel() // world_size), strict=True):
        step = float(piece.abs()[piece != 0].min())
        assert step == pytest.approx(3.0 * float(part.square().mean().sqrt()), rel=0.05)
        assert len(piece.unique()) < 8


@world(2)
def test_ranks_with_different_mean_steps_are_told(rank, world_size):
    with pytest.raises(qcomm.ConfigMismatchError, match="mean_step"):
        qcomm.all_reduce(torch.ones(4000), mean_step=1.0 + rank, strategy="two_phase")


@world(2, 3)
@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(step=1.0), qcomm.RangeGrid(c=2)], ids=["sigma", "range"])
def test_a_million_elements(rank, world_size, grid):
    check_against_twin(rank, world_size, grid, "gauss", 1_000_003, torch.float32, min_elements=1024)


VIEWS = {
    "contiguous": lambda x: x.view(16, 3, 8, 16),
    "transposed": lambda x: x.view(96, 64).t(),  # it is sent in its own row-major order
    "channels_last": lambda x: x.view(16, 3, 8, 16).contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, torch.full_like(x, 7.0)], dim=1)[:, 0],
}


@world(2, 3)
@pytest.mark.parametrize("view", VIEWS)
def test_shapes_and_strides(rank, world_size, view):
    tensor = VIEWS[view](values("gauss", 6144, rank))
    strides = tensor.stride()
    reference = tensor.contiguous().clone()
    all_reduce(reference)
    all_reduce(tensor)
    assert tensor.stride() == strides
    assert torch.equal(tensor, reference)


@world(2, 3)
def test_neighbours_scalars_and_parameters(rank, world_size):
    flat = values("gauss", 6144, rank)
    expected = flat.clone()
    all_reduce(expected)
    beside = torch.full((2, 5000), 7.0)
    beside[0] = flat[:5000]
    all_reduce(beside[0])
    assert bool((beside[1] == 7.0).all()) and not torch.equal(beside[0], flat[:5000])
    scalar = torch.tensor(float(rank))
    all_reduce(scalar)
    assert float(scalar) == (world_size - 1) / 2
    parameter = torch.nn.Parameter(flat.clone())
    all_reduce(parameter)
    assert torch.equal(parameter.detach(), expected) and parameter.requires_grad and parameter.grad is None


@world(1)
def test_world_of_one_is_the_identity_unless_a_strategy_is_named(rank, world_size):
    x = values("gauss", 5000, 0)
    tensor = x.clone()
    assert all_reduce(tensor, strategy="auto") is None and torch.equal(tensor, x)
    work = all_reduce(tensor, async_op=True, strategy="auto")
    assert work.is_completed() and work.wait() and work.get_future().wait() is tensor
    all_reduce(tensor, strategy="two_phase")
    assert not torch.equal(tensor, x)
    for bad in (torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="tensor must be float32"):
            all_reduce(bad)


@world(2, 3)
def test_handles_of_several_at_once(rank, world_size):
    inputs = [values("gauss", 3000 + 7 * i, rank) for i in range(8)]
    expected = [x.clone() for x in inputs]
    for tensor in expected:
        all_reduce(tensor)
    works = [all_reduce(x, async_op=True) for x in inputs]
    for work, tensor, wanted in reversed(list(zip(works, inputs, expected, strict=True))):
        assert (
            work.wait(timeout=20.0) is True and work.is_completed() and work.is_success() and work.exception() is None
        )
        assert work.get_future().wait() is tensor
        assert torch.equal(tensor, wanted)
        assert work.stats()["bytes_sent"] > 0
    # A rank that waits for another gets a TimeoutError, and the collective goes on.
    tensor = values("gauss", 2000, rank)
    if rank == 0:
        work = all_reduce(tensor, async_op=True)
        with pytest.raises(TimeoutError, match=r"still running after 0\.05 s"):
            work.wait(0.05)
        assert not work.is_completed() and not work.is_success() and work.exception() is None
    dist.barrier()
    if rank != 0:
        work = all_reduce(tensor, async_op=True)
    work.wait()
    assert_same_on_all_ranks(tensor)


@world(2, 3)
@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(), qcomm.RangeGrid(c=2)], ids=["sigma", "range"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_value_reaches_all_ranks(rank, world_size, poison, grid):
    tensor = values("gauss", 5000, rank)
    if rank == world_size - 1:
        tensor[4321] = poison
    all_reduce(tensor, grid)
    assert bool(tensor.isnan().all())


@world(2, 3)
def test_a_nonfinite_value_of_a_small_tensor_stays_alone(rank, world_size):
    small = values("gauss", 10, rank)
    if rank == 0:
        small[3] = torch.inf
    all_reduce(small)
    assert small.isfinite().tolist() == [True, True, True, False] + [True] * 6
    assert_same_on_all_ranks(small)


# An argument that is refused, and the error.
BAD_ARGUMENTS = {
    "int32": ({"tensor": torch.ones(5, dtype=torch.int32)}, TypeError, "tensor must be float32.* got torch.int32"),
    "complex": ({"tensor": torch.ones(5, dtype=torch.complex64)}, TypeError, "view_as_real"),
    "sparse": ({"tensor": torch.ones(5, 5).to_sparse()}, TypeError, "tensor must be a dense tensor"),
    "a list": ({"tensor": [1.0]}, TypeError, "tensor must be a torch.Tensor, got list"),
    "meta": ({"tensor": torch.ones(5, device="meta")}, ValueError, "tensor must be on the CPU"),
    "expanded": ({"tensor": torch.ones(1).expand(5)}, ValueError, "tensor must not be expanded"),
    "grid": ({"grid": "sigma"}, TypeError, "grid must be a qcomm.SigmaGrid or qcomm.RangeGrid, got str"),
    "negative min_elements": ({"min_elements": -1}, ValueError, "min_elements must be >= 0, got -1"),
    "min_elements": ({"min_elements": 1.5}, TypeError, "min_elements must be an int, got float"),
    "strategy": ({"strategy": "ring"}, ValueError, "strategy must be one of .* got 'ring'"),
}


@world(3)
@pytest.mark.parametrize("argument", BAD_ARGUMENTS)
def test_bad_arguments_are_named_and_reach_all_ranks(rank, world_size, argument):
    bad, error, match = BAD_ARGUMENTS[argument]
    good = torch.ones(2000)
    # All ranks, then only one: it gets the error itself, and the others hear of it.
    with pytest.raises(error, match=match):
        all_reduce(**{"tensor": good, **bad})
    heard = (error, match) if rank == 1 else (qcomm.CollectiveError, f"rank 1 failed while preparing.*{error.__name__}")
    with pytest.raises(heard[0], match=heard[1]):
        all_reduce(**{"tensor": good, **bad} if rank == 1 else {"tensor": torch.ones(2000)})
    assert torch.equal(good, torch.ones(2000))
    all_reduce(good)
    assert torch.equal(good, torch.ones(2000))


@world(3)
def test_a_group_without_this_rank_is_refused(rank, world_size):
    with pytest.raises(ValueError, match="group must be a process group that this rank belongs to"):
        all_reduce(torch.ones(2000), group=dist.GroupMember.NON_GROUP_MEMBER)


@world(3)
@pytest.mark.parametrize(
    ("argument", "common", "odd", "field"),
    [
        (
            "grid",
            qcomm.SigmaGrid(step=1.0),
            qcomm.SigmaGrid(step=2.0),
            "grid: SigmaGrid.step=1.0.* on ranks 0 2, SigmaGrid.step=2.0.* on rank 1",
        ),
        ("grid", qcomm.SigmaGrid(), qcomm.RangeGrid(c=2), "grid: SigmaGrid.* on ranks 0 2, RangeGrid"),
        ("min_elements", 1024, 7, "min_elements: 1024 on ranks 0 2, 7 on rank 1"),
        ("strategy", "auto", "two_phase", "strategy: auto on ranks 0 2, two_phase on rank 1"),
        ("tensor", torch.zeros(2000), torch.zeros(999), r"shape: \[2000\] on ranks 0 2, \[999\] on rank 1"),
        (
            "tensor",
            torch.zeros(2000),
            torch.zeros(2000, dtype=torch.float64),
            "dtype: torch.float32 on ranks 0 2, torch.float64 on rank 1",
        ),
    ],
    ids=["step", "grid", "min_elements", "strategy", "shape", "dtype"],
)
def test_mismatch_names_field_and_ranks_on_every_rank(rank, world_size, argument, common, odd, field):
    with pytest.raises(qcomm.ConfigMismatchError, match=field):
        all_reduce(**{"tensor": torch.zeros(2000), argument: odd if rank == 1 else common})
    # Nothing is out of step afterwards.
    check_against_twin(rank, world_size, qcomm.SigmaGrid(), "gauss", 5000, torch.float32, 0)


@world(2, 3)
def test_stats_of_one_call(rank, world_size):
    tensor = values("gauss", 100_000, rank)
    stats = all_reduce(tensor, async_op=True)
    stats.wait()
    stats = stats.stats()
    assert stats["elements"] == 100_000 and stats["bytes_uncompressed"] == 400_000
    assert 2.0 < stats["bits_per_element_phase1"] < 2.35 and 2.0 < stats["bits_per_element_phase2"] < 2.35
    assert stats["bits_per_element"] == pytest.approx(
        (stats["bits_per_element_phase1"] + stats["bits_per_element_phase2"]) / 2
    )
    assert stats["bytes_sent"] == stats["bytes_sent_phase1"] + stats["bytes_sent_phase2"] + stats["bytes_sent_overhead"]
    totals = gathered((stats["bytes_sent"], stats["bytes_received"]))
    assert sum(sent for sent, _ in totals) == sum(received for _, received in totals)
