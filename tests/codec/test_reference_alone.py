"""The executable specification by itself: what mathematics and docs/format.md say of it, and what it refuses."""

import heapq
from collections.abc import Callable
from itertools import combinations_with_replacement

import pytest
import torch
from data import DISTRIBUTIONS, DTYPES, gaussian, laplace, one_hot, student_t3, ulp
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm import reference
from qcomm.reference.packet import SINGLE


def as_tensor(data: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


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


def valid_packets(with_checksums: bool) -> list[bytes]:
    """Packets that have every coding, kind of table and mode of a block between them."""
    x, tails = gaussian(135), gaussian(1500)
    tails[::100] = 50.0  # some escapes, and in the second block too many
    tails[1024:] *= 50
    mixed = [
        reference.sigma_segment(x, 2.0, "pair"),
        reference.ReferenceSegment(x[:5]),
        reference.ReferenceSegment(x[:9], coding=reference.packet.CONSTANT, p0=2.0),
        reference.range_segment(x, 3),
        reference.range_segment(x, 14),
    ]
    segments = [
        mixed,
        [reference.ReferenceSegment(t, reference.grids.SIGMA, 4, SINGLE, 14, p1=1.0) for t in (tails, tails[150:210])],
        [reference.sigma_segment(gaussian(1501).half(), 0.9, "pair")],
        [reference.sigma_segment(student_t3(150).double(), 0.001)],
        [reference.sigma_segment(gaussian(1100), 1.0, "table")],
        [reference.range_segment(laplace(1100), 5, center=True)],
        [reference.sigma_segment(one_hot(2100), 4.0, "single")],
        [reference.ReferenceSegment(x[:3].bfloat16())],
    ]
    return [reference.encode_packet(s, [sum(part.values.numel() for part in s)], 32, with_checksums) for s in segments]


PROTECTED, UNPROTECTED = valid_packets(True), valid_packets(False)
METADATA_BYTES = [qcomm.inspect(as_tensor(packet)).header_bytes for packet in UNPROTECTED]


def test_packets_to_be_damaged_have_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, decode_block = set(), reference.decode.decode_block

    def noting(block: reference.decode.Reader, *rest: object) -> torch.Tensor:
        info = int.from_bytes(block.data[:4], "little")
        modes.add((info & 3, info >> 2 & 0x3FFF > 0))
        return decode_block(block, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference.decode, "decode_block", noting)
    segments = set()
    for packet in UNPROTECTED:
        reference.decode_packet(packet)
        segments |= {(part.coding, part.table) for part in qcomm.inspect(as_tensor(packet)).segments}
    levels = {(mode, False) for mode in range(4)}
    assert modes == levels | {(reference.packet.BLOCK_FIXED, True), (reference.packet.BLOCK_CODED, True)}
    assert {coding for coding, _ in segments} == {"raw", "constant", "fixed", "single", "pair"}
    assert {"own", "none"} < {table for _, table in segments}


def refused(packet: bytes) -> bool:
    try:
        reference.decode_packet(packet)
    except qcomm.PacketError:
        return True
    return False


@pytest.mark.parametrize("packet", PROTECTED[::7], ids=["mixed", "raw"])
def test_damage_is_refused(packet: bytes) -> None:
    assert not refused(packet)
    for bit in range(8 * len(packet)):
        damaged = bytearray(packet)
        damaged[bit // 8] ^= 1 << bit % 8
        assert refused(bytes(damaged)), bit
    assert all(refused(packet[:size]) for size in range(len(packet))) and refused(packet + b"\0")


def resealed(packet: bytearray, metadata_bytes: int) -> bytes:
    """With a size and a header checksum that fit."""
    packet[8:12], packet[24:32] = bytes(4), len(packet).to_bytes(8, "little")
    packet[8:12] = reference.checksum(bytes(packet[:metadata_bytes])).to_bytes(4, "little")
    return bytes(packet)


# The reason, the packet, where in its metadata (or a named place in its payload), what is put there.
MIXED, ESCAPES, HALF_PAIR, FINE, OWN_CODE, RANGE, ONE_HOT, RAW = range(8)
RECORD_AT = 48
INVALID = [
    ("magic", RAW, 0, b"X"),
    ("version", RAW, 4, b"\2"),
    ("dtype", RAW, 5, b"\4"),
    ("flags", RAW, 6, b"\2"),
    ("dimensions", RAW, 7, b"\x41"),
    ("segments", RAW, 12, bytes(4)),
    ("steps", RAW, 32, bytes(2)),
    ("steps", RAW, 32, b"\1\2"),
    ("reserved", RAW, 34, b"\1"),
    ("element count", RAW, 16, b"\xff" * 8),
    ("segments' counts", RAW, 16, b"\4"),
    ("dimensions", RAW, 40, b"\4"),
    ("segment fields", RAW, RECORD_AT + 8, b"\4"),
    ("segment fields", RAW, RECORD_AT + 10, b"\5"),
    ("segment fields", RAW, RECORD_AT + 12, b"\1"),
    ("grid and num_bits", FINE, RECORD_AT + 9, b"\1"),
    ("grid and num_bits", FINE, RECORD_AT + 9, b"\x11"),
    ("grid and num_bits", FINE, RECORD_AT + 8, b"\0"),
    ("parameters", FINE, RECORD_AT + 24, bytes(8)),
    ("parameters", RANGE, RECORD_AT + 24, b"\0\0\0\0\0\0\xf8\x7f"),
    ("parameters", RANGE, RECORD_AT + 16, bytes(16)),
    ("coding fixed", FINE, RECORD_AT + 10, b"\2"),
    ("coding pair", HALF_PAIR, RECORD_AT + 9, b"\5"),
    ("coding pair", HALF_PAIR, RECORD_AT + 8, b"\1"),
    ("12 bits", FINE, RECORD_AT + 11, b"\0"),
    ("static table", HALF_PAIR, RECORD_AT + 11, b"\x0e"),
    ("static table", HALF_PAIR, RECORD_AT + 11, b"\x1e"),
    ("fill their area", OWN_CODE, RECORD_AT + 11, b"\xff"),
    ("code lengths", OWN_CODE, RECORD_AT + 32, b"\xff"),
    ("follow each other", ESCAPES, RECORD_AT + 64, b"\xff\xff"),
    ("escapes only", ESCAPES, "second block", b"\7"),
    ("has a code", ESCAPES, RECORD_AT + 11, b"\xff"),
    ("sentinel", ESCAPES, "first window", bytes(4)),
    ("more bits used", ESCAPES, "first window", b"\1\0\0\0"),
    ("positions", ESCAPES, "second position", bytes(2)),
    ("positions", ESCAPES, "second position", b"\xff\xff"),
    ("constant's symbol", ONE_HOT, "constant", b"\x0f"),
    ("constant's symbol", ONE_HOT, "constant", b"\x10"),
    ("truncated", RAW, 36, b"\xff"),
    ("ends with the last", RAW, "end", bytes(4)),
]


@pytest.mark.parametrize(("reason", "index", "place", "there"), INVALID)
def test_invalid_packets_are_refused_with_the_reason(reason: str, index: int, place: int | str, there: bytes) -> None:
    packet, payload_at = bytearray(UNPROTECTED[index]), METADATA_BYTES[index]
    assert not refused(resealed(packet, payload_at))
    info = int.from_bytes(packet[payload_at : payload_at + 4], "little")
    escape_positions = payload_at + 4 + 4 * 32 + 4 * (info >> 2 & 0x3FFF)  # of a coded block of float32
    named = {
        "first window": payload_at + 4,
        "constant": payload_at + 2,
        "second position": escape_positions + 2,
        "second block": payload_at + 4 * int.from_bytes(packet[RECORD_AT + 64 : RECORD_AT + 68], "little"),
        "end": len(packet),
    }
    at = named[place] if isinstance(place, str) else place
    packet[at : at + len(there)] = there
    damaged = resealed(packet, payload_at)
    with pytest.raises(qcomm.PacketError, match=reason):
        reference.decode_packet(damaged)
    with pytest.raises(qcomm.PacketError):
        qcomm.decompress(as_tensor(damaged))


@pytest.mark.parametrize("shape", [(0, 2**42, 2), (2**41, 0, 2, 2), (0, 2**43), (1, 0, 2**64 - 1)])
def test_empty_tensors_of_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    nothing = reference.ReferenceSegment(torch.empty(0))
    assert reference.decode_packet(reference.encode_packet([nothing], (2**41, 0, 2))).shape == (2**41, 0, 2)
    with pytest.raises(qcomm.PacketError, match="dimensions"):
        reference.decode_packet(reference.encode_packet([nothing], shape))


@settings(max_examples=1500, deadline=None)
@given(data=st.data())
def test_both_decoders_refuse_the_same_packets(data: st.DataObject) -> None:
    """Without payload checksums, and with the header's put right, so that every other check is reached."""
    index = data.draw(st.integers(0, len(UNPROTECTED) - 1))
    packet, payload_at = bytearray(UNPROTECTED[index]), METADATA_BYTES[index]
    metadata_only = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, (payload_at if metadata_only else len(packet)) - 1))
        packet[at] = data.draw(st.integers(0, 255)) if data.draw(st.booleans()) else packet[at] ^ 1
    damaged = resealed(packet, payload_at)
    try:
        expected = qcomm.decompress(as_tensor(damaged))
    except qcomm.PacketError:
        assert refused(damaged)
    else:
        found = reference.decode_packet(damaged)
        assert found.shape == expected.shape
        assert found.view(torch.uint8).equal(expected.view(torch.uint8))
