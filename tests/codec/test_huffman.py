"""Code lengths: optimal under the limit, complete, canonical, the same for the same counts."""

import heapq
import math
from itertools import pairwise

import pytest
import torch
from data import gaussian, laplace, student_t3, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm.codec import _native, quantizers
from qcomm.codec.huffman import canonical_codes, code_lengths
from qcomm.codec.quantize import quantize

counts_lists = st.lists(st.integers(0, 10**6), min_size=1, max_size=80).filter(any)


def unlimited_cost(counts: list[int]) -> int:
    """Bits of a plain Huffman code, from the merges alone."""
    heap = [c for c in counts if c]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


def best_limited_cost(counts: list[int], limit: int) -> int:
    """The least bits of any prefix code under a limit: dynamic programming over sorted counts and Kraft sums, for small
    alphabets.
    """
    used = sorted((c for c in counts if c), reverse=True)
    unit = 2**limit
    best = {0: 0}  # Kraft sum in units of 2^-limit -> bits
    for count in used:
        step: dict[int, int] = {}
        for kraft, bits in best.items():
            for length in range(1, limit + 1):
                total = kraft + unit // 2**length
                if total <= unit:
                    step[total] = min(step.get(total, math.inf), bits + count * length)  # type: ignore[type-var]
        best = step
    return min(best.values())


@settings(max_examples=200, deadline=None)
@given(counts_lists)
def test_lengths_are_huffmans_where_the_limit_does_not_bind(counts: list[int]) -> None:
    lengths = code_lengths(torch.tensor(counts))
    assert [n > 0 for n in lengths.tolist()] == [c > 0 for c in counts]
    limited = int((lengths.long() * torch.tensor(counts)).sum())
    assert limited >= unlimited_cost(counts)
    if int(lengths.max()) < 15:
        assert limited == unlimited_cost(counts)


@settings(max_examples=150, deadline=None)
@given(counts=st.lists(st.integers(1, 10**5), min_size=2, max_size=12), limit=st.integers(1, 7))
def test_lengths_are_optimal_under_the_limit(counts: list[int], limit: int) -> None:
    counts = counts[: 2**limit]
    lengths = code_lengths(torch.tensor(counts), limit).long()
    assert int(lengths.max()) <= limit
    assert int((lengths * torch.tensor(counts)).sum()) == best_limited_cost(counts, limit)


def test_fibonacci_counts_reach_the_limit_and_stay_complete() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    for limit in range(6, 16):
        lengths = code_lengths(torch.tensor(fibonacci), limit).double()
        assert int(lengths.max()) == limit
        assert float((2.0**-lengths).sum()) == 1.0


@settings(max_examples=100, deadline=None)
@given(counts_lists)
def test_codes_are_prefix_free_and_canonical(counts: list[int]) -> None:
    lengths = code_lengths(torch.tensor(counts)).tolist()
    codes = canonical_codes(torch.tensor(lengths)).tolist()
    words = {s: format(codes[s], f"0{n}b")[::-1] for s, n in enumerate(lengths) if n}  # as read: first bit first
    ordered = [words[s] for s in sorted(words, key=lambda s: (lengths[s], s))]
    assert ordered == sorted(ordered)
    assert all(not b.startswith(a) for a, b in pairwise(ordered))


def test_static_tables_are_complete_and_symmetric_in_number() -> None:
    tables = _native.static_tables()
    assert [t[0] for t in tables] == [*range(1, 23), *range(64, 74)]
    for number, coding, num_bits, lengths in tables:
        assert len(lengths) == (256 if coding == quantizers.Coding.PAIR else 2**num_bits), number
        assert min(lengths) >= 1 and max(lengths) <= 12, number
        assert sum(2.0**-n for n in lengths) == 1.0, number


@pytest.mark.parametrize("num_bits", range(4, 13))
@pytest.mark.parametrize("make", [gaussian, laplace, student_t3, uniform], ids=lambda f: f.__name__)
def test_payload_is_the_optimum_and_the_blocks_overhead(num_bits: int, make) -> None:  # type: ignore[no-untyped-def]
    """A coded block costs its codewords' bits and 8 to 134 bytes: info, windows that are 16 to 31 bits full, at most 16
    bits of start a lane.
    """
    x = make(300_000)
    grid = qcomm.RangeGrid(num_bits=num_bits)
    symbols, _ = quantize(x, grid)
    counts = torch.bincount(symbols, minlength=2**num_bits)
    lengths = code_lengths(counts, min(max(num_bits + 4, 12), 15))
    optimum = float((counts * lengths).sum()) / 8
    info = qcomm.inspect(qcomm.compress(x, grid))
    if info.coding == "fixed":
        assert info.payload_bytes == 4 * math.ceil(300_000 * num_bits / 32) <= optimum + 60 * 37 + 2**num_bits
    else:
        blocks = math.ceil(300_000 / (32 * info.block_steps))
        assert 8 * blocks <= info.payload_bytes - optimum <= 134 * blocks
    p = counts.double() / counts.sum()
    entropy = float(-(p[p > 0] * p[p > 0].log2()).sum())
    if entropy >= 2.2 and float(p.max()) <= 0.4:
        assert 8 * optimum / 300_000 <= 1.05 * entropy


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: code_lengths(torch.tensor([1.0])), TypeError, "counts must be"),
        (lambda: code_lengths(torch.tensor([[1]])), TypeError, "counts must be"),
        (lambda: code_lengths(torch.tensor([1, -1])), ValueError, "counts must not be negative"),
        (lambda: code_lengths(torch.ones(5, dtype=torch.int64), limit=2), ValueError, "limit=2 leaves room for 4"),
        (lambda: code_lengths(torch.ones(5, dtype=torch.int64), limit=16), ValueError, "limit must be in 1..15"),
        (lambda: canonical_codes(torch.tensor([1, 1, 1])), ValueError, "Kraft"),
        (lambda: canonical_codes(torch.tensor([16])), ValueError, "lengths must be"),
    ],
)
def test_bad_arguments_are_named(call, error, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        call()
