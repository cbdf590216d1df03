"""Canonical, length-limited Huffman codes and the packed form of their lengths."""

from qcomm.errors import PacketError

MAX_LENGTH = 15


def code_lengths(counts: list[int], limit: int) -> list[int]:
    """Computes code lengths by package-merge.

    Each level holds the symbols and the pairs of the level below, by weight, symbols first.
    """
    order = sorted((c, s) for s, c in enumerate(counts) if c)
    lengths = [0] * len(counts)
    if len(order) == 1:
        lengths[order[0][1]] = 1
    leaves = [(c, 0, [s]) for c, s in order]
    level = list(leaves)
    for _ in range(limit - 1):
        packages = [(a[0] + b[0], 1, a[2] + b[2]) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = sorted(leaves + packages, key=lambda item: item[:2])
    for _, _, symbols in level[: 2 * len(order) - 2]:
        for s in symbols:
            lengths[s] += 1
    return lengths


def canonical_codes(lengths: list[int]) -> dict[int, int]:
    """Assigns codewords in order of (length, symbol), the first bit lowest."""
    codes, code = {}, 0
    for length in range(1, MAX_LENGTH + 1):
        for s in (s for s, n in enumerate(lengths) if n == length):
            codes[s] = int(format(code, f"0{length}b")[::-1], 2)
            code += 1
        code <<= 1
    return codes


def pack_lengths(lengths: list[int]) -> bytes:
    """Packs lengths as nibbles and runs of zeros, up to the last used symbol."""
    nibbles: list[int] = []
    run = 0
    for n in lengths:
        run += n == 0
        while n and run:
            now = min(run, 271)
            nibbles += [0, now - 1] if now < 16 else [0, 15, (now - 16) % 16, (now - 16) // 16]
            run -= now
        nibbles += [n] if n else []
    nibbles += [0] * (-len(nibbles) % 8)
    return bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))


def unpack_lengths(data: bytes, size: int, limit: int = MAX_LENGTH) -> tuple[list[int], int]:
    """Returns (lengths, bytes used) of one list, which ends where the code is complete."""
    nibbles = [n for byte in data for n in (byte & 15, byte >> 4)] + [-1] * 4  # one item never takes more
    lengths: list[int] = []
    at, room = 0, 2**MAX_LENGTH
    while room > 0:
        n, at = nibbles[at], at + 1
        if n == 0:
            r, at = nibbles[at], at + 1
            if r == 15:
                r, at = 15 + nibbles[at] + 16 * nibbles[at + 1], at + 2
            lengths += [0] * (r + 1)
        else:
            lengths.append(n)
            room -= 2 ** (MAX_LENGTH - n)
        if at > 2 * len(data) or n > limit or len(lengths) > size:
            raise PacketError("a list of code lengths is truncated, or leaves its limits")
    used = (at + 7) // 8 * 4
    if room < 0 or used > len(data):
        raise PacketError("a list of code lengths describes no prefix code, or is truncated")
    return lengths + [0] * (size - len(lengths)), used
