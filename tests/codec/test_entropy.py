"""Sampled entropy, the number of bits that follows from it, and the statistics under both."""

import math
from collections.abc import Callable

import pytest
import torch
from data import DISTRIBUTIONS, gaussian, one_hot, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm.codec import _native
from qcomm.codec._native import measure
from qcomm.codec.grids import sigma_num_bits
from qcomm.codec.plans_cuda import kernel_grid
from qcomm.codec.quantize import dequantize, plan, quantize
from qcomm.collectives import ReduceOptions
from qcomm.collectives_cuda import check_device_options


@pytest.mark.parametrize("v", [1, 2, 3, 5, 255, 256, 1023, 10**6, 2**31, 2**32 - 1])
def test_log2_is_right_to_the_last_of_its_24_bits(v: int) -> None:
    assert 0 <= math.log2(v) - _native.log2_fixed(v) / 2**24 < 2**-22


def test_log2_of_zero_is_zero() -> None:
    assert _native.log2_fixed(0) == 0


def full_entropy(x: torch.Tensor, num_bits: int) -> float:
    lo, hi = x.min().double(), x.max().double()
    q = ((x.double() - lo) * (2**num_bits / (hi - lo))).long().clamp(max=2**num_bits - 1)
    p = torch.bincount(q).double() / x.numel()
    return float(-(p[p > 0] * p[p > 0].log2()).sum())


@pytest.mark.parametrize("num_bits", [1, 4, 8, 12])
def test_sampling_everything_gives_the_entropy(num_bits: int) -> None:
    x = gaussian(20_000)
    estimate = qcomm.estimate_entropy(x, num_bits, sample_fraction=1.0)
    assert estimate == pytest.approx(full_entropy(x, num_bits), abs=1e-6)


def test_three_percent_are_enough() -> None:
    x = gaussian(307_328)  # the first layer of the paper's network
    assert qcomm.estimate_entropy(x) == pytest.approx(full_entropy(x, 4), abs=0.05)


def test_small_tensors_are_not_judged_by_a_handful_of_values() -> None:
    """Three percent of 500 values are 15; their entropy would be half a bit too small."""
    x = gaussian(500)
    assert qcomm.estimate_entropy(x) == pytest.approx(full_entropy(x, 4), abs=1e-6)


def test_entropy_of_the_simplest_tensors() -> None:
    assert qcomm.estimate_entropy(torch.full((50,), 3.0)) == 0.0
    assert qcomm.estimate_entropy(torch.empty(0)) == 0.0
    assert qcomm.estimate_entropy(torch.tensor([1.0, 2.0] * 512)) == 1.0
    assert 0.0 <= qcomm.estimate_entropy(one_hot(1000)) < 0.02


def test_seed_changes_the_sample_and_nothing_else() -> None:
    x = gaussian(200_000)
    estimates = {qcomm.estimate_entropy(x, seed=s) for s in range(5)}
    assert len(estimates) > 1 and max(estimates) - min(estimates) < 0.1
    assert qcomm.estimate_entropy(x, seed=3) == qcomm.estimate_entropy(x, seed=3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: qcomm.estimate_entropy(torch.tensor([1.0, math.nan])), "tensor must be finite"),
        (lambda: qcomm.estimate_entropy(gaussian(9), num_bits=0), "entropy_bits must be in 1..12"),
        (lambda: qcomm.estimate_entropy(gaussian(9), sample_fraction=2.0), "sample_fraction must be in"),
    ],
)
def test_bad_arguments_are_named(call, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("entropy", "c", "expected"),
    [(2.37, 6, 9), (4.0, 6, 10), (0.0, 6, 6), (2.0, 2, 4), (2.0001, 2, 5), (3.9, 5.5, 9), (0.0, 0, 1)],
)
def test_bits_follow_the_entropy(entropy: float, c: float, expected: int) -> None:
    assert qcomm.RangeGrid(c=c).bits_for(entropy) == expected


@pytest.mark.parametrize(
    ("rms", "c", "expected"),
    [(0.0, 6, 6), (1e-3, 6, 6), (0.41, 6, 6), (0.42, 6, 7), (1.0, 6, 7), (3.0, 6, 8), (1e30, 6, 10), (math.inf, 2, 6)],
)
def test_bits_follow_the_rms(rms: float, c: float, expected: int) -> None:
    """log2(G + 1) + c, rounded, at least c and at most c + M."""
    assert qcomm.RangeGrid(c=c, bits="rms").bits_for_rms(rms) == expected


