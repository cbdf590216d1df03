"""Damage to files of torch.save, drawn with given dice."""

import io
import zipfile
from typing import NamedTuple


class Damaged(NamedTuple):
    """A damaged file, and whether its checksums fit, as if somebody had made it."""

    content: bytes
    has_checksums: bool


def flipped(content, dice, count):
    """With one flipped bit each."""
    for _ in range(count):
        place, bit = dice.randrange(len(content)), dice.randrange(8)
        yield Damaged(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :], False)


def truncated(content, dice, count):
    """Without their ends."""
    for _ in range(count):
        yield Damaged(content[: dice.randrange(len(content))], False)


def with_other_pickles(content, dice, count):
    """With one or two other bytes in the pickle, under fitting checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (name,) = (name for name in parts if name.endswith("/data.pkl"))
    for _ in range(count):
        pickled = bytearray(parts[name])
        for _ in range(dice.randint(1, 2)):
            pickled[dice.randrange(len(pickled))] = dice.randrange(256)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for other, data in parts.items():
                archive.writestr(other, bytes(pickled) if other == name else data)
        yield Damaged(file.getvalue(), True)
