"""Corruptions of contrast, colour, shape and coding; see the package for sources. Images are float [H, W, C] in [0,
1]."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from m3ae_fast.evaluation.corruptions.sizes import STANDARD, resized, scale


def contrast(x: np.ndarray, factor: float, _: Any) -> np.ndarray:
    """Return the image with the distance of each value from its channel's mean multiplied by `factor`."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def saturate(x: np.ndarray, parameters: tuple[float, float], _: Any) -> np.ndarray:
    """Return the image with its HSV saturation multiplied by the first parameter and increased by the second. The hue
    of grey is 0 (red)."""
    factor, added = parameters
    value = x.max(axis=2, keepdims=True)
    spread = value - x.min(axis=2, keepdims=True)
    saturation = spread / np.maximum(value, 1e-12)
    wanted = (saturation * factor + added).clip(0, 1)
    direction = np.where(spread > 0, (value - x) / np.maximum(spread, 1e-12), [0.0, 1.0, 1.0])
    return value * (1 - wanted * direction)


def elastic(x: np.ndarray, parameters: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Return the image after two random distortions. An affine map moves three corners of a central square by up to
    `jitter` pixels. In addition, each pixel is displaced by uniform noise that is smoothed by a Gaussian with standard
    deviation `sigma` and multiplied by `amplitude`. `parameters`: amplitude, sigma, jitter."""
    amplitude, sigma, jitter = parameters
    centre, half, size = STANDARD // 2, STANDARD // 3, x.shape[0]
    corners = np.array([(centre + half, centre + half), (centre + half, centre - half), (centre - half, centre - half)])
    moved = corners + rng.uniform(-jitter, jitter, corners.shape)
    back = np.linalg.solve(np.column_stack((moved, np.ones(3))), corners)  # [3, 2]: maps a point to its source
    shift = resized(amplitude * _smooth(rng.uniform(-1, 1, (2, STANDARD, STANDARD)), sigma), size)
    # [2, H, W]: the displaced (x, y) of each pixel, in the coordinates of an image of 224 pixels
    places = (np.mgrid[0:size, 0:size][::-1] + 0.5) / scale(x) - 0.5 + shift
    right, down = np.tensordot(back.T, np.stack((*places, np.ones((size, size)))), 1)
    at = (np.stack((down, right)) + 0.5) * scale(x) - 0.5
    return np.stack([ndimage.map_coordinates(c, at, order=1, mode="mirror") for c in x.transpose(2, 0, 1)], axis=2)


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """Return planes [..., n, n] smoothed by a Gaussian. Beyond their edges, the planes are mirrored. The cost does not
    depend on `sigma`."""
    n = x.shape[-1]
    decay = np.exp(-0.5 * (sigma * np.pi * np.arange(n) / n) ** 2)
    return fft.idctn(fft.dctn(x, axes=(-2, -1)) * np.outer(decay, decay), axes=(-2, -1))


def pixelate(x: np.ndarray, factor: float, _: Any) -> np.ndarray:
    """Return the image reduced to `factor` times its side, and enlarged again without interpolation."""
    image = _image(x)
    small = image.resize([max(1, int(side * factor)) for side in image.size], Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def jpeg(x: np.ndarray, quality: int, _: Any) -> np.ndarray:
    """Return the image after compression as JPEG. `quality`: as in Pillow, up to 95."""
    file = io.BytesIO()
    _image(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def _image(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(x * 255).astype(np.uint8))
