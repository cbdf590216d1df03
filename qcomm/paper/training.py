"""One run: training, exchange and measurement per epoch, with all workers in this process or each in its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import qcomm
from qcomm.paper.data import load
from qcomm.paper.exchange import (
    Parcel,
    contraction,
    gather,
    layer_rates,
    mean,
    parcel_bits,
    receive,
    send,
)
from qcomm.paper.network import (
    LAYERS,
    WEIGHT_COUNTS,
    Network,
    accuracy,
    check_finite,
    clone,
    gradients,
    initial,
    train_epoch,
)
from qcomm.paper.settings import Settings
from qcomm.recipes import augmentation_generator

ENTROPY_BITS = 4
SAMPLE_FRACTION = 0.03
# Further parameters of the entropy measurement, for weights that are exchanged as floats.
PROBE_BITS = (3, 4, 5, 6)
PROBE_FRACTIONS = (0.01, 0.03, 0.1, 1.0)
_GRADIENT_BATCHES = 20

History = dict[str, list[Any]]


@dataclass(frozen=True, eq=False)
class Trained:
    """The end of a run, the same on every worker.

    Attributes:
        network: the common weights after the last exchange.
        history: one list per measured quantity, with one entry per epoch: a number, or one number per layer. See
            :func:`train`.
    """

    network: Network
    history: History = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the part that is stored in a cell's file."""
        return {"history": self.history}


def run(settings: Settings, in_processes: bool) -> dict[str, Any]:
    """Calls :func:`train`, and returns the content for the file of a cell."""
    return train(settings, in_processes).to_json()


def train(settings: Settings, in_processes: bool = False) -> Trained:
    """Trains one network.

    Each worker trains a copy of the common network on its share of the images for an epoch. Then all exchange their
    weights, and the mean of the received ones replaces them. The history has, for each epoch:

    * ``train_loss``, ``validation_accuracy``, ``test_accuracy`` (after the exchange, 0..1);
    * ``raw_bits``, ``huffman_bits``: per weight, over all layers and workers; ``packet_bits``: of all bytes sent, per
      parameter, biases in fp32 included;
    * by layer: ``layer_raw_bits``, ``layer_huffman_bits``, ``layer_packet_bits`` (means over the workers); ``entropy``
      (4 bits, all weights), ``sampled_entropy`` (which determines N), ``contraction`` by the sent weights and
      ``weight_rms``, all of worker 0's weights before the exchange;
    * by layer, where floats are exchanged: ``gradient_rms`` of 20 batches and ``probe``, the entropy by the paper's
      estimator at each of ``PROBE_BITS`` and ``PROBE_FRACTIONS``.

    Args:
        settings: settings of the run.
        in_processes: whether this process is one worker, of rank and world size as in the default process group.
            Otherwise it runs all workers one after another. With one thread each, the weights agree bit for bit.

    Raises:
        RecipeError: the data set is not usable, or weights are no longer finite; the message names the layer.
    """
    data = load(settings.dataset, settings.data_dir, settings.train_images)
    mine = [dist.get_rank()] if in_processes else list(range(settings.workers))
    shares = {worker: data.train.share(worker, settings.workers) for worker in mine}
    targets = {worker: share.targets() for worker, share in shares.items()}
    common = initial(settings.init, augmentation_generator(settings.seed, 0, settings.workers))
    history: History = {}
    for epoch in range(1, settings.epochs + 1):
        parcels, records = [], []
        for worker in mine:
            generator = augmentation_generator(settings.seed, epoch, worker)
            local = clone(common)
            loss = train_epoch(
                local, shares[worker], targets[worker], settings.batch_size, settings.learning_rate, generator
            )
            check_finite(local, f"{settings.slug}, epoch {epoch}, worker {worker}")
            parcels.append(send(local, settings.exchange, generator))
            records.append({"train_loss": loss})
            if worker == 0:
                records[-1] |= _measure(local, parcels[-1], settings, shares[0].images, targets[0], epoch)
        if in_processes:
            parcels = gather(parcels[0])
        common = mean(parcels, settings.exchange)
        record = {
            **records[0],
            "train_loss": _mean_loss([float(r["train_loss"]) for r in records], in_processes),
            "validation_accuracy": accuracy(common, data.validation),
            "test_accuracy": accuracy(common, data.test),
            **_rates(parcels, settings),
        }
        for name, value in record.items():
            history.setdefault(name, []).append(_rounded(value))
    return Trained(common, history)


