"""Augmentation for fine-tuning: timm's RandAugment of single images, and mixup and cutmix of pairs of images.

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

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.randomness import hash64
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.evaluation import FineTuneConfig
from m3ae_fast.data import Share
from m3ae_fast.images.normalisation import normalised

_MIXING = 64  # identifies the random numbers of mixing; for other purposes, see base.randomness.Purpose


@dataclass(frozen=True)
class RandAugment:
    """A `data.dataset.Transform` that applies timm's RandAugment (arXiv 1909.13719). Raises UserError if timm rejects
    the config string, or if images are not 8-bit RGB."""

    config: str  # timm's config string, such as rand-m9-mstd0.5-inc1
    model: ModelConfig

    def __post_init__(self) -> None:
        if self.model.channels != 3 or self.model.image_dtype != "uint8":
            raise UserError(
                "finetune.rand_augment: supports only 8-bit RGB images; set it to null for "
                f"{self.model.channels} channels of {self.model.image_dtype}"
            )
        try:
            self._make()
        except Exception as error:  # timm reports errors in the string as failed assertions or conversions
            raise UserError(
                f"finetune.rand_augment {self.config!r}: timm rejects it ({type(error).__name__}: {error}); "
                "set it to a string such as rand-m9-mstd0.5-inc1, or to null"
            ) from None

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Return the augmented image, uint8 [3, H, W]. All randomness depends on `seed`."""
        states = random.getstate(), np.random.get_state()
        random.seed(seed)  # timm uses Python's and NumPy's generators
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
    """Return the image posterised to at least one bit: at the highest magnitudes, timm's function requests 0 bits,
    which Pillow 13 rejects."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def mixes(config: FineTuneConfig, images_only: bool) -> bool:
    """Return whether training images are mixed with each other."""
    return images_only and max(config.mixup, config.cutmix) > 0


class Mixing:
    """Converts training batches to batches with soft labels. Applies label smoothing and, if the encoder sees only
    images, mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899).

    The samples 2 k and 2 k + 1 of a lane of the training stream are mixed with each other. The random numbers of a pair
    depend only on the seed and on the position of the pair in the stream. (The official M3AE code draws random
    numbers once per micro-batch, so its results depend on the number of ranks.)

    Args:
        config: settings of label smoothing, mixup and cutmix.
        model: config of the model.
        classes: number of classes.
        images_only: whether the encoder sees only images, so that samples may be mixed.
        seed: random seed.
        repeats: number of consecutive views of a sample in the stream; the k-th view of a sample is mixed with the k-th
            view of its partner.
        lanes: number of lanes, the parallel sub-streams into which the stream of training samples is divided.
    """

    def __init__(
        self,
        config: FineTuneConfig,
        model: ModelConfig,
        classes: int,
        images_only: bool,
        seed: int,
        repeats: int = 1,
        lanes: int = 1,
    ) -> None:
        self.smoothing, self.classes, self.size = config.label_smoothing, classes, model.image_size
        self.mean, self.std = model.image_mean, model.image_std
        self.mixup, self.cutmix, self.switch_prob = config.mixup, config.cutmix, config.switch_prob
        self.mixes, self.native = mixes(config, images_only), model.resize == "native"
        self.seed, self.repeats, self.lanes = seed, repeats, lanes

    def check_share(self, share: Share) -> None:
        """Raise UserError if samples that are mixed would be in different micro-batches or have different sizes."""
        if self.mixes and self.native:
            raise UserError(
                "finetune.mixup and cutmix can mix only images of one size, but model.resize is native; set both to 0, "
                "or model.resize to square"
            )
        together, parts = 2 * self.repeats, share.world * share.accumulation
        if self.mixes and share.global_batch % (parts * together):
            raise UserError(
                f"finetune.mixup and cutmix mix pairs of samples within a micro-batch, which must therefore have a "
                f"multiple of {together} samples, but {share.global_batch} samples are split into {parts} "
                "micro-batches; choose another train.global_batch or train.micro_batch, or set mixup and cutmix to 0"
            )

    def pair(self, position: int) -> tuple[int, int, int]:
        """Return the position of the partner of the sample at `position`, the number of the pair, and the view."""
        sample, view = divmod(position, self.repeats)
        index, lane = divmod(sample, self.lanes)
        return ((index ^ 1) * self.lanes + lane) * self.repeats + view, index // 2 * self.lanes + lane, view

    def __call__(self, batch: PackedBatch, dtype: torch.dtype) -> tuple[PackedBatch, Tensor]:
        """Return the batch and its soft labels, float32 [S, K]. Mixed images are normalised and have the given dtype. A
        sample is not mixed if its partner could not be read."""
        assert batch.labels is not None
        labels_SK = F.one_hot(batch.labels, self.classes).float()
        labels_SK = labels_SK * (1 - self.smoothing) + self.smoothing / self.classes
        if not self.mixes or not batch.keys:
            return batch, labels_SK
        device = batch.images.device
        partner_S, own_S, box_S4 = (torch.from_numpy(array).to(device) for array in self._draw(batch.positions))
        images = normalised(batch.images, self.mean, self.std)
        own_S1HW = own_S[:, None, None, None] * torch.ones((), device=device)
        if self.cutmix:
            own_S1HW = torch.where(box_S4.any(1)[:, None, None, None], ~_inside(box_S4, self.size), own_S1HW)
        images = images * own_S1HW + images[partner_S] * (1 - own_S1HW)
        labels_SK = labels_SK * own_S[:, None] + labels_SK[partner_S] * (1 - own_S[:, None])
        return replace(batch, images=images.to(dtype)), labels_SK

    def _draw(self, positions: list[int | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw how a batch is mixed. Return, for each sample, the row of its partner (its own row if there is none),
        int64 [S]; the weight of the sample itself, float32 [S]; and the box that cutmix pastes from the partner, int64
        [S, 4] (top, bottom, left, right; 0 for mixup)."""
        rows = {position: row for row, position in enumerate(positions)}
        partner_S, own_S = np.arange(len(positions)), np.ones(len(positions), np.float32)
        box_S4 = np.zeros((len(positions), 4), np.int64)
        for position, row in rows.items():
            assert position is not None  # set by the training loader
            other, *pair = self.pair(position)
            if other in rows:
                partner_S[row] = rows[other]
                own_S[row], box_S4[row] = self._draw_pair(hash64(self.seed, _MIXING, *pair))
        return partner_S, own_S, box_S4

    def _draw_pair(self, seed: int) -> tuple[float, tuple[int, int, int, int]]:
        random = np.random.RandomState(seed & 0xFFFFFFFF)
        cuts = self.cutmix > 0 and (self.mixup == 0 or random.rand() < self.switch_prob)
        alpha = self.cutmix if cuts else self.mixup
        own = random.beta(alpha, alpha)
        if not cuts:
            return own, (0, 0, 0, 0)
        half = int(self.size * (1 - own) ** 0.5) // 2
        y, x = random.randint(self.size, size=2)
        top, bottom, left, right = (min(max(edge, 0), self.size) for edge in (y - half, y + half, x - half, x + half))
        return 1 - (bottom - top) * (right - left) / self.size**2, (top, bottom, left, right)


def _inside(box_S4: Tensor, size: int) -> Tensor:
    """Return a mask of the pixels inside each sample's box, bool [S, 1, H, W]."""
    place = torch.arange(size, device=box_S4.device)
    rows_SH, columns_SW = ((place >= low[:, None]) & (place < high[:, None]) for low, high in box_S4.T.split(2))
    return (rows_SH[:, :, None] & columns_SW[:, None])[:, None]
