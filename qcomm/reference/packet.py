"""Encoder of packets, byte by byte, and the parts of a packet."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qcomm.reference.codes import canonical_codes, code_lengths, pack_lengths
from qcomm.reference.grids import NONE, SIGMA, arithmetic, dequantize, quantize, sample_indices
from qcomm.reference.lanes import encode_lanes
from qcomm.reference.static_tables import STATIC_TABLES
from qcomm.reference.zero_runs import RunPart, dequantize_runs, encode_run_blocks, quantize_runs

RAW, CONSTANT, FIXED, SINGLE, PAIR, RUNS = range(6)
BLOCK_CONSTANT, BLOCK_FIXED, BLOCK_CODED, BLOCK_RAW = range(4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OWN_TABLE, NO_TABLE = 0, 255
TABLE_PAIRS = 2**14  # sampled for a long sigma segment's own table
MAGIC, VERSION = 0x4D4D4351, 2
HEADER = "<IBBBBIIQQHHI"


class Header(NamedTuple):
    """The header, the first 40 bytes of a packet."""

    magic: int
    version: int
    dtype: int
    flags: int
    ndim: int
    header_checksum: int
    segment_count: int
    element_count: int
    total_bytes: int
    steps: int
    reserved: int
    lengths_words: int


class Record(NamedTuple):
    """The record of a segment: 8 bytes and two numbers in T."""

    elements: int
    grid: int
    num_bits: int
    coding: int
    table: int
    p0: float
    p1: float

    @staticmethod
    def layout(dtype: torch.dtype) -> str:
        """Returns the fields of a record in packets of ``dtype``."""
        return "<IBBBBdd" if dtype == torch.float64 else "<IBBBBff"

    @classmethod
    def unpack(cls, low: int, high: int, kinds: int, num_bits: int, table: int, p0: float, p1: float) -> "Record":
        """Returns a record from its fields."""
        return cls(low | high << 32, kinds >> 4, num_bits, kinds & 15, table, p0, p1)

    def pack(self, dtype: torch.dtype) -> bytes:
        """Returns the record's bytes."""
        kinds = self.coding | self.grid << 4
        fields = self.elements % 2**32, self.elements >> 32, kinds, self.num_bits, self.table
        p0, p1 = (float(torch.tensor(p, dtype=torch.float64).to(arithmetic(dtype))) for p in (self.p0, self.p1))
        return struct.pack(self.layout(dtype), *fields, p0, p1)


@dataclass
class ReferenceSegment:
    """A segment's record and its values ``u = values * inv_scale + residual``.

    Encoding replaces ``residual`` by the quantization error.
    """

    values: torch.Tensor
    grid: int = NONE
    num_bits: int = 0
    coding: int = RAW
    table: int = OWN_TABLE
    p0: float = 0.0
    p1: float = 0.0
    residual: torch.Tensor | None = None
    inv_scale: float = 1.0

    def u(self) -> torch.Tensor:
        """Returns the values to quantize, in T."""
        t = arithmetic(self.values.dtype)
        u = self.values.to(t)
        if self.inv_scale != 1:
            u = u * torch.tensor(self.inv_scale, dtype=t)
        return u if self.residual is None else u + self.residual.to(t)

    def record(self) -> Record:
        """Returns the segment's record."""
        return Record(self.values.numel(), self.grid, self.num_bits, self.coding, self.table, self.p0, self.p1)


def checksum(data: bytes) -> int:
    """Computes a checksum by 32 lanes of multiply and xor, which are folded."""
    padded = data + bytes(-len(data) % 4)
    h = [0x9E3779B9 * (j + 1) % 2**32 for j in range(32)]
    for i, (word,) in enumerate(struct.iter_unpack("<I", padded)):
        v = (h[i % 32] ^ word) * 0x85EBCA6B % 2**32
        h[i % 32] = v ^ v >> 15
    for d in (16, 8, 4, 2, 1):
        h = [h[j] * 0xC2B2AE35 % 2**32 ^ (h[j + d] << 13 | h[j + d] >> 19) % 2**32 for j in range(d)]
    return h[0] ^ len(data) % 2**32


