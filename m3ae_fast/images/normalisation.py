"""Conversion between stored pixels, pixels in [0, 1] units (black is 0 and white is 1), and pixels normalised by a mean
and a standard deviation in these units.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from m3ae_kernels.pixels import LARGEST
from torch import Tensor


def model_input(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the model input for a decoded and cropped image [C, H, W]: floats are normalised, and integers are
    unchanged, because the kernels normalise them."""
    return from_unit(image, mean, std) if image.is_floating_point() else image


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return integer pixels [..., C, H, W] as float32, normalised per channel; floating-point pixels are already
    normalised and returned unchanged."""
    return images if images.is_floating_point() else from_unit(to_unit(images, mean, std), mean, std)


def to_unit(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return pixels [..., C, H, W], integer or normalised, in units in which black is 0 and white is 1: float32 for
    integers, otherwise in their dtype."""
    if not images.is_floating_point():
        return images / LARGEST[images.dtype]
    mean_C11, std_C11 = _by_channel(images, mean, std)
    return images * std_C11 + mean_C11


def from_unit(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return normalised pixels for floating-point pixels [..., C, H, W] in the units of `to_unit`."""
    mean_C11, std_C11 = _by_channel(images, mean, std)
    return (images - mean_C11) / std_C11


def _by_channel(images: Tensor, *values: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(each, device=images.device)[:, None, None] for each in values]
