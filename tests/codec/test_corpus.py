"""Packets that fuzzing found worth keeping (csrc/fuzz): each an error or values, never a crash, on every processor."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qcomm
from qcomm import reference
from qcomm.codec import _native
from qcomm.codec.packet import decode_into

FOLDER = Path(__file__).parents[1] / "corpus"
FILES = sorted(FOLDER.glob("*/*"))
MAX_ELEMENTS = 1 << 16  # a packet of 80 bytes may claim to hold terabytes
TOO_LARGE = "too large for a test"


def read(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def as_text(result: object) -> str:
    if isinstance(result, torch.Tensor):
        return result.reshape(-1).view(torch.uint8).numpy().tobytes().hex()
    return repr(result)


def answers(packet: torch.Tensor) -> list[str]:
    """What each way to read a packet makes of it: the values' bytes, or the error."""
    try:
        parsed = _native.parse(packet)
    except qcomm.PacketError as error:
        return [str(error)]
    if torch.Size(parsed.shape).numel() > MAX_ELEMENTS:
        return [TOO_LARGE]

    def accumulated() -> torch.Tensor:
        total = torch.ones(parsed.shape, dtype=parsed.dtype)
        decode_into(packet, total, accumulate=True)
        return total

    found = []
    for way in (lambda: qcomm.decompress(packet), accumulated, lambda: qcomm.inspect(packet)):
        try:
            found.append(as_text(way()))
        except (qcomm.PacketError, ValueError) as error:  # 16-bit packets cannot be accumulated
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_there_is_a_corpus() -> None:
    assert len(FILES) > 10


@pytest.mark.parametrize("version", qcomm.cpu_features())
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_version_gives_the_answer_of_the_scalar_one(version: str, path: Path) -> None:
    packet = read(path)
    with _native.using_cpu_feature("scalar"):
        expected = answers(packet)
    with _native.using_cpu_feature(version):
        assert answers(packet) == expected


def verdict(decode: Callable[[torch.Tensor], torch.Tensor], packet: torch.Tensor) -> str:
    try:
        values = decode(packet)
    except qcomm.PacketError:
        return "refused"
    return f"{values.shape} {as_text(values.masked_fill(values.isnan(), 0.5))}"  # a NaN's bits mean nothing


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_specification_judges_alike(path: Path) -> None:
    packet = read(path)
    if answers(packet) != [TOO_LARGE]:
        specified = verdict(lambda p: reference.decode_packet(p.numpy().tobytes()), packet)
        assert verdict(qcomm.decompress, packet) == specified
