"""Exchange of weights at the end of an epoch: each worker's parcel, and the mean from which all continue.

The parcels are decoded in the order of the workers, added in fp32 and divided by their number. Workers in separate
processes and workers in one process therefore end with the same bits.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import qcomm
from qcomm.codec import MAX_CODED_BITS, code_lengths, count_symbols, measure, plan
from qcomm.paper.network import BIAS_COUNT, LAYERS, SIZES, WEIGHT_COUNTS, Layer, Network
from qcomm.paper.settings import Exchange
from qcomm.recipes import RecipeError

FLOAT_BITS = 32
_PACKET_MARGIN = 128  # maximum size of a packet beyond the tensor, in bytes

Parcel = list[Tensor]  # a worker's message: bytes of each layer's weights, then those of all biases


class LayerRate(NamedTuple):
    """Bits per weight of one layer in one parcel.

    Attributes:
        raw: N, the bits of a symbol without a code.
        huffman: bits of the codewords alone, as the paper counts.
        packet: bits of all bytes sent, including headers and code lengths.
        symbol_entropy: entropy of the symbols' histogram, the lower bound of coding them one by one.
    """

    raw: float
    huffman: float
    packet: float
    symbol_entropy: float


def send(network: Network, exchange: Exchange, generator: torch.Generator) -> Parcel:
    """Encodes a worker's network as a parcel. Only the noise draws from ``generator``."""
    parcel = [_send_weight(weight, exchange, generator) for weight, _ in network]
    parcel.append(_to_bytes(torch.cat([bias for _, bias in network])))
    return parcel


def _send_weight(weight: Tensor, exchange: Exchange, generator: torch.Generator) -> Tensor:
    if exchange.kind == "grid":
        return qcomm.compress(weight, exchange.grid)
    if exchange.kind == "float":
        return _to_bytes(weight)
    quantizer = plan(measure(weight), exchange.grid, weight)
    if quantizer.step == 0.0:  # constant weights have no bins
        return _to_bytes(weight)
    if exchange.kind == "decay":
        middle = (quantizer.p0 + quantizer.p1) / 2
        return _to_bytes(middle + (weight - middle) * (1 - 2.0**-quantizer.num_bits))
    return _to_bytes(
        weight + (torch.rand(weight.shape, generator=generator, dtype=torch.float32) - 0.5) * quantizer.step
    )


def receive(parcel: Parcel, exchange: Exchange) -> Network:
    """Decodes a parcel into a network with its own memory."""
    weights = []
    for k, sent in enumerate(parcel[:-1]):
        weight = qcomm.decompress(sent) if exchange.kind == "grid" else sent.view(torch.float32).clone()
        weights.append(weight.view(SIZES[k + 1], SIZES[k]))
    biases = parcel[-1].view(torch.float32).split(SIZES[1:])
    return [Layer(weight, bias.clone()) for weight, bias in zip(weights, biases, strict=True)]


def mean(parcels: list[Parcel], exchange: Exchange) -> Network:
    """Returns the mean of the networks in ``parcels``."""
    total = receive(parcels[0], exchange)
    for parcel in parcels[1:]:
        for (weight, bias), (other_weight, other_bias) in zip(total, receive(parcel, exchange), strict=True):
            weight.add_(other_weight)
            bias.add_(other_bias)
    return [Layer(weight.div_(len(parcels)), bias.div_(len(parcels))) for weight, bias in total]


def gather(parcel: Parcel) -> list[Parcel]:
    """Gathers every rank's parcel on all ranks of the default process group.

    Raises:
        RecipeError: a rank announces sizes that no parcel has; raised on all ranks.
    """
    own = torch.tensor([part.numel() for part in parcel], dtype=torch.int64)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    most = (
        torch.tensor([FLOAT_BITS // 8 * count for count in (*WEIGHT_COUNTS, BIAS_COUNT)], dtype=torch.int64)
        + _PACKET_MARGIN
    )
    for rank, size in enumerate(sizes):
        if bool((size < 0).any()) or bool((size > most).any()):
            raise RecipeError(
                f"rank {rank} announces parts of {size.tolist()} bytes; at most {most.tolist()} are possible"
            )
    longest = max(int(size.sum()) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: int(own.sum())] = torch.cat(parcel)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    # Each part is cloned, so that it is aligned for a view as floats.
    return [
        [part.clone() for part in flat[: int(size.sum())].split(size.tolist())]
        for flat, size in zip(received, sizes, strict=True)
    ]


def layer_rates(parcel: Parcel, exchange: Exchange) -> list[LayerRate]:
    """Returns the bits per weight of each layer in a parcel; floats cost 32 bits in every account."""
    if exchange.kind != "grid":
        return [LayerRate(FLOAT_BITS, FLOAT_BITS, FLOAT_BITS, math.nan)] * LAYERS
    return [_layer_rate(packet, count) for packet, count in zip(parcel, WEIGHT_COUNTS, strict=False)]


def _layer_rate(packet: Tensor, count: int) -> LayerRate:
    info = qcomm.inspect(packet)
    huffman = float(info.num_bits)
    if info.coding in ("single", "fixed") and info.num_bits <= MAX_CODED_BITS:
        counts = count_symbols(packet, 0)[: 1 << info.num_bits]
        huffman = int((counts * code_lengths(counts)).sum()) / count
    return LayerRate(info.num_bits, huffman, info.bits_per_element, info.entropy_bits)


def parcel_bits(parcel: Parcel) -> float:
    """Returns the bits per parameter of a whole parcel; parameters include biases."""
    return 8 * sum(part.numel() for part in parcel) / (sum(WEIGHT_COUNTS) + BIAS_COUNT)


def contraction(before: Tensor, after: Tensor) -> float:
    """Returns the share by which ``after`` is nearer to the middle of ``before``'s range: 0 for no change.

    It is 1 minus the slope of the regression of one on the other.

    Example:
        >>> contraction(torch.tensor([-1.0, 1.0]), torch.tensor([-0.5, 0.5]))
        0.5
    """
    middle = (before.min() + before.max()) / 2
    centered = (before - middle).double()
    energy = float(centered.square().sum())
    return 1 - float((centered * (after - middle)).sum()) / energy if energy else 0.0


def _to_bytes(values: Tensor) -> Tensor:
    return values.detach().contiguous().view(-1).view(torch.uint8)
