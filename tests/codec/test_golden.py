"""The wire format does not move: today's code writes and reads the committed packets, bit for bit."""

import json

import golden_cases
import pytest

import qcomm

CASES = golden_cases.cases()


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_committed_packet(name: str) -> None:
    golden = golden_cases.read(name)
    assert CASES[name].numel() == golden.numel() and CASES[name].equal(golden)


@pytest.mark.parametrize("name", CASES)
def test_committed_packets_decode_to_the_same_values(name: str) -> None:
    expected = json.loads((golden_cases.FOLDER / "decoded.json").read_text())
    assert golden_cases.fingerprint(qcomm.decompress(golden_cases.read(name))) == expected[name]


def test_nothing_in_the_folder_goes_untested() -> None:
    assert {p.stem for p in golden_cases.FOLDER.glob("*.qcm")} == set(CASES)


@pytest.mark.parametrize("name", [n for n in CASES if n not in golden_cases.UNPROTECTED])
def test_every_flipped_bit_of_a_golden_packet_is_an_error(name: str) -> None:
    golden = golden_cases.read(name)
    for bit in range(8 * golden.numel()):
        golden[bit // 8] ^= 1 << bit % 8
        with pytest.raises(qcomm.PacketError):
            qcomm.decompress(golden)
        golden[bit // 8] ^= 1 << bit % 8
