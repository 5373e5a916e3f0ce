"""Samples of any kind -> one packed batch. Runs on the CPU, in the loader.

Shapes: S samples, B pictures, L patches a picture, T encoder rows, U decoder rows, M decoder rows that carry loss,
I of them patches, W of them text tokens.

A sample's encoder rows are [cls, visible patches, visible text]; its decoder rows are [cls, all patches, all text].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.model.batch import LossCounts, PackedBatch, Segments


@dataclass(frozen=True)
class Geometry:
    """The sizes that packing needs to know, and which tokens carry loss."""

    image_size: int
    patch_size: int
    channels: int
    text_length: int
    image_all_tokens: bool = False  # loss on visible patches too
    text_all_tokens: bool = False

    @property
    def patches_per_image(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a picture."""
        return self.channels, self.image_size, self.image_size


@dataclass(slots=True)
class Sample:
    """One picture, one caption, or both."""

    key: str  # for messages
    image: Tensor | None = None  # [C, H, W], uint8 or floating and already normalised
    image_mask: Tensor | None = None  # bool [L], True = masked
    tokens: Tensor | None = None  # int [n]; n = 0 is an empty caption, None no caption at all
    text_mask: Tensor | None = None  # bool [n]
    loss_weight: float = 1.0  # factor of its losses
    image_ids: Tensor | None = None  # int [L], where the image targets are token ids and known


def pack(samples: Sequence[Sample], geometry: Geometry) -> PackedBatch:
    """Lay `samples` out in one PackedBatch.

    The image loss is a mean over pictures of the mean over their loss rows, the text loss a mean over captions of the
    mean over theirs, an empty caption counting as 0 (official M3AE). A sample's `loss_weight` multiplies its rows'
    weights, and nothing else.

    Raises:
        ValueError: a sample has neither picture nor caption, a shape does not fit `geometry`, or some pictures have
            ids and some have none.
    """
    length = geometry.patches_per_image
    checked = [_check(sample, geometry) for sample in samples]
    images = [sample.image for sample in samples if sample.image is not None]
    captions = sum(sample.tokens is not None for sample in samples)

    # over the decoder's rows: what each is, and whether it is masked
    patches_S = _lengths(image_mask for image_mask, _, _ in checked)
    tokens_S = _lengths(text_mask for _, text_mask, _ in checked)
    rows_S = 1 + patches_S + tokens_S
    sample_U = np.repeat(np.arange(len(samples)), rows_S)
    place_U = np.arange(len(sample_U)) - (np.cumsum(rows_S) - rows_S)[sample_U]  # 0 cls, then patches, then text
    patch_U = (place_U > 0) & (place_U <= patches_S[sample_U])
    text_U = place_U > patches_S[sample_U]
    masked_U = _flat([part for image_mask, text_mask, _ in checked for part in (_CLS, image_mask, text_mask)], bool)
    visible_U = ~masked_U

    # what lies behind each row: a picture's patch, a caption's token, its row of [patch positions, text positions]
    patch_id_U = np.cumsum(patch_U) - 1
    token_U = np.full(len(sample_U), -1)
    token_U[text_U] = _flat([tokens for _, _, tokens in checked], np.int64)
    table_U = np.where(text_U, length + place_U - 1 - patches_S[sample_U], place_U - 1)

    # the encoder's rows are the visible ones, in the same order
    visible_patch_U = patch_U & visible_U
    loss_U = (patch_U & (masked_U | geometry.image_all_tokens)) | (text_U & (masked_U | geometry.text_all_tokens))
    patch_M = patch_U[loss_U]
    count = partial(np.bincount, minlength=len(samples))
    image_loss_S, text_loss_S = count(sample_U[patch_U & loss_U]), count(sample_U[text_U & loss_U])
    loss_weight_S = np.array([sample.loss_weight for sample in samples], dtype=np.float64)
    weights = {
        "image_row_weight": np.repeat(loss_weight_S / np.maximum(image_loss_S, 1), image_loss_S),
        "text_row_weight": np.repeat(loss_weight_S / np.maximum(text_loss_S, 1), text_loss_S),
        "text_row_share": np.repeat(1 / np.maximum(text_loss_S, 1), text_loss_S),
    }
    rows = {
        "patch_ids": patch_id_U[visible_patch_U],
        "encoder_src": np.where(visible_patch_U, np.cumsum(visible_patch_U) - 1, -1)[visible_U],
        "token_ids": token_U[visible_U],
        "encoder_table_ids": 1 + table_U[visible_U],  # its table begins with cls
        "decoder_src": np.where(visible_U, np.cumsum(visible_U) - 1, -1),
        "mask_ids": np.where(visible_U, -1, text_U),
        "decoder_table_ids": table_U,
        "loss_rows": np.flatnonzero(loss_U),
        "image_rows": np.flatnonzero(patch_M),
        "image_patch_ids": patch_id_U[patch_U & loss_U],
        "text_rows": np.flatnonzero(~patch_M),
        "text_targets": token_U[text_U & loss_U],
    }
    ids = [sample.image_ids.numpy() for sample in samples if sample.image is not None and sample.image_ids is not None]
    if ids and len(ids) < len(images):
        raise ValueError(f"{len(ids)} of {len(images)} pictures have image_ids")
    rows["image_targets"] = _flat(ids, np.int64)[rows["image_patch_ids"]] if ids else np.empty(0, dtype=np.int64)
    return PackedBatch(
        keys=[sample.key for sample in samples],
        images=torch.stack(images) if images else torch.empty((0, *geometry.image_shape), dtype=torch.uint8),
        encoder=_segments(count(sample_U[visible_U])),
        decoder=_segments(rows_S),
        loss=_segments(image_loss_S + text_loss_S),
        counts=LossCounts(float(len(images)), float(captions)),
        **{name: torch.from_numpy(array).to(torch.int32) for name, array in rows.items()},
        **{name: torch.from_numpy(array).to(torch.float32) for name, array in weights.items()},
    )


