"""A baseline for representations: pixels in place of an encoder's features.

Shapes: B images, C channels, H x W pixels, R patches of P x P pixels, L patches of an image, S samples, K pairs of a
layer and a pooling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.evaluation import Pool
from m3ae_fast.images.normalisation import normalised
from m3ae_fast.model.encoder import MultimodalEncoder

SIDE = 16  # side of the downscaled image in pixels


class Pixels(MultimodalEncoder):
    """An encoder whose features are the pixels of the image, scaled to SIDE x SIDE and normalised by the mean and
    standard deviation of `config`. The features of a patch are its normalised pixels."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # skips the creation of an encoder's weights
        self.config, self.tokenizer = config, None
        # needed because inference code reads the dtype of a model's weights
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    def pooled_of_layers(self, batch: PackedBatch, layers: Sequence[int], pools: Sequence[Pool] = ("mean",)) -> Tensor:
        """Return the pixels as features [S, K, C * SIDE * SIDE], which are the same for each layer and pooling."""
        side = (SIDE, SIDE)
        with torch.autocast(batch.images.device.type, enabled=False):
            small = [F.interpolate(image[None], side, mode="bicubic", antialias=True) for image in self._images(batch)]
        none = batch.images.new_zeros(0, self.config.channels, *side, dtype=torch.float32)  # a rank may have no samples
        return torch.cat([none, *small]).flatten(1)[:, None].expand(-1, len(layers) * len(pools), -1)

    def pooled_and_patches(
        self, batch: PackedBatch, layers: Sequence[int], pools: Sequence[Pool] = ("mean",)
    ) -> tuple[Tensor, Tensor]:
        """Return the features of `pooled_of_layers`, and the pixels of each patch, [S, K, L, C * P * P]. Images must
        not be native."""
        P, L = self.config.patch_size, self.config.most_patches
        none = batch.images.new_zeros(0, L, self.config.channels * P**2, dtype=torch.float32)
        patches = [F.unfold(image[None], P, stride=P).transpose(1, 2) for image in self._images(batch)]
        patches_SKLD = torch.cat([none, *patches])[:, None].expand(-1, len(layers), -1, -1)
        return self.pooled_of_layers(batch, layers, pools), patches_SKLD

    def _images(self, batch: PackedBatch) -> Iterator[Tensor]:
        """Yield each sample's normalised image, float32 [C, H, W]."""
        mean, std = self.config.image_mean, self.config.image_std
        for image in self._unpacked(batch):
            yield normalised(image, mean, std).float()

    def _unpacked(self, batch: PackedBatch) -> Iterator[Tensor]:
        """Yield each sample's image, [C, H, W]."""
        if self.config.resize != "native":
            yield from batch.images
            return
        for patches, (rows, columns) in zip(batch.images.split([*map(math.prod, batch.grids)]), batch.grids):
            cut = patches.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)  # [C, rows, P, columns, P]
            yield cut.flatten(3).flatten(1, 2)
