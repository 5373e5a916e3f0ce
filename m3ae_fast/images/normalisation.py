"""Pixels as they are kept, in units in which black is 0 and white 1, and normalised by a mean and a standard deviation
in those units.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from m3ae_kernels.pixels import LARGEST
from torch import Tensor


def model_input(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return what `decode_image` gave, cropped, as a model takes it: integers as they are, which its kernels normalise,
    floats normalised."""
    return of_unit(image, mean, std) if image.is_floating_point() else image


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return integer pixels [..., C, H, W] as float32, each channel with its mean 0 and its standard deviation 1;
    floating ones, which are so already, as they are."""
    return images if images.is_floating_point() else of_unit(to_unit(images, mean, std), mean, std)


def to_unit(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return pixels [..., C, H, W], integer or normalised, in units in which black is 0 and white 1."""
    if not images.is_floating_point():
        return images / LARGEST[images.dtype]
    mean_C11, std_C11 = _by_channel(images, mean, std)
    return images * std_C11 + mean_C11


def of_unit(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return what `to_unit` returned normalised."""
    mean_C11, std_C11 = _by_channel(images, mean, std)
    return (images - mean_C11) / std_C11


def _by_channel(images: Tensor, *values: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(each, device=images.device)[:, None, None] for each in values]
