"""Bindings to the native core, which turn checked tensors into addresses.

No other module imports the core. The functions take and return tensors, so that callers never handle addresses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from qcomm.codec.checks import (
    CPU,
    DTYPE_NUMBERS,
    DTYPES,
    check_floats,
    check_memory,
    check_num_threads,
    floats_address,
    memory_address,
    negated,
)
from qcomm.codec.quantizers import Coding, GridKind, Quantizer, Segment, Statistics
from qcomm.codec.refusals import core_refusal, dtype_refusal
from qcomm.errors import PacketError

if find_spec("qcomm._C") is None:
    raise core_refusal(Path(__file__).parents[1])
from qcomm import _C

_C.set_packet_error(PacketError)

NO_TABLE = 255
# Sizes that the core defines in csrc/include/qcomm/format.h. QUANTIZER_BYTES is the size of one measured tensor's
# quantizer in a plan's workspace.
PACKET_HEADER_BYTES = _C.PACKET_HEADER_BYTES
TOTAL_BYTES_AT = _C.TOTAL_BYTES_AT  # position of the packet's size in its header
DIMENSION_BYTES = _C.DIMENSION_BYTES
CHECKSUM_BYTES = _C.CHECKSUM_BYTES
MAX_CODED_BITS = _C.MAX_CODED_BITS
SAMPLE_NUMBERS = _C.SAMPLE_NUMBERS  # of a segment's sample
RUNS_BITS = _C.RUNS_BITS  # of a quantizer that codes runs of zeros
QUANTIZER_BYTES = _C.QUANTIZER_BYTES


def _source(values: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Checks ``values`` and ``residual`` and returns (address, dtype, count, residual address)."""
    address = floats_address("values", values, ("cpu",))
    if not values.is_contiguous():
        raise ValueError("values must be contiguous")
    if values.is_neg():
        raise negated("values")
    if residual is None:
        return address, DTYPE_NUMBERS[values.dtype], values.numel(), 0
    if (
        residual.dtype != torch.float32
        or residual.numel() != values.numel()
        or not residual.is_contiguous()
        or residual.device != values.device
    ):
        raise ValueError(
            f"residual must be contiguous float32 of {values.numel()} elements on {values.device}, "
            f"got {residual.dtype} of {residual.numel()} on {residual.device}"
        )
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"values must be float32 or float64 where a residual is added, got {values.dtype}")
    return address, DTYPE_NUMBERS[values.dtype], values.numel(), memory_address("residual", residual)


def _sample_address(sample: torch.Tensor | None) -> int:
    if sample is None:
        return 0
    if (
        sample.dtype != torch.float64
        or sample.numel() != SAMPLE_NUMBERS
        or not sample.is_contiguous()
        or sample.device.type != "cpu"
    ):
        raise ValueError(
            f"sample must be contiguous float64 of {SAMPLE_NUMBERS} elements on the CPU, got {sample.dtype} of "
            f"{sample.numel()} on {sample.device}"
        )
    return memory_address("sample", sample)


def record_bytes(dtype: torch.dtype) -> int:
    """Returns the bytes of a segment record in packets of ``dtype``."""
    return _C.record_bytes(DTYPE_NUMBERS[dtype])


def measure(
    values: torch.Tensor, residual: torch.Tensor | None = None, inv_scale: float = 1.0, *, num_threads: int = 1
) -> Statistics:
    """Measures the statistics of ``u = values * inv_scale + residual``.

    Args:
        values: contiguous, any shape, float32, float16, bfloat16 or float64.
        residual: contiguous float32 with the same number of elements, or None. It needs float32 or float64 values.
        inv_scale: factor of the values, rounded to the arithmetic of the dtype.
        num_threads: maximum number of threads; the result does not depend on it.

    Example:
        >>> measure(torch.tensor([3.0, -4.0])).sum_squares
        25.0
    """
    found = _C.measure(*_source(values, residual), inv_scale, check_num_threads(num_threads))
    return Statistics(values.numel(), *found)


def histogram_entropy(
    values: torch.Tensor,
    residual: torch.Tensor | None,
    inv_scale: float,
    lo: float,
    hi: float,
    num_bits: int,
    fraction: float,
    seed: int,
    num_threads: int,
) -> float:
    """Returns the entropy in bits of a sampled histogram over [lo, hi]."""
    threads = check_num_threads(num_threads)
    return _C.entropy(*_source(values, residual), inv_scale, lo, hi, num_bits, fraction, seed, threads)


def sample_indices(count: int, fraction: float, seed: int) -> torch.Tensor:
    """Returns the int64 indices that the entropy estimate samples in a tensor of ``count`` elements."""
    size = _C.sample_size(count, fraction)
    indices = torch.empty(size, dtype=torch.int64, device=CPU)
    _C.sample_indices(size, count, seed, memory_address("indices", indices))
    return indices


