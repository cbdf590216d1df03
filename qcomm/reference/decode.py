"""Decoder of packets, byte by byte, with all checks of their validity."""

import math
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from qcomm.errors import PacketError
from qcomm.reference.codes import canonical_codes, unpack_lengths
from qcomm.reference.grids import NONE, RANGE_CENTER, RANGE_ENDPOINT, SIGMA, dequantize, is_usable, narrow
from qcomm.reference.lanes import decode_lanes
from qcomm.reference.packet import (
    BLOCK_CODED,
    BLOCK_CONSTANT,
    BLOCK_FIXED,
    BLOCK_RAW,
    CONSTANT,
    DTYPES,
    FIXED,
    HEADER,
    MAGIC,
    NO_TABLE,
    OWN_TABLE,
    PAIR,
    RAW,
    RUNS,
    SINGLE,
    VERSION,
    Header,
    Record,
    alphabet_size,
    checksum,
    checksum_pieces,
    from_bytes,
    length_limit,
    static_lengths,
    unpack_bits,
    values_per_block,
)
from qcomm.reference.static_tables import STATIC_TABLES
from qcomm.reference.zero_runs import MAX_LEVEL, block_borders, decode_run_block, dequantize_runs

MAX_ELEMENTS = 2**40 - 1


def require(condition: bool, what: str) -> None:
    """Raises a PacketError that names the violated condition."""
    if not condition:
        raise PacketError(f"not a valid packet: {what}")


