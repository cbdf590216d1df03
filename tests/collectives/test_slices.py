"""A collective in slices: cut and ordered rightly, equal to its twin, and failing as one that is not cut does."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import twin
from ddp_modes import check_mode
from distributed import all_reduce, assert_same_on_all_ranks, gathered, sliced, world
from hypothesis import given
from hypothesis import strategies as st
from layouts import specs

import qcomm
from qcomm.collectives import two_phase, two_phase_schedule
from qcomm.collectives.layout import BucketLayout, TensorSpec
from qcomm.collectives.telemetry import Telemetry
from qcomm.collectives.two_phase_schedule import LAG, MOST_SLICES, Step, cut_slices, schedule
from qcomm.collectives.two_phase_steps import MeanSteps

SLICES = 4
SIZES = st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=12)


@given(SIZES, st.integers(1, 7), st.integers(1, 4000))
def test_every_element_is_in_one_slice_of_its_chunk(sizes, world_size, slice_elements):
    layout = BucketLayout(specs(sizes), world_size)
    cut = cut_slices(layout, slice_elements)
    assert 1 <= len(cut) <= MOST_SLICES and all(len(part) == world_size for part in cut)
    if len(cut) > 1:
        assert layout.elements >= len(cut) * world_size * slice_elements
    elif MOST_SLICES > 1:
        assert layout.elements < 2 * world_size * slice_elements
    for owner, chunk in enumerate(layout.chunks):
        parts = [part[owner] for part in cut]
        # In the chunk's own order: what belongs to a tensor lies end to end, and so do the raw elements.
        pieces = [piece for part in parts for piece in part.pieces]
        covered = [(p.tensor, p.start + i, p.offset + i) for p in pieces for i in range(p.length)]
        assert covered == [(p.tensor, p.start + i, p.offset + i) for p in chunk.pieces for i in range(p.length)]
        raw = [offset + i for part in parts for offset, length in part.raw_runs for i in range(length)]
        assert raw == [offset + i for offset, length in chunk.raw_runs for i in range(length)]
        for part in parts:
            assert len({piece.tensor for piece in part.pieces}) == len(part.pieces)
            assert all(piece.length > 0 for piece in part.pieces)
            listed = [(p.offset, p.length) for p in part.pieces] + list(part.raw_runs)
            elements = [offset + i for offset, length in listed for i in range(length)]
            assert elements == [offset + i for offset, length in part.places for i in range(length)]
            assert part.count == len(elements)
        # Cuts, unlike ends, lie where the codec's lanes are full.
        assert all(part.compressed_count % 32 == 0 for part in parts if part.compressed_count and part is not parts[-1])
        counts = [part.count for part in parts]
        assert max(counts) - min(counts) <= 2 * 63


@pytest.mark.parametrize("count", range(12))
def test_the_schedule_has_every_step_once_and_in_time(count):
    order = schedule(count)
    assert sorted(order, key=str) == sorted(((step, n) for step in Step for n in range(count)), key=str)
    at = {step: [order.index((step, n)) for n in range(count)] for step in Step}
    for n in range(count):
        assert at[Step.ENCODE][n] < at[Step.REDUCE][n] < at[Step.DECODE][n]
        # While a message is under way there is something to do, as long as there are slices left.
        if n + LAG < count:
            assert at[Step.ENCODE][n + LAG] < at[Step.REDUCE][n] and at[Step.REDUCE][n + LAG] < at[Step.DECODE][n]
    assert all(positions == sorted(positions) for positions in at.values())


def data(rank, count, dtype=torch.float32):
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)).mul_(1 + rank).to(dtype)


def check_against_twin(rank, world_size, grid, count, dtype, slice_elements):
    inputs = [data(seed, count, dtype) for seed in range(world_size)]
    wire = torch.float64 if dtype == torch.float64 else torch.float32
    layout = BucketLayout([TensorSpec("tensor", 0, count, True)], world_size)
    number = len(cut_slices(layout, slice_elements))
    assert number > 1
    expected, bound = twin.mean([x.to(wire) for x in inputs], layout, grid, number)
    tensor, whole = inputs[rank].clone(), inputs[rank].clone()
    with sliced(slice_elements):
        all_reduce(tensor, grid, min_elements=0, num_threads=1 + rank % 2)
    assert torch.equal(tensor, expected.to(dtype)), (grid, count, dtype)
    assert_same_on_all_ranks(tensor)
    with sliced(count + 1):
        all_reduce(whole, grid, min_elements=0)
    _, whole_bound = twin.mean([x.to(wire) for x in inputs], layout, grid)
    exact = torch.stack([x.double() for x in inputs]).mean(0)
    for result, allowed in ((tensor, bound), (whole, whole_bound)):
        slack = twin.rounding([x.to(wire) for x in inputs], dtype)
        assert bool(((result.double() - exact).abs() <= allowed.double() + slack).all())


@contextmanager
def in_slices(elements=None):
    """More slices than the library cuts, so that every step has one before and one after it."""
    with mock.patch.object(two_phase_schedule, "MOST_SLICES", SLICES), sliced(elements) if elements else nullcontext():
        yield


@world(1, 2, 3, 5)
@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(step=1.0), qcomm.SigmaGrid(step=2.0), qcomm.RangeGrid(c=2)], ids=str)
def test_slices_equal_their_twin_and_keep_the_bound(rank, world_size, grid):
    with in_slices():
        check_twins(rank, world_size, grid)


def check_twins(rank, world_size, grid):
    for count, slice_elements in ((2000, 100), (4097, 250), (100_003, 7000)):
        check_against_twin(rank, world_size, grid, count, torch.float32, slice_elements)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_against_twin(rank, world_size, grid, 9999, dtype, 500)
    # Uncompressed, and not finite at one place.
    raw = data(rank, 20_000)
    with sliced(1000):
        all_reduce(raw, grid, min_elements=1 << 20)
        wanted = twin.sum_in_order([data(seed, 20_000) for seed in range(world_size)])
        assert torch.equal(raw, wanted)
        poisoned = data(rank, 20_000)
        poisoned[17_000] = torch.inf if rank == world_size - 1 else 1.0
        all_reduce(poisoned, grid)
    assert bool(poisoned.isnan().all())


@world(2, 3)
def test_a_large_tensor(rank, world_size):
    """As cut by default, on two threads."""
    check_against_twin(rank, world_size, qcomm.SigmaGrid(), 6_000_011, torch.float32, two_phase.SLICE_ELEMENTS)


@world(2, 3)
@pytest.mark.parametrize(
    ("grid", "error_feedback"),
    [(qcomm.SigmaGrid(step=1.0), True), (qcomm.RangeGrid(c=2), False)],
    ids=["sigma-feedback", "range"],
)
@pytest.mark.parametrize("mode", ["plain", "unused", "channels_last", "bfloat16", "mixed dtypes"])
def test_the_hook_loses_nothing_in_slices(rank, world_size, mode, grid, error_feedback):
    with in_slices(300):
        check_mode(rank, world_size, mode, grid, error_feedback)


ELEMENTS = 6 * 3 * 500  # of three ranks


def failing(step, number):
    """Makes a step fail in one slice on this rank."""
    original = getattr(MeanSteps, step)

    def fail(self, slice_number, *arguments):
        if slice_number == number:
            raise ZeroDivisionError(f"boom in {step} {number}")
        return original(self, slice_number, *arguments)

    return mock.patch.object(MeanSteps, step, fail)


def error_of(tensor):
    try:
        all_reduce(tensor)
    except qcomm.CollectiveError as error:
        return str(error)
    return None


def check_works(rank, world_size):
    tensor = torch.full((ELEMENTS,), float(rank))
    all_reduce(tensor)
    assert torch.equal(tensor, torch.full((ELEMENTS,), (world_size - 1) / 2))


@world(3)
def test_a_fault_in_any_step_of_any_slice_reaches_all_ranks(rank, world_size):
    phases = {"encode": "compressing its values", "reduce": "averaging its chunk", "decode": "decoding the result"}
    with in_slices(500):
        for step, phase in phases.items():
            for number in range(SLICES):
                with failing(step, number) if rank == 1 else nullcontext():
                    error = error_of(data(rank, ELEMENTS))
                # After its last message a rank cannot tell the others before the next collective.
                told = step != "decode" or number + LAG + 1 < SLICES
                if not told:
                    assert (error is not None) == (rank == 1)
                    error = error_of(data(rank, ELEMENTS))
                assert f"rank 1 failed while {phase}: ZeroDivisionError: boom in {step} {number}" in error, error
                check_works(rank, world_size)
        # Two ranks, in different steps: both are named, whoever was first.
        with {0: failing("reduce", 1), 2: failing("encode", 3)}.get(rank, nullcontext()):
            error = error_of(data(rank, ELEMENTS))
        assert "rank 0 failed while averaging" in error or "rank 2 failed while compressing" in error
        assert gathered(error) == [error] * world_size
        check_works(rank, world_size)


@world(3)
def test_ranks_that_cut_differently_are_told(rank, world_size):
    with in_slices(500 if rank == 1 else 1000), pytest.raises(qcomm.ConfigMismatchError) as caught:
        all_reduce(data(rank, ELEMENTS))
    assert "slices: 3 on ranks 0 2, 4 on rank 1" in str(caught.value)
    check_works(rank, world_size)


@world(2)
def test_the_timeline_shows_every_slice(rank, world_size):
    timeline = []
    with in_slices(500), mock.patch("qcomm.allreduce.call.Telemetry", return_value=Telemetry(timeline)):
        all_reduce(data(rank, 3 * world_size * 500))
    assert [event for _, event, _ in timeline] == [
        *["encode", "encode", "encode", "exchange_1", "reduce", "exchange_1", "reduce"],
        *["exchange_1", "reduce", "exchange_2", "decode", "exchange_2", "decode", "exchange_2", "decode", "done"],
    ]


@world(2)
@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_number_of_threads_that_is_none_is_refused(rank, world_size, bad, error):
    with pytest.raises(error, match="num_threads must be"):
        all_reduce(torch.ones(2000), num_threads=bad)
    with pytest.raises(error, match="num_threads must be"):
        qcomm.CompressionState(num_threads=bad)


@world(2)
def test_results_do_not_depend_on_threads(rank, world_size):
    results = []
    for threads in (1, 3, 1 + rank):
        results.append(data(rank, 1_500_000))
        all_reduce(results[-1], num_threads=threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
