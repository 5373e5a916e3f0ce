"""The size that the corruptions' lengths are meant for."""

from __future__ import annotations

import numpy as np
from PIL import Image

STANDARD = 224  # pixels


def scale(x: np.ndarray) -> float:
    """Return the factor of lengths for the image `x` [H, W, C]."""
    return x.shape[0] / STANDARD


def resized(layer: np.ndarray, size: int) -> np.ndarray:
    """Return a layer [H, W], or planes of one [C, H, W], at `size` x `size`; shrunk without aliasing."""
    if layer.ndim == 3:
        return np.stack([resized(plane, size) for plane in layer])
    image = Image.fromarray(layer.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float64)