class Reader:
    """A reader that takes bytes from the front, and never more than there are."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        """Takes the next ``count`` bytes."""
        require(count <= self.left, "it must not be truncated")
        self.at += count
        return self.data[self.at - count : self.at]

    @property
    def left(self) -> int:
        """Returns the number of bytes not taken yet."""
        return len(self.data) - self.at

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Takes the next fields."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def integers(self, count: int, letter: str) -> list[int]:
        """Takes the next ``count`` integers of one type."""
        data = self.take(count * struct.calcsize("<" + letter))  # checks a hostile count before it becomes a layout
        return [value for (value,) in struct.iter_unpack("<" + letter, data)]


def check_header(h: Header, total_bytes: int) -> None:
    """Checks the fields of a header on their own."""
    require(h.magic == MAGIC and h.version == VERSION, "magic number and version")
    require(h.dtype < len(DTYPES) and h.flags <= 1 and h.reserved == 0, "dtype, flags, reserved field")
    require(h.ndim <= 64 and 1 <= h.steps <= 512 and h.segment_count >= 1, "dimensions, steps, segments")
    require(h.element_count <= MAX_ELEMENTS and h.total_bytes == total_bytes, "element count and size")


def check_record(r: Record, dtype: torch.dtype) -> None:
    """Checks the fields of a segment record on their own."""
    require(r.grid <= SIGMA and r.coding <= RUNS, "segment fields")
    if r.coding in (RAW, CONSTANT):
        return
    require(r.grid != NONE and (2 if r.grid == SIGMA else 1) <= r.num_bits <= 16, "grid and num_bits")
    require(is_usable(dtype, r.grid, r.num_bits, r.p0, r.p1), "parameters of the grid")
    require(r.coding != FIXED or r.grid in (RANGE_CENTER, RANGE_ENDPOINT), "coding fixed is for range grids")
    require(r.coding != PAIR or (r.grid, r.num_bits) == (SIGMA, 4), "coding pair is for sigma grids of 4 bits")
    if r.coding == RUNS:
        fits = (r.grid, r.num_bits, r.table) == (SIGMA, 3, OWN_TABLE)
        require(fits and MAX_LEVEL * r.p1 <= torch.finfo(dtype).max, "coding runs is for sigma grids of 3 bits")
    if r.coding in (FIXED, RUNS):
        return
    require(r.table != OWN_TABLE or r.num_bits <= 12, "codes exist for 12 bits at most")
    if r.table not in (OWN_TABLE, NO_TABLE):
        num_bits, pair, _ = STATIC_TABLES.get(r.table, (0, False, ""))
        require((num_bits, pair) == (r.num_bits, r.coding == PAIR), "static table")


def blocks_in(r: Record, steps: int) -> int:
    """Returns the number of blocks of a segment."""
    return -(-r.elements // values_per_block(r.coding, steps)) if r.coding in (SINGLE, PAIR) else 0


def plain_bytes(r: Record, dtype: torch.dtype) -> int:
    """Returns the payload bytes of a segment without blocks."""
    if r.coding == RAW:
        return -(-r.elements * dtype.itemsize // 4) * 4
    return -(-r.elements * r.num_bits // 32) * 4 if r.coding == FIXED else 0


def lengths_of(records: list[Record], area: bytes) -> Iterator[list[int] | None]:
    """Yields the code of each segment, and checks that the lists fill their area."""
    for r in records:
        if r.coding not in (SINGLE, PAIR):
            yield None
        elif r.table != OWN_TABLE:
            yield static_lengths(r.table)
        else:
            lengths, used = unpack_lengths(
                area, alphabet_size(r.coding, r.num_bits), length_limit(r.coding, r.num_bits)
            )
            area = area[used:]
            yield lengths
    require(not area, "the code lengths fill their area")


def pieces_of(
    records: list[Record], dtype: torch.dtype, steps: int, ends: list[int], payload: bytes
) -> list[list[tuple[int, bytes]]]:
    """Returns (values, bytes) of each segment's blocks, or of a whole plain segment, and last of the run blocks.

    They must fill the payload.
    """
    segments, at, left = [], 0, iter(ends)
    for r in records:
        coded = r.coding in (SINGLE, PAIR)
        size = values_per_block(r.coding, steps) if coded else max(r.elements, 1)
        pieces = []
        for begin in range(0, r.elements if coded else 1, size):
            end = next(left) if coded else at + plain_bytes(r, dtype)
            require(at + coded <= end <= len(payload), "blocks and segments follow each other in the payload")
            pieces.append((min(size, r.elements - begin), payload[at:end]))
            at = end
        segments.append(pieces)
    borders = block_borders(sum(r.elements for r in records if r.coding == RUNS), steps)
    runs = []
    for begin, stop in pairwise(borders):
        end = next(left)
        require(at < end <= len(payload), "blocks and segments follow each other in the payload")
        runs.append((stop - begin, payload[at:end]))
        at = end
    require(at == len(payload), "the payload ends with the last segment")
    return [*segments, runs]


def checksums_of(r: Record, pieces: list[tuple[int, bytes]]) -> list[int]:
    """Returns the checksums of a segment's pieces; a constant has none."""
    if r.coding in (CONSTANT, RUNS):
        return []
    return [checksum_pieces(data) if r.coding in (RAW, FIXED) else checksum(data) for _, data in pieces]


def decode_packet(packet: bytes) -> torch.Tensor:
    """Decodes a packet to its tensor; raises PacketError if it is not valid."""
    reader = Reader(packet)
    h = Header(*reader.unpack(HEADER))
    check_header(h, len(packet))
    dtype, shape = DTYPES[h.dtype], reader.integers(h.ndim, "Q")
    records = [Record.unpack(*reader.unpack(Record.layout(dtype))) for _ in range(h.segment_count)]
    for r in records:
        check_record(r, dtype)
    require(sum(r.elements for r in records) == h.element_count, "the sum of the segments' counts")
    require(math.prod(d for d in shape if d) <= MAX_ELEMENTS and math.prod(shape) == h.element_count, "dimensions")
    area = reader.take(4 * h.lengths_words)
    runs = sum(r.elements for r in records if r.coding == RUNS)
    blocks = sum(blocks_in(r, h.steps) for r in records) + len(block_borders(runs, h.steps)) - 1
    ends = [4 * end for end in reader.integers(blocks, "I")]
    sums = reader.integers(blocks + sum(r.coding in (RAW, FIXED) for r in records) if h.flags else 0, "I")
    metadata = packet[:8] + bytes(4) + packet[12 : reader.at]
    require(checksum(metadata) == h.header_checksum, "the header's checksum")
    codes = list(lengths_of(records, area))
    *pieces, run_blocks = pieces_of(records, dtype, h.steps, ends, packet[reader.at :])
    found = [value for r, parts in zip(records, pieces, strict=True) for value in checksums_of(r, parts)]
    found += [checksum(data) for _, data in run_blocks]
    require(not h.flags or found == sums, "the payload's checksums")
    levels = [level for n, data in run_blocks for level in decode_run_block(data, n)]
    values = [torch.empty(0, dtype=dtype)]
    for r, lengths, parts in zip(records, codes, pieces, strict=True):
        if r.coding == RUNS:
            values.append(dequantize_runs(torch.tensor(levels[: r.elements], dtype=torch.float64), r.p1, dtype))
            levels = levels[r.elements :]
        else:
            values += [decode_piece(data, n, dtype, r, lengths) for n, data in parts]
    return torch.cat(values).reshape(shape)


