"""Damaged and invalid packets that the executable specification refuses, as the decoder does."""

import pytest
import torch
from data import as_tensor, gaussian, laplace, one_hot, student_t3
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm import reference
from qcomm.reference.packet import RUNS, SINGLE


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
    sparse, dense = gaussian(1600), gaussian(100)
    sparse[:400] = 0.0
    sparse[500] = float("nan")
    segments = [
        mixed,
        [reference.ReferenceSegment(t, reference.grids.SIGMA, 4, SINGLE, 14, p1=1.0) for t in (tails, tails[150:210])],
        [reference.sigma_segment(gaussian(1501).half(), 0.9, "pair")],
        [reference.sigma_segment(student_t3(150).double(), 0.001)],
        [reference.sigma_segment(gaussian(1100), 1.0, "table")],
        [reference.range_segment(laplace(1100), 5, center=True)],
        [reference.sigma_segment(one_hot(2100), 4.0, "single")],
        [reference.ReferenceSegment(x[:3].bfloat16())],
        [run_segment(sparse, 3.0)],
        [run_segment(dense, 0.1), reference.ReferenceSegment(x[:5])],
    ]
    steps = [32] * 8 + [4, 32]
    return [
        reference.encode_packet(parts, [sum(part.values.numel() for part in parts)], block_steps, with_checksums)
        for parts, block_steps in zip(segments, steps, strict=True)
    ]


def run_segment(x: torch.Tensor, step: float) -> reference.ReferenceSegment:
    p1 = float(torch.tensor(step))
    return reference.ReferenceSegment(x, reference.grids.SIGMA, 3, RUNS, p1=p1, residual=torch.zeros(x.numel()))


PROTECTED, UNPROTECTED = valid_packets(True), valid_packets(False)
METADATA_BYTES = [qcomm.inspect(as_tensor(packet)).header_bytes for packet in UNPROTECTED]


def test_packets_to_be_damaged_have_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, decode_block = set(), reference.decode.decode_block

    def noting(block: reference.decode.Reader, *rest: object) -> torch.Tensor:
        info = int.from_bytes(block.data[:4], "little")
        modes.add((info & 3, info >> 2 & 0x3FFF > 0))
        return decode_block(block, *rest)  # type: ignore[arg-type]

    run_modes, decode_run_block = set(), reference.decode.decode_run_block

    def noting_run(block: bytes, count: int) -> list[float]:
        run_modes.add(block[0] & 3)
        return decode_run_block(block, count)

    monkeypatch.setattr(reference.decode, "decode_block", noting)
    monkeypatch.setattr(reference.decode, "decode_run_block", noting_run)
    segments = set()
    for packet in UNPROTECTED:
        reference.decode_packet(packet)
        segments |= {(part.coding, part.table) for part in qcomm.inspect(as_tensor(packet)).segments}
    levels = {(mode, False) for mode in range(4)}
    assert modes == levels | {(reference.packet.BLOCK_FIXED, True), (reference.packet.BLOCK_CODED, True)}
    assert run_modes == set(range(4))
    assert {coding for coding, _ in segments} == {"raw", "constant", "fixed", "single", "pair", "runs"}
    assert {"own", "none"} < {table for _, table in segments}


def refused(packet: bytes) -> bool:
    try:
        reference.decode_packet(packet)
    except qcomm.PacketError:
        return True
    return False


