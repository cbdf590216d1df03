"""Quantizers: the levels, bits and code that a grid gives a measured tensor, and its symbols."""

import math

import torch

from qcomm.codec import _native
from qcomm.codec._native import MAX_CODED_BITS, NO_TABLE, RUNS_BITS, measure
from qcomm.codec.checks import CPU, DTYPE_NUMBERS, check_floats, check_memory
from qcomm.codec.grids import MIN_SIGMA_STEP, PAIR_BITS, Grid, RangeGrid, SigmaGrid, sigma_num_bits
from qcomm.codec.quantizers import WIRE_TABLE, Coding, GridKind, Quantizer, Statistics

__all__ = ["Code", "Quantizer", "dequantize", "forecast_quantizer", "plan", "plan_step", "quantize"]

Code = tuple[Coding, int]  # a segment's coding and table, as in a packet's segment record


def plan(
    stats: Statistics,
    grid: Grid,
    values: torch.Tensor,
    residual: torch.Tensor | None = None,
    inv_scale: float = 1.0,
    code: Code | None = None,
    num_threads: int = 1,
) -> Quantizer:
    """Chooses the quantizer for ``u = values * inv_scale + residual``, whose statistics are ``stats``.

    A raw quantizer is chosen for a non-finite tensor, and where the arithmetic cannot represent the levels. A constant
    tensor gets a constant quantizer.

    Args:
        stats: statistics of the same values, from :func:`qcomm.codec.measure`.
        grid: a SigmaGrid or RangeGrid.
        values, residual, inv_scale: as in ``measure``; a sample of them is read.
        code: code of an earlier plan for a similar tensor with the same SigmaGrid, which saves sampling it again.
        num_threads: maximum number of threads; the result does not depend on it.
    """
    if not stats.finite:
        return Quantizer.raw()
    if stats.minimum == stats.maximum:
        return Quantizer.constant(stats.minimum)
    if isinstance(grid, SigmaGrid):
        quantizer = _plan_sigma(stats, grid, values, residual, inv_scale, code, num_threads)
    elif isinstance(grid, RangeGrid):
        quantizer = _plan_range(stats, grid, values, residual, inv_scale, num_threads)
    else:
        raise TypeError(f"grid must be a SigmaGrid or a RangeGrid, got {type(grid).__name__}")
    return quantizer if _native.is_usable(quantizer, values.dtype) else Quantizer.raw()


def plan_step(stats: Statistics, step: float, coding: str, values: torch.Tensor) -> Quantizer:
    """Returns the quantizer for a sigma grid of a given step, independently of the values' own RMS.

    Args:
        stats: statistics of the values, which must be finite and not all 0.
        step: absolute distance of the levels, positive, a float32 unless the values are float64.
        coding: as of a SigmaGrid; pairs are used only where four bits suffice.
        values: a sample of them is read.
    """
    k = step / stats.rms
    bits = sigma_num_bits(max(k, MIN_SIGMA_STEP))
    if coding == "pair" and bits != PAIR_BITS:
        coding = "auto"
    return _code_sigma(bits, step, k, coding, values, None, 1.0, None, 1)


def _plan_sigma(
    stats: Statistics,
    grid: SigmaGrid,
    values: torch.Tensor,
    residual: torch.Tensor | None,
    inv_scale: float,
    code: Code | None,
    num_threads: int,
) -> Quantizer:
    step = _in_arithmetic(grid.step * stats.rms, values.dtype)
    if residual is not None and grid.codes_runs:
        quantizer = _code_runs(step, values.dtype)
        if quantizer is not None:
            return quantizer
        code = None
    coding = "auto" if grid.coding == "runs" else grid.coding
    return _code_sigma(grid.num_bits, step, grid.step, coding, values, residual, inv_scale, code, num_threads)


def _in_arithmetic(step: float, dtype: torch.dtype) -> float:
    return (
        step if dtype == torch.float64 else float(torch.tensor(step, dtype=torch.float64, device=CPU).to(torch.float32))
    )


def _code_runs(step: float, dtype: torch.dtype) -> Quantizer | None:
    quantizer = Quantizer(GridKind.SIGMA, RUNS_BITS, Coding.RUNS, WIRE_TABLE, 0.0, step)
    return quantizer if _native.is_usable(quantizer, dtype) else None


def forecast_quantizer(grid: SigmaGrid, rms: float, dtype: torch.dtype) -> Quantizer | None:
    """Returns the quantizer of values whose RMS is known before they are read, and which have a residual.

    None where ``grid`` does not code them as runs of zeros, or the arithmetic cannot represent the levels.

    Args:
        grid: of the values.
        rms: of value plus residual.
        dtype: of the packet.

    Example:
        >>> forecast_quantizer(SigmaGrid(step=3.0), 0.5, torch.float32).step
        1.5
    """
    return _code_runs(_in_arithmetic(grid.step * rms, dtype), dtype) if grid.codes_runs else None