_CLS = np.zeros(1, dtype=bool)  # cls is never masked


def _check(sample: Sample, geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks and tokens as arrays, empty where the sample lacks the modality."""
    image_mask = text_mask = np.empty(0, dtype=bool)
    tokens = np.empty(0, dtype=np.int64)
    if sample.image is None and sample.tokens is None:
        raise ValueError(f"{sample.key}: has neither picture nor caption")
    if sample.image is not None:
        image_mask = sample.image_mask.numpy()
        if sample.image.shape != geometry.image_shape:
            raise ValueError(f"{sample.key}: picture has shape {tuple(sample.image.shape)}, not {geometry.image_shape}")
        if image_mask.shape != (geometry.patches_per_image,):
            raise ValueError(f"{sample.key}: image_mask has shape {image_mask.shape}")
        if sample.image_ids is not None and sample.image_ids.shape != image_mask.shape:
            raise ValueError(f"{sample.key}: image_ids has shape {tuple(sample.image_ids.shape)}")
    if sample.tokens is not None:
        text_mask, tokens = sample.text_mask.numpy(), sample.tokens.numpy()
        if tokens.ndim != 1 or tokens.shape != text_mask.shape or len(tokens) > geometry.text_length:
            raise ValueError(f"{sample.key}: tokens {tokens.shape} and text_mask {text_mask.shape} do not fit")
    return image_mask, text_mask, tokens


def _lengths(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.array([len(array) for array in arrays], dtype=np.int64)


def _flat(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays, dtype=dtype) if arrays else np.empty(0, dtype)


def _segments(lengths_S: np.ndarray) -> Segments:
    ends = np.concatenate(([0], np.cumsum(lengths_S)))
    return Segments(torch.from_numpy(ends.astype(np.int32)), int(lengths_S.max(initial=0)), int(ends[-1]))
