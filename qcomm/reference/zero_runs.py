"""Zero runs: values of which most are zero, as tokens of a run of zeros and the level that ends it.

Blocks of tokens run across the segments of a packet that are coded this way; docs/format.md, "Zero runs".
"""

import math
import struct
from itertools import pairwise
from typing import NamedTuple

import torch

from qcomm.errors import PacketError
from qcomm.reference.codes import canonical_codes
from qcomm.reference.grids import arithmetic
from qcomm.reference.lanes import LANES, decode_tokens, encode_lanes
from qcomm.reference.static_tables import RUN_TABLE_BOUNDS, RUN_TABLES

MAX_LEVEL = 3
LEVELS = (-3, -2, -1, 1, 2, 3)
RUNS_BITS = 3  # of a level in a fixed block
SKIP_ZEROS = 512
# (shortest run, extra bits) of each class
CLASSES = (
    *((run, 0) for run in range(8)),
    *((base + i * 2**extra, extra) for base, extra in ((8, 1), (16, 2), (32, 3), (64, 4), (128, 5)) for i in range(4)),
    *((256 + 32 * i, 5) for i in range(8)),
)
SKIP = len(CLASSES) * len(LEVELS)
RUNS_ZERO, RUNS_FIXED, RUNS_CODED, RUNS_NOT_FINITE = range(4)


def quantize_runs(u: torch.Tensor, step: float) -> torch.Tensor:
    """Returns the int64 levels of values ``u`` in T, at most 3 on each side; those of NaN mean nothing."""
    return torch.round(u * (1 / torch.tensor(step, dtype=u.dtype))).clamp(-MAX_LEVEL, MAX_LEVEL).nan_to_num().long()


