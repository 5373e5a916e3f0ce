"""Pixel-wise noise; see the package for sources. Images are float [H, W, C] in [0, 1]; results may be outside, and are
clipped by the caller."""

from __future__ import annotations

import numpy as np


def gaussian_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Return the image with normally distributed noise added. `deviation`: standard deviation of the noise."""
    return x + rng.normal(0, deviation, x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """Return the image with Poisson noise. `photons`: mean number of photons of a white value."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Return the image with salt-and-pepper noise, independently for each channel. `fraction`: fraction of changed
    values."""
    return np.where(rng.random(x.shape) < fraction, rng.random(x.shape) < 0.5, x)


def speckle_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Return the image with noise in proportion to its values. `deviation`: standard deviation of the noise of a white
    value."""
    return x + x * rng.normal(0, deviation, x.shape)
