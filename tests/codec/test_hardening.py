"""Destinations that do not fit and packets that lie: refused by name, and nothing is touched that should not be."""

import struct
from collections.abc import Callable

import golden_cases
import pytest
import torch
from data import DTYPES, gaussian, student_t3

import qcomm
from qcomm import _C, reference
from qcomm.codec import _native
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantize import plan

VERSIONS = qcomm.cpu_features()
MARGIN = 64


def packets() -> dict[str, torch.Tensor]:
    """One of every coding."""
    x = gaussian(700)
    return {
        "pair": qcomm.compress(x, qcomm.SigmaGrid(1.0, coding="pair")),
        "escapes": qcomm.compress(student_t3(701), qcomm.SigmaGrid(1.0, coding="single")),
        "fixed": qcomm.compress(x[:333], qcomm.RangeGrid(num_bits=14)),
        "raw": qcomm.compress(torch.tensor([1.0, float("nan")] * 30)),
        "constant": qcomm.compress(torch.full((55,), 2.5)),
        "bfloat16": qcomm.compress(x.bfloat16(), qcomm.SigmaGrid(0.5)),
        "float64": qcomm.compress(x.double(), qcomm.SigmaGrid(2.0)),
    }


PACKETS = packets()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PACKETS)
def test_a_destination_of_another_size_is_refused_and_left_alone(name: str, version: str) -> None:
    packet = PACKETS[name]
    info = qcomm.inspect(packet)
    count = torch.Size(info.shape).numel()
    arena = torch.full((count + 2 * MARGIN,), 123.0, dtype=info.dtype)
    for size in (0, 1, count - 1, count + 1, count + 32):
        for accumulate in (False, True):
            with _native.using_cpu_feature(version), pytest.raises(ValueError, match=f"out must have .*{count}"):
                decode_into(packet, arena[MARGIN : MARGIN + size], accumulate=accumulate)
    assert bool((arena == 123).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_destination_of_another_dtype_is_refused_and_left_alone(dtype: torch.dtype) -> None:
    for name, packet in PACKETS.items():
        info = qcomm.inspect(packet)
        if info.dtype == dtype:
            continue
        out = torch.full(info.shape, 123.0, dtype=dtype)
        with pytest.raises(ValueError, match="out must have the packet's dtype"):
            decode_into(packet, out)
        assert bool((out == 123).all()), name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_destination_that_fits_is_filled_to_its_ends_only(version: str, accumulate: bool) -> None:
    for name, packet in PACKETS.items():
        info = qcomm.inspect(packet)
        if accumulate and info.dtype.itemsize == 2:
            continue
        count = torch.Size(info.shape).numel()
        for begin in (MARGIN, MARGIN + 1, MARGIN + 3):  # no alignment beyond that of an element is promised
            arena = torch.full((count + 2 * MARGIN,), 123.0, dtype=info.dtype)
            with _native.using_cpu_feature(version):
                decode_into(packet, arena[begin : begin + count], accumulate=accumulate)
            expected = qcomm.decompress(packet) + (123 if accumulate else 0)
            assert bool((arena[:begin] == 123).all()) and bool((arena[begin + count :] == 123).all()), name
            assert torch.equal(arena[begin : begin + count].nan_to_num(7.0), expected.nan_to_num(7.0)), name


def test_a_destination_one_byte_below_the_bound_is_not_written() -> None:
    x, residual = student_t3(3000), gaussian(3000, 1)
    before = residual.clone()
    quantizer = plan(measure(x, residual, 1.0), qcomm.SigmaGrid(1.0), x, residual, 1.0)
    segment = Segment(x, quantizer, residual)
    described = [(x.data_ptr(), x.numel(), residual.data_ptr(), segment.quantizer)]
    bound = _C.encode_bound(described, 0, [3000], True, 16)
    out = torch.full((bound,), 123, dtype=torch.uint8)
    with pytest.raises(ValueError, match="destination is smaller than encode_bound"):
        _C.encode(described, 1.0, 0, [3000], True, 16, 1, out.data_ptr(), bound - 1)
    assert bool((out == 123).all()) and residual.equal(before)


def verdict(decode: Callable[[], torch.Tensor]) -> str:
    """The values' bytes, or the word error."""
    try:
        return decode().view(torch.uint8).numpy().tobytes().hex()
    except qcomm.PacketError:
        return "error"


def verdicts(packet: torch.Tensor) -> list[str]:
    """Of every version."""
    found = []
    for version in VERSIONS:
        with _native.using_cpu_feature(version):
            found.append(verdict(lambda: qcomm.decompress(packet)))
    return found


def specified(packet: torch.Tensor) -> str:
    """The verdict of the specification, which takes its time."""
    return verdict(lambda: reference.decode_packet(packet.numpy().tobytes()))


def test_flipped_bits_without_checksums_are_judged_alike() -> None:
    """The one golden packet in which damage can go unnoticed: then all see the same damage."""
    golden = golden_cases.read("no_checksums")
    start = qcomm.inspect(golden).header_bytes
    unnoticed = 0
    for bit in range(8 * start, 8 * golden.numel()):
        golden[bit // 8] ^= 1 << bit % 8
        found = verdicts(golden)
        assert len(set(found)) == 1, bit
        assert bit % 17 or specified(golden) == found[0], bit
        unnoticed += found[0] != "error"
        golden[bit // 8] ^= 1 << bit % 8
    assert unnoticed > 0


def test_an_escape_at_a_position_of_another_symbol_is_an_error() -> None:
    """Stored, its value would hide the symbol's; added, it would come on top of it: two readers, two results."""
    x = torch.cat([torch.full((40,), 0.01), gaussian(200)])
    x[100] = 50.0
    packet = qcomm.compress(x, qcomm.SigmaGrid(1.0, coding="single"), checksum=False)
    assert set(verdicts(packet)) == {specified(packet)} != {"error"}
    data = packet.numpy().tobytes()
    at = data.index(struct.pack("<fH", 50.0, 100)) + 4
    lying = torch.frombuffer(bytearray(data[:at] + struct.pack("<H", 3) + data[at + 2 :]), dtype=torch.uint8)
    assert {*verdicts(lying), specified(lying)} == {"error"}
    with pytest.raises(qcomm.PacketError, match="position is that of another symbol; block"):
        qcomm.decompress(lying)


@pytest.mark.parametrize("version", qcomm.cpu_features())
def test_a_range_that_does_not_cover_the_values_clamps_them(version: str) -> None:
    """As when a tensor changes between being measured and being encoded."""
    x = torch.linspace(-3.0, 3.0, 5000)
    quantizer = plan(measure(x[2000:3000]), qcomm.RangeGrid(num_bits=6), x[2000:3000])
    with _native.using_cpu_feature(version):
        decoded = qcomm.decompress(encode([Segment(x, quantizer)]))
    assert decoded.min() == decoded[0] >= x[2000] - 0.01 and decoded.max() == decoded[-1] <= x[2999] + 0.01
    assert float((decoded - x)[2000:3000].abs().max()) <= quantizer.step / 2 + 1e-6
