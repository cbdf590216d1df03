"""Packets, byte by byte."""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qcomm.reference.codes import canonical_codes, code_lengths, pack_lengths, unpack_lengths
from qcomm.reference.grids import NONE, SIGMA, arithmetic, dequantize, quantize
from qcomm.reference.lanes import decode_lanes, encode_lanes
from qcomm.static_tables import STATIC_TABLES

RAW, CONSTANT, FIXED, SINGLE, PAIR = range(5)
BLOCK_CONSTANT, BLOCK_FIXED, BLOCK_CODED, BLOCK_RAW = range(4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OWN_TABLE, NO_TABLE = 0, 255
HEADER, RECORD = "<IBBBBIIQQHHI", "<QBBBBIdd"


@dataclass
class ReferenceSegment:
    """What a segment record says, and the values: ``u = values * inv_scale + residual``.

    ``residual`` is replaced by what is lost.
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
        """What is quantized, in T."""
        t = arithmetic(self.values.dtype)
        u = self.values.to(t)
        if self.inv_scale != 1:
            u = u * torch.tensor(self.inv_scale, dtype=t)
        return u if self.residual is None else u + self.residual.to(t)

    def record(self) -> tuple[int, int, int, int, int, int, float, float]:
        """The fields of the segment's record."""
        return (self.values.numel(), self.grid, self.num_bits, self.coding, self.table, 0, self.p0, self.p1)


def checksum(data: bytes) -> int:
    """32 lanes of multiply and xor, folded."""
    padded = data + bytes(-len(data) % 4)
    h = [0x9E3779B9 * (j + 1) % 2**32 for j in range(32)]
    for i, (word,) in enumerate(struct.iter_unpack("<I", padded)):
        v = (h[i % 32] ^ word) * 0x85EBCA6B % 2**32
        h[i % 32] = v ^ v >> 15
    for d in (16, 8, 4, 2, 1):
        h = [h[j] * 0xC2B2AE35 % 2**32 ^ (h[j + d] << 13 | h[j + d] >> 19) % 2**32 for j in range(d)]
    return h[0] ^ len(data) % 2**32


def checksum_pieces(data: bytes) -> int:
    """Of a raw or fixed segment."""
    sums = [checksum(data[i : i + 65536]) for i in range(0, len(data), 65536)]
    return checksum(struct.pack(f"<{len(sums)}I", *sums))


def to_bytes(values: torch.Tensor) -> bytes:
    """The elements' bytes."""
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def from_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the elements in ``data``."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def pad4(data: bytes) -> bytes:
    """With zeros up to a multiple of 4 bytes."""
    return data + bytes(-len(data) % 4)


def pack_bits(symbols: Sequence[int], num_bits: int) -> bytes:
    """Symbols of ``num_bits`` bits, the first lowest."""
    whole = sum(s << (i * num_bits) for i, s in enumerate(symbols))
    return whole.to_bytes(-(-len(symbols) * num_bits // 8), "little")


def unpack_bits(data: bytes, count: int, num_bits: int) -> list[int]:
    """The inverse of :func:`pack_bits`."""
    whole = int.from_bytes(data[: -(-count * num_bits // 8)], "little")
    return [whole >> (i * num_bits) & (1 << num_bits) - 1 for i in range(count)]


def codewords_of(symbols: list[int], coding: int) -> list[int]:
    """Symbols, or pairs of them."""
    if coding == SINGLE:
        return symbols
    even = symbols + [7] * (len(symbols) % 2)
    return [a | b << 4 for a, b in zip(even[::2], even[1::2], strict=True)]


def values_per_block(coding: int, steps: int) -> int:
    """At most."""
    return 32 * steps * (2 if coding == PAIR else 1)


def alphabet_size(coding: int, num_bits: int) -> int:
    """Symbols or pairs that there are."""
    return 256 if coding == PAIR else 2**num_bits


def length_limit(coding: int, num_bits: int) -> int:
    """The longest codeword."""
    return 12 if coding == PAIR else min(num_bits + 4, 15)


def escape_of(grid: int, num_bits: int) -> int:
    """The escape symbol, or -1 where there is none."""
    return 2**num_bits - 1 if grid == SIGMA else -1


def encode_block(
    u: torch.Tensor, symbols: list[int], segment: ReferenceSegment, lengths: list[int] | None
) -> tuple[bytes, int]:
    """(bytes, mode) of a block."""
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
    """Collects the parts of a packet."""

    def __init__(self, steps: int, with_checksums: bool) -> None:
        self.steps, self.with_checksums = steps, with_checksums
        self.records: list[bytes] = []
        self.lengths, self.payload = b"", b""
        self.block_ends: list[int] = []
        self.checksums: list[int] = []

    def cost(self) -> int:
        """Bytes so far, besides headers."""
        sums = 4 * len(self.checksums) if self.with_checksums else 0
        return len(self.lengths) + 4 * len(self.block_ends) + sums + len(self.payload)

    def add_plain(self, data: bytes) -> None:
        """Adds a raw or fixed segment."""
        self.payload += pad4(data)
        self.checksums.append(checksum_pieces(pad4(data)))

    def add_blocks(
        self, segment: ReferenceSegment, u: torch.Tensor, symbols: list[int], lengths: list[int] | None
    ) -> list[int]:
        """Returns the mode of each value's block."""
        modes = []
        size = values_per_block(segment.coding, self.steps)
        for begin in range(0, len(symbols), size):
            data, mode = encode_block(u[begin : begin + size], symbols[begin : begin + size], segment, lengths)
            self.payload += data
            self.block_ends.append(len(self.payload) // 4)
            self.checksums.append(checksum(data))
            modes += [mode] * len(symbols[begin : begin + size])
        return modes


def own_lengths(segment: ReferenceSegment, symbols: list[int], steps: int) -> list[int] | None:
    """The code of a segment that brings its own, or None for no code."""
    counts = [0] * alphabet_size(segment.coding, segment.num_bits)
    for s in codewords_of(symbols, segment.coding):
        counts[s] += 1
    lengths = code_lengths(counts, length_limit(segment.coding, segment.num_bits))
    if sum(c > 0 for c in counts) == 1:
        return None
    bits = sum(c * n for c, n in zip(counts, lengths, strict=True))
    blocks = -(-len(symbols) // values_per_block(segment.coding, steps))
    packed = -(-len(symbols) * segment.num_bits // 8)
    pays = bits // 8 + len(pack_lengths(lengths)) + 40 * blocks < packed
    return lengths if segment.grid != SIGMA or pays else None


def write_segment(writer: Writer, segment: ReferenceSegment) -> Writer:
    """``writer`` with one more segment, after its fallbacks."""
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
    else:
        lost, result = write_symbols(writer, written, u)
    plain = copy_of(writer)
    plain.add_plain(to_bytes(u.to(segment.values.dtype)))
    if written.grid != NONE and segment.residual is None and result.cost() >= plain.cost():
        result, written = plain, ReferenceSegment(segment.values)
    result.records.append(struct.pack(RECORD, *written.record()))
    if segment.residual is not None and not (written.coding == CONSTANT and not math.isfinite(written.p0)):
        segment.residual.copy_(lost)
    return result


def write_symbols(writer: Writer, segment: ReferenceSegment, u: torch.Tensor) -> tuple[torch.Tensor, Writer]:
    """(what is lost, writer); changes ``segment``'s coding and table to what was written."""
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
    exact = (q == escape_of(segment.grid, segment.num_bits)) | (torch.tensor(modes) == BLOCK_RAW)
    return torch.where(exact, 0.0, (u - decoded).float()), result


def static_lengths(table: int) -> list[int] | None:
    """Of a static table; None for table 255."""
    return None if table == NO_TABLE else [int(digit, 16) for digit in STATIC_TABLES[table][2]]


def copy_of(writer: Writer) -> Writer:
    """A writer that can go its own way."""
    new = Writer(writer.steps, writer.with_checksums)
    new.records, new.lengths, new.payload = list(writer.records), writer.lengths, writer.payload
    new.block_ends, new.checksums = list(writer.block_ends), list(writer.checksums)
    return new


def encode_packet(
    segments: Sequence[ReferenceSegment], shape: Sequence[int], steps: int = 256, with_checksums: bool = True
) -> bytes:
    """A packet; residuals are updated."""
    writer = Writer(steps, with_checksums)
    for segment in segments:
        writer = write_segment(writer, segment)
    tail = struct.pack(f"<{len(shape)}Q", *shape) + b"".join(writer.records) + writer.lengths
    tail += struct.pack(f"<{len(writer.block_ends)}I", *writer.block_ends)
    tail += struct.pack(f"<{len(writer.checksums)}I", *writer.checksums) if with_checksums else b""
    count = sum(s.values.numel() for s in segments)
    total = 40 + len(tail) + len(writer.payload)
    dtype = DTYPES.index(segments[0].values.dtype)

    def header(value: int) -> bytes:
        fields = (0x4D4D4351, 1, dtype, int(with_checksums), len(shape), value, len(segments), count, total, steps, 0)
        return struct.pack(HEADER, *fields, len(writer.lengths) // 4)

    return header(checksum(header(0) + tail)) + tail + writer.payload


def decode_packet(packet: bytes) -> torch.Tensor:
    """The tensor of a valid packet. Trusts it: damage is for the native decoder to find."""
    _, _, number, flags, ndim, _, segment_count, _, _, steps, _, lengths_words = struct.unpack_from(HEADER, packet)
    dtype, at = DTYPES[number], 40
    shape = struct.unpack_from(f"<{ndim}Q", packet, at)
    at += 8 * ndim
    records = [struct.unpack_from(RECORD, packet, at + 32 * i) for i in range(segment_count)]
    at += 32 * segment_count
    lists = packet[at : at + 4 * lengths_words]
    at += 4 * lengths_words
    blocks = sum(-(-r[0] // values_per_block(r[3], steps)) for r in records if r[3] in (SINGLE, PAIR))
    plain = sum(r[3] in (RAW, FIXED) for r in records)
    ends = list(struct.unpack_from(f"<{blocks}I", packet, at))
    payload = packet[at + 4 * blocks + (4 * (blocks + plain) if flags & 1 else 0) :]
    values = decode_segments(records, dtype, steps, lists, iter(ends), payload)
    return torch.cat([torch.empty(0, dtype=dtype), *values]).reshape(shape)


def decode_segments(
    records: list[tuple[int, int, int, int, int, int, float, float]],
    dtype: torch.dtype,
    steps: int,
    lists: bytes,
    ends: Iterator[int],
    payload: bytes,
) -> list[torch.Tensor]:
    """The values of each segment, or of each block of it."""
    parts, at = [], 0
    for count, grid, num_bits, coding, table, _, p0, p1 in records:
        if coding == CONSTANT:
            parts.append(torch.full((count,), p0, dtype=torch.float64).to(arithmetic(dtype)).to(dtype))
        elif coding == RAW:
            size = count * dtype.itemsize
            parts.append(from_bytes(payload[at : at + size], dtype))
            at += size + -size % 4
        elif coding == FIXED:
            symbols = unpack_bits(payload[at:], count, num_bits)
            parts.append(dequantize(torch.tensor(symbols), dtype, grid, num_bits, p0, p1))
            size = -(-count * num_bits // 8)
            at += size + -size % 4
        else:
            lengths = static_lengths(table) if table != OWN_TABLE else None
            if table == OWN_TABLE:
                lengths, used = unpack_lengths(lists, alphabet_size(coding, num_bits))
                lists = lists[used:]
            size = values_per_block(coding, steps)
            for begin in range(0, count, size):
                end = 4 * next(ends)
                n = min(size, count - begin)
                parts.append(decode_block(payload[at:end], n, dtype, (grid, num_bits, p0, p1), coding, lengths))
                at = end
    return parts


def decode_block(
    data: bytes,
    n: int,
    dtype: torch.dtype,
    parameters: tuple[int, int, float, float],
    coding: int,
    lengths: list[int] | None,
) -> torch.Tensor:
    """The values of one block."""
    (info,) = struct.unpack_from("<I", data)
    mode, escapes, at = info & 3, info >> 2 & 0x3FFF, 4
    if mode == BLOCK_RAW:
        return from_bytes(data[4 : 4 + n * dtype.itemsize], dtype)
    start: tuple[int, ...] = ()
    if mode == BLOCK_CODED:
        start, at = struct.unpack_from("<32I", data, at), at + 128
    values = from_bytes(data[at : at + escapes * dtype.itemsize], dtype)
    at += escapes * dtype.itemsize
    positions = list(struct.unpack_from(f"<{escapes}H", data, at))
    body = data[at + 2 * escapes :]
    if mode == BLOCK_CONSTANT:
        symbols = [info >> 16] * n
    elif mode == BLOCK_FIXED:
        symbols = unpack_bits(body, n, parameters[1])
    elif lengths is None:
        raise ValueError("a coded block without a code")
    else:
        words = list(struct.unpack(f"<{len(body) // 2}H", body))
        count = n if coding == SINGLE else -(-n // 2)
        symbols = decode_lanes(list(start), words, count, canonical_codes(lengths), lengths)
        if coding == PAIR:
            symbols = [s for pair in symbols for s in (pair & 15, pair >> 4)][:n]
    decoded = dequantize(torch.tensor(symbols), dtype, *parameters)
    decoded[positions] = values
    return decoded
