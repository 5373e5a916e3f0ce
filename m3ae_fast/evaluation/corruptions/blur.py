"""Blur corruptions; see the package for sources. Images are float [H, W, C] in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from m3ae_fast.evaluation.corruptions.sizes import scale


def gaussian_blur(x: np.ndarray, sigma: float, _: Any) -> np.ndarray:
    """Return the image blurred with a Gaussian. `sigma`: standard deviation in pixels."""
    sigma *= scale(x)
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def defocus_blur(x: np.ndarray, parameters: tuple[int, float], _: Any) -> np.ndarray:
    """Return the image blurred with a disk. `parameters`: radius of the disk, and standard deviation of the Gaussian
    that softens its edge. The Gaussian is truncated to 3 x 3 pixels, or to 5 x 5 if the radius exceeds 8."""
    radius, sigma = parameters
    reach = max(8, radius)
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    edge = 1 if radius <= 8 else 2
    disk = _shrunk(ndimage.gaussian_filter(disk / disk.sum(), sigma, mode="mirror", radius=edge), scale(x))
    return np.stack([ndimage.convolve(channel, disk, mode="mirror") for channel in x.transpose(2, 0, 1)], axis=2)


def _shrunk(kernel: np.ndarray, scale: float) -> np.ndarray:
    """Return the kernel resized for images that are scaled by `scale`. The new kernel has an odd side. Its values are
    averages over areas of the given kernel, and their sum is 1."""
    side = 2 * math.ceil((len(kernel) * scale - 1) / 2) + 1
    source = side / scale  # side of the area that the new kernel covers, in pixels of the old kernel
    margin = math.ceil(max(0.0, source - len(kernel)) / 2)
    image = Image.fromarray(np.pad(kernel, margin).astype(np.float32))
    left = (image.width - source) / 2
    box = (left, left, left + source, left + source)
    shrunk = np.asarray(image.resize((side, side), Image.Resampling.BOX, box), dtype=np.float64)
    return shrunk / shrunk.sum()


def glass_blur(x: np.ndarray, parameters: tuple[float, int, int], rng: np.random.Generator) -> np.ndarray:
    """Return the image after several swaps of each pixel with a nearby one, between two Gaussian blurs. If the maximum
    distance of a swap is rounded down, the number of swaps is increased so that the mean square displacement does not
    change. `parameters`: standard deviation of the blurs, maximum distance, and number of swaps."""
    sigma, unscaled, rounds = parameters
    reach = max(1, int(unscaled * scale(x)))
    swaps = rounds * scale(x) ** 2 * (2 * unscaled**2 + 1) / (2 * reach**2 + 1)  # swaps per pixel
    x = gaussian_blur(x, sigma, rng)
    height, width = x.shape[:2]
    order = list(range(height * width))
    rows, columns = np.mgrid[height - reach : reach : -1, width - reach : reach : -1].reshape(2, -1)
    for swap in range(math.ceil(swaps)):
        down, right = rng.integers(-reach, reach, (2, len(rows))) * (rng.random(len(rows)) < swaps - swap)
        others = (rows + down) * width + columns + right
        for one, other in zip((rows * width + columns).tolist(), others.tolist()):
            order[one], order[other] = order[other], order[one]
    return gaussian_blur(x.reshape(height * width, -1)[order].reshape(x.shape), sigma, rng)


def motion_blur(x: np.ndarray, parameters: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """Return the image blurred along a random direction at most 45 degrees from the horizontal. `parameters`: as in
    `trail`."""
    radius, sigma = parameters
    return trail(x, radius, sigma, rng.uniform(-45, 45), scale(x))


def trail(x: np.ndarray, radius: int, sigma: float, degrees: float, scale: float = 1.0) -> np.ndarray:
    """Return the image blurred as in ImageMagick's motion blur. The kernel is one half of a Gaussian over 2 * radius +
    1 steps of `scale` pixels in the direction `degrees`. Edges are repeated."""
    steps, angle = np.arange(2 * radius + 1), math.radians(degrees)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    downs, rights = (np.ceil(steps * scale * way - 0.5).astype(int) for way in (math.sin(angle), math.cos(angle)))
    height, width = x.shape[:2]
    reach = math.ceil(2 * radius * scale)
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    parts = (
        weight * padded[reach + down :, reach + right :][:height, :width]
        for weight, down, right in zip(weights / weights.sum(), downs, rights)
    )
    return sum(parts, np.zeros_like(x))


def zoom_blur(x: np.ndarray, parameters: tuple[float, float], _: Any) -> np.ndarray:
    """Return the mean of the image and of its enlarged centre at several zoom factors. The factors
    begin at 1. `parameters`: end (exclusive) and step of their range."""
    end, step = parameters
    zooms = np.arange(1, end, step)
    return (x + sum(zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


def zoomed(x: np.ndarray, zoom: float) -> np.ndarray:
    """Return the central part of the image, enlarged by `zoom` to the size of the image."""
    height, width = x.shape[:2]
    h, w = int(np.ceil(height / zoom)), int(np.ceil(width / zoom))
    top, left = (height - h) // 2, (width - w) // 2
    large = ndimage.zoom(x[top : top + h, left : left + w], (zoom, zoom, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]
