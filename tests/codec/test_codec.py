"""compress and decompress: every element within its grid's bound, sizes within theirs, all shapes and dtypes."""

import math
from collections.abc import Callable

import pytest
import torch
from data import BLOCK, DISTRIBUTIONS, DTYPES, SIZES, gaussian, laplace, ulp
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm.codec import _native
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantize import Quantizer, dequantize, plan, quantize

GRIDS = {
    "sigma 0.0005": qcomm.SigmaGrid(0.0005),
    "sigma 0.05": qcomm.SigmaGrid(0.05),
    "sigma 0.5": qcomm.SigmaGrid(0.5),
    "sigma 1": qcomm.SigmaGrid(1.0),
    "sigma 1 single": qcomm.SigmaGrid(1.0, coding="single"),
    "sigma 2 pair": qcomm.SigmaGrid(2.0, coding="pair"),
    "sigma 2 table": qcomm.SigmaGrid(2.0, coding="table"),
    "sigma 1 fixed": qcomm.SigmaGrid(1.0, coding="fixed"),
    "sigma 16": qcomm.SigmaGrid(16.0),
    "range paper": qcomm.RangeGrid("paper"),
    "range compact": qcomm.RangeGrid("compact"),
    "range c=2": qcomm.RangeGrid(c=2),
    "range 1 bit": qcomm.RangeGrid(num_bits=1),
    "range 12 bits": qcomm.RangeGrid(num_bits=12),
    "range 16 bits": qcomm.RangeGrid(num_bits=16, reconstruction="center"),
}


def assert_within_bound(x: torch.Tensor, decoded: torch.Tensor, step: float, ulps: float = 2.5) -> None:
    """Half a step and a few ulps: half of one where the result is rounded, and on a sigma grid two for 1 / step and the
    quotient in T.
    """
    if x.numel() == 0:
        return
    error = (decoded.double() - x.double()).abs()
    slack = ulps * torch.maximum(ulp(x), ulp(decoded)) + step * 2**-40
    assert bool((error <= step / 2 + slack).all()), (
        f"{float((error - step / 2 - slack).max())} above the bound, step {step}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_element_is_within_its_bound(grid: qcomm.codec.Grid, dtype: torch.dtype) -> None:
    cases = [(make, n) for make in DISTRIBUTIONS.values() for n in (1000, BLOCK + 1)] + [(gaussian, n) for n in SIZES]
    for make, n in cases:
        x = make(n).to(dtype)
        packet = qcomm.compress(x, grid)
        decoded = qcomm.decompress(packet)
        assert decoded.dtype == x.dtype and decoded.shape == x.shape, (make.__name__, n)
        info = qcomm.inspect(packet).segments[0]
        assert_within_bound(x, decoded, info.step, ulps=0.5 if info.grid.startswith("range") else 2.5)


@pytest.mark.parametrize("n", [1, 33, 1000, BLOCK + 1, 300_000])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_size_never_exceeds_fixed_width_or_raw(
    grid: qcomm.codec.Grid, n: int, make: Callable[..., torch.Tensor]
) -> None:
    x = make(n)
    info = qcomm.inspect(qcomm.compress(x, grid))
    assert info.total_bytes <= 4 * n + 128
    if info.coding in ("fixed", "single", "pair"):
        symbols, quantizer = quantize(x, grid)
        escapes = int((symbols == 2**quantizer.num_bits - 1).sum()) if info.grid == "sigma" else 0
        assert info.total_bytes <= 1.005 * info.num_bits * n / 8 + 6 * escapes + 128, info


@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(1.0), qcomm.RangeGrid(c=2)], ids=str)
def test_ten_million_values(grid: qcomm.codec.Grid) -> None:
    x = laplace(10_000_000)
    packet = qcomm.compress(x, grid)
    assert_within_bound(x, qcomm.decompress(packet), qcomm.inspect(packet).segments[0].step)
    assert packet.numel() <= 2.2 * x.numel() / 8


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 4), (1, 1, 1, 5), (7, 0), (2,) * 9, (1,) * 64])
def test_shapes_survive(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    decoded = qcomm.decompress(qcomm.compress(x, qcomm.RangeGrid(num_bits=12)))
    assert decoded.shape == x.shape


@pytest.mark.parametrize(
    "view_of",
    [
        lambda x: x.t(),
        lambda x: x[::2, 3:50],
        lambda x: x[:, :1].expand(60, 5),
        lambda x: x.reshape(3, 4, 5, 100).contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "sliced", "expanded", "channels_last"],
)
def test_views_are_read_through_their_strides(view_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    view = view_of(gaussian(6000).reshape(60, 100))
    same = qcomm.decompress(qcomm.compress(view)) == qcomm.decompress(qcomm.compress(view.contiguous()))
    assert bool(same.all())


def test_a_lazily_negated_view_keeps_its_sign() -> None:
    x = gaussian(5000)
    negated = torch._neg_view(x)
    assert qcomm.decompress(qcomm.compress(negated)).equal(-qcomm.decompress(qcomm.compress(x)))
    with pytest.raises(ValueError, match="resolve_neg"):
        decode_into(qcomm.compress(x), negated)


def test_gradients_flow_around_the_codec_not_through_it() -> None:
    x = gaussian(100).requires_grad_()
    assert not qcomm.decompress(qcomm.compress(x)).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(1.0), qcomm.RangeGrid()], ids=["sigma", "range"])
