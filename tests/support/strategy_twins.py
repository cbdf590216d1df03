"""The strategies in one process, without a network: what they compute bit for bit, how far that may be off, and what
each rank has to send and receive for it. No error feedback; twin.py has two_phase."""

from typing import NamedTuple

import torch
import twin

from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, encode
from qcomm.codec.quantize import Coding, Quantizer
from qcomm.collectives import ReduceOptions
from qcomm.collectives.exact_sum_grid import SharedGrid, lossless_quantizer, share, summarize
from qcomm.communicator.handshake import HEADER_WORDS

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
    segments = [Segment(values[twin.place(p)], quantizers[p.tensor]) for p in chunk.pieces]
    if chunk.raw_runs:
        raw = torch.cat([values[offset : offset + length] for offset, length in chunk.raw_runs])
        segments.append(Segment(raw, Quantizer.raw()))
    return segments


def all_gather(buffers, layout, grid, item_bytes=0):
    world_size = len(buffers)
    result, bound = torch.empty_like(buffers[0]), torch.zeros_like(buffers[0])
    quantizers = [twin.quantizers_of(b, layout, grid) for b in buffers]
    for number, tensor in enumerate(layout.tensors):
        part = twin.place(tensor)
        arrived = [twin.lossy(b[part], q[number]) for b, q in zip(buffers, quantizers, strict=True)]
        result[part] = twin.sum_in_order(arrived)
        bound[part] = sum(q[number].step for q in quantizers) / world_size / 2
    packets = [size(chunk_segments(b, layout.whole, q)) for b, q in zip(buffers, quantizers, strict=True)]
    sent = [(world_size - 1) * (HEADER_BYTES + packet) for packet in packets]
    received = [sum(packets) - packet + (world_size - 1) * HEADER_BYTES for packet in packets]
    return Expected(result, bound, sent, received)


def exact_sum(buffers, layout, grid, item_bytes=0):
    """Integers, added as integers."""
    world_size, dtype = len(buffers), buffers[0].dtype
    result, bound = torch.empty_like(buffers[0]), torch.zeros_like(buffers[0])
    values, total, summaries = [b.clone() for b in buffers], torch.empty_like(buffers[0]), []
    codes = [[Quantizer.raw()] * len(layout.tensors) for _ in buffers]
    steps = [0.0] * len(layout.tensors)
    for number, tensor in enumerate(layout.tensors):
        part = twin.place(tensor)
        parts = [b[part] for b in buffers]
        shared = SharedGrid()
        if tensor.compressed:
            asked_grid = ReduceOptions(grid).grid_of(tensor)
            summaries.append([summarize(measure(x), asked_grid, x, None, 1.0) for x in parts])
            shared = share(asked_grid, summaries[-1], tensor.numel, dtype)
        steps[number] = step = shared.step
        if not step:
            total[part] = twin.sum_in_order(parts) * world_size
            result[part] = twin.sum_in_order(parts)
            if shared.constant is not None:
                for code in codes:
                    code[number] = Quantizer.constant(shared.constant)
            continue
        levels = [(x * torch.tensor(1.0 / step, dtype=dtype)).round().to(torch.int64) for x in parts]
        for rank, q in enumerate(levels):
            values[rank][part] = (q.double() * step).to(dtype)
            codes[rank][number] = lossless_quantizer(values[rank][part], step, asked_grid)
        total[part] = (sum(levels).double() * step).to(dtype)
        result[part] = total[part] / world_size
        bound[part] = step / 2
    summary_bytes = (
        size([Segment(torch.tensor(summaries, dtype=torch.float64)[:, 0].flatten(), Quantizer.raw())])
        if (summaries)
        else 0
    )
    to_owner = [
        [size(chunk_segments(v, chunk, code)) for chunk in layout.chunks] for v, code in zip(values, codes, strict=True)
    ]
    sums = []
    for chunk in layout.chunks:
        code = {}
        for piece in chunk.pieces:
            part, step = total[twin.place(piece)], steps[piece.tensor]
            if step:
                asked_grid = ReduceOptions(grid).grid_of(layout.tensors[piece.tensor])
                code[piece.tensor] = lossless_quantizer(part, step, asked_grid)
            else:
                code[piece.tensor] = codes[0][piece.tensor]  # raw, or any constant: they are of one size
        sums.append(size(chunk_segments(total, chunk, code)))
    fixed = (world_size - 1) * (3 * HEADER_BYTES + summary_bytes)
    sent = [fixed + sum(row) - row[r] + (world_size - 1) * sums[r] for r, row in enumerate(to_owner)]
    received = [
        fixed + sum(row[r] for row in to_owner) - to_owner[r][r] + sum(sums) - sums[r] for r in range(world_size)
    ]
    return Expected(result, bound, sent, received)