def sigma_code(
    values: torch.Tensor,
    residual: torch.Tensor | None,
    inv_scale: float,
    num_bits: int,
    step: float,
    k: float,
    num_threads: int = 1,
) -> tuple[Coding, int]:
    """Returns (coding, table) of the cheapest code for a sigma segment, as priced on a sample."""
    threads = check_num_threads(num_threads)
    coding, table = _C.sigma_code(*_source(values, residual), inv_scale, num_bits, step, k, 0, threads)
    return Coding(coding), table


def nearest_static_table(coding: Coding, num_bits: int, k: float) -> int:
    """Returns the number of the built-in table made for a step near ``k``, or ``NO_TABLE``."""
    return _C.nearest_static_table(coding, num_bits, k)


def is_usable(quantizer: Quantizer, dtype: torch.dtype) -> bool:
    """Returns whether the grid's arithmetic can represent the values; if not, they travel raw."""
    if dtype not in DTYPE_NUMBERS:
        raise dtype_refusal("values", dtype)
    return _C.is_usable(quantizer, DTYPE_NUMBERS[dtype])


def quantize(values: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Returns the int32 symbols of ``values``, in their shape."""
    values = check_floats("tensor", values).contiguous()
    symbols = torch.empty(values.shape, dtype=torch.int32, device=CPU)
    source, target = memory_address("values", values), memory_address("symbols", symbols)
    _C.quantize(source, DTYPE_NUMBERS[values.dtype], values.numel(), quantizer, target)
    return symbols


def dequantize(symbols: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values of int32 symbols, in their shape."""
    symbols = check_memory("symbols", symbols).contiguous()
    values = torch.empty(symbols.shape, dtype=dtype, device=CPU)
    source, target = memory_address("symbols", symbols), memory_address("values", values)
    _C.dequantize(source, symbols.numel(), quantizer, DTYPE_NUMBERS[dtype], target)
    return values


def encode(
    segments: Sequence[Segment], shape: Sequence[int], inv_scale: float, checksum: bool, steps: int, num_threads: int
) -> torch.Tensor:
    """Encodes ``segments`` into a packet, a 1-D uint8 tensor that is a view of a larger buffer."""
    dtype = DTYPE_NUMBERS[check_floats("values", segments[0].values).dtype]
    described = []
    num_threads = check_num_threads(num_threads)
    for values, quantizer, residual, sample in segments:
        address, number, count, residual_address = _source(values, residual)
        if number != dtype:
            raise TypeError(f"all segments must have one dtype, got {values.dtype} beside {DTYPES[dtype]}")
        described.append((address, count, residual_address, quantizer, _sample_address(sample)))
    capacity = _C.encode_bound(described, dtype, shape, checksum, steps)
    out = torch.empty(capacity, dtype=torch.uint8, device=CPU)
    target = memory_address("the packet", out)
    size = _C.encode(described, inv_scale, dtype, shape, checksum, steps, num_threads, target, capacity)
    return out[:size]


class ParsedPacket(NamedTuple):
    """A packet's metadata, completely checked."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    steps: int
    checksums: bool
    payload_bytes: int
    records: list[tuple[int, Quantizer]]  # (count, quantizer)


def parse(packet: torch.Tensor) -> ParsedPacket:
    """Checks a packet's metadata and returns it; raises ``PacketError``."""
    parsed = _C.parse(memory_address("packet", packet), packet.numel())
    return ParsedPacket(
        DTYPES[parsed["dtype"]],
        tuple(parsed["dims"]),
        parsed["steps"],
        parsed["checksums"],
        parsed["payload_bytes"],
        _records(parsed["records"]),
    )


def _records(records: Sequence[tuple[int, int, int, int, int, float, float]]) -> list[tuple[int, Quantizer]]:
    return [(count, Quantizer(GridKind(g), n, Coding(c), t, p0, p1)) for count, g, n, c, t, p0, p1 in records]


class PacketFront(NamedTuple):
    """A packet's header, dimensions and segment records.

    They suffice to allocate memory before the rest is read.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    steps: int
    records: list[tuple[int, Quantizer]]  # (count, quantizer)


def front_bytes(header: torch.Tensor, packet_bytes: int) -> int:
    """Returns the size of a packet's front; raises ``PacketError``.

    Args:
        header: the packet's first ``PACKET_HEADER_BYTES`` bytes, uint8 on the CPU.
        packet_bytes: size of the whole packet, which bounds that of the front.
    """
    return _C.front_bytes(memory_address("header", header), header.numel(), packet_bytes)


def parse_front(front: torch.Tensor, packet_bytes: int) -> PacketFront:
    """Checks a packet's front and returns it; raises ``PacketError``.

    The header checksum is not checked, because it covers more than the front.

    Args:
        front: the packet's first :func:`front_bytes` bytes, uint8 on the CPU.
        packet_bytes: size of the whole packet.
    """
    parsed = _C.parse_front(memory_address("front", front), front.numel(), packet_bytes)
    shape, records = tuple(parsed["dims"]), _records(parsed["records"])
    return PacketFront(DTYPES[parsed["dtype"]], shape, parsed["steps"], records)


def decode(packet: torch.Tensor, out: torch.Tensor, accumulate: bool, num_threads: int) -> None:
    """Decodes a packet into ``out``, or adds it to ``out``.

    ``out`` is contiguous and has the packet's dtype and element count.
    """
    threads = check_num_threads(num_threads)
    dtype = DTYPE_NUMBERS[out.dtype]
    source, target = memory_address("packet", packet), memory_address("out", out)
    _C.decode(source, packet.numel(), target, out.numel(), dtype, accumulate, threads)


def decode_to(packet: torch.Tensor, out: torch.Tensor, places: Sequence[tuple[int, int]], num_threads: int) -> None:
    """Decodes a packet to ``places`` of a contiguous ``out`` of its dtype; each is (offset, number of elements)."""
    threads = check_num_threads(num_threads)
    source, target = memory_address("packet", packet), memory_address("out", out)
    _C.decode_to(source, packet.numel(), target, out.numel(), DTYPE_NUMBERS[out.dtype], places, threads)


def count_symbols(packet: torch.Tensor, segment: int) -> torch.Tensor:
    """Counts a segment's symbols and returns int64 counts[65536]."""
    counts = torch.zeros(65536, dtype=torch.int64, device=CPU)
    _C.count_symbols(memory_address("packet", packet), packet.numel(), segment, memory_address("counts", counts))
    return counts


def code_lengths(counts: torch.Tensor, limit: int) -> torch.Tensor:
    """Returns the uint8 lengths of an optimal code whose codewords have at most ``limit`` bits."""
    counts = counts.to(torch.int64).contiguous()
    lengths = torch.empty(counts.numel(), dtype=torch.uint8, device=CPU)
    _C.code_lengths(memory_address("counts", counts), counts.numel(), limit, memory_address("lengths", lengths))
    return lengths


def canonical_codes(lengths: torch.Tensor) -> torch.Tensor:
    """Returns the int32 codewords, LSB first."""
    lengths = lengths.to(torch.uint8).contiguous()
    codes = torch.empty(lengths.numel(), dtype=torch.int16, device=CPU)
    _C.canonical_codes(memory_address("lengths", lengths), lengths.numel(), memory_address("codes", codes))
    return codes.to(torch.int32) & 0xFFFF


def cpu_features() -> tuple[str, ...]:
    """Returns the names of the instruction sets that this processor and this build support, the best last.

    The names are ``"scalar"``, ``"avx2"``, ``"avx512"`` and ``"neon"``. The best one is used; results do not depend
    on it.

    Example:
        >>> cpu_features()[0]
        'scalar'
    """
    return tuple(_C.kernel_versions())


@contextmanager
def using_cpu_feature(name: str) -> Iterator[None]:
    """Selects one of :func:`cpu_features` inside a ``with`` block, in all threads, for tests and benchmarks."""
    before = _C.kernel_version()
    if not _C.use_kernel_version(name):
        raise ValueError(f"name must be one of {cpu_features()} on this processor, got {name!r}")
    try:
        yield
    finally:
        _C.use_kernel_version(before)


def static_tables() -> list[tuple[int, Coding, int, list[int]]]:
    """Returns the built-in codes as (number, coding, num_bits, code lengths)."""
    return [(number, Coding(coding), bits, lengths) for number, coding, bits, lengths in _C.static_tables()]


def checksum(data: torch.Tensor) -> int:
    """Returns the packet checksum of a uint8 tensor."""
    data = check_memory("data", data).contiguous()
    return _C.checksum(memory_address("data", data), data.numel())


def divide_to_bfloat(values: torch.Tensor, divisor: int, out: torch.Tensor) -> None:
    """Computes ``out.copy_(values).div_(divisor)`` in one pass on torch's threads.

    The result is equal bit for bit, except for the payloads of NaNs.

    Args:
        values: float32, contiguous, on the CPU.
        divisor: at least 1.
        out: bfloat16, contiguous, with the same number of elements.
    """
    if values.dtype != torch.float32 or out.dtype != torch.bfloat16 or values.numel() != out.numel():
        raise ValueError(
            f"values must be float32 and out bfloat16, of one size, got {values.numel()} of {values.dtype} and "
            f"{out.numel()} of {out.dtype}"
        )
    source, target = memory_address("values", values), memory_address("out", out)
    _C.divide_to_bfloat(source, values.numel(), divisor, target, torch.get_num_threads())


def log2_fixed(v: int) -> int:
    """Returns ``2**24 * log2(v)`` in the fixed-point arithmetic of the format."""
    return _C.log2_fixed(v)
