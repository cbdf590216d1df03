"""Packets: the public functions for all devices, and the codec of the CPU. docs/format.md describes the bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcomm.codec import _native, packet_cuda
from qcomm.codec._native import NO_TABLE, measure
from qcomm.codec.checks import CPU, check_claim, check_floats, check_num_threads, check_packet
from qcomm.codec.grids import Grid, SigmaGrid
from qcomm.codec.quantize import plan
from qcomm.codec.quantizers import WIRE_TABLE, Coding, GridKind, Quantizer, Segment
from qcomm.errors import PacketError

__all__ = ["PacketInfo", "Segment", "SegmentInfo", "compress", "decode_into", "decompress", "encode", "inspect"]

# Symbols per lane in a block. A block costs about 48 bytes besides its codewords. One warp or one thread works on one
# block at a time.
BLOCK_STEPS = 256
LARGE_BLOCK_STEPS = 512
LARGE_ELEMENTS = 1 << 24


def default_block_steps(element_count: int) -> int:
    """Returns the default number of symbols per lane in a block.

    Long blocks cost fewer bytes, and a large tensor has enough of them to keep a GPU busy.
    """
    return LARGE_BLOCK_STEPS if element_count >= LARGE_ELEMENTS else BLOCK_STEPS


def check_block_steps(block_steps: int | None, element_count: int) -> int:
    """Returns ``block_steps`` if it is 1..512, and :func:`default_block_steps` for None."""
    if block_steps is None:
        return default_block_steps(element_count)
    if isinstance(block_steps, bool) or not isinstance(block_steps, int):
        raise TypeError(f"block_steps must be an int, got {type(block_steps).__name__}")
    if not 1 <= block_steps <= LARGE_BLOCK_STEPS:
        raise ValueError(f"block_steps must be in 1..{LARGE_BLOCK_STEPS}, got {block_steps}")
    return block_steps


def compress(
    tensor: torch.Tensor,
    grid: Grid = SigmaGrid(),
    *,
    checksum: bool = True,
    block_steps: int | None = None,
    num_threads: int = 1,
) -> torch.Tensor:
    """Quantizes and Huffman-codes a tensor.

    Args:
        tensor: any shape, contiguous or not, float32, float16, bfloat16 or float64, on the CPU or a CUDA device. The
            CUDA kernels have never run on a GPU, only under emulation. A tensor with non-finite values is stored raw
            and restored exactly.
        grid: levels of the quantization, a SigmaGrid for gradients or a RangeGrid for weights.
        checksum: add 4 bytes per block, by which ``decompress`` detects damage.
        block_steps: symbols per lane in a block, 1..512; the default depends on the size. Smaller blocks are more
            parallel but take more bytes.
        num_threads: maximum number of threads; the result does not depend on it. Each thread needs 131,072 values.

    Returns:
        A 1-D uint8 tensor on the tensor's device. It is at most 128 bytes larger than the tensor itself (up to 6
        dimensions).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        RuntimeError: the tensor is on a CUDA device and this build has no CUDA kernels.

    Example:
        >>> packet = compress(torch.linspace(-1, 1, 100_000), SigmaGrid(step=1.0))
        >>> restored = decompress(packet)
        >>> packet.numel() < 4 * 100_000 / 12, restored.shape
        (True, torch.Size([100000]))
    """
    values = check_floats("tensor", tensor, devices=("cpu", "cuda"), may_be_negated=True)
    values = values.detach().resolve_neg().contiguous()
    if values.is_cuda:
        check_num_threads(num_threads)
        return packet_cuda.compress(values, grid, checksum, check_block_steps(block_steps, values.numel()))
    quantizer = plan(measure(values, num_threads=num_threads), grid, values, num_threads=num_threads)
    packet = encode(
        [Segment(values.reshape(-1), quantizer)],
        shape=values.shape,
        checksum=checksum,
        block_steps=block_steps,
        num_threads=num_threads,
    )
    return packet.clone()  # the encoder's buffer is as large as the worst case


def decompress(packet: torch.Tensor, *, max_bytes: int | None = None, num_threads: int = 1) -> torch.Tensor:
    """Returns the tensor in a packet, in its shape and dtype.

    Args:
        packet: 1-D uint8, on the CPU or a CUDA device.
        max_bytes: maximum number of bytes that the tensor may take in memory. Set it for untrusted packets, because a
            tensor of equal values takes 80 bytes in a packet, however large it is.
        num_threads: maximum number of threads on the CPU; the result does not depend on it.

    Raises:
        PacketError: the bytes are not a whole, undamaged packet of this version, or they claim a tensor larger than
            ``max_bytes``, for which no memory is allocated then.
        TypeError, ValueError: ``packet`` is not a 1-D uint8 tensor, or ``max_bytes`` not a number of bytes.
        RuntimeError: it is on a CUDA device and this build has no CUDA kernels.

    Example:
        >>> decompress(compress(torch.full((2, 3), 7.0)))
        tensor([[7., 7., 7.],
                [7., 7., 7.]])
    """
    packet = check_packet(packet, devices=("cpu", "cuda"))
    if packet.is_cuda:
        check_num_threads(num_threads)
        return packet_cuda.decompress(packet, max_bytes)
    parsed = _native.parse(packet)
    check_claim(parsed.shape, parsed.dtype, max_bytes)
    try:
        out = torch.empty(parsed.shape, dtype=parsed.dtype, device=CPU)
    except RuntimeError as error:  # a constant packet of 80 bytes may claim terabytes
        raise PacketError(f"no memory for the tensor of shape {parsed.shape} that the packet claims to hold") from error
    _native.decode(packet, out, accumulate=False, num_threads=num_threads)
    return out


def encode(
    segments: Sequence[Segment],
    *,
    inv_scale: float = 1.0,
    shape: Sequence[int] | None = None,
    checksum: bool = True,
    block_steps: int | None = None,
    num_threads: int = 1,
) -> torch.Tensor:
    """Encodes several segments into one packet, each ``u = values * inv_scale + residual`` on its own quantizer.

    The collectives are built on this function. The same pass replaces a segment's residual by ``u - decoded(u)`` (error
    feedback). A constant NaN leaves the residual untouched. Arguments are checked before anything is written.

    Args:
        segments: at least one, all of one dtype (float32 or float64 where a residual or scale is used).
        inv_scale: factor of all values, positive and finite.
        shape: shape of all values together; flat by default.
        checksum, block_steps, num_threads: as in :func:`compress`.

    Returns:
        A 1-D uint8 tensor, a view of a larger buffer.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Example:
        >>> gradient, residual = torch.randn(5000), torch.zeros(5000)
        >>> quantizer = plan(measure(gradient), SigmaGrid(2.0), gradient)
        >>> packet = encode([Segment(gradient, quantizer, residual)])
        >>> torch.allclose(decompress(packet) + residual, gradient)
        True
    """
    if not segments:
        raise ValueError("segments must not be empty")
    if not (math.isfinite(inv_scale) and inv_scale > 0.0):
        raise ValueError(f"inv_scale must be positive and finite, got {inv_scale}")
    count = sum(segment.values.numel() for segment in segments)
    block_steps = check_block_steps(block_steps, count)
    dims = [count] if shape is None else list(shape)
    if math.prod(dims) != count:
        raise ValueError(f"shape must have {count} elements like the segments together, got {dims}")
    return _native.encode(segments, dims, inv_scale, checksum, block_steps, num_threads)


def decode_into(
    packet: torch.Tensor,
    out: torch.Tensor,
    *,
    places: Sequence[tuple[int, int]] | None = None,
    accumulate: bool = False,
    num_threads: int = 1,
) -> None:
    """Decodes all segments of a packet into ``out``, one after another, or adds them to ``out``.

    Args:
        packet: 1-D uint8.
        out: contiguous, of the packet's dtype; also of its element count, unless there are ``places``. It is float32 or
            float64 with ``accumulate``.
        places: (offset, number of elements) of the parts of ``out`` that the values fill, in order. They hold as many
            elements as the packet, and do not overlap. Not with ``accumulate``.
        accumulate: add instead of store.
        num_threads: maximum number of threads; the result does not depend on it.

    Raises:
        PacketError: the bytes are not a valid packet; the content of ``out`` is then unspecified.
        TypeError, ValueError: ``out`` or ``places`` do not fit the packet.

    Example:
        >>> total = torch.ones(3)
        >>> decode_into(compress(torch.full((3,), 2.0)), total, accumulate=True)
        >>> total
        tensor([3., 3., 3.])
        >>> decode_into(compress(torch.full((2,), 5.0)), total, places=[(2, 1), (0, 1)])
        >>> total
        tensor([5., 3., 5.])
    """
    packet = check_packet(packet)
    check_floats("out", out)
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    if places is None:
        _native.decode(packet, out, accumulate, num_threads)
    elif accumulate:
        raise ValueError("accumulate must be False with places, got True")
    else:
        _native.decode_to(packet, out, places, num_threads)


@dataclass(frozen=True)
class SegmentInfo:
    """The description of one segment of a packet.

    Attributes:
        count: number of values.
        grid: ``"none"``, ``"range_center"``, ``"range_endpoint"`` or ``"sigma"``.
        num_bits: bits of a symbol before coding, or of a value where the values are raw.
        step: distance of neighbouring levels; 0 where nothing is lost.
        entropy_bits: entropy of the segment's symbols; NaN where there are none.
        coding: ``"raw"``, ``"constant"``, ``"fixed"``, ``"single"``, ``"pair"`` or ``"runs"``.
        table: ``"static <number>"``, ``"own"`` or ``"none"``.
    """

    count: int
    grid: str
    num_bits: int
    step: float
    entropy_bits: float
    coding: str
    table: str


@dataclass(frozen=True)
class PacketInfo:
    """The content of a packet and its size.

    The fields from ``grid`` to ``coding`` describe the first segment; a compressed tensor has only one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    grid: str
    num_bits: int
    entropy_bits: float
    coding: str
    bits_per_element: float
    payload_bytes: int
    header_bytes: int
    total_bytes: int
    block_steps: int
    checksums: bool
    segments: tuple[SegmentInfo, ...]


