"""Crops: random crops in training; in evaluation the central square or, with native aspect ratio, the whole image.

Shapes: C channels, H x W pixels of the original image, S x S pixels of the model's square input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.images.patch_grid import Native

_TRIES = 10  # maximum number of random crops that are drawn until one fits into the image, as in torchvision
_RATIO = (3 / 4, 4 / 3)  # range of width / height of a crop; see `own` in `draw_box`


def random_crop(
    image: Tensor, frame: int | Native, scale: tuple[float, float], flip: bool, generator: torch.Generator
) -> Tensor:
    """Return a RandomResizedCrop with torchvision's distribution, bicubic and antialiased, flipped horizontally with
    probability 1/2. A native crop has nearly the aspect ratio of its box, and about the same number of patches as the
    whole image.

    Args:
        image: [C, H, W], uint8, uint16 or float32.
        frame: S, or the bounds for the sizes of native images.
        scale: smallest and largest fraction of the area that is kept.
        flip: whether crops may be flipped.
        generator: source of all randomness; the number of draws is always the same.
    """
    draws = torch.rand(4 * _TRIES + 1, generator=generator).tolist()
    H, W = image.shape[-2:]
    top, left, height, width = draw_box(H, W, scale, draws, 1.0 if isinstance(frame, int) else W / H)
    crop = resize(image[:, top : top + height, left : left + width], *_pixels(frame, height, width, H * W))
    return (_mirrored(crop) if flip and draws[-1] < 0.5 else crop).contiguous()


def _pixels(frame: int | Native, height: int, width: int, area: int) -> tuple[int, int]:
    """Return the height and width of the model's input for a box of height x width pixels of an image with `area`
    pixels."""
    if isinstance(frame, int):
        return frame, frame
    rows, columns = frame.grid(height, width, area)
    return rows * frame.patch_size, columns * frame.patch_size


def draw_box(
    height: int, width: int, scale: tuple[float, float], draws: list[float], own: float = 1.0
) -> tuple[int, int, int, int]:
    """Return the top, left, height and width of a crop, sampled as in
    torchvision.transforms.RandomResizedCrop.get_params. `own`: factor by which the aspect ratios in _RATIO are
    multiplied. It is the aspect ratio of the image if that is kept, otherwise 1."""
    least, most = own * _RATIO[0], own * _RATIO[1]
    for i in range(0, 4 * _TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[i])
        low, high = math.log(least), math.log(most)
        ratio = math.exp(low + (high - low) * draws[i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[i + 2] * (height - h + 1)), int(draws[i + 3] * (width - w + 1)), h, w
    # no box fits: take the largest central box with an allowed ratio
    w, h = width, height
    if width / height < least:
        h = round(width / least)
    elif width / height > most:
        w = round(height * most)
    return (height - h) // 2, (width - w) // 2, h, w


def whole_view(image: Tensor, frame: int | Native) -> Tensor:
    """Return the model's input for the evaluation of an image [C, H, W] (uint8, uint16 or float32), in its dtype: the
    central square [C, S, S], or the whole native image."""
    if isinstance(frame, int):
        return centre_crop(image, frame)
    height, width = image.shape[-2:]
    return resize(image, *_pixels(frame, height, width, height * width)).contiguous()


def centre_crop(image: Tensor, size: int) -> Tensor:
    """Return the central square of an image [C, H, W], scaled to [C, S, S] (bicubic, antialiased). The image is uint8,
    uint16 or float32."""
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    return resize(image[:, top : top + side, left : left + side], size, size).contiguous()


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Return the image resized to [C, height, width] in its dtype (bicubic, antialiased); uint16 images are resized in
    float32 and rounded."""
    if image.dtype == torch.uint16:
        return resize(image.float(), height, width).round_().clamp_(0, 65535).to(torch.uint16)
    if image.is_floating_point() and width == 1 < height:  # torch 2.13 resizes incorrectly to one column
        return resize(image.mT, width, height).mT
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def _mirrored(image: Tensor) -> Tensor:
    if image.dtype == torch.uint16:  # torch cannot flip uint16
        return image.view(torch.int16).flip(-1).view(torch.uint16)
    return image.flip(-1)
