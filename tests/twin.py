"""The collective in one process, without a network: what two_phase_mean has to compute, bit for bit."""

import torch

from qcomm.codec import Segment, decompress, encode
from qcomm.quantize import Quantizer, plan
from qcomm.statistics import measure
from qcomm.two_phase import owner_grid


def lossy(values, quantizer):
    """What arrives of ``values``."""
    return decompress(encode([Segment(values, quantizer)])) if values.numel() else values


def quantizer_for(values, grid):
    statistics = measure(values)
    return plan(statistics, grid, values) if statistics.finite else Quantizer.constant(torch.nan)


def mean(buffers, layout, grid):
    """(result, bound of its error) of the flat float32 or float64 ``buffers``, one a rank. No error feedback."""
    result, bound = torch.empty_like(buffers[0]), torch.zeros_like(buffers[0])
    quantizers = [
        [
            quantizer_for(b[t.offset : t.offset + t.numel], grid) if t.compressed else Quantizer.raw()
            for t in layout.tensors
        ]
        for b in buffers
    ]
    for chunk in layout.chunks:
        for piece in chunk.pieces:
            part = slice(piece.offset, piece.offset + piece.length)
            total = sum_in_order([lossy(b[part], q[piece.tensor]) for b, q in zip(buffers, quantizers, strict=True)])
            owner = quantizer_for(total, owner_grid(grid))
            result[part] = lossy(total, owner)
            bound[part] = (sum(q[piece.tensor].step for q in quantizers) / len(buffers) + owner.step) / 2
        for offset, length in chunk.raw_runs:
            result[offset : offset + length] = sum_in_order([b[offset : offset + length] for b in buffers])
    return result, bound


def sum_in_order(parts):
    """The mean of ``parts``, added up one after another."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total / len(parts)


def rounding(buffers, dtype):
    """What floating point may add to the bound: ulps of the largest value in codec and sum, an ulp of the result."""
    largest = max((float(b.abs().max()) for b in buffers if b.numel()), default=0.0)
    return largest * ((8 + len(buffers)) * torch.finfo(buffers[0].dtype).eps + torch.finfo(dtype).eps)