def decode_piece(data: bytes, n: int, dtype: torch.dtype, r: Record, lengths: list[int] | None) -> torch.Tensor:
    """Decodes the ``n`` values of a block or of a plain segment."""
    if r.coding == CONSTANT:
        return narrow(torch.full((n,), r.p0, dtype=torch.float64), dtype)
    if r.coding == RAW:
        return from_bytes(data[: n * dtype.itemsize], dtype)
    if r.coding == FIXED:
        return dequantize(
            torch.tensor(unpack_bits(data, n, r.num_bits), dtype=torch.int64), dtype, r.grid, r.num_bits, r.p0, r.p1
        )
    return decode_block(Reader(data), n, dtype, r, lengths)


def decode_block(block: Reader, n: int, dtype: torch.dtype, r: Record, lengths: list[int] | None) -> torch.Tensor:
    """Decodes the values of one block."""
    (info,) = block.unpack("<I")
    mode, escapes, symbol = info & 3, info >> 2 & 0x3FFF, info >> 16
    may_escape = r.grid == SIGMA and mode in (BLOCK_FIXED, BLOCK_CODED)
    require(escapes <= (n if may_escape else 0), "escapes only where they can be")
    if mode == BLOCK_RAW:
        return from_bytes(block.take(n * dtype.itemsize), dtype)
    start = block.integers(32 if mode == BLOCK_CODED else 0, "I")
    values = from_bytes(block.take(escapes * dtype.itemsize), dtype)
    positions = block.integers(escapes, "H")
    require(all(a < b for a, b in pairwise([-1, *positions, n])), "positions of escapes ascend inside the block")
    if mode == BLOCK_CONSTANT:
        require(symbol < 2**r.num_bits - (r.grid == SIGMA), "a constant's symbol is a level")
        symbols = [symbol] * n
    elif mode == BLOCK_FIXED:
        symbols = unpack_bits(block.take(-(-n * r.num_bits // 8)), n, r.num_bits)
    else:
        require(lengths is not None, "a coded block has a code")
        symbols = decode_codewords(start, block.integers(block.left // 2, "H"), n, r.coding, lengths or [])
    require(all(symbols[p] == 2**r.num_bits - 1 for p in positions), "positions of escapes are those of escape symbols")
    decoded = dequantize(torch.tensor(symbols, dtype=torch.int64), dtype, r.grid, r.num_bits, r.p0, r.p1)
    decoded[positions] = values
    return decoded


def decode_codewords(start: list[int], words: list[int], n: int, coding: int, lengths: list[int]) -> list[int]:
    """Decodes the ``n`` symbols of a coded block.

    A word of padding may be read as a word of the block, because it is zero.
    """
    count = -(-n // 2) if coding == PAIR else n
    codewords = decode_lanes(start, words, count, canonical_codes(lengths), lengths)
    return [s for pair in codewords for s in (pair & 15, pair >> 4)][:n] if coding == PAIR else codewords
