"""One thing that the official implementation computed, beside ours."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Quantity(NamedTuple):
    """They agree where `relative_error(ours, official) <= tolerance`."""

    name: str
    ours: Tensor
    official: Tensor
    tolerance: float


def relative_error(ours: Tensor, official: Tensor) -> float:
    """Return ||ours - official|| / ||official||, in float64; the plain norm where the official one is 0, infinite where
    the shapes differ."""
    ours, official = ours.detach().double().cpu(), official.double()
    if ours.shape != official.shape:
        return math.inf
    scale = official.norm().item()
    return (ours - official).norm().item() / (scale or 1.0)