def test_non_finite_tensors_travel_exactly(grid: qcomm.codec.Grid, bad: float, dtype: torch.dtype) -> None:
    x = gaussian(1001).to(dtype)
    x[500] = bad
    packet = qcomm.compress(x, grid)
    assert qcomm.inspect(packet).coding == "raw"
    assert qcomm.decompress(packet).view(torch.uint8).equal(x.view(torch.uint8))


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([1e-45, -1e-45, 0.0] * 50),
        torch.tensor([3.4e38, -3.4e38, 1.0] * 50),
        torch.tensor([65504.0, -65504.0, 65000.0] * 50, dtype=torch.float16),
        torch.tensor([1.7e308, -1.7e308, 1.0] * 50, dtype=torch.float64),
        torch.tensor([1e-310, 2e-310, 0.0] * 50, dtype=torch.float64),
        torch.tensor([1.0, 1.0 + 2**-23] * 50),
        torch.tensor([1e30, 1e30 * (1 + 2**-22)] * 50),
        torch.tensor([-0.0, 0.0] * 50),
    ],
    ids=lambda x: f"{x[0].item():g} {x.dtype}",
)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_extreme_magnitudes_stay_finite_and_bounded(grid: qcomm.codec.Grid, x: torch.Tensor) -> None:
    packet = qcomm.compress(x, grid)
    decoded = qcomm.decompress(packet)
    assert bool(decoded.isfinite().all())
    assert_within_bound(x, decoded, qcomm.inspect(packet).segments[0].step)


@pytest.mark.parametrize("step", [0.02, 1.0, 2.0])
def test_signs_and_zeros_are_kept(step: float) -> None:
    x = torch.cat([gaussian(5000), torch.zeros(3000), -torch.zeros(3000)])
    decoded = qcomm.decompress(qcomm.compress(x, qcomm.SigmaGrid(step)))
    assert not ((decoded * x) < 0).any() and not decoded[5000:].any()


@pytest.mark.parametrize("n", [1, 31, 1000, BLOCK + 1])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_random_bits_need_hardly_more_room_than_they_take(grid: qcomm.codec.Grid, n: int) -> None:
    bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64, generator=torch.Generator().manual_seed(n))
    x = bits.to(torch.int32).view(torch.float32)
    for values in (x, torch.where(x.isfinite(), x, torch.zeros(()))):
        packet = qcomm.compress(values, grid)
        decoded = qcomm.decompress(packet)
        assert packet.numel() <= values.nbytes + 128
        assert torch.equal(decoded.isfinite(), values.isfinite())