def checksum_pieces(data: bytes) -> int:
    """Returns the checksum of a raw or fixed segment."""
    sums = [checksum(data[i : i + 65536]) for i in range(0, len(data), 65536)]
    return checksum(struct.pack(f"<{len(sums)}I", *sums))


def to_bytes(values: torch.Tensor) -> bytes:
    """Returns the elements' bytes."""
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def from_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor of the elements in ``data``."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def pad4(data: bytes) -> bytes:
    """Pads ``data`` with zeros to a multiple of 4 bytes."""
    return data + bytes(-len(data) % 4)


def pack_bits(symbols: Sequence[int], num_bits: int) -> bytes:
    """Packs symbols of ``num_bits`` bits, the first lowest."""
    whole = sum(s << (i * num_bits) for i, s in enumerate(symbols))
    return whole.to_bytes(-(-len(symbols) * num_bits // 8), "little")


def unpack_bits(data: bytes, count: int, num_bits: int) -> list[int]:
    """Unpacks symbols: the inverse of :func:`pack_bits`."""
    whole = int.from_bytes(data[: -(-count * num_bits // 8)], "little")
    return [whole >> (i * num_bits) & (1 << num_bits) - 1 for i in range(count)]


def codewords_of(symbols: list[int], coding: int) -> list[int]:
    """Returns the symbols, or pairs of them."""
    if coding == SINGLE:
        return symbols
    even = symbols + [7] * (len(symbols) % 2)
    return [a | b << 4 for a, b in zip(even[::2], even[1::2], strict=True)]


def values_per_block(coding: int, steps: int) -> int:
    """Returns the maximum number of values in a block."""
    return 32 * steps * (2 if coding == PAIR else 1)


def alphabet_size(coding: int, num_bits: int) -> int:
    """Returns the number of symbols or pairs in the alphabet."""
    return 256 if coding == PAIR else 2**num_bits


def length_limit(coding: int, num_bits: int) -> int:
    """Returns the maximum length of a codeword."""
    return 12 if coding == PAIR else min(max(num_bits + 4, 12), 15)


def escape_of(grid: int, num_bits: int) -> int:
    """Returns the escape symbol, or -1 where there is none."""
    return 2**num_bits - 1 if grid == SIGMA else -1


def encode_block(
    u: torch.Tensor, symbols: list[int], segment: ReferenceSegment, lengths: list[int] | None
) -> tuple[bytes, int]:
    """Encodes a block to (bytes, mode)."""
    dtype, n, escape = segment.values.dtype, len(symbols), escape_of(segment.grid, segment.num_bits)
    positions = [i for i, s in enumerate(symbols) if s == escape]
    escapes = to_bytes(u[positions].to(dtype)) + struct.pack(f"<{len(positions)}H", *positions)

    def block(mode: int, body: bytes, symbol: int = 0) -> bytes:
        count = len(positions) if mode in (BLOCK_FIXED, BLOCK_CODED) else 0
        return pad4(struct.pack("<I", mode | count << 2 | symbol << 16) + body)

    if symbols[0] != escape and len(set(symbols)) == 1:
        return block(BLOCK_CONSTANT, b"", symbols[0]), BLOCK_CONSTANT
    candidates = []
    if 16 * len(positions) <= n:
        used = codewords_of(symbols, segment.coding)
        if lengths is not None and all(lengths[s] for s in used):
            codes = canonical_codes(lengths)
            start, words = encode_lanes([(codes[s], lengths[s]) for s in used])
            body = struct.pack("<32I", *start) + escapes + struct.pack(f"<{len(words)}H", *words)
            candidates.append((block(BLOCK_CODED, body), BLOCK_CODED))
        candidates.append((block(BLOCK_FIXED, escapes + pack_bits(symbols, segment.num_bits)), BLOCK_FIXED))
    candidates.append((block(BLOCK_RAW, to_bytes(u.to(dtype))), BLOCK_RAW))
    return min(candidates, key=lambda candidate: len(candidate[0]))  # the first of the smallest


class Writer:
    """A writer that collects the parts of a packet."""

    def __init__(self, steps: int, with_checksums: bool) -> None:
        self.steps, self.with_checksums = steps, with_checksums
        self.records: list[bytes] = []
        self.lengths, self.payload = b"", b""
        self.block_ends: list[int] = []
        self.checksums: list[int] = []
        self.runs: list[RunPart] = []  # the segments of zero runs so far

    def cost(self) -> int:
        """Returns the bytes so far, without headers."""
        sums = 4 * len(self.checksums) if self.with_checksums else 0
        return len(self.lengths) + 4 * len(self.block_ends) + sums + len(self.payload)

    def add_plain(self, data: bytes) -> None:
        """Adds a raw or fixed segment."""
        self.payload += pad4(data)
        self.checksums.append(checksum_pieces(pad4(data)))

    def add_blocks(
        self, segment: ReferenceSegment, u: torch.Tensor, symbols: list[int], lengths: list[int] | None
    ) -> list[int]:
        """Adds a segment's blocks and returns the mode of each value's block."""
        modes = []
        size = values_per_block(segment.coding, self.steps)
        for begin in range(0, len(symbols), size):
            data, mode = encode_block(u[begin : begin + size], symbols[begin : begin + size], segment, lengths)
            self.payload += data
            self.block_ends.append(len(self.payload) // 4)
            self.checksums.append(checksum(data))
            modes += [mode] * len(symbols[begin : begin + size])
        return modes

    def add_run_blocks(self) -> None:
        """Adds the blocks of all segments of zero runs, behind everything else, and updates their residuals."""
        for data in encode_run_blocks(self.runs, self.steps):
            self.payload += data
            self.block_ends.append(len(self.payload) // 4)
            self.checksums.append(checksum(data))


def own_lengths(segment: ReferenceSegment, symbols: list[int], steps: int) -> list[int] | None:
    """Returns the own code of a segment, or None for no code.

    A long sigma segment's code is made of a sample of its pairs, with a codeword for every symbol.
    """
    size, count = alphabet_size(segment.coding, segment.num_bits), len(symbols)
    sampled = segment.grid == SIGMA and size <= 256 and count // 2 > TABLE_PAIRS
    counts = [1 if sampled else 0] * size
    if sampled:
        pairs = [symbols[2 * a : 2 * a + 2] for a in sample_indices(count // 2, TABLE_PAIRS, 0)]
        for s in codewords_of([symbol for pair in pairs for symbol in pair], segment.coding):
            counts[s] += 2
    else:
        for s in codewords_of(symbols, segment.coding):
            counts[s] += 1
    lengths = code_lengths(counts, length_limit(segment.coding, segment.num_bits))
    if sum(c > 0 for c in counts) == 1:
        return None
    bits = sum(c * n for c, n in zip(counts, lengths, strict=True))
    if sampled:
        bits = bits * (-(-count // 2) if segment.coding == PAIR else count) // sum(counts)
    blocks = -(-count // values_per_block(segment.coding, steps))
    packed = -(-count * segment.num_bits // 8)
    pays = bits // 8 + len(pack_lengths(lengths)) + 40 * blocks < packed
    return lengths if segment.grid != SIGMA or pays else None


def write_segment(writer: Writer, segment: ReferenceSegment) -> Writer:
    """Returns ``writer`` with one more segment, after its fallbacks."""
    u, n = segment.u(), segment.values.numel()
    written = ReferenceSegment(**vars(segment))
    if n == 0:
        written = ReferenceSegment(segment.values, coding=CONSTANT)
    result = copy_of(writer)
    lost = torch.zeros(n, dtype=torch.float32)
    if written.coding == CONSTANT:
        lost = (u - torch.tensor(written.p0, dtype=u.dtype)).float()
    elif written.coding == RAW:
        result.add_plain(to_bytes(u.to(segment.values.dtype)))
    elif written.coding == RUNS:
        if segment.residual is None:
            raise ValueError("coding runs needs a residual")
        levels = quantize_runs(u, written.p1)
        lost = (u - dequantize_runs(levels, written.p1, u.dtype)).float()
        result.runs.append(RunPart(levels, segment.residual, lost))
    else:
        lost, result = write_symbols(writer, written, u)
    plain = copy_of(writer)
    plain.add_plain(to_bytes(u.to(segment.values.dtype)))
    if written.grid != NONE and written.coding != RUNS and segment.residual is None and result.cost() >= plain.cost():
        result, written = plain, ReferenceSegment(segment.values)
    result.records.append(written.record().pack(segment.values.dtype))
    later = written.coding == RUNS or (written.coding == CONSTANT and not math.isfinite(written.p0))
    if segment.residual is not None and not later:
        segment.residual.copy_(lost)
    return result


def write_symbols(writer: Writer, segment: ReferenceSegment, u: torch.Tensor) -> tuple[torch.Tensor, Writer]:
    """Returns (quantization error, writer), and sets ``segment``'s coding and table to the written ones."""
    dtype, result = segment.values.dtype, copy_of(writer)
    parameters = (dtype, segment.grid, segment.num_bits, segment.p0, segment.p1)
    q = quantize(u, *parameters)
    symbols = q.tolist()
    decoded = dequantize(q, *parameters).to(u.dtype)
    fixed = copy_of(writer)
    fixed.add_plain(pack_bits(symbols, segment.num_bits))
    modes = [BLOCK_FIXED] * len(symbols)
    if segment.coding != FIXED:
        if segment.table == OWN_TABLE:
            lengths = own_lengths(segment, symbols, writer.steps)
            segment.table = OWN_TABLE if lengths else NO_TABLE
            result.lengths += pack_lengths(lengths) if lengths else b""
        else:
            lengths = static_lengths(segment.table)
        modes = result.add_blocks(segment, u, symbols, lengths)
    if segment.grid != SIGMA and (segment.coding == FIXED or result.cost() >= fixed.cost()):
        segment.coding, segment.table, result = FIXED, OWN_TABLE, fixed
    exact = (q == escape_of(segment.grid, segment.num_bits)) | (torch.tensor(modes, dtype=torch.int64) == BLOCK_RAW)
    return torch.where(exact, 0.0, (u - decoded).float()), result


def static_lengths(table: int) -> list[int] | None:
    """Returns the code lengths of a static table; None for table 255."""
    return None if table == NO_TABLE else [int(digit, 16) for digit in STATIC_TABLES[table][2]]


def copy_of(writer: Writer) -> Writer:
    """Returns an independent copy of a writer."""
    new = Writer(writer.steps, writer.with_checksums)
    new.records, new.lengths, new.payload = list(writer.records), writer.lengths, writer.payload
    new.block_ends, new.checksums = list(writer.block_ends), list(writer.checksums)
    new.runs = list(writer.runs)
    return new


def encode_packet(
    segments: Sequence[ReferenceSegment], shape: Sequence[int], steps: int = 256, with_checksums: bool = True
) -> bytes:
    """Encodes a packet and updates the residuals."""
    writer = Writer(steps, with_checksums)
    for segment in segments:
        writer = write_segment(writer, segment)
    writer.add_run_blocks()
    tail = struct.pack(f"<{len(shape)}Q", *shape) + b"".join(writer.records) + writer.lengths
    tail += struct.pack(f"<{len(writer.block_ends)}I", *writer.block_ends)
    tail += struct.pack(f"<{len(writer.checksums)}I", *writer.checksums) if with_checksums else b""
    count = sum(s.values.numel() for s in segments)
    total = 40 + len(tail) + len(writer.payload)
    dtype = DTYPES.index(segments[0].values.dtype)

    fields = (len(segments), count, total, steps, 0, len(writer.lengths) // 4)

    def header(value: int) -> bytes:
        return struct.pack(HEADER, *Header(MAGIC, VERSION, dtype, int(with_checksums), len(shape), value, *fields))

    return header(checksum(header(0) + tail)) + tail + writer.payload
