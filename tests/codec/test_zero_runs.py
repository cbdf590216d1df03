"""Zero runs: the core writes and reads the bytes of the reference, for any density, segments and dtype."""

import struct
import subprocess
from collections.abc import Iterator, Sequence

import pytest
import torch
from data import gaussian, laplace, student_t3
from hypothesis import given, settings
from hypothesis import strategies as st
from native_build import build, skip_unless_built

import qcomm
from qcomm import reference
from qcomm.codec import _native, quantize
from qcomm.codec._native import using_cpu_feature
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantizers import Coding, GridKind, Quantizer
from qcomm.reference import zero_runs
from qcomm.reference.packet import RUNS

FEATURES = _native.cpu_features()
# Segments' lengths: empty ones, single values, around lanes and blocks, and several blocks of 1 or 2 steps.
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 31, 32, 33, 127, 128, 129, 300, 700]), min_size=1, max_size=5)
# In units of the values' RMS: nearly all levels are 3 at the first, and none is left at the last.
STEPS = (0.05, 0.5, 1.0, 3.0, 6.0, 18.0, 1000.0)


def runs(step: float) -> Quantizer:
    return Quantizer(GridKind.SIGMA, 3, Coding.RUNS, 0, 0.0, float(torch.tensor(step)))


def residuals(u: torch.Tensor, step: float) -> torch.Tensor:
    return (torch.rand(u.numel(), generator=torch.Generator().manual_seed(u.numel())) - 0.5) * step


def both(
    parts: Sequence[tuple[torch.Tensor, float]], block_steps: int, inv_scale: float = 1.0
) -> tuple[bytes, bytes, list[torch.Tensor], list[torch.Tensor]]:
    """(packet, packet of the reference, residuals of the one, of the other) of values with their steps."""
    native, twins = [], []
    for values, step in parts:
        residual = residuals(values, step)
        native.append(Segment(values, runs(step), residual.clone()))
        twins.append(
            reference.ReferenceSegment(
                values, GridKind.SIGMA, 3, RUNS, 0, 0.0, runs(step).p1, residual.clone(), inv_scale
            )
        )
    packet = encode(native, inv_scale=inv_scale, block_steps=block_steps)
    twin = reference.encode_packet(twins, [sum(v.numel() for v, _ in parts)], block_steps)
    lost = [s.residual for s in native if s.residual is not None], [s.residual for s in twins if s.residual is not None]
    return packet.numpy().tobytes(), twin, *lost


@pytest.fixture(params=FEATURES)
def feature(request: pytest.FixtureRequest) -> Iterator[str]:
    with using_cpu_feature(request.param):
        yield request.param


