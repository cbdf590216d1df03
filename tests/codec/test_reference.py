"""The executable specification and the native core agree: the same bytes, the same values, the same residuals."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import golden_cases
import pytest
import torch
from data import DISTRIBUTIONS, DTYPES, as_tensor, gaussian, laplace, sparse, student_t3
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm import reference
from qcomm.codec import _native, quantizers
from qcomm.codec._native import measure
from qcomm.codec.huffman import canonical_codes, code_lengths
from qcomm.codec.packet import Segment, encode
from qcomm.codec.quantize import Quantizer, plan
from qcomm.reference.static_tables import STATIC_TABLES

GRIDS = {
    "sigma 1 pair": qcomm.SigmaGrid(1.0, coding="pair"),
    "sigma 1 single": qcomm.SigmaGrid(1.0, coding="single"),
    "sigma 2 table": qcomm.SigmaGrid(2.0, coding="table"),
    "sigma 2 auto": qcomm.SigmaGrid(2.0),
    "sigma 0.2": qcomm.SigmaGrid(0.2),
    "sigma fine": qcomm.SigmaGrid(0.001),
    "range paper": qcomm.RangeGrid("paper"),
    "range c=2": qcomm.RangeGrid(c=2),
    "range 1": qcomm.RangeGrid(num_bits=1),
    "range 12": qcomm.RangeGrid(num_bits=12),
    "range 14": qcomm.RangeGrid(num_bits=14, reconstruction="center"),
}


def mirrored(
    values: torch.Tensor, q: Quantizer, residual: torch.Tensor | None = None, inv_scale: float = 1.0
) -> reference.ReferenceSegment:
    return reference.ReferenceSegment(
        values,
        int(q.grid),
        q.num_bits,
        int(q.coding),
        q.table,
        q.p0,
        q.p1,
        None if residual is None else residual.clone(),
        inv_scale,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_bytes_agree(grid: qcomm.codec.Grid, dtype: torch.dtype, make: Callable[..., torch.Tensor]) -> None:
    for n in (0, 1, 33, 300):
        x = make(n).to(dtype)
        quantizer = plan(measure(x), grid, x)
        packet = encode([Segment(x, quantizer)], block_steps=4)
        expected = reference.encode_packet([mirrored(x, quantizer)], [n], steps=4)
        assert packet.equal(as_tensor(expected)), (make.__name__, n)
        assert qcomm.decompress(packet).view(torch.uint8).equal(reference.decode_packet(expected).view(torch.uint8)), (
            make.__name__,
            n,
        )


@pytest.mark.parametrize("name", sorted(p.stem for p in golden_cases.FOLDER.glob("*.qcm")))
def test_the_specification_reads_the_golden_packets(name: str) -> None:
    packet = golden_cases.read(name)
    expected, found = qcomm.decompress(packet), reference.decode_packet(packet.numpy().tobytes())
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert golden_cases.fingerprint(found) == golden_cases.fingerprint(expected)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_several_segments_with_feedback_agree(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    inv_scale = data.draw(st.sampled_from([1.0, 0.25, 0.3]))
    segments, mirrors, residuals = [], [], []
    for i in range(data.draw(st.integers(1, 4))):
        make = data.draw(st.sampled_from(list(DISTRIBUTIONS.values())))
        x = make(data.draw(st.integers(0, 200)), i).to(dtype)
        residual = 0.2 * gaussian(x.numel(), i + 50) if data.draw(st.booleans()) else None
        kind = data.draw(st.sampled_from(["raw", "nan", *GRIDS]))
        if kind == "raw":
            quantizer = Quantizer.raw()
        elif kind == "nan":
            quantizer = Quantizer.constant(float("nan"))
        else:
            quantizer = plan(measure(x, residual, inv_scale), GRIDS[kind], x, residual, inv_scale)
        mirrors.append(mirrored(x, quantizer, residual, inv_scale))
        segments.append(Segment(x, quantizer, residual))
        residuals.append(residual)
    steps, checksum = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    packet = encode(segments, inv_scale=inv_scale, block_steps=steps, checksum=checksum)
    expected = reference.encode_packet(mirrors, [sum(s.values.numel() for s in segments)], steps, checksum)
    assert packet.equal(as_tensor(expected))
    for residual, mirror in zip(residuals, mirrors, strict=True):
        assert residual is None or (mirror.residual is not None and residual.equal(mirror.residual))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=700))
def test_checksums_agree(data: bytes) -> None:
    assert _native.checksum(as_tensor(data or b"\0")) == reference.checksum(data or b"\0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_choices_agree(dtype: torch.dtype, make: Callable[..., torch.Tensor]) -> None:
    """Raw, constant or a grid; bits; step; code: what an encoder decides before it writes."""
    for n in (0, 1, 2, 33, 700):
        x = make(n).to(dtype)
        for k, coding in ((1.0, "auto"), (2.0, "auto"), (0.3, "auto"), (0.05, "auto"), (0.001, "auto")):
            check_plan(qcomm.SigmaGrid(k, coding), reference.sigma_segment(x, k, coding))
        for k, coding in ((2.0, "single"), (1.5, "pair"), (0.05, "single"), (0.5, "table"), (0.5, "fixed")):
            check_plan(qcomm.SigmaGrid(k, coding), reference.sigma_segment(x, k, coding))
        check_plan(qcomm.RangeGrid("paper"), reference.range_segment(x, center=True))
        check_plan(qcomm.RangeGrid(c=2.5, entropy_bits=6, seed=9), reference.range_segment(x, None, 2.5, 6, seed=9))
        check_plan(qcomm.RangeGrid(max_bits=5), reference.range_segment(x, max_bits=5))
        check_plan(qcomm.RangeGrid(num_bits=13), reference.range_segment(x, 13))
        check_plan(qcomm.RangeGrid(c=3.25, bits="rms"), reference.range_segment(x, c=3.25, bits="rms"))
        check_plan(qcomm.RangeGrid("paper", bits="rms"), reference.range_segment(x, center=True, bits="rms"))


def check_plan(grid: qcomm.codec.Grid, found: reference.ReferenceSegment) -> None:
    source = found.values, found.residual, found.inv_scale
    q = plan(measure(*source), grid, *source)
    fields = (found.grid, found.num_bits, found.coding, found.table, found.p0, found.p1)
    assert tuple(q) == fields, (grid, found.values)


@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_choices_agree_where_the_arithmetic_ends(scale: float, dtype: torch.dtype) -> None:
    x = (gaussian(200).clamp(-1, 1).double() * scale).to(dtype)
    for edge in (x, x * 1e-270 if dtype == torch.float64 else x, torch.cat([x, x.new_tensor([float("inf")])])):
        check_plan(qcomm.SigmaGrid(1.0), reference.sigma_segment(edge, 1.0))
        check_plan(qcomm.RangeGrid(), reference.range_segment(edge))
        check_plan(qcomm.RangeGrid(bits="rms"), reference.range_segment(edge, bits="rms"))


@settings(max_examples=40, deadline=None)
@given(
    make=st.sampled_from([gaussian, student_t3, laplace, sparse]),
    n=st.integers(2, 3000) | st.just(40_000),  # where 3 % are more than 1024 values
    k=st.floats(2.0**-7, 16),
    inv_scale=st.sampled_from([1.0, 0.3]),
)
def test_codes_chosen_by_a_sample_agree(make: Callable[..., torch.Tensor], n: int, k: float, inv_scale: float) -> None:
    x, residual = make(n), 0.1 * gaussian(n, 4)
    check_plan(qcomm.SigmaGrid(k), reference.sigma_segment(x, k, "auto", residual, inv_scale))


@pytest.mark.parametrize("n", [600, 1_200_001])
def test_choices_turn_at_the_same_point(n: int) -> None:
    """From Gaussian values, which the static code suits, to almost only zeros, which it does not: bisected, so that
    little in a price or a sample could differ unseen. Of the many values the sample has as many as it may.
    """
    tame, wild = gaussian(n), sparse(n)

    def both(part: float) -> tuple[int, int]:
        x = torch.lerp(tame, wild, part)
        found = reference.sigma_code(x, x.dtype, 5, 0.5, 0.5)
        assert _native.sigma_code(x, None, 1.0, 5, 0.5, 0.5) == found, part
        return found

    low, high = 0.0, 1.0
    assert both(low) != both(high)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if both(middle) == both(0.0) else (low, middle)


def test_every_kind_of_code_is_chosen() -> None:
    """So that the agreement of choices means something: both static codes, both own ones, and none."""
    repeated = torch.tensor([1.0, -1.0, 3.0, -2.0] * 2000)  # pairs that a table of their own suits
    chosen = {
        reference.sigma_segment(x, k).coding * 1000 + min(reference.sigma_segment(x, k).table, 1)
        for x, k in ((laplace(300), 0.4), (gaussian(300), 2.0), (repeated, 1.0), (repeated, 0.3))
    }
    single, pair = 1000 * reference.packet.SINGLE, 1000 * reference.packet.PAIR
    assert chosen == {single, single + 1, pair, pair + 1}
    assert reference.sigma_segment(gaussian(99), 0.001).table == reference.packet.NO_TABLE


@settings(max_examples=100, deadline=None)
@given(k=st.floats(2.0**-12, 16) | st.integers(-26, 16).map(lambda j: 2.0 ** (j / 8)), pair=st.booleans())
def test_nearest_tables_agree(k: float, pair: bool) -> None:
    coding, num_bits = (quantizers.Coding.PAIR, 4) if pair else (quantizers.Coding.SINGLE, reference.sigma_num_bits(k))
    assert _native.nearest_static_table(coding, num_bits, k) == reference.nearest_table(int(coding), num_bits, k)


def test_static_tables_agree_and_follow_from_their_model() -> None:
    native = {
        number: (num_bits, coding == quantizers.Coding.PAIR, "".join(f"{n:x}" for n in lengths))
        for number, coding, num_bits, lengths in _native.static_tables()
    }
    assert native == STATIC_TABLES
    assert {t[0]: (t[1], t[2], t[4]) for t in table_maker().make_tables()} == STATIC_TABLES


@pytest.mark.parametrize(("k", "ratio"), [(0.25, 1.03), (0.5, 1.04), (1.0, 1.06), (1.4, 1.08), (2.0, 1.1)])
def test_static_tables_are_near_the_entropy(k: float, ratio: float) -> None:
    """Of the better code, on Gaussian and on Laplace data."""
    maker = table_maker()
    for cdf in (maker.gaussian_cdf, maker.laplace_cdf):
        costs = []
        for coding, num_bits in ((reference.packet.SINGLE, reference.sigma_num_bits(k)), (reference.packet.PAIR, 4)):
            number = reference.nearest_table(coding, num_bits, k)
            if coding == reference.packet.SINGLE or k >= 0.84:
                bits, pair, lengths = STATIC_TABLES[number]
                spent, entropy = maker.cost(k, cdf, bits, pair, lengths)
                costs.append(spent / entropy)
        assert 1 <= min(costs) <= ratio


def table_maker() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "make_static_tables.py"
    spec = importlib.util.spec_from_file_location("make_static_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_statistics_and_entropy_agree(make: Callable[..., torch.Tensor]) -> None:
    for n in (1, 31, 4096, 4097, 50_000):
        x = make(n)
        stats = measure(x)
        assert stats.sum_squares == reference.sum_squares(x)
        if stats.minimum < stats.maximum:
            for bits, fraction, seed in ((4, 0.03, 0), (8, 0.5, 7), (12, 1.0, 1)):
                expected = reference.entropy(x, stats.minimum, stats.maximum, bits, fraction, seed)
                assert qcomm.estimate_entropy(x, bits, fraction, seed=seed) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_logarithms_agree(v: int) -> None:
    assert _native.log2_fixed(v) == reference.log2_fixed(v)


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 8, 100, 10**6]), min_size=1, max_size=64).filter(any),
    limit=st.integers(6, 15),
)
def test_codes_agree(counts: list[int], limit: int) -> None:
    lengths = code_lengths(torch.tensor(counts), limit).tolist()
    assert lengths == reference.code_lengths(counts, limit)
    expected = reference.canonical_codes(lengths)
    assert canonical_codes(torch.tensor(lengths)).tolist() == [expected.get(s, 0) for s in range(len(counts))]


@settings(max_examples=150, deadline=None)
@given(gaps=st.lists(st.integers(0, 600), min_size=2, max_size=30))
def test_lists_of_lengths_survive_runs_of_unused_symbols(gaps: list[int]) -> None:
    counts: list[int] = []
    for i, gap in enumerate(gaps):
        counts += [0] * gap + [i + 1]
    counts += [0] * 5
    lengths = reference.code_lengths(counts, 15)
    data = reference.pack_lengths(lengths)
    assert reference.unpack_lengths(data + b"\xff" * 8, len(lengths)) == (lengths, len(data))


def test_every_mode_of_a_block_is_reached() -> None:
    """So that agreement above means something."""
    level = torch.tensor(0.5)
    segment = reference.ReferenceSegment(
        torch.empty(0), reference.grids.SIGMA, 4, reference.packet.SINGLE, 14, 0.0, float(level)
    )
    lengths = reference.packet.static_lengths(14)

    def mode(u: torch.Tensor, code: list[int] | None = lengths) -> int:
        symbols = reference.quantize(u, torch.float32, reference.grids.SIGMA, 4, 0.0, float(level)).tolist()
        return reference.packet.encode_block(u, symbols, segment, code)[1]

    assert mode(torch.zeros(99)) == reference.packet.BLOCK_CONSTANT
    assert mode(0.5 * gaussian(1000)) == reference.packet.BLOCK_CODED
    assert mode(0.5 * gaussian(1000), None) == reference.packet.BLOCK_FIXED
    assert mode(torch.linspace(-3, 3, 20)) == reference.packet.BLOCK_FIXED, (
        "windows cost more than 20 symbols of 4 bits"
    )
    assert mode(student_t3(1000) * 20) == reference.packet.BLOCK_RAW, "too many escapes"


def test_large_raw_segments_have_checksums_of_pieces() -> None:
    x = gaussian(16_385 * 2)
    expected = reference.encode_packet([reference.ReferenceSegment(x)], [x.numel()])
    assert encode([Segment(x, Quantizer.raw())], block_steps=256).equal(as_tensor(expected))