def _raw_bytes(counts, item_bytes):
    """Bytes of packets of so many values, stored as they are."""
    if not item_bytes:  # whoever asks for the mean alone does not say
        return 0
    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[item_bytes]
    return sum(size([Segment(torch.zeros(count, dtype=dtype), Quantizer.raw())]) for count in counts if count)


def hierarchical(buffers, layout, grid, item_bytes=0, ranks_per_node=1):
    """Nodes first, chunk by chunk."""
    world_size, dtype = len(buffers), buffers[0].dtype
    nodes = world_size // ranks_per_node
    result, bound = torch.empty_like(buffers[0]), torch.zeros_like(buffers[0])
    headers = 4 * (world_size - 1) * HEADER_BYTES
    sent, received = [headers] * world_size, [headers] * world_size
    for rank in range(world_size):
        local = rank % ranks_per_node
        counts = [
            sum(chunk.count for chunk in layout.chunks[other * nodes : (other + 1) * nodes])
            for other in range(ranks_per_node)
        ]
        others = [count for other, count in enumerate(counts) if other != local]
        copies = [counts[local]] * (ranks_per_node - 1)
        sent[rank] += _raw_bytes(others, dtype.itemsize) + _raw_bytes(copies, item_bytes)
        received[rank] += _raw_bytes(copies, dtype.itemsize) + _raw_bytes(others, item_bytes)

    def quantizer(values, grid):
        found = twin.quantizer_for(values, grid)
        return found if nodes > 1 or found.coding == Coding.CONSTANT else Quantizer.raw()

    def total(parts):
        added = parts[0].clone()
        for part in parts[1:]:
            added += part
        return added

    for number, chunk in enumerate(layout.chunks):
        local, owner_node = divmod(number, nodes)
        owner = owner_node * ranks_per_node + local
        sums = []
        for node in range(nodes):
            neighbours = range(node * ranks_per_node, (node + 1) * ranks_per_node)
            sums.append(total([buffers[rank] for rank in neighbours]))
        places, options = {p.tensor: twin.place(p) for p in chunk.pieces}, ReduceOptions(grid)
        first = [
            {t: quantizer(x[part], options.grid_of(layout.tensors[t])) for t, part in places.items()} for x in sums
        ]
        second = {}
        for t, part in places.items():
            mean = total([twin.lossy(x[part], q[t]) for x, q in zip(sums, first, strict=True)]) / world_size
            second[t] = quantizer(mean, options.mean_grid_of(layout.tensors[t]))
            result[part] = mean
            bound[part] = (sum(q[t].step for q in first) / world_size + second[t].step) / 2
        for offset, length in chunk.raw_runs:
            part = slice(offset, offset + length)
            result[part] = total([x[part] for x in sums]) / world_size
        values = [size(chunk_segments(x, chunk, q)) for x, q in zip(sums, first, strict=True)]
        mean = size(chunk_segments(result, chunk, second))
        for t, part in places.items():
            result[part] = twin.lossy(result[part], second[t])
        for node in range(nodes):
            if node != owner_node:
                rank = node * ranks_per_node + local
                sent[rank] += values[node]
                received[owner] += values[node]
                sent[owner] += mean
                received[rank] += mean
    return Expected(result, bound, sent, received)


TWINS = {"all_gather": all_gather, "exact_sum": exact_sum, "hierarchical": hierarchical}