def _code_sigma(
    bits: int,
    step: float,
    k: float,
    coding: str,
    values: torch.Tensor,
    residual: torch.Tensor | None,
    inv_scale: float,
    code: Code | None,
    num_threads: int,
) -> Quantizer:
    quantizer = Quantizer(GridKind.SIGMA, bits, Coding.SINGLE, NO_TABLE, 0.0, step)
    if coding == "fixed" or bits > MAX_CODED_BITS or not _native.is_usable(quantizer, values.dtype):
        return quantizer
    if code is None:
        if coding == "table":
            code = Coding.SINGLE, WIRE_TABLE
        elif coding == "auto":
            code = _native.sigma_code(values, residual, inv_scale, bits, step, k, num_threads)
        else:
            kind = Coding.PAIR if coding == "pair" else Coding.SINGLE
            table = _native.nearest_static_table(kind, bits, k)
            code = kind, (table if table != NO_TABLE else WIRE_TABLE)  # very fine steps have no built-in table
    return quantizer._replace(coding=code[0], table=code[1])


def _plan_range(
    stats: Statistics,
    grid: RangeGrid,
    values: torch.Tensor,
    residual: torch.Tensor | None,
    inv_scale: float,
    num_threads: int,
) -> Quantizer:
    lo, hi = stats.minimum, stats.maximum
    if not math.isfinite(hi - lo):
        return Quantizer.raw()
    bits = grid.num_bits
    if grid.bits == "rms":
        bits = grid.bits_for_rms(stats.rms)
    elif bits is None:
        entropy = _native.histogram_entropy(
            values, residual, inv_scale, lo, hi, grid.entropy_bits, grid.sample_fraction, grid.seed, num_threads
        )
        bits = grid.bits_for(entropy)
    kind = GridKind.RANGE_CENTER if grid.reconstruction == "center" else GridKind.RANGE_ENDPOINT
    return Quantizer(kind, bits, Coding.SINGLE if bits <= MAX_CODED_BITS else Coding.FIXED, WIRE_TABLE, lo, hi)


def quantize(tensor: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Quantizer]:
    """Quantizes ``tensor`` on a grid, and returns the symbols and the quantizer that decodes them.

    On a range grid the symbol is the level's number, counted from the minimum. On a sigma grid the symbol of zero is
    ``2**(num_bits - 1) - 1``. Values outside the alphabet have the escape symbol ``2**num_bits - 1``.

    Args:
        tensor: any shape, float32, float16, bfloat16 or float64, finite and not constant.
        grid: a SigmaGrid or RangeGrid.

    Returns:
        (int32 symbols in the tensor's shape, Quantizer).

    Raises:
        ValueError: a tensor that would be stored raw or as a constant has no symbols.

    Example:
        >>> symbols, quantizer = quantize(torch.tensor([0.0, 0.5, 1.0]), RangeGrid(num_bits=1))
        >>> symbols.tolist(), quantizer.num_bits
        ([0, 1, 1], 1)
    """
    values = check_floats("tensor", tensor).detach().contiguous()
    quantizer = plan(measure(values), grid, values)
    if quantizer.grid == GridKind.NONE:
        raise ValueError(
            "tensor must be finite, not constant and of a representable range to be quantized; "
            f"it would be stored {quantizer.coding.name.lower()}"
        )
    return _native.quantize(values, quantizer), quantizer


def dequantize(symbols: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns the values that ``symbols`` stand for.

    Args:
        symbols: int32, any shape, as from :func:`quantize`, in ``0..2**num_bits - 1``. Escape symbols decode to one
            level beyond the others, because their values are in the packet only.
        quantizer: from :func:`quantize`.
        dtype: float32, float16, bfloat16 or float64.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> symbols, quantizer = quantize(torch.tensor([0.0, 0.4, 1.0]), RangeGrid(num_bits=2))
        >>> dequantize(symbols, quantizer)
        tensor([0.0000, 0.3333, 1.0000])
    """
    if check_memory("symbols", symbols).dtype != torch.int32:
        raise TypeError(f"symbols must be int32, got {symbols.dtype}")
    if dtype not in DTYPE_NUMBERS:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if quantizer.grid == GridKind.NONE:
        raise ValueError("quantizer must belong to a grid; raw and constant tensors have no symbols")
    top = 2**quantizer.num_bits - 1
    outside = symbols[(symbols < 0) | (symbols > top)]
    if outside.numel():
        raise ValueError(f"symbols must be in 0..{top} for {quantizer.num_bits} bits, got {int(outside[0])}")
    return _native.dequantize(symbols, quantizer, dtype)
