"""Quantization and its inverse, and the statistics by which a grid is chosen."""

import math
from fractions import Fraction

import torch

NONE, RANGE_CENTER, RANGE_ENDPOINT, SIGMA = range(4)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Returns T, the dtype in which a dtype's sigma grid computes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrow(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds float64 or T to ``dtype``; 16-bit types go through float32."""
    return values.to(arithmetic(dtype)).to(dtype)


def range_levels(grid: int, num_bits: int, lo: float, hi: float) -> tuple[float, float, float]:
    """Returns (1 / step, step, offset) of a range grid."""
    intervals = 2.0**num_bits - (grid == RANGE_ENDPOINT)
    return intervals / (hi - lo), (hi - lo) / intervals, 0.5 if grid == RANGE_CENTER else 0.0


def quantize(u: torch.Tensor, dtype: torch.dtype, grid: int, num_bits: int, p0: float, p1: float) -> torch.Tensor:
    """Returns the int64 symbols of values ``u`` in T, on the grid of a packet of ``dtype``."""
    if grid == SIGMA:
        radius, step = 2 ** (num_bits - 1) - 1, torch.tensor(p1, dtype=u.dtype)
        limit = min(radius, torch.finfo(dtype).max / float(step))  # q is whole: the limit needs no floor
        q = torch.round(u * (1 / step))  # torch.round rounds to even
        return torch.where(q.abs() <= limit, q + radius, 2**num_bits - 1).long()
    inv, _, offset = range_levels(grid, num_bits, p0, p1)
    q, top = (u.double() - p0) * inv + (0.5 - offset), 2**num_bits - 1
    q = torch.where(q > 0, q, 0.0)
    return torch.where(q < top, q, top).long()


def fma(a: float, b: float, c: float) -> float:
    """Computes a * b + c, rounded once."""
    return float(Fraction(a) * Fraction(b) + Fraction(c))


def dequantize(
    symbols: torch.Tensor, dtype: torch.dtype, grid: int, num_bits: int, p0: float, p1: float
) -> torch.Tensor:
    """Returns the values of int64 symbols; an escape symbol gives 0."""
    if grid == SIGMA:
        t, radius = arithmetic(dtype), 2 ** (num_bits - 1) - 1
        values = (symbols - radius).to(t) * torch.tensor(p1, dtype=t)
        return torch.where(symbols == 2**num_bits - 1, 0.0, values).to(dtype)
    _, step, offset = range_levels(grid, num_bits, p0, p1)
    top = 2**num_bits - 1
    levels = [p1 if grid == RANGE_ENDPOINT and q == top else fma(q + offset, step, p0) for q in symbols.tolist()]
    return narrow(torch.tensor(levels, dtype=torch.float64), dtype)


def sum_squares(u: torch.Tensor) -> float:
    """Computes the sum of squares in the order of the format: 32 lanes in blocks of 4096, then a tree."""
    blocks = torch.nn.functional.pad(u.double(), (0, -u.numel() % 4096)).reshape(-1, 128, 32)
    lanes = torch.zeros(blocks.shape[0], 32, dtype=torch.float64)
    for row in range(128):
        lanes = lanes + blocks[:, row] * blocks[:, row]
    for d in (16, 8, 4, 2, 1):
        lanes = lanes[:, :d] + lanes[:, d : 2 * d]
    sums = lanes[:, 0].tolist()
    while len(sums) > 1:
        sums = [sum(sums[i : i + 2]) for i in range(0, len(sums), 2)]
    return float(sums[0]) if sums else 0.0


def extremes(u: torch.Tensor) -> tuple[float, float]:
    """Returns (lo, hi), never -0.0; both are 0 for an empty tensor."""
    return (float(u.min()) + 0.0, float(u.max()) + 0.0) if u.numel() else (0.0, 0.0)


def sigma_step(u: torch.Tensor, k: float) -> float:
    """Returns a step of k RMS, rounded to T."""
    return float(torch.tensor(k * math.sqrt(sum_squares(u) / u.numel()), dtype=torch.float64).to(u.dtype))


