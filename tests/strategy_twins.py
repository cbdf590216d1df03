"""The strategies in one process, without a network: what they compute bit for bit, how far that may be off, and what
each rank has to send and receive for it. No error feedback; twin.py has two_phase."""

from typing import NamedTuple

import torch
import twin

from qcomm.agreement import HEADER_WORDS
from qcomm.codec import Segment, encode
from qcomm.quantize import Quantizer

HEADER_BYTES = 8 * HEADER_WORDS


class Expected(NamedTuple):
    """``sent`` and ``received``: bytes at gloo's send and recv, one number a rank."""

    result: torch.Tensor
    bound: torch.Tensor
    sent: list[int]
    received: list[int]


def size(segments):
    segments = [segment for segment in segments if segment.values.numel()]
    return encode(segments).numel() if segments else 0


def chunk_segments(values, chunk, quantizers):
    """What a packet of ``chunk`` holds."""
    segments = [Segment(values[p.offset : p.offset + p.length], quantizers[p.tensor]) for p in chunk.pieces]
    if chunk.raw_runs:
        raw = torch.cat([values[offset : offset + length] for offset, length in chunk.raw_runs])
        segments.append(Segment(raw, Quantizer.raw()))
    return segments


def all_gather(buffers, layout, grid):
    world_size = len(buffers)
    result, bound = torch.empty_like(buffers[0]), torch.zeros_like(buffers[0])
    quantizers = [
        [
            twin.quantizer_for(b[t.offset : t.offset + t.numel], grid) if t.compressed else Quantizer.raw()
            for t in layout.tensors
        ]
        for b in buffers
    ]
    for number, tensor in enumerate(layout.tensors):
        part = slice(tensor.offset, tensor.offset + tensor.numel)
        arrived = [twin.lossy(b[part], q[number]) for b, q in zip(buffers, quantizers, strict=True)]
        result[part] = twin.sum_in_order(arrived)
        bound[part] = sum(q[number].step for q in quantizers) / world_size / 2
    packets = [size(chunk_segments(b, layout.whole, q)) for b, q in zip(buffers, quantizers, strict=True)]
    sent = [(world_size - 1) * (HEADER_BYTES + packet) for packet in packets]
    received = [sum(packets) - packet + (world_size - 1) * HEADER_BYTES for packet in packets]
    return Expected(result, bound, sent, received)


TWINS = {"all_gather": all_gather}
