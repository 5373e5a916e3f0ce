"""Common corruptions of images at five severities: the fifteen corruptions of ImageNet-C and its four additional ones.

Kinds and parameters are those of Hendrycks & Dietterich (arXiv 1903.12261; hendrycks/robustness, ImageNet-C), who chose
them for images of 224 pixels. Here, lengths (of blurs, trails and swaps) are multiplied by side / 224. Overlays and
distortions (fog, frost, snow, spatter, elastic) are generated at 224 pixels and resized. Noise, brightness, contrast,
saturation, pixelation and JPEG are not scaled, so noise, pixelation and JPEG have a stronger effect on smaller images.
An image that is not square is padded to a square by repeating its edges, corrupted, and cropped again.

Frost is a procedural texture in place of the photographs that come with the paper's code, so accuracies with frost
cannot be compared with published ones. Glass blur swaps pixels, whereas the paper's code, by an oversight, only copies
them in one direction.

Shapes: C = 3 channels, H x W pixels; H = W in the functions of the corruptions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.evaluation.corruptions import blur, digital, noise, weather

SEVERITIES = (1, 2, 3, 4, 5)
PROCEDURAL = ("frost",)  # kinds that replace data shipped with the paper's code
Corrupt = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Corruption:
    """A `data.dataset.Transform` that applies one kind of corruption at one severity, from 1 to 5."""

    kind: str
    severity: int

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Return the corrupted image, uint8 [3, H, W]. All randomness depends on `seed`."""
        corrupt, parameters = KINDS[self.kind]
        x_HWC = image.permute(1, 2, 0).numpy() / 255
        height, width = x_HWC.shape[:2]
        missing = max(width - height, 0), max(height - width, 0)
        x_HWC = np.pad(x_HWC, [*((each // 2, each - each // 2) for each in missing), (0, 0)], mode="edge")
        x_HWC = corrupt(x_HWC, parameters[self.severity - 1], np.random.default_rng(seed))
        top, left = (each // 2 for each in missing)
        x_HWC = x_HWC[top : top + height, left : left + width]
        corrupted = (x_HWC.clip(0, 1) * 255).astype(np.uint8)
        return torch.from_numpy(corrupted).permute(2, 0, 1).contiguous()


# for each kind, the function and its parameters at severities 1 to 5
KINDS: dict[str, tuple[Corrupt, tuple]] = {
    "gaussian_noise": (noise.gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (noise.shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (noise.impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (blur.defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (blur.glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (blur.motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (blur.zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        weather.snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (weather.frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (weather.fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (weather.brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (digital.contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    # Severities 1 and 2 shift and bend the whole image; severities 3 to 5 add fine ripples. The paper's code gives
    # these lengths as multiples of 244.
    "elastic": (
        digital.elastic,
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    ),
    "pixelate": (digital.pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (digital.jpeg, (25, 18, 15, 10, 7)),
    # the four additional corruptions
    "speckle_noise": (noise.speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (blur.gaussian_blur, (1, 2, 3, 4, 6)),
    "spatter": (
        weather.spatter,
        (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
    ),
    # severities 1 and 2 reduce the saturation; severities 3 to 5 increase it
    "saturate": (digital.saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
}
