"""Random masks of tokens. `data/dataset.py` draws the masks of a sample, with the ratios of `masking` in the config."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def kept(length: int, ratio: float) -> int:
    """Return the number of visible tokens out of `length`: int(length * (1 - ratio)), rounded as in the official
    code."""
    return int(length * (1.0 - ratio))


def draw_mask(length: int, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a random mask, bool [length], True if masked: the `kept` smallest of the noise stay visible."""
    # NumPy takes a fifth of torch's time. Values in float64 have no ties, whose order would depend on the CPU.
    noise = torch.rand(length, dtype=torch.float64, generator=generator).numpy()
    mask = np.ones(length, dtype=bool)
    mask[noise.argsort()[: kept(length, ratio)]] = False
    return torch.from_numpy(mask)


def draw_predicted(mask: Tensor, fraction: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a random subset of the masked tokens, bool [length]: a `fraction` of them, rounded, and at least one if
    any is masked."""
    masked = mask.numpy().nonzero()[0]
    wanted = max(round(fraction * len(masked)), min(len(masked), 1))
    noise = torch.rand(len(masked), dtype=torch.float64, generator=generator).numpy()
    predicted = np.zeros(len(mask), dtype=bool)
    predicted[masked[noise.argsort()[:wanted]]] = True
    return torch.from_numpy(predicted)