@pytest.mark.parametrize("packet", [PROTECTED[i] for i in (0, 7, 8)], ids=["mixed", "raw", "runs"])
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
MIXED, ESCAPES, HALF_PAIR, FINE, OWN_CODE, RANGE, ONE_HOT, RAW, SPARSE, DENSE = range(10)
RECORD_AT = 48
INVALID = [
    ("magic", RAW, 0, b"X"),
    ("version", RAW, 4, b"\3"),
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
    ("segment fields", RAW, RECORD_AT + 5, b"\x40"),
    ("segment fields", RAW, RECORD_AT + 5, b"\x06"),
    ("grid and num_bits", FINE, RECORD_AT + 6, b"\1"),
    ("grid and num_bits", FINE, RECORD_AT + 6, b"\x11"),
    ("grid and num_bits", FINE, RECORD_AT + 5, b"\x03"),
    ("parameters", FINE, RECORD_AT + 16, bytes(8)),
    ("parameters", RANGE, RECORD_AT + 12, b"\0\0\xc0\x7f"),
    ("parameters", RANGE, RECORD_AT + 8, bytes(8)),
    ("coding fixed", FINE, RECORD_AT + 5, b"\x32"),
    ("coding pair", HALF_PAIR, RECORD_AT + 6, b"\5"),
    ("coding pair", HALF_PAIR, RECORD_AT + 5, b"\x14"),
    ("12 bits", FINE, RECORD_AT + 7, b"\0"),
    ("static table", HALF_PAIR, RECORD_AT + 7, b"\x0e"),
    ("static table", HALF_PAIR, RECORD_AT + 7, b"\x1e"),
    ("fill their area", OWN_CODE, RECORD_AT + 7, b"\xff"),
    ("code lengths", OWN_CODE, RECORD_AT + 16, b"\xff"),
    ("follow each other", ESCAPES, RECORD_AT + 32, b"\xff\xff"),
    ("escapes only", ESCAPES, "second block", b"\7"),
    ("has a code", ESCAPES, RECORD_AT + 7, b"\xff"),
    ("sentinel", ESCAPES, "first window", bytes(4)),
    ("more bits used", ESCAPES, "first window", b"\1\0\0\0"),
    ("positions", ESCAPES, "second position", bytes(2)),
    ("positions", ESCAPES, "second position", b"\xff\xff"),
    ("constant's symbol", ONE_HOT, "constant", b"\x0f"),
    ("constant's symbol", ONE_HOT, "constant", b"\x10"),
    ("truncated", RAW, 36, b"\xff"),
    ("ends with the last", RAW, "end", bytes(4)),
    ("coding runs", SPARSE, RECORD_AT + 6, b"\4"),
    ("coding runs", SPARSE, RECORD_AT + 7, b"\1"),
    ("coding runs", SPARSE, RECORD_AT + 5, b"\x15"),
    ("follow each other", SPARSE, RECORD_AT + 16, bytes(4)),
    ("follow each other", DENSE, RECORD_AT + 32, b"\xff"),
    ("the info of a block", SPARSE, "block of zeros", b"\4"),
    ("the info of a block", SPARSE, "block of zeros", b"\0\1"),
    ("the info of a block", SPARSE, "block of zeros", b"\2\1"),
    ("the info of a block", SPARSE, "block of NaN", b"\3\1"),
    ("the info of a block", SPARSE, "block of tokens", b"\x32"),
    ("the info of a block", SPARSE, "block of tokens", b"\2\0\0\0"),
    ("no more tokens", SPARSE, "block of tokens", b"\2\xff\xff"),
    ("sentinel", SPARSE, "window of tokens", bytes(4)),
    ("more bits used", SPARSE, "window of tokens", b"\1\0\0\0"),
    ("not truncated", SPARSE, "block of zeros", b"\1"),
    ("levels are within", DENSE, "levels", b"\xff"),
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
        "second block": payload_at + 4 * int.from_bytes(packet[RECORD_AT + 32 : RECORD_AT + 36], "little"),
        "block of zeros": payload_at,
        "block of NaN": payload_at + 4,
        "block of tokens": payload_at + 8,
        "window of tokens": payload_at + 12,
        "levels": payload_at + 20 + 4,  # behind a raw segment
        "end": len(packet),
    }
    at = named[place] if isinstance(place, str) else place
    packet[at : at + len(there)] = there
    damaged = resealed(packet, payload_at)
    with pytest.raises(qcomm.PacketError, match=reason):
        reference.decode_packet(damaged)
    with pytest.raises(qcomm.PacketError):
        qcomm.decompress(as_tensor(damaged))


@pytest.mark.parametrize("shape", [(0, 2**40 - 1, 2), (2**38, 0, 2, 2), (0, 2**41), (1, 0, 2**64 - 1)])
def test_empty_tensors_of_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    nothing = reference.ReferenceSegment(torch.empty(0))
    assert reference.decode_packet(reference.encode_packet([nothing], (2**38, 0, 2))).shape == (2**38, 0, 2)
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
