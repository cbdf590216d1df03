"""Entropy of a tensor from a small sample, which decides on the number of bits of a range grid."""

import torch

from qcomm.codec import _native, packet_cuda
from qcomm.codec._native import measure
from qcomm.codec._native_cuda import is_on_device
from qcomm.codec.checks import CPU, check_floats
from qcomm.codec.grids import RangeGrid

__all__ = ["estimate_entropy"]


def estimate_entropy(tensor: torch.Tensor, num_bits: int = 4, sample_fraction: float = 0.03, *, seed: int = 0) -> float:
    """Estimates the entropy of ``tensor`` in bits, from a sample.

    The estimate is the entropy of a histogram with ``2**num_bits`` bins between the tensor's minimum and maximum. At
    least 1024 values are sampled, one from each stride; a smaller tensor is counted whole. The arithmetic is in
    integers, so that every machine and device finds the same number. The entropy of a constant or empty tensor is 0.

    Args:
        tensor: any shape, float32, float16, bfloat16 or float64, finite, on the CPU or a CUDA device. The function
            waits for the device.
        num_bits: base-2 logarithm of the number of bins, 1..12.
        sample_fraction: fraction of the values to sample, in (0, 1].
        seed: selects the sampled values.

    Raises:
        ValueError: non-finite values, or an argument out of range.

    Source: A. Oland and B. Raj, ICASSP 2015, section on bit allocation by entropy.

    Example:
        >>> estimate_entropy(torch.arange(4096.0))
        4.0
    """
    RangeGrid(entropy_bits=num_bits, sample_fraction=sample_fraction, seed=seed)  # checks the arguments
    values = check_floats("tensor", tensor, devices=("cpu", "cuda")).detach().contiguous()
    if is_on_device(values):
        lo, hi, finite = packet_cuda.extremes(values)
        if finite and lo < hi:
            sample = packet_cuda.sample(values, sample_fraction, seed).cpu()
            return _native.histogram_entropy(sample, None, 1.0, lo, hi, num_bits, 1.0, 0, 1)
        values = (
            values.reshape(-1)[:1].cpu() if finite else torch.full((1,), torch.nan, dtype=torch.float32, device=CPU)
        )
    stats = measure(values)
    if not stats.finite:
        raise ValueError("tensor must be finite: NaN or infinity has no place in a histogram")
    if stats.minimum == stats.maximum:
        return 0.0
    return _native.histogram_entropy(
        values, None, 1.0, stats.minimum, stats.maximum, num_bits, sample_fraction, seed, 1
    )
