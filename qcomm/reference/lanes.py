"""The 32 lanes of a coded block."""

from collections.abc import Callable
from typing import TypeVar

from qcomm.errors import PacketError

LANES = 32
T = TypeVar("T")


def encode_lanes(codewords: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Encodes (code, length) codewords to (start windows, words).

    It goes backwards, and writes each word in front of the previous ones.
    """
    x, c, words = [0] * LANES, [0] * LANES, []
    started = False
    for step in reversed(range(-(-len(codewords) // LANES))):
        live = list(enumerate(codewords[step * LANES : (step + 1) * LANES]))
        if not started and any(c[lane] + length >= 32 for lane, (_, length) in live):
            started, c = True, [max(v, 16) for v in c]
        for lane, (code, length) in reversed(live):
            if c[lane] + length >= 32:
                words.append(x[lane] >> (c[lane] - 16))
                c[lane] -= 16
                x[lane] %= 1 << c[lane]
            x[lane] = x[lane] << length | code
            c[lane] += length
    return [x[lane] | 1 << c[lane] for lane in range(LANES)], words[::-1]


def decode_lanes(
    start: list[int], words: list[int], count: int, codes: dict[int, int], lengths: list[int]
) -> list[int]:
    """Decodes ``count`` symbols of a complete code; no bits may be left over."""
    by_code = {(codes[s], n): s for s, n in enumerate(lengths) if n}

    def take(window: int) -> tuple[int, int]:
        length = next(n for n in range(1, 16) if (window % (1 << n), n) in by_code)
        return by_code[window % (1 << length), length], length

    return decode_tokens(start, words, count, take)


def decode_tokens(start: list[int], words: list[int], count: int, take: Callable[[int], tuple[T, int]]) -> list[T]:
    """Decodes ``count`` tokens; no bits may be left over.

    Args:
        start: start windows.
        words: 16 bits each.
        count: number of tokens.
        take: returns the token at the lowest bits of a window, and its length in bits.
    """
    if 0 in start:
        raise PacketError("a start window has no sentinel")
    c = [v.bit_length() - 1 for v in start]
    x = [v ^ 1 << n for v, n in zip(start, c, strict=True)]
    tokens, at = [], 0
    for step in range(-(-count // LANES)):
        live = range(min(LANES, count - step * LANES))
        for lane in live:
            token, length = take(x[lane])
            tokens.append(token)
            x[lane] >>= length
            c[lane] -= length
            if c[lane] < 0:
                raise PacketError("more bits used than there are")
        for lane in live:
            if c[lane] < 16 and at < len(words):
                x[lane] |= words[at] << c[lane]
                c[lane] += 16
                at += 1
    if any(x):
        raise PacketError("bits are left over")
    return tokens
