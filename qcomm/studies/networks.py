"""Small networks without BatchNorm, whose samples do not act on each other."""

from torch import nn

from qcomm.recipes import NUM_CLASSES

IMAGE_SIZE = 32


def mlp(channels: int) -> nn.Module:
    """Returns a fully connected network of two hidden layers.

    Example:
        >>> sum(parameter.numel() for parameter in mlp(1).parameters())
        69360
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * IMAGE_SIZE**2, 64),
        nn.ReLU(),
        nn.Linear(64, 50),
        nn.ReLU(),
        nn.Linear(50, NUM_CLASSES),
    )


def cnn(channels: int) -> nn.Module:
    """Returns a convolutional network of three strided layers and a linear one.

    Example:
        >>> sum(parameter.numel() for parameter in cnn(1).parameters())
        6138
    """
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, NUM_CLASSES),
    )


NETWORKS = {"mlp": mlp, "cnn": cnn}
