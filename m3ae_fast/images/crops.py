"""The part of an image that the model sees: a random crop in training; in evaluation the central square, or all of a
native image.

Shapes: C channels, H x W the image's own pixels, S x S what the model sees of a square image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from m3ae_fast.images.patch_grid import Native

_TRIES = 10  # torchvision's
_RATIO = (3 / 4, 4 / 3)  # width / height, of a native image as a multiple of its own


def random_crop(
    image: Tensor, frame: int | Native, scale: tuple[float, float], flip: bool, generator: torch.Generator
) -> Tensor:
    """Return a RandomResizedCrop with torchvision's distribution, bicubic and antialiased, flipped in half of the
    cases. A native crop has nearly the aspect ratio of its box, and as many patches as the whole image would have.

    Args:
        image: [C, H, W], uint8, uint16 or float32.
        frame: S, or how large native images are.
        scale: least and greatest fraction of the area that is kept.
        flip: whether to mirror at all.
        generator: where all randomness comes from; always the same number of draws.
    """
    draws = torch.rand(4 * _TRIES + 1, generator=generator).tolist()
    H, W = image.shape[-2:]
    top, left, height, width = _draw_box(H, W, scale, draws, 1.0 if isinstance(frame, int) else W / H)
    crop = resize(image[:, top : top + height, left : left + width], *_pixels(frame, height, width, H * W))
    return (_mirrored(crop) if flip and draws[-1] < 0.5 else crop).contiguous()


def _pixels(frame: int | Native, height: int, width: int, area: int) -> tuple[int, int]:
    """Return height and width that the model sees of height x width pixels, of an image of `area`."""
    if isinstance(frame, int):
        return frame, frame
    rows, columns = frame.grid(height, width, area)
    return rows * frame.patch_size, columns * frame.patch_size


def _draw_box(
    height: int, width: int, scale: tuple[float, float], draws: list[float], own: float = 1.0
) -> tuple[int, int, int, int]:
    """Return top, left, height and width as torchvision.transforms.RandomResizedCrop.get_params chooses them, for
    ratios that are multiples of `own`."""
    least, most = own * _RATIO[0], own * _RATIO[1]
    for i in range(0, 4 * _TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[i])
        low, high = math.log(least), math.log(most)
        ratio = math.exp(low + (high - low) * draws[i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[i + 2] * (height - h + 1)), int(draws[i + 3] * (width - w + 1)), h, w
    # no box fits: the largest central one of an allowed ratio
    w, h = width, height
    if width / height < least:
        h = round(width / least)
    elif width / height > most:
        w = round(height * most)
    return (height - h) // 2, (width - w) // 2, h, w


def whole_view(image: Tensor, frame: int | Native) -> Tensor:
    """Return what an evaluation sees of an image [C, H, W]: the central square, or the whole native image."""
    if isinstance(frame, int):
        return centre_crop(image, frame)
    height, width = image.shape[-2:]
    return resize(image, *_pixels(frame, height, width, height * width)).contiguous()


def centre_crop(image: Tensor, size: int) -> Tensor:
    """Return the central square of [C, H, W], uint8, uint16 or float32, scaled to [C, S, S] (bicubic, antialiased)."""
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    return resize(image[:, top : top + side, left : left + side], size, size).contiguous()


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Return [C, height, width] in the dtype of the image (bicubic, antialiased); what uint16 gives is rounded from
    float32."""
    if image.dtype == torch.uint16:
        return resize(image.float(), height, width).round_().clamp_(0, 65535).to(torch.uint16)
    if image.is_floating_point() and width == 1 < height:  # torch 2.13 gives wrong values of one column, not of one row
        return resize(image.mT, width, height).mT
    return F.resize(image, [height, width], InterpolationMode.BICUBIC, antialias=True)


def _mirrored(image: Tensor) -> Tensor:
    if image.dtype == torch.uint16:  # which torch cannot flip
        return image.view(torch.int16).flip(-1).view(torch.uint16)
    return image.flip(-1)
