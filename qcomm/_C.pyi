from collections.abc import Sequence
from typing import TypedDict

_Quantizer = tuple[int, int, int, int, float, float]
_Segment = tuple[int, int, int, _Quantizer]

class _Front(TypedDict):
    version: int
    dtype: int
    dims: list[int]
    element_count: int
    steps: int
    records: list[tuple[int, int, int, int, int, float, float]]

class _Parsed(_Front):
    checksums: bool
    payload_bytes: int

PACKET_HEADER_BYTES: int
TOTAL_BYTES_AT: int
DIMENSION_BYTES: int
SEGMENT_RECORD_BYTES: int
CHECKSUM_BYTES: int
MAX_CODED_BITS: int
QUANTIZER_BYTES: int

def set_packet_error(error: type[Exception]) -> None: ...
def measure(
    data: int, dtype: int, count: int, residual: int, inv_scale: float, threads: int
) -> tuple[float, float, float, bool]: ...
def entropy(
    data: int,
    dtype: int,
    count: int,
    residual: int,
    inv_scale: float,
    lo: float,
    hi: float,
    num_bits: int,
    fraction: float,
    seed: int,
    threads: int,
) -> float: ...
def sample_size(count: int, fraction: float) -> int: ...
def sample_indices(size: int, count: int, seed: int, indices: int) -> None: ...
def sigma_code(
    data: int,
    dtype: int,
    count: int,
    residual: int,
    inv_scale: float,
    num_bits: int,
    step: float,
    k: float,
    seed: int,
    threads: int,
) -> tuple[int, int]: ...
def nearest_static_table(coding: int, num_bits: int, k: float) -> int: ...
def is_usable(quantizer: _Quantizer, dtype: int) -> bool: ...
def quantize(data: int, dtype: int, count: int, quantizer: _Quantizer, symbols: int) -> None: ...
def dequantize(symbols: int, count: int, quantizer: _Quantizer, dtype: int, out: int) -> None: ...
def encode_bound(segments: Sequence[_Segment], dtype: int, dims: Sequence[int], checksums: bool, steps: int) -> int: ...
def encode(
    segments: Sequence[_Segment],
    inv_scale: float,
    dtype: int,
    dims: Sequence[int],
    checksums: bool,
    steps: int,
    threads: int,
    out: int,
    capacity: int,
) -> int: ...
def parse(packet: int, bytes: int) -> _Parsed: ...
def front_bytes(packet: int, present: int, bytes: int) -> int: ...
def parse_front(packet: int, present: int, bytes: int) -> _Front: ...
def decode(packet: int, bytes: int, out: int, count: int, dtype: int, accumulate: bool, threads: int) -> None: ...
def count_symbols(packet: int, bytes: int, segment: int, counts: int) -> None: ...
def code_lengths(counts: int, size: int, limit: int, lengths: int) -> None: ...
def canonical_codes(lengths: int, size: int, codes: int) -> None: ...
def kernel_versions() -> list[str]: ...
def kernel_version() -> str: ...
def use_kernel_version(name: str) -> bool: ...
def static_tables() -> list[tuple[int, int, int, list[int]]]: ...
def log2_fixed(v: int) -> int: ...
def checksum(data: int, bytes: int) -> int: ...
def divide_to_bfloat(values: int, count: int, divisor: float, out: int, threads: int) -> None: ...
