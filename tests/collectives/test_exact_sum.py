"""exact_sum: the mean of what the ranks' values round to on one grid, to the bit, in whatever order it is added."""

import math
from contextlib import nullcontext
from unittest import mock

import pytest
import strategy_cases
import torch
from data import DISTRIBUTIONS
from distributed import assert_same_on_all_ranks, world
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decode_into, decompress, encode
from qcomm.codec.quantize import Quantizer
from qcomm.collectives import exact_sum
from qcomm.collectives.exact_sum_grid import SharedGrid, Summary, lossless_quantizer, share, summarize


def shared(grid, parts):
    summaries = [summarize(measure(x), grid, x, None, 1.0) for x in parts]
    return share(grid, summaries, parts[0].numel(), parts[0].dtype)


GRIDS = st.one_of(
    st.floats(2.0**-8, 8.0).map(lambda k: qcomm.SigmaGrid(step=k)),
    st.integers(0, 9).map(lambda c: qcomm.RangeGrid(c=c)),
)


@settings(max_examples=150, deadline=None)
@given(
    grid=GRIDS,
    names=st.lists(st.sampled_from(sorted(DISTRIBUTIONS)), min_size=1, max_size=9),
    count=st.integers(1, 3000),
    exponent=st.integers(-90, 90),
    outlier=st.sampled_from([0.0, 1e3, 1e5, 1e8]),
    shift=st.sampled_from([0.0, 1.0, 100.0]),
    wide=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_sums_are_exact_and_travel_without_loss(grid, names, count, exponent, outlier, shift, wide, order):
    dtype = torch.float64 if wide else torch.float32
    parts = [(DISTRIBUTIONS[name](count, seed).to(dtype) + shift) * 2.0**exponent for seed, name in enumerate(names)]
    parts[0][0] += outlier * 2.0**exponent
    found = shared(grid, parts)
    if not found.step:
        return
    on_grid = [found.round(x.clone()) for x in parts]
    eps = torch.finfo(dtype).eps
    for x, rounded in zip(parts, on_grid, strict=True):
        assert bool(((rounded - x).abs().double() <= found.step / 2 + 4 * eps * x.abs().max().double()).all())
    packets = [encode([Segment(x, lossless_quantizer(x, found.step, grid))]) for x in on_grid]
    levels = sum((x.double() / found.step).round().to(torch.int64) for x in on_grid)
    order.shuffle(packets)
    total = torch.empty(count, dtype=dtype)
    for number, packet in enumerate(packets):
        decode_into(packet, total, accumulate=number > 0)
    assert torch.equal(total.double(), levels.double() * found.step)
    assert torch.equal(decompress(encode([Segment(total, lossless_quantizer(total, found.step, grid))])), total)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "grid", [qcomm.SigmaGrid(1.0), qcomm.SigmaGrid(2.0, coding="pair"), qcomm.RangeGrid(c=2)], ids=str
)
def test_the_step_is_what_the_grid_asks_for_or_a_little_finer(name, grid):
    parts = [DISTRIBUTIONS[name](20_000, seed) for seed in range(3)]
    joint = torch.cat(parts)
    found = shared(grid, parts)
    if name == "constant":
        parts = [parts[0]] * 3
        assert shared(grid, parts) == SharedGrid(constant=float(parts[0][0]))
        return
    if isinstance(grid, qcomm.SigmaGrid):
        wanted = grid.step * float(joint.double().square().mean().sqrt())
    else:
        bits = max(grid.bits_for(qcomm.estimate_entropy(x, grid.entropy_bits, grid.sample_fraction)) for x in parts)
        wanted = float(joint.max() - joint.min()) / (2**bits - 1)
    assert wanted * (1 - 2.0**-7) <= found.step <= wanted * (1 + 1e-6)