@pytest.mark.parametrize("feature_name", FEATURES)
@settings(max_examples=120, deadline=None)
@given(
    lengths=LENGTHS,
    steps=st.lists(st.sampled_from(STEPS), min_size=5, max_size=5),
    block_steps=st.sampled_from([1, 2, 3, 512]),
    make=st.sampled_from([gaussian, laplace, student_t3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    inv_scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 5),
)
def test_same_bytes_and_residuals_as_the_reference(
    feature_name, lengths, steps, block_steps, make, dtype, inv_scale, seed
):
    parts = [(make(n, seed + i).to(dtype), step) for i, (n, step) in enumerate(zip(lengths, steps, strict=False))]
    with using_cpu_feature(feature_name):
        packet, twin, kept, kept_twin = both(parts, block_steps, inv_scale)
        assert packet == twin
        assert all(torch.equal(a, b) for a, b in zip(kept, kept_twin, strict=True))
        found = qcomm.decompress(torch.frombuffer(bytearray(packet), dtype=torch.uint8))
    assert torch.equal(found, reference.decode_packet(twin))
    position = 0
    for (values, step), residual in zip(parts, kept, strict=True):
        u = values * inv_scale + residuals(values, step).to(dtype)
        assert torch.equal((u - found[position : position + values.numel()]).float(), residual)
        position += values.numel()


def large_parts(count: int = 200_001) -> list[tuple[torch.Tensor, float]]:
    x = laplace(count, 3)
    cuts = [0, 70_000, 70_000, 70_001, 131_072, count]
    return [(x[a:b], step) for a, b, step in zip(cuts, cuts[1:], (6.0, 1.0, 3.0, 12.0, 0.7), strict=False)]


def test_all_versions_and_threads_write_and_read_the_same():
    packets = set()
    for name in FEATURES:
        for threads in (1, 3):
            with using_cpu_feature(name):
                segments = [Segment(v, runs(step), residuals(v, step)) for v, step in large_parts()]
                packet = encode(segments, num_threads=threads)
                packets.add((packet.numpy().tobytes(), *(s.residual.numpy().tobytes() for s in segments)))
                found = qcomm.decompress(packet, num_threads=threads)
                total = torch.full_like(found, 2.0)
                decode_into(packet, total, accumulate=True, num_threads=threads)
                assert torch.equal(total, 2.0 + found)
    assert len(packets) == 1


def test_loops_agree_for_any_values_and_any_words():
    skip_unless_built()
    result = subprocess.run([build("compare_zero_runs"), "4000", "1"], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_segments_of_other_codings_stand_between():
    x, y = gaussian(500, 1), laplace(900, 2)
    whole = [
        Segment(x, quantize.plan(_native.measure(x), qcomm.SigmaGrid(1.0, coding="pair"), x)),
        Segment(x, runs(4.0), torch.zeros(500)),
        Segment(x[:7], Quantizer.raw()),
        Segment(x[:9], Quantizer.constant(float("nan"))),
        Segment(y, runs(3.0), torch.zeros(900)),
        Segment(y, quantize.plan(_native.measure(y), qcomm.RangeGrid(num_bits=4), y)),
    ]
    packet = encode(whole, block_steps=2)
    found = qcomm.decompress(packet)
    assert torch.equal(found.nan_to_num(7.0), reference.decode_packet(packet.numpy().tobytes()).nan_to_num(7.0))
    info = qcomm.inspect(packet)
    assert [segment.coding for segment in info.segments] == ["pair", "runs", "raw", "constant", "runs", "fixed"]
    assert info.segments[4].entropy_bits == pytest.approx(entropy_of(found[1016:1916] / 3.0))


def entropy_of(levels: torch.Tensor) -> float:
    p = torch.bincount((levels + 3).long()).double() / levels.numel()
    return float(-(p[p > 0] * p[p > 0].log2()).sum())


def test_the_residual_keeps_what_is_beyond_three_levels(feature):
    x = torch.zeros(64)
    x[3], x[4], x[40] = 100.0, -100.0, 1.5
    residual = torch.zeros(64)
    found = qcomm.decompress(encode([Segment(x, runs(1.0), residual)]))
    assert found[[3, 4, 40]].tolist() == [3.0, -3.0, 2.0]
    assert residual[[3, 4, 40]].tolist() == [97.0, -97.0, -0.5]


@pytest.mark.parametrize("at", [0, 140, 299, 300, 511, 899])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_a_block_with_a_value_that_is_not_finite_is_nan_and_keeps_its_residuals(at, value, feature):
    """3e38 is finite, but not with a residual of 3e38. Other blocks are as without it."""
    x, residual = gaussian(900), 0.1 * gaussian(900, 1)
    x[at] = value
    if value == 3e38:
        residual[at] = 3e38
    kept = [residual[:300].clone(), residual[300:].clone()]
    twins = [
        reference.ReferenceSegment(x[a:b], GridKind.SIGMA, 3, RUNS, 0, 0.0, 2.0, residual[a:b].clone())
        for a, b in ((0, 300), (300, 900))
    ]
    segments = [Segment(x[:300], runs(2.0), kept[0]), Segment(x[300:], runs(2.0), kept[1])]
    packet = encode(segments, block_steps=2)
    assert packet.numpy().tobytes() == reference.encode_packet(twins, [900], 2)
    found = qcomm.decompress(packet)
    assert torch.equal(found.nan_to_num(9.0), reference.decode_packet(packet.numpy().tobytes()).nan_to_num(9.0))
    borders = zero_runs.block_borders(900, 2)
    begin = max(border for border in borders[:-1] if border <= at)
    end = min(border for border in borders if border > at)
    inside = torch.zeros(900, dtype=torch.bool)
    inside[begin:end] = True
    assert torch.equal(found.isnan(), inside)
    now = torch.cat(kept)
    assert torch.equal(now[inside], residual[inside])
    assert torch.equal(now[~inside], torch.cat([t.residual for t in twins])[~inside])
    total = torch.ones(900)
    decode_into(packet, total, accumulate=True)
    assert torch.equal(total.isnan(), inside) and torch.equal(total[~inside], 1.0 + found[~inside])


def test_adding_leaves_the_other_values_bit_for_bit(feature):
    x = torch.zeros(3000)
    x[::100] = 1.0
    total = torch.full((3000,), -0.0)
    decode_into(encode([Segment(x, runs(1.0), torch.zeros(3000))]), total, accumulate=True)
    assert torch.equal(total, x) and bool(total.signbit()[1])


@pytest.mark.parametrize(
    ("quantizer", "residual", "message"),
    [
        (runs(1.0), None, "coding runs needs a residual"),
        (runs(1.0)._replace(num_bits=4), torch.zeros(8), "coding runs needs a sigma grid with num_bits 3"),
        (runs(1.0)._replace(table=1), torch.zeros(8), "coding runs needs a sigma grid with num_bits 3"),
        (runs(1.0)._replace(p1=2e38), torch.zeros(8), "cannot represent"),
        (Quantizer(GridKind.RANGE_CENTER, 3, Coding.RUNS, 0, 0.0, 1.0), torch.zeros(8), "coding runs needs a sigma"),
    ],
)
def test_requests_that_cannot_be(quantizer, residual, message):
    with pytest.raises(ValueError, match=message):
        encode([Segment(torch.ones(8), quantizer, residual)])


@pytest.mark.parametrize(
    "sample",
    [torch.zeros(1, dtype=torch.float64), torch.zeros(4), torch.zeros(8, dtype=torch.float64)[::2]],
    ids=["too short", "float32", "strided"],
)
def test_memory_for_a_sample_that_does_not_fit_is_refused(sample):
    with pytest.raises(ValueError, match="sample must be contiguous float64 of 4 elements"):
        encode([Segment(torch.ones(8), runs(1.0), torch.zeros(8), sample)])


def test_steps_whose_levels_would_not_reach_are_refused():
    with pytest.raises(ValueError, match="coding 'runs' needs step >= 1"):
        qcomm.SigmaGrid(step=0.5, coding="runs")
    with pytest.raises(ValueError, match="mean_step must be a step of the grid: coding 'runs' needs step >= 1"):
        qcomm.CompressionState(grid=qcomm.SigmaGrid(step=3.0, coding="runs"), mean_step=0.5)


def test_a_grid_takes_runs_where_there_is_a_residual():
    x, residual = gaussian(5000), torch.zeros(5000)
    for grid, coding in [
        (qcomm.SigmaGrid(3.2), Coding.RUNS),
        (qcomm.SigmaGrid(1.0, coding="runs"), Coding.RUNS),
        (qcomm.SigmaGrid(3.2, coding="pair"), Coding.PAIR),
        (qcomm.SigmaGrid(2.0, coding="single"), Coding.SINGLE),
    ]:
        assert quantize.plan(_native.measure(x, residual), grid, x, residual).coding == coding
        assert quantize.plan(_native.measure(x), grid, x).coding != Coding.RUNS


@pytest.mark.parametrize("step", [4.0, 6.0, 12.0, 24.0, 48.0])
def test_bytes_are_near_the_entropy(step):
    """Of independent values: a table is at most 4 % off, and a packet's frame is 0.01 bit a value."""
    x = laplace(400_000)
    residual = residuals(x, step)
    packet = encode([Segment(x, runs(step), residual)])
    (segment,) = qcomm.inspect(packet).segments
    assert 8 * packet.numel() / x.numel() <= 1.045 * segment.entropy_bits + 0.01


def valid_block(levels: list[int]) -> bytearray:
    return bytearray(zero_runs.encode_run_block(levels))


def packet_with(block: bytes, count: int) -> torch.Tensor:
    """A packet of one run block, whatever is in it, without checksums of the payload."""
    head = struct.pack("<IBBBBIIQQHHI", 0x4D4D4351, 2, 0, 0, 1, 0, 1, count, 0, 512, 0, 0)
    body = struct.pack("<QIBBBBffI", count, count, 0, 5 | 3 << 4, 3, 0, 0.0, 1.0, len(block) // 4)
    whole = bytearray(head + body + block)
    whole[24:32] = len(whole).to_bytes(8, "little")
    whole[8:12] = reference.checksum(bytes(whole[: len(head) + len(body)])).to_bytes(4, "little")
    return torch.frombuffer(whole, dtype=torch.uint8)


def test_the_block_that_is_damaged_below_is_valid():
    block = valid_block(LEVELS)
    assert block[0] & 3 == zero_runs.RUNS_CODED
    assert qcomm.decompress(packet_with(block, len(LEVELS))).tolist() == [float(level) for level in LEVELS]


LEVELS = ([0] * 15 + [1]) * 100
HOSTILE = {
    "NaN with tokens": lambda b: b"\x03" + b[1:],
    "a table beyond the last": lambda b: bytes([2 | 12 << 2]) + b[1:],
    "no tokens": lambda b: b[:1] + bytes(3) + b[4:],
    "too many tokens": lambda b: b[:1] + (1601).to_bytes(3, "little") + b[4:],
    "one token more": lambda b: b[:1] + (int.from_bytes(b[1:4], "little") + 1).to_bytes(3, "little") + b[4:],
    "one token less": lambda b: b[:1] + (int.from_bytes(b[1:4], "little") - 1).to_bytes(3, "little") + b[4:],
    "a window without a sentinel": lambda b: b[:4] + bytes(4) + b[8:],
    "a truncated block": lambda b: b[:64],
    "only an info": lambda b: b[:4],
    "zeros with tokens": lambda b: b"\x00" + b[1:],
    "a level of 4": lambda b: struct.pack("<I", 1) + b"\xff" * 600,
    "a truncated fixed block": lambda b: struct.pack("<I", 1) + b"\x00" * 596,
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_hostile_blocks_are_packet_errors(damage, feature):
    packet = packet_with(damage(bytes(valid_block(LEVELS))), len(LEVELS))
    with pytest.raises(qcomm.PacketError):
        qcomm.decompress(packet)
    with pytest.raises(qcomm.PacketError):
        reference.decode_packet(packet.numpy().tobytes())


def test_positions_beyond_the_block_and_a_last_skip_are_refused(feature):
    block = bytes(valid_block([0] * 1500 + [1] + [0] * 100 + [1]))
    assert qcomm.decompress(packet_with(block, 1602))[[1500, 1601]].tolist() == [1.0, 1.0]
    for count in (1601, 1502, 1501, 600, 512, 33):
        with pytest.raises(qcomm.PacketError):
            qcomm.decompress(packet_with(block, count))


@pytest.mark.parametrize("values", [0, 1, 31, 63, 64, 95], ids=lambda n: f"{n}-values")
@pytest.mark.parametrize("more_words", [0, 200])
def test_a_last_token_without_a_level_is_refused(values, more_words, feature):
    """Whole steps of lanes among them, with words behind, so that vector loops reach the last token."""
    ends_well = token_block([5] * values + [zero_runs.SKIP, 5], more_words)
    assert int(qcomm.decompress(packet_with(ends_well, 4000)).count_nonzero()) == values + 1
    ends_in_a_skip = token_block([5] * values + [zero_runs.SKIP], more_words)
    with pytest.raises(qcomm.PacketError):
        qcomm.decompress(packet_with(ends_in_a_skip, 4000))
    with pytest.raises(qcomm.PacketError):
        reference.decode_packet(packet_with(ends_in_a_skip, 4000).numpy().tobytes())


def token_block(tokens: list[int], more_words: int) -> bytes:
    """A block of tokens without extra bits, and words behind it that nothing reads."""
    lengths, codes = zero_runs.run_code(11)
    start, words = reference.encode_lanes([(codes[token], lengths[token]) for token in tokens])
    words += [0] * (more_words + len(words) % 2)
    return struct.pack(f"<33I{len(words)}H", 2 | 11 << 2 | len(tokens) << 8, *start, *words)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_or_the_reference_agrees(data):
    """Of a packet without checksums: what the core accepts, the reference accepts, with the same values."""
    x = laplace(900, 4)
    segments = [Segment(x[:400], runs(3.0), torch.zeros(400)), Segment(x[400:], runs(1.0), torch.zeros(500))]
    packet = bytearray(encode(segments, block_steps=2, checksum=False).numpy().tobytes())
    front = qcomm.inspect(torch.frombuffer(bytearray(packet), dtype=torch.uint8)).header_bytes
    for _ in range(data.draw(st.integers(1, 3))):
        packet[data.draw(st.integers(front, len(packet) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    tensor = torch.frombuffer(bytearray(packet), dtype=torch.uint8)
    try:
        expected = reference.decode_packet(bytes(packet))
    except qcomm.PacketError:
        expected = None
    for name in FEATURES:
        with using_cpu_feature(name):
            if expected is None:
                with pytest.raises(qcomm.PacketError):
                    qcomm.decompress(tensor)
            else:
                assert torch.equal(qcomm.decompress(tensor).nan_to_num(9.0), expected.nan_to_num(9.0))