def equilibrium_step(k: float) -> float:
    """Returns the step at which error feedback comes to rest, in units of the gradient's RMS g.

    Rounding to nearest leaves a residual e that is spread evenly over one step s, so ``RMS(e) = s / sqrt(12)``. The
    gradient is independent of it, so ``RMS(u)^2 = g^2 + s^2 / 12``, and with ``s = k RMS(u)``::

        s = k g / sqrt(1 - k^2 / 12)

    Raises:
        ValueError: k is not below sqrt(12), where there is no such step.

    Example:
        >>> [round(equilibrium_step(k), 1) for k in (1, 2, 3, 3.2, 3.4)]
        [1.0, 2.4, 6.0, 8.4, 17.8]
    """
    if not 0 < k * k < 12:
        raise ValueError(f"k must be positive and below sqrt(12), got {k}")
    return k / math.sqrt(1 - k * k / 12)


def sigma_num_bits(k: float) -> int:
    """Returns the bits of a sigma grid's alphabet for a step of k RMS."""
    return next(n for n in range(4, 17) if (2 ** (n - 1) - 0.5) * k >= 6.25)


def range_num_bits(h: float, c: float, entropy_bits: int, max_bits: int) -> int:
    """Returns the bits of a range grid for an entropy of ``h`` bits in a histogram of ``2**entropy_bits`` bins."""
    return max(1, min(math.ceil(h + c), math.floor(c + entropy_bits), max_bits))


def rms_num_bits(rms: float, c: float, entropy_bits: int, max_bits: int) -> int:
    """Returns the bits of a range grid by the rule of the gradient's root mean square, N = log2(G + 1) + c."""
    return max(1, math.floor(min(math.log2(rms + 1.0) + c + 0.5, math.floor(c + entropy_bits), max_bits)))


def is_usable(dtype: torch.dtype, grid: int, num_bits: int, p0: float, p1: float) -> bool:
    """Returns whether a grid's arithmetic works; if not, the segment is raw."""
    if grid != SIGMA:
        return (
            math.isfinite(p0)
            and math.isfinite(p1)
            and p0 < p1
            and all(math.isfinite(v) for v in (p1 - p0, range_levels(grid, num_bits, p0, p1)[0]))
        )
    t = arithmetic(dtype)
    step = torch.tensor(p1, dtype=torch.float64).to(t)
    return all(torch.finfo(t).tiny <= float(v) < math.inf for v in (step, 1 / step))


def log2_fixed(v: int) -> int:
    """Returns 2^24 * log2(v), its last bits truncated as the format says."""
    if v == 0:
        return 0
    exponent = v.bit_length() - 1
    mantissa, result = v << (31 - exponent), exponent
    for _ in range(24):
        mantissa = mantissa * mantissa >> 31
        carry = mantissa >> 32
        mantissa >>= carry
        result = result << 1 | carry
    return result


def mix(h: int) -> int:
    """Mixes the bits of ``h`` by a 32-bit finalizer."""
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ h >> 16


def sample_size(count: int, fraction: float) -> int:
    """Returns the number of values that are sampled of ``count`` values."""
    return min(count, max(1024, math.ceil(fraction * count)))


def sample_indices(count: int, n: int, seed: int) -> list[int]:
    """Returns ``n`` indices, one from each stride."""
    stride = count // n if n else 0
    return [i * stride + (mix((seed + i) % 2**32) * stride >> 32) for i in range(n)]


def entropy_fixed(counts: list[int]) -> int:
    """Returns 2^24 times the entropy in bits of a histogram, whose number of bins is a power of two."""
    n, num_bits = sum(counts), len(counts).bit_length() - 1
    h = n * log2_fixed(n) - sum(c * log2_fixed(c) for c in counts)
    return min(max(h, 0) // n, num_bits << 24) if n else 0


def entropy(u: torch.Tensor, lo: float, hi: float, num_bits: int, fraction: float, seed: int) -> float:
    """Returns the entropy in bits of the sampled histogram of ``u`` over [lo, hi], lo < hi."""
    sample = u[sample_indices(u.numel(), sample_size(u.numel(), fraction), seed)]
    symbols = quantize(sample, u.dtype, RANGE_CENTER, num_bits, lo, hi)
    return entropy_fixed(torch.bincount(symbols, minlength=2**num_bits).tolist()) / float(2**24)
