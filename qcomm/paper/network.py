"""The paper's network, 784-392-50-10 with tanh and squared error, and plain SGD on it.

Forward and backward are written out: a step of 20 images takes a third of a millisecond, and autograd would double it.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qcomm.paper.data import Vectors
from qcomm.recipes import RecipeError

SIZES = (784, 392, 50, 10)
LAYERS = len(SIZES) - 1
WEIGHT_COUNTS = tuple(inputs * outputs for inputs, outputs in pairwise(SIZES))
BIAS_COUNT = sum(SIZES[1:])
LAYER_NAMES = tuple(f"layer {k + 1} ({inputs} -> {outputs})" for k, (inputs, outputs) in enumerate(pairwise(SIZES)))
_SMALL_DEVIATION = 0.01
_EVALUATION_BATCH = 1000


class Layer(NamedTuple):
    """Weight, fp32 ``[outputs, inputs]``, and bias, fp32 ``[outputs]``."""

    weight: Tensor
    bias: Tensor


Network = list[Layer]


def initial(init: str, generator: torch.Generator) -> Network:
    """Returns a network with random weights and zero biases; ``init`` as in ``settings.Settings``."""
    network = []
    for inputs, outputs in pairwise(SIZES):
        weight = torch.empty(outputs, inputs, dtype=torch.float32)
        bound = 1 / math.sqrt(inputs)
        if init == "uniform":
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.normal_(0.0, _SMALL_DEVIATION if init == "small" else bound / math.sqrt(3), generator=generator)
        network.append(Layer(weight, torch.zeros(outputs, dtype=torch.float32)))
    return network


def clone(network: Network) -> Network:
    """Returns a copy with its own memory."""
    return [Layer(weight.clone(), bias.clone()) for weight, bias in network]


def activations(network: Network, images: Tensor) -> list[Tensor]:
    """Returns the images and each layer's output, the last one ``[n, 10]``."""
    result = [images]
    for weight, bias in network:
        result.append(torch.addmm(bias, result[-1], weight.t()).tanh_())
    return result


def deltas(network: Network, layers: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    """Returns the derivatives of half the squared error, summed over outputs, by each layer's sums ``[n, outputs]``."""
    result: list[Tensor] = []
    error = layers[-1] - targets
    for k in reversed(range(LAYERS)):
        error = error * (1 - layers[k + 1].square())
        result.insert(0, error)
        if k:
            error = error @ network[k].weight
    return result


def gradients(network: Network, images: Tensor, targets: Tensor) -> Network:
    """Returns the derivatives of half the squared error: summed over outputs, averaged over images."""
    layers = activations(network, images)
    errors = deltas(network, layers, targets)
    count = len(images)
    return [
        Layer(error.t() @ layer / count, error.sum(0) / count) for error, layer in zip(errors, layers, strict=False)
    ]


def train_epoch(
    network: Network, data: Vectors, targets: Tensor, batch_size: int, rate: float, generator: torch.Generator
) -> float:
    """Runs one pass of SGD in a random order, in place; images that do not fill a batch are left out.

    Returns:
        Half the squared error, summed over outputs, averaged over the images.

    Raises:
        RecipeError: there are fewer images than one batch.
    """
    steps = len(data) // batch_size
    if steps == 0:
        raise RecipeError(f"--batch-size is {batch_size}; a worker's {len(data)} training images do not fill one step")
    order = torch.randperm(len(data), generator=generator, dtype=torch.int64)
    loss = torch.zeros((), dtype=torch.float64)
    scale = rate / batch_size
    for chosen in order[: steps * batch_size].view(steps, batch_size):
        layers, wanted = activations(network, data.images[chosen]), targets[chosen]
        errors = deltas(network, layers, wanted)
        loss += (layers[-1] - wanted).square().sum()
        for (weight, bias), error, layer in zip(network, errors, layers, strict=False):
            weight.addmm_(error.t(), layer, alpha=-scale)  # the gradient is never stored
            bias.sub_(error.sum(0), alpha=scale)
    return loss.item() / (2 * steps * batch_size)


def accuracy(network: Network, data: Vectors) -> float:
    """Returns the share of images whose largest output is their class's, 0..1."""
    correct = 0
    for images, labels in zip(
        torch.split(data.images, _EVALUATION_BATCH), torch.split(data.labels, _EVALUATION_BATCH), strict=True
    ):
        correct += int((activations(network, images)[-1].argmax(1) == labels).sum())
    return correct / len(data)


def check_finite(network: Network, where: str) -> None:
    """Stops a run that has diverged.

    Raises:
        RecipeError: a layer has NaN or infinite weights; the message names the first one.
    """
    for name, (weight, bias) in zip(LAYER_NAMES, network, strict=True):
        for kind, values in (("weights", weight), ("biases", bias)):
            bad = int((~values.isfinite()).sum())
            if bad:
                raise RecipeError(
                    f"{where}: {bad} of {values.numel()} {kind} of {name} are NaN or infinite; a lower --lr may help"
                )
