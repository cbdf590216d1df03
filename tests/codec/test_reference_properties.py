"""The executable specification by itself: properties that follow from mathematics and docs/format.md."""

import heapq
from collections.abc import Callable
from itertools import combinations_with_replacement

import pytest
import torch
from data import DISTRIBUTIONS, DTYPES, gaussian, student_t3, ulp
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm import reference

STEPS = 2
BLOCK_SIZES = (0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)  # around blocks of single symbols and of pairs


@settings(max_examples=200, deadline=None)
@given(
    make=st.sampled_from(list(DISTRIBUTIONS.values())),
    n=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["auto", "single", "pair", "table", "fixed", "center", "endpoint"]),
    k=st.sampled_from([0.9, 1.0, 2.0, 16.0]),
    num_bits=st.integers(1, 16) | st.none(),
)
def test_values_come_back_within_half_a_step(
    make: Callable[..., torch.Tensor], n: int, dtype: torch.dtype, kind: str, k: float, num_bits: int | None
) -> None:
    x = make(n).to(dtype)
    if kind in ("center", "endpoint"):
        segment = reference.range_segment(x, num_bits, center=kind == "center")
    else:
        segment = reference.sigma_segment(x, k, kind)
    packet = reference.encode_packet([segment], [n], STEPS)
    found = reference.decode_packet(packet)
    assert found.dtype == dtype and found.shape == x.shape
    error = (found.double() - x.double()).abs()
    if segment.grid == reference.grids.NONE:
        assert not error.any()
    elif n:
        step = mirrored_step(segment)
        arithmetic = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
        rounding = 2 ** (segment.num_bits + 2) * arithmetic * step + ulp(x.abs().max().reshape(1))
        assert float(error.max()) <= step / 2 + float(rounding)


def mirrored_step(segment: reference.ReferenceSegment) -> float:
    if segment.grid == reference.grids.SIGMA:
        return segment.p1
    return reference.grids.range_levels(segment.grid, segment.num_bits, segment.p0, segment.p1)[1]


@settings(max_examples=60, deadline=None)
@given(n=st.sampled_from(BLOCK_SIZES[2:]), k=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 9))
def test_residual_is_what_was_lost(n: int, k: float, seed: int) -> None:
    x, residual = student_t3(n, seed), 0.3 * gaussian(n, seed)
    segment = reference.sigma_segment(x, k, "auto", residual.clone(), 0.5)
    u = segment.u()
    assert u.equal(x * 0.5 + residual)
    found = reference.decode_packet(reference.encode_packet([segment], [n], STEPS))
    assert segment.residual is not None and segment.residual.equal(u - found)
    symbols = reference.quantize(u, u.dtype, segment.grid, segment.num_bits, 0.0, segment.p1)
    assert not segment.residual[symbols == 2**segment.num_bits - 1].any()


def test_a_nan_constant_travels_and_leaves_the_residual() -> None:
    residual = gaussian(40)
    kept = residual.clone()
    segment = reference.ReferenceSegment(
        gaussian(40), coding=reference.packet.CONSTANT, p0=float("nan"), residual=residual
    )
    packet = reference.encode_packet([segment, reference.sigma_segment(gaussian(9), 1.0)], [49])
    found = reference.decode_packet(packet)
    assert found[:40].isnan().all() and found[40:].isfinite().all() and residual.equal(kept)


def best_limited_cost(counts: list[int], limit: int) -> int:
    """By trying all lengths: the larger count never has the longer codeword."""
    descending = sorted(counts, reverse=True)
    return min(
        sum(c * n for c, n in zip(descending, lengths, strict=True))
        for lengths in combinations_with_replacement(range(1, limit + 1), len(counts))
        if sum(2.0**-n for n in lengths) <= 1
    )


