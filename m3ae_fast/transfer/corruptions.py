"""Common corruptions of pictures at five severities: those of ImageNet-C that need no data files.

Kinds and parameters are those of Hendrycks & Dietterich (arXiv 1903.12261; hendrycks/robustness, imagenet_c), who chose
them for pictures of 224 pixels: on smaller ones the same blur is the stronger.

Shapes: C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
Corrupt = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Corruption:
    """A `data.dataset.Transform`: one kind at one severity from 1 to 5."""

    kind: str
    severity: int

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """uint8 [3, H, W] -> the same."""
        corrupt, parameters = KINDS[self.kind]
        x_HWC = image.permute(1, 2, 0).numpy() / 255
        x_HWC = corrupt(x_HWC, parameters[self.severity - 1], np.random.default_rng(seed))
        corrupted = (x_HWC.clip(0, 1) * 255).astype(np.uint8)
        return torch.from_numpy(corrupted).permute(2, 0, 1).contiguous()


def gaussian_noise(x: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(0, scale, x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper, of each channel by itself."""
    return np.where(rng.random(x.shape) < share, rng.random(x.shape) < 0.5, x)


def speckle_noise(x: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    return x + x * rng.normal(0, scale, x.shape)


def gaussian_blur(x: np.ndarray, sigma: float, _: Any) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def defocus_blur(x: np.ndarray, parameters: tuple[int, float], _: Any) -> np.ndarray:
    """A disk of a radius, its edge softened by a Gaussian of 3 pixels, of 5 from radius 9 on."""
    radius, sigma = parameters
    reach = max(8, radius)
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    edge = 1 if radius <= 8 else 2
    disk = ndimage.gaussian_filter(disk / disk.sum(), sigma, mode="mirror", radius=edge)
    return np.stack([ndimage.convolve(channel, disk, mode="mirror") for channel in x.transpose(2, 0, 1)], axis=2)


def zoom_blur(x: np.ndarray, parameters: tuple[float, float], _: Any) -> np.ndarray:
    """The mean of the picture and its centre at growing zooms, up to an end in steps."""
    end, step = parameters
    zooms = np.arange(1, end, step)
    return (x + sum(_zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


def _zoomed(x: np.ndarray, zoom: float) -> np.ndarray:
    height, width = x.shape[:2]
    h, w = int(np.ceil(height / zoom)), int(np.ceil(width / zoom))
    top, left = (height - h) // 2, (width - w) // 2
    large = ndimage.zoom(x[top : top + h, left : left + w], (zoom, zoom, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]


def brightness(x: np.ndarray, added: float, _: Any) -> np.ndarray:
    """Added to HSV's value, with hue and saturation as they are."""
    value = x.max(axis=2, keepdims=True)
    brighter = (value + added).clip(0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def contrast(x: np.ndarray, share: float, _: Any) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * share + mean


def saturate(x: np.ndarray, parameters: tuple[float, float], _: Any) -> np.ndarray:
    """HSV's saturation times a factor plus a term; grey has hue 0, red."""
    factor, added = parameters
    value = x.max(axis=2, keepdims=True)
    spread = value - x.min(axis=2, keepdims=True)
    saturation = spread / np.maximum(value, 1e-12)
    wanted = (saturation * factor + added).clip(0, 1)
    direction = np.where(spread > 0, (value - x) / np.maximum(spread, 1e-12), [0.0, 1.0, 1.0])
    return value * (1 - wanted * direction)


def pixelate(x: np.ndarray, share: float, _: Any) -> np.ndarray:
    image = _image(x)
    small = image.resize([max(1, int(side * share)) for side in image.size], Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def jpeg(x: np.ndarray, quality: int, _: Any) -> np.ndarray:
    file = io.BytesIO()
    _image(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def _image(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(x * 255).astype(np.uint8))


# by kind: the function, and its parameters at severities 1 to 5
KINDS: dict[str, tuple[Corrupt, tuple]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "zoom_blur": (zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": (saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),
}
