"""Hostile and damaged packets: an error that says what is wrong, never a crash, never silence."""

import random
import struct

import pytest
import torch
from data import gaussian, laplace, student_t3
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm.codec import _native
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, encode
from qcomm.codec.quantize import Quantizer, plan

HEADER_CHECKSUM_AT = 8
KINDS_AT = 5  # in a segment record


def run_segment(x: torch.Tensor, step: float) -> Segment:
    residual = torch.zeros(x.numel())
    return Segment(x, plan(measure(x, residual), qcomm.SigmaGrid(step, coding="runs"), x, residual), residual)


def samples() -> dict[str, torch.Tensor]:
    """One packet of every coding, small enough to damage everywhere."""
    x = gaussian(700)
    mixed = [
        Segment(x, plan(measure(x), qcomm.SigmaGrid(2.0, coding="pair"), x)),
        Segment(x[:50], Quantizer.raw()),
        Segment(x[:9], Quantizer.constant(2.0)),
        Segment(x, plan(measure(x), qcomm.RangeGrid(num_bits=5), x)),
    ]
    runs = [run_segment(x[:200], 3.0), Segment(x[:9], Quantizer.raw()), run_segment(x[200:], 1.0)]
    return {
        "pair": qcomm.compress(x, qcomm.SigmaGrid(1.0, coding="pair")),
        "escapes": qcomm.compress(student_t3(700), qcomm.SigmaGrid(1.0, coding="single")),
        "own table": qcomm.compress(laplace(900), qcomm.RangeGrid(num_bits=6), block_steps=8),
        "fixed": qcomm.compress(torch.rand(333), qcomm.RangeGrid(num_bits=7)),
        "raw": qcomm.compress(torch.tensor([1.0, float("nan"), 3.0] * 20)),
        "constant": qcomm.compress(torch.full((5, 5), 2.5)),
        "empty": qcomm.compress(torch.empty(0, 3)),
        "float16": qcomm.compress(student_t3(500).half(), qcomm.SigmaGrid(0.5)),
        "segments": encode(mixed),
        "runs": encode(runs, block_steps=2),
    }


SAMPLES = samples()


def reseal(packet: torch.Tensor, metadata_bytes: int) -> torch.Tensor:
    """Gives damaged metadata a fitting header checksum, so that the checks behind it are reached."""
    sealed = packet.clone()
    sealed[HEADER_CHECKSUM_AT : HEADER_CHECKSUM_AT + 4] = 0
    value = _native.checksum(sealed[:metadata_bytes])
    sealed[HEADER_CHECKSUM_AT : HEADER_CHECKSUM_AT + 4] = torch.frombuffer(
        bytearray(struct.pack("<I", value)), dtype=torch.uint8
    )
    return sealed


def decode_or_packet_error(packet: torch.Tensor) -> torch.Tensor | None:
    try:
        return qcomm.decompress(packet)
    except qcomm.PacketError:
        return None


@pytest.mark.parametrize("name", SAMPLES)
def test_a_front_says_what_the_packet_says(name: str) -> None:
    packet = SAMPLES[name]
    size = _native.front_bytes(packet[: _native.PACKET_HEADER_BYTES], packet.numel())
    front, whole = _native.parse_front(packet[:size].clone(), packet.numel()), _native.parse(packet)
    assert front == (whole.dtype, whole.shape, whole.steps, whole.records)
    for present in range(size):
        with pytest.raises(qcomm.PacketError):
            _native.parse_front(packet[:present].clone(), packet.numel())
    for present in range(_native.PACKET_HEADER_BYTES):
        with pytest.raises(qcomm.PacketError, match="at least 40 bytes"):
            _native.front_bytes(packet[:present].clone(), packet.numel())


@pytest.mark.parametrize("name", SAMPLES)
def test_a_damaged_front_is_read_or_refused(name: str) -> None:
    packet, header_bytes = SAMPLES[name], _native.PACKET_HEADER_BYTES
    whole = _native.front_bytes(packet[:header_bytes], packet.numel())
    for at in range(whole):
        for bit in range(8):
            bad = packet.clone()
            bad[at] ^= 1 << bit
            try:
                size = _native.front_bytes(bad[:header_bytes].clone(), bad.numel())
                assert header_bytes <= size <= bad.numel()
                _native.parse_front(bad[:size].clone(), bad.numel())
            except qcomm.PacketError:
                continue


def test_a_front_is_no_larger_than_its_packet() -> None:
    packet = SAMPLES["pair"].clone()
    packet[12:16] = 255  # segment_count
    with pytest.raises(qcomm.PacketError, match="metadata is truncated"):
        _native.front_bytes(packet[: _native.PACKET_HEADER_BYTES], packet.numel())
    with pytest.raises(qcomm.PacketError, match="metadata is truncated"):
        _native.parse_front(packet, packet.numel())


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_is_an_error(name: str) -> None:
    packet = SAMPLES[name]
    for size in range(packet.numel()):
        with pytest.raises(qcomm.PacketError):
            qcomm.decompress(packet[:size].clone())
    with pytest.raises(qcomm.PacketError, match="after the end"):
        qcomm.decompress(torch.cat([packet, torch.zeros(1, dtype=torch.uint8)]))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_flipped_bit_is_an_error(name: str) -> None:
    packet = SAMPLES[name]
    for bit in range(8 * packet.numel()):
        damaged = packet.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(qcomm.PacketError):
            qcomm.decompress(damaged)


