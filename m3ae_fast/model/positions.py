"""Fixed sin-cos position embeddings in the layout of the official M3AE code (and MAE before it)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.config import ModelConfig
from m3ae_fast.images.patch_grid import Grid, distinct


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """Return float32 [n, dim] for positions [n]: sines in the first half and cosines in the second half, with
    frequencies 10000^(-2i/dim) (Vaswani et al., arXiv 1706.03762, section 3.5). `dim` must be even."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float32, device="cpu") / (dim / 2.0))
    angles = torch.outer(positions.float(), omega)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def sincos_2d(dim: int, side: int, first: int = 0) -> Tensor:
    """Return float32 [side * side, dim], row-major. The first half encodes the column and the second half encodes the
    row; both are counted from `first`. `dim` must be a multiple of 4."""
    places = torch.arange(first, first + side, device="cpu")
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return torch.cat((sincos_1d(dim // 2, columns.flatten()), sincos_1d(dim // 2, rows.flatten())), dim=1)


def resampled(image_LD: Tensor, grid: Grid) -> Tensor:
    """Return the position embeddings of a square image's patches [L, dim], resampled (bicubic, antialiased) to another
    grid (rows, columns), as in timm's `resample_abs_pos_embed`: [rows * columns, dim], in the same dtype."""
    side = round(len(image_LD) ** 0.5)
    if grid == (side, side):
        return image_LD
    # channels last in memory: torch 2.13 interpolates a contiguous image wrongly if the result has one column
    image_1Dhw = image_LD.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    return F.interpolate(image_1Dhw, size=grid, mode="bicubic", antialias=True)[0].flatten(1).T.to(image_LD.dtype)


class Positions(nn.Module):
    """Fixed position embeddings of patches and text tokens at one width. Embeddings loaded from a checkpoint are in the
    state dict.

    The embeddings are created on the CPU even if weights are meta tensors (`torch.device("meta")`) that are loaded
    later.
    """

    image: Tensor
    text: Tensor

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.dim = dim
        text = sincos_1d(dim, torch.arange(config.text_length if config.vocab_size else 0, device="cpu"))
        self.register_buffer("image", torch.empty(0, device="cpu"), persistent=config.positions == "stored")
        self.register_buffer("text", text, persistent=False)
        self.lay_out(config)

    def lay_out(self, config: ModelConfig) -> None:
        """Compute the position embeddings for square or native images, according to the config. Embeddings loaded from
        a checkpoint are kept."""
        stored, side = config.positions == "stored", config.position_side
        self.resamples = stored and config.resize == "native"
        if self.image.numel() and stored:
            return
        centred = config.resize == "native" and config.native_positions == "centred" and not stored
        # positions of a square image begin at 0
        first = -((side - config.image_size // config.patch_size) // 2) if centred else 0
        self.image = sincos_2d(self.dim, side, first).to(self.image.device)

    def forward(
        self, image_type: Tensor | None, text_type: Tensor | None, grids: Iterable[Grid]
    ) -> tuple[Tensor, Tensor]:
        """Return the position tables [positions, dim] and [text_length, dim], with the modality's embedding [1, dim]
        added if there is one. The first table is for patches. If images are square, it has the positions of one image.
        With native aspect ratio, it has those of the batch's `grids` in the layout of `Native.position_indices`."""
        image = self.image
        if self.resamples:
            image = torch.cat([image[:0], *(resampled(image, grid) for grid in distinct(grids))])
        return (
            image if image_type is None else image + image_type,
            self.text if text_type is None else self.text + text_type,
        )
