"""Fixed sin-cos position embeddings, as the official M3AE code (and MAE before it) lays them out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3ae_fast.config import ModelConfig


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """Return float32 [n, dim] for positions [n]: first half sines, second half cosines, frequencies 10000^(-2i/dim)."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float32, device="cpu") / (dim / 2.0))
    angles = torch.outer(positions.float(), omega)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def sincos_2d(dim: int, side: int) -> Tensor:
    """Return float32 [side * side, dim], row-major; the first half comes from the column, the second from the row."""
    places = torch.arange(side, device="cpu")
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return torch.cat((sincos_1d(dim // 2, columns.flatten()), sincos_1d(dim // 2, rows.flatten())), dim=1)


class Positions(nn.Module):
    """The fixed position embeddings of patches and text tokens at one width; stored ones are in the state dict.

    They are made on the CPU even where weights are meta tensors (`torch.device("meta")`), to be loaded later.
    """

    image: Tensor
    text: Tensor

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        side = config.image_size // config.patch_size
        text = sincos_1d(dim, torch.arange(config.text_length if config.vocab_size else 0, device="cpu"))
        self.register_buffer("image", sincos_2d(dim, side), persistent=config.positions == "stored")
        self.register_buffer("text", text, persistent=False)

    def forward(self, image_type: Tensor | None, text_type: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return [L, dim] and [text_length, dim], with the modality's embedding [1, dim] added where there is one."""
        return (
            self.image if image_type is None else self.image + image_type,
            self.text if text_type is None else self.text + text_type,
        )