@settings(max_examples=150, deadline=None)
@given(counts=st.lists(st.integers(1, 300), min_size=2, max_size=7), limit=st.integers(1, 6))
def test_code_lengths_are_optimal_under_the_limit(counts: list[int], limit: int) -> None:
    counts = counts[: 2**limit]
    lengths = reference.code_lengths(counts, limit)
    assert sum(2.0**-n for n in lengths) == 1 and max(lengths) <= limit
    assert sum(c * n for c, n in zip(counts, lengths, strict=True)) == best_limited_cost(counts, limit)


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 10**6), min_size=2, max_size=16).filter(lambda c: sum(map(bool, c)) > 1))
def test_code_lengths_are_those_of_huffman_where_no_limit_binds(counts: list[int]) -> None:
    heap, cost = [c for c in counts if c], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        heapq.heappush(heap, merged := heapq.heappop(heap) + heapq.heappop(heap))
        cost += merged
    lengths = reference.code_lengths(counts, 15)
    assert sum(c * n for c, n in zip(counts, lengths, strict=True)) == cost
    assert [n > 0 for n in lengths] == [c > 0 for c in counts]


def test_codes_by_hand() -> None:
    assert reference.code_lengths([0, 7, 0], 5) == [0, 1, 0]
    assert reference.code_lengths([1, 1, 1, 1, 4], 4) == [3, 3, 3, 3, 1]
    assert reference.canonical_codes([2, 1, 3, 3]) == {1: 0b0, 0: 0b01, 2: 0b011, 3: 0b111}


@pytest.mark.parametrize(
    ("unused", "nibbles"),
    [
        (0, "11"),
        (1, "1001"),
        (15, "10e1"),
        (16, "10f001"),
        (271, "10fff1"),
        (272, "10fff001"),
        (300, "10fff0fd01"),
    ],
)
def test_lists_of_lengths_by_hand(unused: int, nibbles: str) -> None:
    padded = nibbles + "0" * (-len(nibbles) % 8)
    expected = bytes(int(padded[i + 1] + padded[i], 16) for i in range(0, len(padded), 2))
    assert reference.pack_lengths([1, *[0] * unused, 1, 0, 0]) == expected
    assert reference.unpack_lengths(expected, unused + 4) == ([1, *[0] * unused, 1, 0, 0], len(expected))


@pytest.mark.parametrize(
    "nibbles", ["", "1", "10", "10f", "10f1", "12100000", "33333330", "10710000", "10e00000", "12345660"]
)
def test_lists_that_are_no_code_are_refused(nibbles: str) -> None:
    padded = nibbles + "0" * (len(nibbles) % 2)
    data = bytes(int(padded[i + 1] + padded[i], 16) for i in range(0, len(padded), 2))
    with pytest.raises(qcomm.PacketError):
        reference.unpack_lengths(data, 8, 5)


def test_the_tail_of_pairs_is_filled_with_zero() -> None:
    assert reference.packet.codewords_of([1, 2, 3], reference.packet.PAIR) == [0x21, 0x73]


def test_squares_are_added_in_the_order_of_the_format() -> None:
    x = student_t3(3 * 4096 + 77) * 1e3
    values = x.double().tolist() + [0.0] * (-x.numel() % 4096)
    sums = []
    for begin in range(0, len(values), 4096):
        lanes = [0.0] * 32
        for i, v in enumerate(values[begin : begin + 4096]):
            lanes[i % 32] += v * v
        for d in (16, 8, 4, 2, 1):
            lanes = [lanes[j] + lanes[j + d] for j in range(d)]
        sums += lanes
    assert reference.sum_squares(x) == (sums[0] + sums[1]) + (sums[2] + sums[3])
    assert reference.sum_squares(x[: 2 * 4096 + 1]) == (sums[0] + sums[1]) + float(x[2 * 4096]) ** 2
    assert reference.sum_squares(x[:0]) == 0.0


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 10**7), fraction=st.sampled_from([1e-6, 0.03, 1.0]), seed=st.integers(0, 2**32 - 1))
def test_samples_come_from_their_strides(count: int, fraction: float, seed: int) -> None:
    n = min(reference.grids.sample_size(count, fraction), 2000)
    assert n >= min(count, 1024)
    indices = reference.sample_indices(count, n, seed)
    assert [i // (count // n) for i in indices] == list(range(n))
