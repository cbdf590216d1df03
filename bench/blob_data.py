"""A synthetic task in the shape of CIFAR-10: ten classes of star-shaped blobs, 3 x 32 x 32 bytes an image.

A blob's border is ``r(angle) = R (1 + depth cos(arms (angle - turn)))``. Its class is one of five numbers of arms and
one of two depths. Each class has a usual colour, as objects in photographs have, but it is too faint among the random
colours to tell more than a part of them. Size, place, turn, textures, a disc in front and noise are drawn anew for each
image. The images follow from the seed alone, so that the task needs no files.
"""

from functools import lru_cache

import torch
from torch.nn import functional

from qcomm.recipes.datasets import Dataset, Split

SIZE = 32
ARMS = (2, 3, 4, 5, 6)
DEPTHS = (0.2, 0.5)
CLASSES = len(ARMS) * len(DEPTHS)
TRAIN_IMAGES, TEST_IMAGES = 20_000, 10_000
CHUNK = 2_000
# Standard deviations in grey levels: colours of classes, of images, of patches of 4 x 4, and of pixels.
CLASS_COLOUR, COLOUR, PATCHES, NOISE = 25.0, 45.0, 10.0, 6.0


def _texture(colours: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns ``[count, 3, SIZE, SIZE]``: a colour around 128 with smooth patches, which varies about ``colours``."""
    count = len(colours)
    colour = colours.view(count, 3, 1, 1) + COLOUR * torch.randn(count, 3, 1, 1, generator=generator)
    patches = PATCHES * torch.randn(count, 3, 8, 8, generator=generator)
    return 128 + colour + functional.interpolate(patches, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def _images(labels: torch.Tensor, colours: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns one uint8 image for each label; ``colours`` are those of the classes."""
    count = len(labels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    axis = torch.arange(SIZE, dtype=torch.float32) - (SIZE - 1) / 2
    down, right = axis.view(1, SIZE, 1), axis.view(1, 1, SIZE)
    y, x = down - uniform(-3, 3), right - uniform(-3, 3)
    arms = torch.tensor(ARMS)[labels % len(ARMS)].view(count, 1, 1)
    depth = torch.tensor(DEPTHS)[labels // len(ARMS)].view(count, 1, 1)
    border = uniform(7, 10) * (1 + depth * torch.cos(arms * (torch.atan2(y, x) - uniform(-0.5, 0.5))))
    inside = torch.sigmoid(2 * (border - torch.hypot(y, x))).unsqueeze(1)
    away = torch.hypot(down - uniform(-12, 12), right - uniform(-12, 12))
    front = torch.sigmoid(2 * (uniform(2, 4) - away)).unsqueeze(1)
    none = torch.zeros(count, 3)
    image = _texture(none, generator) * (1 - inside) + _texture(colours[labels], generator) * inside
    image = image * (1 - front) + _texture(none, generator) * front
    image += NOISE * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return image.round().clamp(0, 255).to(torch.uint8)


def _split(count: int, colours: torch.Tensor, generator: torch.Generator) -> Split:
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Split(torch.cat([_images(part, colours, generator) for part in labels.split(CHUNK)]), labels)


@lru_cache(maxsize=1)
def load_blobs(train_images: int = TRAIN_IMAGES, test_images: int = TEST_IMAGES) -> Dataset:
    """Makes training and test images; always the same ones of equal numbers."""
    generator = torch.Generator().manual_seed(0)
    colours = CLASS_COLOUR * torch.randn(CLASSES, 3, generator=generator)
    train, test = _split(train_images, colours, generator), _split(test_images, colours, generator)
    values = train.images.float()
    mean, std = values.mean((0, 2, 3)).view(1, 3, 1, 1), values.std((0, 2, 3)).view(1, 3, 1, 1)
    return Dataset("blobs", train, test, mean, std, crop_padding=0, flip=False)
