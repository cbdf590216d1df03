"""The executable specification and the native core agree: the same bytes, the same values, the same residuals."""

import golden_cases
import pytest
import torch
from data import DISTRIBUTIONS, DTYPES, gaussian, student_t3
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm import _native, reference
from qcomm.codec import Segment, encode
from qcomm.huffman import canonical_codes, code_lengths
from qcomm.quantize import Quantizer, plan
from qcomm.statistics import measure

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


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_bytes_agree(grid: qcomm.grids.Grid, dtype: torch.dtype) -> None:
    for make in DISTRIBUTIONS.values():
        for n in (0, 1, 33, 300):
            x = make(n).to(dtype)
            quantizer = plan(measure(x), grid, x)
            packet = encode([Segment(x, quantizer)], block_steps=4)
            expected = reference.encode_packet([mirrored(x, quantizer)], [n], steps=4)
            assert packet.equal(as_tensor(expected)), (make.__name__, n)
            assert (
                qcomm.decompress(packet).view(torch.uint8).equal(reference.decode_packet(expected).view(torch.uint8))
            ), (make.__name__, n)


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


def test_statistics_and_entropy_agree() -> None:
    for make in DISTRIBUTIONS.values():
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
