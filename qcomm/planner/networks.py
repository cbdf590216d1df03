"""Convolutional networks by formula: ResNet-18 to 152 and VGG16 on images of 224 x 224.

The ResNets are those of :mod:`qcomm.recipes.models` with 1000 classes, a multiply-add counted as two operations:
``flops = 2 * c_in * k * k * c_out * height * width`` for a convolution with an output of that size. Batch normalisation
and activations are bound by memory: they lower the rate of a GPU and are not in the count.
"""

from collections.abc import Mapping

from qcomm.planner.profiles import ModelProfile, ParameterTensor

__all__ = ["RESNETS", "resnet", "vgg16"]

# name -> (bottleneck blocks?, blocks in each of the four stages), as in table 1 of arXiv:1512.03385
RESNETS: Mapping[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
# Configuration D of arXiv:1409.1556: channels of the convolutions; 0 for a max pooling.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)

CLASSES = 1000
SIDE = 224
PIXELS = 3 * SIDE * SIDE
IMAGENET_IMAGES = 1_281_167  # of the 1000 classes, for training


def _conv(name: str, c_in: int, c_out: int, kernel: int, side: int) -> ParameterTensor:
    shape = (c_out, c_in, kernel, kernel)
    return ParameterTensor(f"{name}.weight", shape, 2.0 * c_in * kernel * kernel * c_out * side * side)


def _norm(name: str, channels: int) -> list[ParameterTensor]:
    return [ParameterTensor(f"{name}.weight", (channels,)), ParameterTensor(f"{name}.bias", (channels,))]


def _linear(name: str, c_in: int, c_out: int) -> list[ParameterTensor]:
    return [
        ParameterTensor(f"{name}.weight", (c_out, c_in), 2.0 * c_in * c_out),
        ParameterTensor(f"{name}.bias", (c_out,)),
    ]


def _profile(name: str, family: str, forward: list[ParameterTensor]) -> ModelProfile:
    return ModelProfile(name, family, tuple(reversed(forward)), "images", PIXELS, PIXELS, IMAGENET_IMAGES)


def resnet(name: str) -> ModelProfile:
    """Returns the profile of a residual network of ``RESNETS``.

    Example:
        >>> resnet("resnet50").parameters, round(resnet("resnet50").forward_flops / 1e9, 2)
        (25557032, 8.18)
    """
    bottleneck, counts = RESNETS[name]
    side, channels = SIDE // 2, 64
    tensors = [_conv("stem", 3, channels, 7, side), *_norm("stem.norm", channels)]
    side //= 2  # max pooling
    for stage, count in enumerate(counts):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for index in range(count):
            block, before = f"stage{stage + 1}.{index}", side
            if stage > 0 and index == 0:
                side //= 2
            if bottleneck:
                convolutions = [(channels, width, 1, before), (width, width, 3, side), (width, out, 1, side)]
            else:
                convolutions = [(channels, width, 3, side), (width, width, 3, side)]
            for number, (c_in, c_out, kernel, at) in enumerate(convolutions):
                tensors += [
                    _conv(f"{block}.conv{number}", c_in, c_out, kernel, at),
                    *_norm(f"{block}.norm{number}", c_out),
                ]
            if channels != out:
                tensors += [_conv(f"{block}.shortcut", channels, out, 1, side), *_norm(f"{block}.shortcut.norm", out)]
            channels = out
    tensors += _linear("classifier", channels, CLASSES)
    return _profile(name, "resnet", tensors)


def vgg16() -> ModelProfile:
    """Returns the profile of VGG16, configuration D, without batch normalisation.

    Example:
        >>> vgg16().parameters
        138357544
    """
    side, channels = SIDE, 3
    tensors: list[ParameterTensor] = []
    for number, width in enumerate(VGG16):
        if width == 0:
            side //= 2
            continue
        tensors += [_conv(f"conv{number}", channels, width, 3, side), ParameterTensor(f"conv{number}.bias", (width,))]
        channels = width
    for number, (c_in, c_out) in enumerate(((channels * side * side, 4096), (4096, 4096), (4096, CLASSES))):
        tensors += _linear(f"classifier{number}", c_in, c_out)
    return _profile("vgg16", "vgg", tensors)
