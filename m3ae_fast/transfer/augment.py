"""timm's augmentations: RandAugment of single images, mixup and cutmix of batches.

Shapes: S samples, K classes, C channels, H = W pixels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.transfer import FineTuneConfig
from m3ae_fast.errors import UserError


@dataclass(frozen=True)
class RandAugment:
    """A `data.dataset.Transform`: timm's RandAugment (arXiv 1909.13719) of its config string.

    Raises UserError where timm rejects the string, or images are not RGB.
    """

    config: str
    model: ModelConfig

    def __post_init__(self) -> None:
        if self.model.channels != 3:
            raise UserError(f"finetune.rand_augment: takes only RGB; set it to null for {self.model.channels} channels")
        try:
            self._make()
        except Exception as error:  # timm asserts and converts
            raise UserError(
                f"finetune.rand_augment {self.config!r}: timm rejects it ({type(error).__name__}: {error}); "
                "write it like rand-m9-mstd0.5-inc1, or null"
            ) from None

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """uint8 [3, H, W] -> the same."""
        states = random.getstate(), np.random.get_state()
        random.seed(seed)  # timm draws from both
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            augmented = self._make()(Image.fromarray(image.permute(1, 2, 0).numpy()))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        return torch.from_numpy(np.array(augmented)).permute(2, 0, 1).contiguous()

    def _make(self) -> Any:
        from timm.data.auto_augment import posterize, rand_augment_transform

        fill = tuple(min(255, round(255 * x)) for x in self.model.image_mean)
        size = self.model.image_size
        made = rand_augment_transform(self.config, {"translate_const": int(size * 0.45), "img_mean": fill})
        for op in made.ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
        return made


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's asks for 0 bits at the highest levels, which Pillow 13 refuses."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


class Mixing:
    """Training batches with soft labels: smoothed and, where images are all that the encoder sees, mixed by mixup
    (arXiv 1710.09412) or cutmix (arXiv 1905.04899), one of them for a whole micro-batch, as the official code does.

    What is drawn comes from NumPy's global generator, timm's own source.
    """

    def __init__(self, config: FineTuneConfig, model: ModelConfig, classes: int, images_only: bool) -> None:
        self.smoothing, self.classes, self.mixup = config.label_smoothing, classes, None
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (model.image_mean, model.image_std))
        if images_only and max(config.mixup, config.cutmix) > 0:
            from timm.data.mixup import Mixup

            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                switch_prob=config.switch_prob,
                label_smoothing=config.label_smoothing,
                num_classes=classes,
            )

    def __call__(self, batch: PackedBatch, dtype: torch.dtype) -> tuple[PackedBatch, Tensor]:
        """The batch, whose images are normalised and of `dtype` where they are mixed, and soft labels [S, K]. The
        last one of an odd number of images is not mixed."""
        assert batch.labels is not None
        labels_SK = F.one_hot(batch.labels, self.classes).float()
        labels_SK = labels_SK * (1 - self.smoothing) + self.smoothing / self.classes
        pairs = len(batch.labels) // 2 * 2
        if self.mixup is None or not pairs:
            return batch, labels_SK
        mean, std = (t.to(batch.images.device) for t in (self.mean, self.std))
        images = (batch.images / 255 - mean) / std
        images[:pairs], labels_SK[:pairs] = self.mixup(images[:pairs].clone(), batch.labels[:pairs])
        return replace(batch, images=images.to(dtype)), labels_SK
