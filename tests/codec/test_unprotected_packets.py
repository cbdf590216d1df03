"""Packets without checksums: damage that goes unnoticed gives every reader the same values, or the same error."""

import struct
from collections.abc import Callable

import golden_cases
import pytest
import torch
from data import gaussian

import qcomm
from qcomm import reference
from qcomm.codec import _native

VERSIONS = qcomm.cpu_features()


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


@pytest.mark.parametrize("name", golden_cases.UNPROTECTED)
def test_flipped_bits_without_checksums_are_judged_alike(name: str) -> None:
    """The golden packets in which damage can go unnoticed: then all see the same damage."""
    golden = golden_cases.read(name)
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