def inspect(packet: torch.Tensor) -> PacketInfo:
    """Describes a packet.

    The payload is decoded to symbols to find their entropy.

    Args:
        packet: 1-D uint8, on the CPU, or on a CUDA device, from which it is copied.

    Raises:
        PacketError: the bytes are not a whole, undamaged packet of this version.

    Example:
        >>> info = inspect(compress(torch.randn(50_000), SigmaGrid(step=1.0)))
        >>> info.grid, info.num_bits, info.total_bytes == info.header_bytes + info.payload_bytes
        ('sigma', 4, True)
    """
    packet = check_packet(packet, devices=("cpu", "cuda")).cpu()
    parsed = _native.parse(packet)
    segments = tuple(_describe(packet, i, *record, dtype=parsed.dtype) for i, record in enumerate(parsed.records))
    total, count = packet.numel(), math.prod(parsed.shape)
    first = segments[0]
    return PacketInfo(
        shape=parsed.shape,
        dtype=parsed.dtype,
        grid=first.grid,
        num_bits=first.num_bits,
        entropy_bits=first.entropy_bits,
        coding=first.coding,
        bits_per_element=8 * total / count if count else math.nan,
        payload_bytes=parsed.payload_bytes,
        header_bytes=total - parsed.payload_bytes,
        total_bytes=total,
        block_steps=parsed.steps,
        checksums=parsed.checksums,
        segments=segments,
    )


def _describe(packet: torch.Tensor, index: int, count: int, quantizer: Quantizer, *, dtype: torch.dtype) -> SegmentInfo:
    entropy = math.nan
    if quantizer.coding in (Coding.FIXED, Coding.SINGLE, Coding.PAIR, Coding.RUNS):
        counts = _native.count_symbols(packet, index).double()
        p = counts[counts > 0] / counts.sum()
        entropy = abs(float(-(p * p.log2()).sum()))
    raw = quantizer.coding == Coding.RAW
    table = {WIRE_TABLE: "own", NO_TABLE: "none"}.get(quantizer.table, f"static {quantizer.table}")
    return SegmentInfo(
        count=count,
        grid=GridKind(quantizer.grid).name.lower(),
        num_bits=8 * dtype.itemsize if raw else quantizer.num_bits,
        step=quantizer.step,
        entropy_bits=entropy,
        coding=Coding(quantizer.coding).name.lower(),
        table=table if quantizer.coding in (Coding.SINGLE, Coding.PAIR) else "none",
    )
