"""The part of an image that the model sees: a random crop in training, the central square in evaluation.

Shapes: C channels, H x W the image's own pixels, S x S what the model sees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_TRIES = 10  # torchvision's
_RATIO = (3 / 4, 4 / 3)  # width / height


def random_crop(image: Tensor, size: int, scale: tuple[float, float], flip: bool, generator: torch.Generator) -> Tensor:
    """Return a RandomResizedCrop with torchvision's distribution, bicubic and antialiased, flipped in half of the
    cases.

    Args:
        image: uint8 [C, H, W].
        size: S.
        scale: least and greatest fraction of the area that is kept.
        flip: whether to mirror at all.
        generator: where all randomness comes from; always the same number of draws.
    """
    draws = torch.rand(4 * _TRIES + 1, generator=generator).tolist()
    top, left, height, width = _draw_box(image.shape[-2], image.shape[-1], scale, draws)
    crop = resize(image[:, top : top + height, left : left + width], size, size)
    return (crop.flip(-1) if flip and draws[-1] < 0.5 else crop).contiguous()


def _draw_box(height: int, width: int, scale: tuple[float, float], draws: list[float]) -> tuple[int, int, int, int]:
    """Return top, left, height and width as torchvision.transforms.RandomResizedCrop.get_params chooses them."""
    for i in range(0, 4 * _TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[i])
        low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
        ratio = math.exp(low + (high - low) * draws[i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[i + 2] * (height - h + 1)), int(draws[i + 3] * (width - w + 1)), h, w
    # no box fits: the largest central one of an allowed ratio
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def centre_crop(image: Tensor, size: int) -> Tensor:
    """Return the central square of uint8 [C, H, W], scaled to [C, S, S] (bicubic, antialiased)."""
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    return resize(image[:, top : top + side, left : left + side], size, size).contiguous()


def resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.resize(image, [height, width], InterpolationMode.BICUBIC, antialias=True)
