"""Export of the image encoder as an ONNX file for runtimes without torch. The file maps pixels to the features of
`M3AE.encode`. Pixels have the model's image_dtype (int32 in place of uint16) and are not normalised; if they are
floats, black is 0 and white is 1.

Shapes: B images, C channels, S image size, D width.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from m3ae_kernels.pixels import LARGEST
from torch import Tensor, nn

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.config import GRIDS, POOLINGS, POOLS, ModelConfig
from m3ae_fast.model.pooling import means_of_cells
from m3ae_fast.weights.timm_folder import model_arguments, timm_weights

NEEDS = dict.fromkeys(("onnx", "timm"), "format onnx")
SUFFIX = ".onnx"


class ImageEncoder(nn.Module):
    """timm's VisionTransformer with the encoder's weights: pixels [B, C, S, S] -> float32 [B, D], or
    [B, G * D] for a grid of G cells."""

    mean: Tensor
    scale: Tensor

    def __init__(self, config: ModelConfig, state: dict[str, Tensor]) -> None:
        super().__init__()
        from timm.models import VisionTransformer

        self.vit = VisionTransformer(**model_arguments(config))
        self.vit.load_state_dict(timm_weights(config, state))
        side = config.image_size // config.patch_size
        self.grid, self.cells = (side, side), GRIDS.get(config.pool)
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        white = LARGEST.get(getattr(torch, config.image_dtype), 1)
        self.register_buffer("mean", white * mean)
        self.register_buffer("scale", 1 / (white * std))

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        normal_BCSS = (pixels_BCSS.float() - self.mean) * self.scale
        if self.cells is None:
            return self.vit(normal_BCSS)
        patches_BLD = self.vit.forward_features(normal_BCSS)[:, 1:]
        means_BGD = means_of_cells(patches_BLD, [self.grid], self.cells)
        return self.vit.fc_norm(means_BGD).flatten(1)


def input_dtype(config: ModelConfig) -> np.dtype:
    """Return the dtype of a file's input: int32 instead of uint16, which torch cannot export."""
    return np.dtype("int32" if config.image_dtype == "uint16" else config.image_dtype)


def write_onnx(out: str | Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Write the image encoder to a file. `state`: weights by parameter name. Raises UserError if `out` is not the name
    of an ONNX file, the pooling cannot be exported, a library is missing, or the file cannot be written."""
    out = Path(out)
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: must end in {SUFFIX}")
    possible = [pool for pool in POOLS if pool in GRIDS or POOLINGS[pool].timm]
    if config.pool not in possible:
        raise UserError(f"pool {config.pool}: cannot be exported as ONNX; choose one of {', '.join(possible)}")
    require_libraries(NEEDS)
    encoder = ImageEncoder(config, {name: tensor.float() for name, tensor in state.items()}).eval()
    with atomic_write(out) as partial:
        _export(encoder, config, partial)


def _export(encoder: ImageEncoder, config: ModelConfig, path: Path) -> None:
    # a batch of 2 images, because a batch size of 1 would become a constant
    pixels = torch.zeros(2, config.channels, config.image_size, config.image_size)
    pixels = torch.from_numpy(pixels.numpy().astype(input_dtype(config)))
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["features"]}
    with warnings.catch_warnings():
        # warnings about fixed shapes, and about another exporter that requires more libraries
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            (pixels,),
            str(path),
            **names,
            dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
