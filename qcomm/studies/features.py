"""Features of images by a small residual network, and their map to the plane by PCA and t-SNE.

Everything here depends on seeds alone: the network runs on the CPU, and scikit-learn is kept to one thread.
"""

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcomm.codec import CPU
from qcomm.recipes import NUM_CLASSES, RecipeError, Split

WIDTHS = (8, 16, 32)
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
PCA_DIMENSIONS = 16
PERPLEXITY = 30.0  # scikit-learn's default
CHUNK = 500  # images of an evaluation at once


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    """``relu(body(x) + shortcut(x))`` with a strided projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, outputs, stride), nn.ReLU(), _conv(outputs, outputs, 1))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        return functional.relu(self.body(values) + self.shortcut(values))


class SmallResNet(nn.Module):
    """A residual network of 8 layers: a stem of stride 2, three blocks of 8, 16 and 32 channels, and a linear layer.

    Example:
        >>> sum(parameter.numel() for parameter in SmallResNet(1).parameters())
        19714
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(channels, WIDTHS[0], 2),
            nn.ReLU(),
            _Block(WIDTHS[0], WIDTHS[0], 1),
            _Block(WIDTHS[0], WIDTHS[1], 2),
            _Block(WIDTHS[1], WIDTHS[2], 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(WIDTHS[-1], NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Computes the logits of normalised images."""
        logits: Tensor = self.classifier(self.body(images))
        return logits


def batches(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields the indices of ``steps`` batches from shuffled epochs. The incomplete last batch of an epoch is left out.

    Example:
        >>> [len(batch) for batch in batches(10, 4, 3, torch.Generator())]
        [4, 4, 4]
    """
    left, size = steps, min(batch_size, count)
    while left > 0:
        order = torch.randperm(count, generator=generator, dtype=torch.int64, device=CPU)
        chosen = order[: count // size * size].split(size)[:left]
        left -= len(chosen)
        yield from chosen


def train(split: Split, steps: int, batch_size: int, learning_rate: float, seed: int) -> SmallResNet:
    """Trains a network by SGD with momentum, whose learning rate falls linearly to 0.

    Args:
        split: normalised images, float32, and labels.
        steps: number of batches.
        batch_size: images of a batch.
        learning_rate: of the first step.
        seed: of the weights and of the order of images.

    Returns:
        The network in evaluation mode.
    """
    torch.manual_seed(seed)
    model, generator = SmallResNet(split.images.shape[1]), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    for number, chosen in enumerate(batches(len(split), batch_size, steps, generator)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - number / steps)
        optimizer.zero_grad()
        functional.cross_entropy(model(split.images[chosen]), split.labels[chosen]).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: SmallResNet, images: Tensor, labels: Tensor) -> float:
    """Returns the percentage of images that the network classifies rightly."""
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(CHUNK)])
    return 100 * float((found == labels).float().mean())


def features(model: SmallResNet, images: Tensor) -> Tensor:
    """Returns the penultimate activations, ``[n, 32]``."""
    with torch.no_grad():
        return torch.cat([model.body(part) for part in images.split(CHUNK)])


def check_sklearn() -> None:
    """Checks for scikit-learn before the first run.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        importlib.import_module("sklearn")
    except ImportError as error:
        raise RecipeError(
            "the data filter needs scikit-learn, which is not installed: pip install 'qcomm[train]'"
        ) from error


def embed(values: Tensor, seed: int) -> Tensor:
    """Maps features to the plane: PCA to at most ``PCA_DIMENSIONS``, then t-SNE with the library's defaults.

    Args:
        values: float ``[n, dimensions]``. With fewer than 91 rows the perplexity is ``(n - 1) / 3``.
        seed: ``random_state`` of both.

    Returns:
        Float32 ``[n, 2]``.

    Source:
        L. van der Maaten and G. Hinton, "Visualizing data using t-SNE", JMLR 9, 2008.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(1):  # sums of several threads depend on their number
        compact = PCA(min(PCA_DIMENSIONS, *values.shape), random_state=seed).fit_transform(values.numpy())
        perplexity = min(PERPLEXITY, (len(values) - 1) / 3)
        places = TSNE(perplexity=perplexity, random_state=seed).fit_transform(compact)
    return torch.as_tensor(places, dtype=torch.float32, device=CPU)