def dequantize_runs(levels: torch.Tensor, step: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values of levels, which are whole numbers or NaN."""
    t = arithmetic(dtype)
    return (levels.to(t) * torch.tensor(step, dtype=t)).to(dtype)


def block_borders(count: int, steps: int) -> list[int]:
    """Returns where the blocks of ``count`` values begin, and the end: multiples of 32, as equal as can be."""
    units, blocks = -(-count // LANES), -(-count // (4 * LANES * steps))
    return [min(count, LANES * (units * i // blocks)) for i in range(blocks + 1)] if count else [0]


def tokens_of(levels: list[int]) -> list[tuple[int, int, int]]:
    """Returns the tokens of a block as (number, value of the extra bits, number of extra bits)."""
    tokens, run = [], 0
    for level in levels:
        if level == 0:
            run += 1
            continue
        tokens += [(SKIP, 0, 0)] * (run // SKIP_ZEROS)
        run %= SKIP_ZEROS
        number = max(i for i, (shortest, _) in enumerate(CLASSES) if shortest <= run)
        shortest, extra = CLASSES[number]
        tokens.append((number * len(LEVELS) + LEVELS.index(level), run - shortest, extra))
        run = 0
    return tokens


def run_table(nonzeros: int, count: int) -> int:
    """Returns the table made for a share near ``nonzeros / count``."""
    return sum(nonzeros << 32 < count * bound for bound in RUN_TABLE_BOUNDS)


def run_code(table: int) -> tuple[list[int], dict[int, int]]:
    """Returns (lengths, codewords) of a table."""
    lengths = [int(digit, 16) for digit in RUN_TABLES[table]]
    return lengths, canonical_codes(lengths)


class RunPart(NamedTuple):
    """A segment's levels, its residual before, which encoding replaces, and the quantization errors to come."""

    levels: torch.Tensor
    residual: torch.Tensor
    lost: torch.Tensor


def encode_run_blocks(parts: list[RunPart], steps: int) -> list[bytes]:
    """Encodes all segments' levels as blocks, and updates their residuals.

    The residuals of a block that cannot be coded stay as they were.
    """
    if not parts:
        return []
    levels = torch.cat([part.levels for part in parts])
    lost = torch.cat([part.lost for part in parts])
    kept = torch.cat([part.residual for part in parts])
    blocks = []
    for begin, end in pairwise(block_borders(levels.numel(), steps)):
        if lost[begin:end].isfinite().all():
            blocks.append(encode_run_block(levels[begin:end].tolist()))
        else:
            blocks.append(struct.pack("<I", RUNS_NOT_FINITE))
            lost[begin:end] = kept[begin:end]
    for part, new in zip(parts, lost.split([part.levels.numel() for part in parts]), strict=True):
        part.residual.copy_(new)
    return blocks


def encode_run_block(levels: list[int]) -> bytes:
    """Encodes the levels of a block."""
    nonzeros = sum(level != 0 for level in levels)
    if not nonzeros:
        return struct.pack("<I", RUNS_ZERO)
    whole = sum((level + MAX_LEVEL) << RUNS_BITS * i for i, level in enumerate(levels))
    packed = whole.to_bytes(-(-len(levels) * RUNS_BITS // 8), "little")
    fixed = _pad4(struct.pack("<I", RUNS_FIXED) + packed)
    tokens, table = tokens_of(levels), run_table(nonzeros, len(levels))
    lengths, codes = run_code(table)
    codewords = [(codes[n] | value << lengths[n], lengths[n] + extra) for n, value, extra in tokens]
    start, words = encode_lanes(codewords)
    info = RUNS_CODED | table << 2 | len(tokens) << 8
    coded = _pad4(struct.pack(f"<33I{len(words)}H", info, *start, *words))
    return coded if len(coded) <= len(fixed) else fixed


def decode_run_block(block: bytes, count: int) -> list[float]:
    """Decodes the ``count`` levels of a block, which may be NaN; raises PacketError if it is not valid."""
    (info,) = struct.unpack("<I", block[:4])
    mode, table, number = info & 3, info >> 2 & 63, info >> 8
    if mode == RUNS_CODED and table < len(RUN_TABLES) and number and len(block) >= 4 + 4 * LANES:
        return list(_coded_levels(block, count, table, number))
    _require(mode != RUNS_CODED and not table and not number, "the info of a block of zero runs")
    if mode in (RUNS_ZERO, RUNS_NOT_FINITE):
        return [0.0 if mode == RUNS_ZERO else math.nan] * count
    size = -(-count * RUNS_BITS // 8)
    _require(len(block) >= 4 + size, "a block of levels is not truncated")
    whole = int.from_bytes(block[4 : 4 + size], "little")
    symbols = [whole >> RUNS_BITS * i & (1 << RUNS_BITS) - 1 for i in range(count)]
    _require(all(symbol <= 2 * MAX_LEVEL for symbol in symbols), "levels are within 3")
    return [symbol - MAX_LEVEL for symbol in symbols]


def _coded_levels(block: bytes, count: int, table: int, number: int) -> list[int]:
    start = list(struct.unpack(f"<{LANES}I", block[4 : 4 + 4 * LANES]))
    words = [word for (word,) in struct.iter_unpack("<H", block[4 + 4 * LANES :])]
    lengths, codes = run_code(table)
    by_code = {(codes[n], length): n for n, length in enumerate(lengths)}

    def take(window: int) -> tuple[tuple[int, int], int]:
        length = next(n for n in range(1, 12) if (window % (1 << n), n) in by_code)
        token = by_code[window % (1 << length), length]
        extra = 0 if token == SKIP else CLASSES[token // len(LEVELS)][1]
        return (token, (window >> length) % (1 << extra)), length + extra

    _require(number <= count, "no more tokens than values")
    levels: list[int] = []
    tokens = decode_tokens(start, words, number, take)
    for token, more in tokens:
        levels += [0] * SKIP_ZEROS if token == SKIP else [0] * (CLASSES[token // len(LEVELS)][0] + more)
        levels += [] if token == SKIP else [LEVELS[token % len(LEVELS)]]
        _require(len(levels) <= count, "positions are inside the block")
    _require(tokens[-1][0] != SKIP, "the last token has a value")
    return levels + [0] * (count - len(levels))


def _pad4(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise PacketError(f"not a valid packet: {what}")