@pytest.mark.parametrize("num_bits", [2, 4, 6, 8])
def test_a_hundred_exchanges_of_endpoint_levels_change_nothing(num_bits: int) -> None:
    grid = qcomm.RangeGrid(num_bits=num_bits)
    first = qcomm.decompress(qcomm.compress(gaussian(20_000), grid))
    x = first
    for _ in range(100):
        x = qcomm.decompress(qcomm.compress(x, grid))
    assert x.equal(first)


@pytest.mark.parametrize("num_bits", [4, 6, 8, 9])
def test_a_hundred_exchanges_of_bin_centers_shrink_the_range(num_bits: int) -> None:
    x = gaussian(20_000).double()
    grid = qcomm.RangeGrid(num_bits=num_bits, reconstruction="center")
    first = float(x.max() - x.min())
    for _ in range(100):
        x = qcomm.decompress(qcomm.compress(x, grid))
    assert float(x.max() - x.min()) / first == pytest.approx((1 - 2.0**-num_bits) ** 100, rel=1e-9)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_same_input_gives_the_same_bytes(grid: qcomm.codec.Grid) -> None:
    x = laplace(100_000)
    assert qcomm.compress(x, grid).equal(qcomm.compress(x.clone(), grid))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=0, max_size=300),
    grid=st.sampled_from(list(GRIDS.values())),
    steps=st.integers(1, 9),
    checksum=st.booleans(),
)
def test_any_floats_round_trip_within_bound(
    values: list[float], grid: qcomm.codec.Grid, steps: int, checksum: bool
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    packet = qcomm.compress(x, grid, block_steps=steps, checksum=checksum)
    info = qcomm.inspect(packet)
    assert info.block_steps == steps and info.checksums == checksum
    assert_within_bound(x, qcomm.decompress(packet), info.segments[0].step)


def test_segments_with_error_feedback_lose_nothing() -> None:
    """u = decoded + residual, element by element, on every kind of segment."""
    parts = [gaussian(10_000), laplace(BLOCK + 5, 1), torch.zeros(40), student(777), gaussian(3, 2)]
    grids = [
        qcomm.SigmaGrid(2.0),
        qcomm.RangeGrid(c=2),
        qcomm.SigmaGrid(1.0),
        qcomm.SigmaGrid(2.0, coding="table"),
        qcomm.RangeGrid(num_bits=16),
    ]
    residuals = [0.1 * gaussian(p.numel(), 9) for p in parts]
    inv_scale = 0.37
    exact = [p * torch.tensor(inv_scale) + r for p, r in zip(parts, residuals, strict=True)]
    quantizers = [
        plan(measure(p, r, inv_scale), g, p, r, inv_scale) for p, r, g in zip(parts, residuals, grids, strict=True)
    ]
    packet = encode([Segment(*s) for s in zip(parts, quantizers, residuals, strict=True)], inv_scale=inv_scale)
    decoded = qcomm.decompress(packet).split([p.numel() for p in parts])
    for u, value, residual, quantizer in zip(exact, decoded, residuals, quantizers, strict=True):
        assert residual.equal(u - value), quantizer
        assert_within_bound(u, value, quantizer.step)


def student(n: int) -> torch.Tensor:
    return DISTRIBUTIONS["student_t3"](n)


def test_feedback_of_raw_and_nan_segments() -> None:
    x, kept, sent = gaussian(100), gaussian(100, 1), gaussian(100, 2)
    before = kept.clone()
    packet = encode([Segment(x, Quantizer.constant(math.nan), kept), Segment(x, Quantizer.raw(), sent)])
    decoded = qcomm.decompress(packet)
    assert bool(decoded[:100].isnan().all()) and kept.equal(before), "a NaN tensor must leave its residual alone"
    assert decoded[100:].equal(x + gaussian(100, 2)) and not bool(sent.any()), "a raw tensor takes its residual along"


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_accumulate_adds_what_decoding_gives(grid: qcomm.codec.Grid) -> None:
    x, total = student(30_000), gaussian(30_000, 3)
    packet = qcomm.compress(x, grid)
    expected = total + qcomm.decompress(packet)
    summed = total.clone()
    decode_into(packet, summed, accumulate=True)
    assert summed.equal(expected)


def test_inspect_adds_up() -> None:
    x = gaussian(100_000)
    packet = qcomm.compress(x, qcomm.RangeGrid(c=2))
    info = qcomm.inspect(packet)
    assert info.total_bytes == packet.numel() == info.header_bytes + info.payload_bytes
    assert info.bits_per_element == pytest.approx(8 * packet.numel() / 100_000)
    symbols, quantizer = quantize(x, qcomm.RangeGrid(c=2))
    p = torch.bincount(symbols).double() / symbols.numel()
    assert info.num_bits == quantizer.num_bits
    assert info.entropy_bits == pytest.approx(float(-(p[p > 0] * p[p > 0].log2()).sum()), abs=1e-9)


@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(1.0), qcomm.RangeGrid(num_bits=4)], ids=["sigma", "range"])
@pytest.mark.parametrize("stray", [-(2**31), -1, 16, 2**31 - 1])
def test_symbols_outside_the_alphabet_are_refused(grid: qcomm.codec.Grid, stray: int) -> None:
    symbols, quantizer = quantize(gaussian(1000), grid)
    assert quantizer.num_bits == 4
    symbols[[0, -1]] = torch.tensor([0, 15], dtype=torch.int32)  # both ends are symbols
    assert dequantize(symbols, quantizer).isfinite().all()
    symbols[500] = stray
    with pytest.raises(ValueError, match=rf"symbols must be in 0\.\.15 for 4 bits, got {stray}$"):
        dequantize(symbols, quantizer)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: qcomm.compress([1.0]), TypeError, "tensor must be a torch.Tensor"),
        (lambda: qcomm.compress(torch.zeros(3, dtype=torch.int32)), TypeError, "tensor must be float32"),
        (lambda: qcomm.compress(torch.zeros(3, dtype=torch.complex64)), TypeError, "view_as_real"),
        (lambda: qcomm.compress(torch.eye(3).to_sparse()), TypeError, "to_dense"),
        (lambda: qcomm.compress(torch.zeros(3, device="meta")), ValueError, "device meta"),
        (lambda: qcomm.compress(gaussian(9), block_steps=0), ValueError, "block_steps must be in 1..512"),
        (lambda: qcomm.compress(gaussian(9), block_steps=2.5), TypeError, "block_steps must be an int"),
        (lambda: qcomm.compress(gaussian(9), "sigma"), TypeError, "grid must be a SigmaGrid"),
        (lambda: qcomm.SigmaGrid(0.0), ValueError, "step must be in"),
        (lambda: qcomm.SigmaGrid(-1.0), ValueError, "step must be in"),
        (lambda: qcomm.SigmaGrid(math.nan), ValueError, "step must be in"),
        (lambda: qcomm.SigmaGrid("1"), TypeError, "step must be a real number"),
        (lambda: qcomm.SigmaGrid(coding="arithmetic"), ValueError, "coding must be one of"),
        (lambda: qcomm.SigmaGrid(0.5, coding="pair"), ValueError, "step >= 0.84"),
        (lambda: qcomm.RangeGrid(num_bits=0), ValueError, "num_bits must be in 1..16"),
        (lambda: qcomm.RangeGrid(num_bits=17), ValueError, "num_bits must be in 1..16"),
        (lambda: qcomm.RangeGrid(c=-1), ValueError, "c must be in"),
        (lambda: qcomm.RangeGrid(c=math.nan), ValueError, "c must be in"),
        (lambda: qcomm.RangeGrid("papers"), ValueError, "preset must be None, 'paper' or 'compact', got 'papers'$"),
        (lambda: qcomm.RangeGrid(2), ValueError, "are written RangeGrid.c=2"),
        (lambda: qcomm.RangeGrid([2]), ValueError, "preset must be None"),
        (lambda: qcomm.RangeGrid("paper", c=2), ValueError, "contradicts preset"),
        (lambda: qcomm.RangeGrid(reconstruction="middle"), ValueError, "reconstruction must be one of"),
        (lambda: qcomm.RangeGrid(sample_fraction=0.0), ValueError, "sample_fraction must be in"),
        (lambda: qcomm.RangeGrid(entropy_bits=13), ValueError, "entropy_bits must be in 1..12"),
        (lambda: qcomm.decompress(b"QCMM"), TypeError, "packet must be a 1-D uint8 tensor"),
        (
            lambda: qcomm.decompress(torch.zeros(2, 2, dtype=torch.uint8)),
            TypeError,
            "packet must be a 1-D uint8 tensor",
        ),
        (lambda: encode([]), ValueError, "segments must not be empty"),
        (
            lambda: encode([Segment(gaussian(4), Quantizer.raw())], inv_scale=0.0),
            ValueError,
            "inv_scale must be positive",
        ),
        (
            lambda: encode([Segment(gaussian(4), Quantizer.raw(), torch.zeros(3))]),
            ValueError,
            "residual must be contiguous float32 of 4",
        ),
        (
            lambda: encode([Segment(gaussian(4).half(), Quantizer.raw(), torch.zeros(4))]),
            TypeError,
            "float32 or float64 where a residual",
        ),
        (
            lambda: encode([Segment(gaussian(4), Quantizer.raw()), Segment(gaussian(4).double(), Quantizer.raw())]),
            TypeError,
            "one dtype",
        ),
        (lambda: encode([Segment(gaussian(4), Quantizer.raw())], shape=[5]), ValueError, "shape must have 4 elements"),
        (lambda: decode_into(qcomm.compress(gaussian(9)), torch.empty(8)), ValueError, "element count"),
        (lambda: decode_into(qcomm.compress(gaussian(9)), torch.empty(9, dtype=torch.float64)), ValueError, "dtype"),
        (
            lambda: decode_into(qcomm.compress(gaussian(9).half()), torch.empty(9).half(), accumulate=True),
            ValueError,
            "accumulate needs",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_arguments_are_named(call, error, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()


def test_bad_arguments_leave_the_residual_alone() -> None:
    residual = gaussian(100)
    before = residual.clone()
    bad = plan(measure(gaussian(100)), qcomm.SigmaGrid(1.0), gaussian(100))._replace(table=200)
    with pytest.raises(ValueError, match="static table"):
        encode(
            [
                Segment(gaussian(100), plan(measure(gaussian(100)), qcomm.SigmaGrid(), gaussian(100)), residual),
                Segment(gaussian(100), bad),
            ]
        )
    assert residual.equal(before)


@pytest.mark.parametrize("version", qcomm.cpu_features())
def test_a_range_that_does_not_cover_the_values_clamps_them(version: str) -> None:
    """As when a tensor changes between being measured and being encoded."""
    x = torch.linspace(-3.0, 3.0, 5000)
    quantizer = plan(measure(x[2000:3000]), qcomm.RangeGrid(num_bits=6), x[2000:3000])
    with _native.using_cpu_feature(version):
        decoded = qcomm.decompress(encode([Segment(x, quantizer)]))
    assert decoded.min() == decoded[0] >= x[2000] - 0.01 and decoded.max() == decoded[-1] <= x[2999] + 0.01
    assert float((decoded - x)[2000:3000].abs().max()) <= quantizer.step / 2 + 1e-6