@pytest.mark.parametrize("name", SAMPLES)
def test_metadata_that_lies_under_a_good_checksum_is_survived(name: str) -> None:
    """Any single byte of the metadata replaced and sealed again: an error, or a tensor; never more memory than the
    packet may ask for.
    """
    packet = SAMPLES[name]
    metadata_bytes = qcomm.inspect(packet).header_bytes
    rng = random.Random(7)
    for at in range(metadata_bytes):
        for value in {0, 1, 255, 128, rng.randrange(256), rng.randrange(256)}:
            damaged = packet.clone()
            damaged[at] = value
            sealed = reseal(damaged, metadata_bytes)
            try:
                shape = _native.parse(sealed).shape
            except qcomm.PacketError:
                continue
            if torch.Size(shape).numel() < 1 << 20:
                decode_or_packet_error(sealed)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(qcomm.PacketError):
        qcomm.decompress(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8))


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(SAMPLES)), data=st.data())
def test_payloads_without_checksums_are_read_within_bounds(name: str, data: st.DataObject) -> None:
    x = student_t3(700)
    packet = qcomm.compress(
        x, qcomm.SigmaGrid(1.0) if len(name) % 2 else qcomm.RangeGrid(num_bits=6), checksum=False, block_steps=4
    )
    if name == "runs":
        packet = encode([run_segment(x, 1.0)], checksum=False, block_steps=4)
    start = qcomm.inspect(packet).header_bytes
    damaged = packet.clone()
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(start, packet.numel() - 1))] = data.draw(st.integers(0, 255))
    decoded = decode_or_packet_error(damaged)
    assert decoded is None or decoded.shape == x.shape


def test_messages_say_what_is_wrong() -> None:
    packet = SAMPLES["pair"]
    other = packet.clone()
    other[4] = 9
    with pytest.raises(qcomm.PacketError, match=r"reads version 2, found 9"):
        qcomm.decompress(other)
    with pytest.raises(qcomm.PacketError, match="not a qcomm packet"):
        qcomm.decompress(torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(qcomm.PacketError, match=f"truncated; bytes present {packet.numel() - 1}"):
        qcomm.decompress(packet[:-1])
    damaged = packet.clone()
    damaged[-5] ^= 4
    with pytest.raises(qcomm.PacketError, match="wrong checksum; block"):
        qcomm.decompress(damaged)


def test_messages_number_the_first_block_and_segment() -> None:
    packet = SAMPLES["pair"]  # of one block and one segment
    damaged = packet.clone()
    damaged[-5] ^= 4
    with pytest.raises(qcomm.PacketError, match=r"wrong checksum; block 0$"):
        qcomm.decompress(damaged)
    size = _native.front_bytes(packet[: _native.PACKET_HEADER_BYTES], packet.numel())
    front = packet[:size].clone()
    front[size - _native.record_bytes(torch.float32) + KINDS_AT] = 99
    with pytest.raises(qcomm.PacketError, match=r"unknown grid or coding; segment 0$"):
        _native.parse_front(front, packet.numel())
    with pytest.raises(qcomm.PacketError, match=r"wrong magic number$"):
        qcomm.decompress(torch.zeros(100, dtype=torch.uint8))


def test_a_huge_claim_is_refused_before_memory_is_asked_for() -> None:
    packet = SAMPLES["constant"].clone()
    claim = torch.frombuffer(bytearray(struct.pack("<Q", 2**62)), dtype=torch.uint8)
    for at in (16, 40):  # element count, first dimension
        packet[at : at + 8] = claim
    with pytest.raises(qcomm.PacketError, match="out of range"):
        qcomm.decompress(reseal(packet, qcomm.inspect(SAMPLES["constant"]).header_bytes))


def with_claim(packet: torch.Tensor, count: int, dims: tuple[int, ...]) -> torch.Tensor:
    """A constant packet that claims another size, sealed again."""
    body = packet.numpy().tobytes()
    head = bytearray(
        body[:40]
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<I", count % 2**32)
        + bytes([count >> 32])
        + body[-11:]
    )
    head[7] = len(dims)
    head[16:24], head[24:32] = struct.pack("<Q", count), struct.pack("<Q", len(head))
    return reseal(torch.frombuffer(head, dtype=torch.uint8), len(head))


@pytest.mark.parametrize(("count", "dims"), [(2**39, (2**39,)), (0, (0, 2**40, 2**40)), (0, (2**38, 0, 2**38))])
def test_sizes_that_no_machine_has_are_packet_errors(count: int, dims: tuple[int, ...]) -> None:
    packet = with_claim(qcomm.compress(torch.full((4,), 2.5)), count, dims)
    with pytest.raises(qcomm.PacketError, match=r"no memory|out of range"):
        qcomm.decompress(packet)


@pytest.mark.parametrize("packet", SAMPLES.values(), ids=SAMPLES)
def test_destination_is_never_overrun(packet: torch.Tensor) -> None:
    """A canary on both sides of an encoder's and a decoder's output."""
    info = qcomm.inspect(packet)
    count = torch.Size(info.shape).numel()
    arena = torch.full((count + 64,), 123.0, dtype=info.dtype)
    _native.decode(packet, arena[32 : 32 + count], accumulate=False, num_threads=1)
    assert bool((arena[:32] == 123).all()) and bool((arena[32 + count :] == 123).all())
