"""Residual networks of He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

``resnet20`` is the CIFAR network of section 4.2: three stages of 16, 32 and 64 channels with parameter-free
shortcuts (option A: subsample and pad the channels with zeros). ``resnet18`` to ``resnet152`` are the networks of
table 1 with projection shortcuts (option B); bottleneck blocks stride in their 3x3 convolution, as all current
implementations do. For 32x32 images their stem is one 3x3 convolution without max pooling.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from qcomm.recipes.errors import RecipeError

# name -> (bottleneck blocks?, blocks in each of the four stages)
_IMAGENET_NETWORKS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
_CIFAR_BLOCKS_PER_STAGE = 3  # 6n + 2 = 20 layers

MODEL_NAMES: tuple[str, ...] = ("resnet20", *_IMAGENET_NETWORKS)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


class _PaddedShortcut(nn.Module):
    """Shortcut by option A: every ``stride``-th pixel, new channels zero; it has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Builds the shortcut of option B, a strided 1x1 convolution."""
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class _Block(nn.Module):
    """``relu(body(x) + shortcut(x))``; the identity where shapes agree, ``make_shortcut`` where they do not."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        bottleneck: bool,
        make_shortcut: Callable[[int, int, int], nn.Module],
    ) -> None:
        super().__init__()
        out_channels = 4 * width if bottleneck else width
        if bottleneck:
            convolutions = [
                _conv(in_channels, width, 1),
                _conv(width, width, 3, stride),
                _conv(width, out_channels, 1),
            ]
        else:
            convolutions = [_conv(in_channels, width, 3, stride), _conv(width, width, 3)]
        layers: list[nn.Module] = []
        for convolution in convolutions:
            layers += [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])  # the last activation comes after the sum
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else make_shortcut(in_channels, out_channels, stride)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling and one linear layer.

    Input is float ``[batch, in_channels, height, width]``, output float ``[batch, num_classes]`` (logits). Build one
    with :func:`build_model`.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[tuple[int, int]],
        bottleneck: bool,
        make_shortcut: Callable[[int, int, int], nn.Module],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        channels = stages[0][0]
        layers: list[nn.Module] = []
        for stage, (width, count) in enumerate(stages):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                block = _Block(channels, width, stride, bottleneck, make_shortcut)
                layers.append(block)
                channels = block.out_channels
        self.stages = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Computes the logits of a batch of images."""
        features: Tensor = self.stages(self.stem(images))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def _stem(in_channels: int, width: int, kernel: int, stride: int, max_pool: bool) -> nn.Module:
    layers: list[nn.Module] = [
        _conv(in_channels, width, kernel, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    if max_pool:
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return nn.Sequential(*layers)


def build_model(
    name: str, *, in_channels: int = 3, image_size: int = 32, num_classes: int = 10, stem_stride: int | None = None
) -> ResNet:
    """Builds a residual network with freshly drawn weights (from torch's global generator).

    Args:
        name: one of ``MODEL_NAMES``.
        in_channels: 1 (grey) or 3 (colour).
        image_size: pixels a side, 32 or 224; ``resnet20`` takes 32 only.
        num_classes: outputs, at least 2.
        stem_stride: stride of the first convolution, 1 or 2; by default 1 at 32 pixels and 2 at 224. With 2 at 32
            pixels a network costs about a quarter.

    Returns:
        The network in training mode, fp32, on the CPU.

    Raises:
        RecipeError: an argument is not one of the above; the message lists what is.

    Example:
        >>> import torch
        >>> model = build_model("resnet20", in_channels=1)
        >>> model(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """
    if name not in MODEL_NAMES:
        raise RecipeError(f"model is {name!r}; it must be one of {', '.join(MODEL_NAMES)}")
    if in_channels not in (1, 3):
        raise RecipeError(f"in_channels is {in_channels}; it must be 1 or 3")
    if num_classes < 2:
        raise RecipeError(f"num_classes is {num_classes}; it must be at least 2")
    sizes = (32,) if name == "resnet20" else (32, 224)
    if image_size not in sizes:
        raise RecipeError(f"image_size is {image_size}; {name} takes {' or '.join(map(str, sizes))}")
    stride = stem_stride if stem_stride is not None else (1 if image_size == 32 else 2)
    if stride not in (1, 2):
        raise RecipeError(f"stem_stride is {stride}; it must be 1 or 2")

    if name == "resnet20":
        stem = _stem(in_channels, 16, 3, stride, max_pool=False)
        return ResNet(
            stem, [(width, _CIFAR_BLOCKS_PER_STAGE) for width in (16, 32, 64)], False, _PaddedShortcut, num_classes
        )
    bottleneck, blocks = _IMAGENET_NETWORKS[name]
    large = image_size == 224
    stem = _stem(in_channels, 64, 7 if large else 3, stride, max_pool=large)
    # The first bottleneck stage widens 64 to 256 channels without a stride: the shortcut projects there too.
    return ResNet(stem, list(zip((64, 128, 256, 512), blocks, strict=True)), bottleneck, _projection, num_classes)


def count_parameters(model: nn.Module) -> int:
    """Counts the trainable scalars.

    Example:
        >>> count_parameters(build_model("resnet20"))
        269722
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
