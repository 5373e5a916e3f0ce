"""Prediction targets of masked patches, with one class for each value of `model.image_targets`.

A further kind of target needs a class here, a value of the setting, and its number of outputs in
`ModelConfig.image_output_dim`.

Shapes: I patches, K outputs of the head, E decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from m3ae_kernels import MaskedHogLoss, MaskedPixelLoss, MaskedTokenLoss, hog_targets
from m3ae_kernels.pixels import check_pixels, standardise, take_patches
from torch import Tensor, nn

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.model.encoder import pixel_options


class MaskedFeatureLoss(nn.Module):
    """A linear head, weight [K, E] (Xavier uniform) and bias [K] (zero). Its loss is the weighted sum over patches of
    the mean of the K squared errors."""

    reduction = "sum"

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dim))
        self.bias = nn.Parameter(torch.empty(width))
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_IE: Tensor, targets_IK: Tensor, row_weight_I: Tensor) -> Tensor:
        """Return the loss, a float32 scalar. Raises ValueError if there are no targets for these rows."""
        if targets_IK.shape != (expected := (len(hidden_IE), len(self.weight))):
            raise ValueError(f"the batch has image targets of shape {[*targets_IK.shape]}, not {[*expected]}")
        errors_IK = self.predict(hidden_IE).float() - targets_IK
        return errors_IK.square().mean(1) @ row_weight_I

    def predict(self, hidden_IE: Tensor) -> Tensor:
        """Return the predicted features [I, K], in autocast's dtype if autocast is enabled, otherwise in the dtype of
        the input."""
        return F.linear(hidden_IE, self.weight.to(hidden_IE.dtype), self.bias.to(hidden_IE.dtype))


ImageHead = MaskedPixelLoss | MaskedHogLoss | MaskedTokenLoss | MaskedFeatureLoss


class Pixels:
    """Pixels. If `loss.norm_pix` is set, they are standardised per patch."""

    def __init__(self, config: ModelConfig, loss: LossConfig) -> None:
        self._config, self._norm_pix = config, loss.norm_pix

    def head(self) -> ImageHead:
        """Return a new head. Its loss is the weighted sum over patches of the mean of the K squared errors."""
        options = pixel_options(self._config)
        return MaskedPixelLoss(self._config.dec_emb_dim, **options, norm_pix=self._norm_pix, reduction="sum")

    def of(self, batch: PackedBatch, chosen_I: Tensor) -> Tensor:
        """Return the targets, float32 [I, K]. `chosen_I`: bool mask of the rows of the image loss; the result has a
        row for each True."""
        c, ids = self._config, batch.image_patch_ids[chosen_I]
        means = (None, None) if batch.images.is_floating_point() else (c.image_mean, c.image_std)
        scale, shift = check_pixels(batch.images, ids, c.patch_size, *means)
        targets_IK = take_patches(batch.images, ids, c.patch_size, scale, shift, torch.float32, channels_last=True)
        return standardise(targets_IK) if self._norm_pix else targets_IK


class Hog:
    """Histograms of oriented gradients; see `m3ae_kernels.hog`."""

    def __init__(self, config: ModelConfig, loss: LossConfig) -> None:
        self._config = config

    def head(self) -> ImageHead:
        """Return a new head; its loss is that of `Pixels.head` with other targets."""
        c = self._config
        return MaskedHogLoss(c.dec_emb_dim, patch_size=c.patch_size, std=c.image_std, reduction="sum")

    def of(self, batch: PackedBatch, chosen_I: Tensor) -> Tensor:
        """Return the targets, float32 [I, 9]; see `Pixels.of`."""
        return self.of_patches(batch.images, batch.image_patch_ids[chosen_I])

    def of_patches(self, images: Tensor, ids_I: Tensor) -> Tensor:
        """Return the targets of the patches `ids_I`, float32 [I, 9]. `images`: model inputs [B, C, H, W]."""
        std: Sequence[float] | None = self._config.image_std if images.is_floating_point() else None
        return hog_targets(images, ids_I, patch_size=self._config.patch_size, std=std).float()


class VqganTokens:
    """Token ids of a frozen VQGAN, which are added to each batch (`vqgan.model.with_image_targets`)."""

    def __init__(self, config: ModelConfig, loss: LossConfig) -> None:
        self._config = config

    def head(self) -> ImageHead:
        """Return a new head. Its loss is the weighted sum of the cross-entropies."""
        return MaskedTokenLoss(self._config.dec_emb_dim, self._config.codebook_size, reduction="sum")

    def of(self, batch: PackedBatch, chosen_I: Tensor) -> Tensor:
        """Return the targets, int [I]; see `Pixels.of`."""
        return batch.image_targets[chosen_I]


class TeacherFeatures:
    """Features of a frozen teacher, which are added to each batch (`training.teacher.Teacher.with_targets`)."""

    def __init__(self, config: ModelConfig, loss: LossConfig) -> None:
        self._config = config

    def head(self) -> ImageHead:
        """Return a new head; its loss is that of `Pixels.head` with other targets."""
        return MaskedFeatureLoss(self._config.dec_emb_dim, self._config.image_output_dim)

    def of(self, batch: PackedBatch, chosen_I: Tensor) -> Tensor:
        """Return the targets, float32 [I, K]; see `Pixels.of`."""
        return batch.image_targets[chosen_I]


ImageTargets = Pixels | Hog | VqganTokens | TeacherFeatures
_KINDS: dict[str, type[ImageTargets]] = {
    "pixels": Pixels, "hog": Hog, "vqgan": VqganTokens, "features": TeacherFeatures
}  # fmt: skip


def image_targets(config: ModelConfig, loss: LossConfig) -> ImageTargets:
    """Return the image targets of a model."""
    return _KINDS[config.image_targets](config, loss)
