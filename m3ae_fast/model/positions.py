"""Fixed sin-cos position embeddings, as the official M3AE code (and MAE before it) lays them out."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """[n] positions -> float32 [n, dim]: first half sines, second half cosines, frequencies 10000^(-2i/dim)."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float32) / (dim / 2.0))
    angles = torch.outer(positions.float(), omega)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def sincos_2d(dim: int, side: int) -> Tensor:
    """float32 [side * side, dim], row-major; the first half comes from the column, the second from the row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat((sincos_1d(dim // 2, columns.flatten()), sincos_1d(dim // 2, rows.flatten())), dim=1)