def test_the_rms_of_a_tensor_chooses_its_bits() -> None:
    x, grid = gaussian(5000), qcomm.RangeGrid(c=3, bits="rms")
    bits = {scale: qcomm.inspect(qcomm.compress(x * scale, grid)).num_bits for scale in (1e-3, 1.0, 3.0, 1e6)}
    assert bits == {1e-3: 3, 1.0: 4, 3.0: 5, 1e6: 7}
    assert "bits='rms'" in grid.describe() and grid.max_num_bits == 7


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: qcomm.RangeGrid(bits="norm"), r"bits must be one of \('entropy', 'rms'\), got 'norm'"),
        (lambda: qcomm.RangeGrid(bits="rms", num_bits=4), "num_bits must be None with bits='rms'"),
        (lambda: qcomm.RangeGrid(bits="rms").bits_for(2.0), "bits must be 'entropy' where N follows from it"),
        (lambda: kernel_grid(qcomm.RangeGrid(bits="rms")), "bits must be 'entropy' on a CUDA device"),
        (
            lambda: check_device_options(ReduceOptions(qcomm.RangeGrid(bits="rms"))),
            "grid must have bits='entropy' with device_codec, got bits='rms'",
        ),
    ],
)
def test_wrong_bit_rules_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "expected"),
    [(uniform, 10), (one_hot, 7)],  # one_hot: H is just above 0, so ceil(H + 6) = 7
    ids=["ceiling", "floor"],
)
def test_c_is_the_floor_and_c_plus_m_the_ceiling(make: Callable[..., torch.Tensor], expected: int) -> None:
    quantizer = plan(measure(make(5000)), qcomm.RangeGrid("paper"), make(5000))
    assert quantizer.num_bits == expected


def test_a_code_from_the_wrong_end_would_be_noticed() -> None:
    """The paper's text counts levels from the maximum and decodes from the minimum: that returns the mirror image."""
    x = torch.tensor([0.0, 0.1, 0.2, 0.9, 1.0])
    symbols, quantizer = quantize(x, qcomm.RangeGrid(num_bits=8, reconstruction="center"))
    assert symbols.tolist() == [0, 25, 51, 230, 255]
    mirrored = dequantize(255 - symbols, quantizer)
    assert (
        float((mirrored - x).abs().max())
        > 0.9
        > 1 / 512
        >= float((dequantize(symbols, quantizer) - x).abs().max()) - 1e-6
    )


@pytest.mark.parametrize(
    ("step", "bits"),
    [(16.0, 4), (2.0, 4), (1.0, 4), (0.84, 4), (0.83, 5), (0.5, 5), (0.25, 6), (0.1, 7), (2.0**-12, 16)],
)
def test_sigma_alphabets_reach_six_and_a_quarter_sigma(step: float, bits: int) -> None:
    assert sigma_num_bits(step) == bits
    assert (2 ** (bits - 1) - 0.5) * step >= 6.25


def pairwise(sums: list[float]) -> float:
    while len(sums) > 1:
        sums = [sums[i] + sums[i + 1] if i + 1 < len(sums) else sums[i] for i in range(0, len(sums), 2)]
    return sums[0] if sums else 0.0


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 31, 32, 33, 4095, 4096, 4097, 12_300, 20_481]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def test_sum_of_squares_is_defined_to_the_bit(n: int, seed: int, dtype: torch.dtype) -> None:
    x = gaussian(n, seed).to(dtype)
    padded = torch.nn.functional.pad(x.double(), (0, -n % 4096)).reshape(-1, 128, 32)
    sums = []
    for block in padded:
        lanes = torch.zeros(32, dtype=torch.float64)
        for row in block:
            lanes = lanes + row * row
        for d in (16, 8, 4, 2, 1):
            lanes = lanes[:d] + lanes[d : 2 * d]
        sums.append(float(lanes[0]))
    stats = measure(x)
    assert stats.sum_squares == pairwise(sums)
    if n:
        assert (stats.minimum, stats.maximum) == (float(x.min()), float(x.max())) and stats.finite


def test_statistics_include_residual_and_scale() -> None:
    x, r = gaussian(5000), gaussian(5000, 1)
    assert measure(x, r, 0.25) == measure(x * 0.25 + r)


@pytest.mark.parametrize("at", [0, 17, 4095, 4096, 4999])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_non_finite_values_are_found_anywhere(bad: float, at: int, dtype: torch.dtype) -> None:
    x = gaussian(5000).to(dtype)
    x[at] = bad
    assert not measure(x).finite


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_sampling_of_every_distribution_stays_inside(make: Callable[..., torch.Tensor]) -> None:
    assert 0.0 <= qcomm.estimate_entropy(make(40_000), 4) <= 4.0