def _mean_loss(own: list[float], in_processes: bool) -> float:
    total = torch.tensor(own, dtype=torch.float64).mean()
    if in_processes:
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.item()


def _rates(parcels: list[Parcel], settings: Settings) -> dict[str, Any]:
    """Returns the bits per weight, means over the workers."""
    by_layer = torch.tensor([layer_rates(parcel, settings.exchange) for parcel in parcels], dtype=torch.float64).mean(0)
    shares = torch.tensor(WEIGHT_COUNTS, dtype=torch.float64) / sum(WEIGHT_COUNTS)
    return {
        "raw_bits": float(by_layer[:, 0] @ shares),
        "huffman_bits": float(by_layer[:, 1] @ shares),
        "packet_bits": sum(parcel_bits(parcel) for parcel in parcels) / len(parcels),
        "layer_raw_bits": by_layer[:, 0].tolist(),
        "layer_huffman_bits": by_layer[:, 1].tolist(),
        "layer_packet_bits": by_layer[:, 2].tolist(),
    }


def _measure(
    network: Network, parcel: Parcel, settings: Settings, images: Tensor, targets: Tensor, epoch: int
) -> dict[str, Any]:
    """Measures a worker's weights before the exchange."""
    decoded = receive(parcel, settings.exchange)
    seed = settings.exchange.grid.seed
    record: dict[str, Any] = {
        "entropy": [qcomm.estimate_entropy(weight, ENTROPY_BITS, 1.0) for weight, _ in network],
        "sampled_entropy": [
            qcomm.estimate_entropy(weight, ENTROPY_BITS, SAMPLE_FRACTION, seed=seed) for weight, _ in network
        ],
        "contraction": [contraction(network[k].weight, decoded[k].weight) for k in range(LAYERS)],
        "weight_rms": [float(weight.square().mean().sqrt()) for weight, _ in network],
    }
    if settings.exchange.kind == "float":
        record["gradient_rms"] = gradient_rms(network, images, targets, settings.batch_size)
        generator = augmentation_generator(settings.seed, epoch, settings.workers)
        record["probe"] = [probe(weight, generator) for weight, _ in network]
    return record


def gradient_rms(network: Network, images: Tensor, targets: Tensor, batch_size: int) -> list[float]:
    """Returns the RMS of the derivative by each layer's weights over the first 20 batches, at the given weights.

    The derivative of a batch is the direction of one step.
    """
    squares = torch.zeros(LAYERS, dtype=torch.float64)
    batches = list(zip(images.split(batch_size), targets.split(batch_size), strict=True))[:_GRADIENT_BATCHES]
    for batch, wanted in batches:
        squares += torch.tensor(
            [float(g.weight.square().mean()) for g in gradients(network, batch, wanted)], dtype=torch.float32
        )
    return (squares / len(batches)).sqrt().tolist()


def probe(weight: Tensor, generator: torch.Generator) -> list[list[float]]:
    """Estimates entropy by the paper's method: rows for ``PROBE_BITS``, columns for ``PROBE_FRACTIONS``.

    The random sample has exactly that share of the values, however small; ``qcomm.estimate_entropy`` never takes fewer
    than 1024 values.
    """
    flat = weight.flatten().double()
    low, high = flat.min(), flat.max()
    if low == high:
        return [[0.0] * len(PROBE_FRACTIONS)] * len(PROBE_BITS)
    order = torch.randperm(flat.numel(), generator=generator, dtype=torch.int64)
    finest = 1 << max(PROBE_BITS)
    symbols = ((flat - low) * (finest / (high - low))).floor().clamp_(max=finest - 1).long()[order]
    result = []
    for bits in PROBE_BITS:
        coarse = symbols >> (max(PROBE_BITS) - bits)  # floor bins nest
        result.append([_entropy(coarse[: math.ceil(f * flat.numel())], 1 << bits) for f in PROBE_FRACTIONS])
    return result


def _entropy(symbols: Tensor, bins: int) -> float:
    p = torch.bincount(symbols, minlength=bins).double() / symbols.numel()
    return abs(float(torch.special.entr(p).sum())) / math.log(2)


def _rounded(value: Any) -> Any:
    """Rounds to six significant digits, since more are noise and the files are committed; JSON has no NaN."""
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if math.isfinite(value) else None


Cell = Callable[[Settings, bool], dict[str, Any]]
