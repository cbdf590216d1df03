"""The collective in one process, without a network: what two_phase_mean has to compute, bit for bit."""

import math

import torch

from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decompress, encode
from qcomm.codec.quantize import Quantizer, plan
from qcomm.codec.quantizers import GridKind
from qcomm.collectives import ReduceOptions


def lossy(values, quantizer):
    """What arrives of ``values``."""
    return decompress(encode([Segment(values, quantizer)])) if values.numel() else values


def quantizer_for(values, grid, code=None):
    statistics = measure(values)
    return plan(statistics, grid, values, code=code) if statistics.finite else Quantizer.constant(torch.nan)


def place(part):
    """The positions in the buffer of a tensor's or a piece's elements."""
    return torch.cat([torch.arange(offset, offset + length) for offset, length in part.runs])


def quantizers_of(values, layout, grid):
    """Of each tensor of one rank, whole."""
    options = ReduceOptions(grid)
    return [
        quantizer_for(values[place(t)], options.grid_of(t)) if t.compressed else Quantizer.raw() for t in layout.tensors
    ]


def mean(buffers, layout, grid, slices=1):
    """(result, bound of its error) of the flat float32 or float64 ``buffers``, one a rank. No error feedback."""
    result, bound = torch.empty_like(buffers[0]), torch.zeros_like(buffers[0])
    quantizers = [quantizers_of(b, layout, grid) for b in buffers]
    codes = {}
    for part_of_chunks in layout.slices(slices):
        for owner, chunk in enumerate(part_of_chunks):
            for piece in chunk.pieces:
                part, mean_grid = place(piece), ReduceOptions(grid).mean_grid_of(layout.tensors[piece.tensor])
                # What the owner has itself is not quantized.
                sent = [q[piece.tensor] for q in quantizers]
                if math.isfinite(sent[owner].p0):
                    sent[owner] = Quantizer.raw()
                total = sum_in_order([lossy(b[part], q) for b, q in zip(buffers, sent, strict=True)])
                means = quantizer_for(total, mean_grid, codes.get((owner, piece.tensor)))
                if means.grid == GridKind.SIGMA:
                    codes[owner, piece.tensor] = means.coding, means.table
                result[part] = lossy(total, means)
                bound[part] = (sum(q.step for q in sent) / len(buffers) + means.step) / 2
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
