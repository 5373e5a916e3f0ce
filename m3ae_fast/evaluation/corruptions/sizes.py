"""Scaling of the corruptions' lengths to the size of the image."""

from __future__ import annotations

import numpy as np
from PIL import Image

STANDARD = 224  # side in pixels of the images for which the parameters were chosen


def scale(x: np.ndarray) -> float:
    """Return the factor by which lengths are multiplied for the image `x` [H, W, C]."""
    return x.shape[0] / STANDARD


def resized(layer: np.ndarray, size: int) -> np.ndarray:
    """Return a layer [H, W], or the planes of a layer [C, H, W], resized to `size` x `size`, with antialiasing, as
    float64 with float32 precision."""
    if layer.ndim == 3:
        return np.stack([resized(plane, size) for plane in layer])
    image = Image.fromarray(layer.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float64)
