"""Image targets that are token ids of a VQGAN, made where the batch lies."""

from __future__ import annotations

from dataclasses import replace

import torch

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import ModelConfig
from m3ae_fast.vqgan.model import VQGAN


def with_image_targets(batch: PackedBatch, vqgan: VQGAN, config: ModelConfig) -> PackedBatch:
    """Return `batch` with the ids of its patches that carry loss, on the device where batch and `vqgan` are; 0 for rows
    of weight 0.

    The VQGAN takes pixels in [0, 1]: floating images, which are normalised, are put back. (The official code hands it
    the normalised ones, whatever they are.)
    """
    images = batch.images
    if images.is_floating_point():
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (config.image_mean, config.image_std))
        images = images * std + mean
    ids_I = vqgan.encode(images).flatten().index_select(0, batch.image_patch_ids.to(torch.int64))
    return replace(batch, image_targets=ids_I * (batch.image_row_weight != 0))
