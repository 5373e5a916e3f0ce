"""Weather. See the package for sources; images are float [H, W, C] in [0, 1], layers are made at 224 pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from m3ae_fast.evaluation.corruptions.blur import trail, zoomed
from m3ae_fast.evaluation.corruptions.sizes import STANDARD, resized

_LUMINANCE = np.array([0.299, 0.587, 0.114])
_WATER, _MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255
_ICE = np.array([0.84, 0.92, 1.0])
_EMBOSS = np.array([[2, 1, 0], [1, 1, -1], [0, -1, -2]])  # as a convolution


def brightness(x: np.ndarray, added: float, _: Any) -> np.ndarray:
    """Add to HSV's value, with hue and saturation as they are."""
    value = x.max(axis=2, keepdims=True)
    brighter = (value + added).clip(0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def fog(x: np.ndarray, parameters: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Add clouds, and rescale so that the brightest value does not change."""
    amount, decay = parameters
    clouds = resized(plasma(decay, rng), x.shape[0])[..., None]
    return (x + amount * clouds) * x.max() / (x.max() + amount) if x.any() else x


def plasma(decay: float, rng: np.random.Generator) -> np.ndarray:
    """Return clouds in [0, 1], [224, 224]: the diamond-square algorithm (Fournier, Fussell & Carpenter 1982) on a torus
    of 256 pixels. Each halving of the distance divides the noise by `decay` squared."""
    heights, spread = np.zeros((1, 1)), 1.0

    def between(*points: np.ndarray) -> np.ndarray:
        return sum(points) / 4 + rng.uniform(-spread, spread, points[0].shape)

    while len(heights) < STANDARD:
        below, beside = np.roll(heights, -1, 0), np.roll(heights, -1, 1)
        centres = between(heights, below, beside, np.roll(below, -1, 1))
        rows = between(heights, beside, centres, np.roll(centres, 1, 0))
        columns = between(heights, below, centres, np.roll(centres, 1, 1))
        cells = np.stack((np.stack((heights, rows), -1), np.stack((columns, centres), -1)), 1)  # [n, 2, n, 2]
        heights, spread = cells.reshape(2 * len(heights), -1), spread / decay**2
    heights = heights - heights.min()
    return (heights / heights.max())[:STANDARD, :STANDARD]


def frost(x: np.ndarray, parameters: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Add a texture to the darkened image."""
    kept, added = parameters
    texture = resized(frost_texture(rng).transpose(2, 0, 1), x.shape[0]).transpose(1, 2, 0)
    return kept * x + added * texture


def frost_texture(rng: np.random.Generator) -> np.ndarray:
    """Return ice on a window, [224, 224, 3] in [0, 1]: fern-like crystals that grow from the edges, over a pale haze.
    It replaces the photographs that the paper's code ships, and is drawn anew for each image."""
    crystals = Image.new("L", (2 * STANDARD, 2 * STANDARD))
    draw = ImageDraw.Draw(crystals)
    for _ in range(22):
        side, along = rng.integers(4), rng.uniform(0, 2 * STANDARD)
        start = ((along, 0), (2 * STANDARD, along), (along, 2 * STANDARD), (0, along))[side]
        inwards = (90, 180, 270, 0)[side] + rng.uniform(-50, 50)
        _grow(draw, start, inwards, rng.uniform(120, 340), rng)
    ice = resized(np.asarray(crystals) / 255, STANDARD)
    ice = 0.8 * ice + 0.45 * ndimage.gaussian_filter(ice, 3)  # each crystal in a rim of its own haze
    return ((0.25 * plasma(1.7, rng) ** 2 + ice)[..., None] * _ICE).clip(0, 1)


def _grow(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], angle: float, length: float, rng: np.random.Generator
) -> None:
    """Grow a stem that bends a little, with pairs of branches at 60 degrees, as of ice, shorter towards its tip."""
    step, grown = 9.0, 0.0
    while grown < length:
        angle += rng.normal(0, 2.5)
        to = at[0] + step * math.cos(math.radians(angle)), at[1] + step * math.sin(math.radians(angle))
        draw.line((*at, *to), fill=int(rng.integers(130, 256)), width=2 if length > 60 else 1)
        at, grown = to, grown + step
        branch = 0.35 * (length - grown) * rng.uniform(0.5, 1)
        if branch > step:
            for turn in (-60, 60):
                _grow(draw, at, angle + turn, branch, rng)


def snow(x: np.ndarray, parameters: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw flakes with trails, twice, on a whitened image."""
    mean, deviation, zoom, threshold, radius, sigma, kept = parameters
    flakes = zoomed(rng.normal(mean, deviation, (STANDARD, STANDARD, 1)), zoom)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = trail(flakes, int(radius), sigma, rng.uniform(-135, -45))
    layer = resized(flakes[..., 0], x.shape[0])[..., None]
    white = np.maximum(x, (x @ _LUMINANCE)[..., None] * 1.5 + 0.5)
    return kept * x + (1 - kept) * white + layer + np.rot90(layer, 2)


def spatter(x: np.ndarray, parameters: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw drops of water, or of mud."""
    mean, deviation, sigma, threshold, strength, mud = parameters
    liquid = ndimage.gaussian_filter(rng.normal(mean, deviation, (STANDARD, STANDARD)), sigma, mode="nearest")
    wet = liquid >= threshold
    if mud:
        cover = ndimage.gaussian_filter(wet.astype(np.float64), strength, mode="nearest")
        cover = resized(np.where(cover < 0.8, 0, cover), x.shape[0])[..., None]
        return x * (1 - cover) + _MUD * cover
    sheen = np.where(wet, liquid, 0) * _relief(wet)
    light = resized(strength * sheen / max(sheen.max(), 1e-12), x.shape[0])[..., None]
    return x + light * _WATER


def _relief(wet: np.ndarray) -> np.ndarray:
    """Return the shading of drops, [0, 255]: their distance from an edge, equalised and embossed."""
    edge = wet & ~ndimage.binary_erosion(wet)
    distance = np.minimum(ndimage.distance_transform_edt(~edge), 20) if edge.any() else np.full(wet.shape, 20.0)
    _, level, counts = np.unique(_mean(distance).astype(int), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - counts[0]
    equalised = (255 * ranks / max(ranks[-1], 1))[level].reshape(wet.shape)
    return _mean(ndimage.convolve(equalised, _EMBOSS, mode="mirror").clip(0, 255))


def _mean(x: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter(x, 3, mode="mirror")
