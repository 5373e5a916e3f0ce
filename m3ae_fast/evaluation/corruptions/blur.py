"""Blurs. See the package for sources; images are float [H, W, C] in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from m3ae_fast.evaluation.corruptions.sizes import scale


def gaussian_blur(x: np.ndarray, sigma: float, _: Any) -> np.ndarray:
    sigma *= scale(x)
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def defocus_blur(x: np.ndarray, parameters: tuple[int, float], _: Any) -> np.ndarray:
    """Blur with a disk of a radius, its edge softened by a Gaussian of 3 pixels, of 5 from radius 9 on."""
    radius, sigma = parameters
    reach = max(8, radius)
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    edge = 1 if radius <= 8 else 2
    disk = _shrunk(ndimage.gaussian_filter(disk / disk.sum(), sigma, mode="mirror", radius=edge), scale(x))
    return np.stack([ndimage.convolve(channel, disk, mode="mirror") for channel in x.transpose(2, 0, 1)], axis=2)


def _shrunk(kernel: np.ndarray, scale: float) -> np.ndarray:
    """Return a kernel of odd side for images that are `scale` times as large: its areas averaged, its sum kept."""
    side = 2 * math.ceil((len(kernel) * scale - 1) / 2) + 1
    source = side / scale  # pixels of the kernel that the new one covers
    margin = math.ceil(max(0.0, source - len(kernel)) / 2)
    image = Image.fromarray(np.pad(kernel, margin).astype(np.float32))
    left = (image.width - source) / 2
    box = (left, left, left + source, left + source)
    shrunk = np.asarray(image.resize((side, side), Image.Resampling.BOX, box), dtype=np.float64)
    return shrunk / shrunk.sum()


def glass_blur(x: np.ndarray, parameters: tuple[float, int, int], rng: np.random.Generator) -> np.ndarray:
    """Swap each pixel with one near it, several times, between two Gaussian blurs. Where the reach of a swap is rounded
    down, more swaps make up for it, so that displacements keep their mean square."""
    sigma, meant, rounds = parameters
    reach = max(1, int(meant * scale(x)))
    swaps = rounds * scale(x) ** 2 * (2 * meant**2 + 1) / (2 * reach**2 + 1)  # of each pixel
    x = gaussian_blur(x, sigma, rng)
    height, width = x.shape[:2]
    order = list(range(height * width))
    rows, columns = np.mgrid[height - reach : reach : -1, width - reach : reach : -1].reshape(2, -1)
    for turn in range(math.ceil(swaps)):
        down, right = rng.integers(-reach, reach, (2, len(rows))) * (rng.random(len(rows)) < swaps - turn)
        others = (rows + down) * width + columns + right
        for one, other in zip((rows * width + columns).tolist(), others.tolist()):
            order[one], order[other] = order[other], order[one]
    return gaussian_blur(x.reshape(height * width, -1)[order].reshape(x.shape), sigma, rng)


def motion_blur(x: np.ndarray, parameters: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """Blur along a line at most 45 degrees from the horizontal."""
    radius, sigma = parameters
    return trail(x, radius, sigma, rng.uniform(-45, 45), scale(x))


def trail(x: np.ndarray, radius: int, sigma: float, degrees: float, scale: float = 1.0) -> np.ndarray:
    """Blur as ImageMagick's motion blur: half a Gaussian over 2 * radius + 1 steps of `scale` pixels; edges repeat."""
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
    """Return the mean of the image and its centre at growing zooms, up to an end in steps."""
    end, step = parameters
    zooms = np.arange(1, end, step)
    return (x + sum(zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


def zoomed(x: np.ndarray, zoom: float) -> np.ndarray:
    """Return the centre, as large as the whole."""
    height, width = x.shape[:2]
    h, w = int(np.ceil(height / zoom)), int(np.ceil(width / zoom))
    top, left = (height - h) // 2, (width - w) // 2
    large = ndimage.zoom(x[top : top + h, left : left + w], (zoom, zoom, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]