def test_what_cannot_be_added_exactly_is_not_quantized():
    grid, one = qcomm.SigmaGrid(1.0), Summary(-1.0, 1.0, 100.0, 0.0)
    assert share(grid, [one] * 3, 100, torch.float32).step == 1.0
    # The further values reach, the fewer bits the step has, and float64 has more of them.
    far = [Summary(-1.0, 5e4, 3.1e4, 0.0)] * 3
    assert share(grid, far, 10_000, torch.float32).step == 1.75 != share(grid, far, 10_000, torch.float64).step
    for summaries in (
        [Summary(-1.0, 1e7, 100.0, 0.0)],
        [Summary(0.0, 1e-44, 1e-88, 0.0)],
        [Summary(-1e300, 1e300, math.inf, 0.0)],
        [Summary(1.0, -1.0, 0.0, 0.0)],
    ):
        assert share(grid, summaries, 100, torch.float32) == SharedGrid()
    assert share(qcomm.RangeGrid(), [Summary(-1e308, 1e308, 1.0, 0.0)], 100, torch.float64) == SharedGrid()
    assert math.isnan(share(grid, [one, Summary(math.nan, math.nan, math.nan, 0.0)], 100, torch.float32).constant)
    # What a peer says of its bits cannot take memory or time.
    assert share(qcomm.RangeGrid(), [Summary(0.0, 1.0, 1.0, 1e300)], 9, torch.float32).step == 2.0**-16


@world(1, 2, 3, 5)
@pytest.mark.parametrize("grid", strategy_cases.GRIDS, ids=str)
def test_equals_twin_within_the_bound_for_the_bytes_of_the_formula(rank, world_size, grid):
    strategy_cases.check_kinds(rank, world_size, "exact_sum", grid)


@world(5)
def test_the_order_of_ranks_does_not_matter(rank, world_size):
    """The bits of the result do not depend on which rank has which values, nor on what other tensors go along."""
    inputs = [strategy_cases.values("gauss", 20_000, seed) for seed in range(world_size)]
    results = []
    for turn in range(world_size):
        for grid in (qcomm.SigmaGrid(step=0.1), qcomm.RangeGrid(c=3)):
            tensor = inputs[(rank + turn) % world_size].clone()
            qcomm.all_reduce(tensor, grid, strategy="exact_sum")
            results.append(tensor)
    for turn in range(1, world_size):
        assert torch.equal(results[0], results[2 * turn]) and torch.equal(results[1], results[2 * turn + 1])
    assert_same_on_all_ranks(*results)


@world(2, 3)
def test_faults_and_mismatches_reach_all_ranks(rank, world_size):
    steps = {
        "_measure": "measuring its values",
        "_share": "measuring its values",
        "_encode_values": "quantizing its values on the shared grid",
        "_add_chunk": "averaging its chunk",
    }
    strategy_cases.check_faults(rank, world_size, "exact_sum", exact_sum, steps, last="_decode_means")
    # A rank that comes to another grid is found out before anything is added.
    other = mock.patch.object(exact_sum, "share", return_value=SharedGrid(step=0.125))
    with other if rank == 1 else nullcontext():
        error = strategy_cases.error_of("exact_sum")
    assert isinstance(error, qcomm.ConfigMismatchError) and "shared grids" in str(error), error
    # What cannot be a summary.
    wrong = encode([Segment(torch.ones(5), Quantizer.raw())])
    lie = mock.patch.object(exact_sum, "pack", return_value=wrong)
    with lie if rank == 1 else nullcontext():
        error = strategy_cases.error_of("exact_sum")
    assert isinstance(error, qcomm.CollectiveError), error
    assert "failed while measuring its values" in str(error), error
    strategy_cases.check_works(rank, world_size, "exact_sum")


@world(3)
def test_bytes_that_are_no_packet_are_refused(rank, world_size):
    for size, match in ((10_000_000, "rank 1 announced a packet of 10000000 bytes"), (100, "packet of rank 1")):
        for name in ("_encode_values", "_add_chunk"):
            part = torch.zeros(size, dtype=torch.uint8)
            lie = part if name == "_add_chunk" else [part] * world_size
            strategy_cases.check_lie(rank, world_size, "exact_sum", exact_sum, name, lie, match)


@world(3)
@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(), qcomm.RangeGrid(c=2)], ids=["sigma", "range"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_value_reaches_all_ranks(rank, world_size, poison, grid):
    tensor = strategy_cases.values("gauss", 5000, rank)
    if rank == world_size - 1:
        tensor[4321] = poison
    qcomm.all_reduce(tensor, grid, strategy="exact_sum")
    assert bool(tensor.isnan().all())
    assert_same_on_all_ranks(tensor)
