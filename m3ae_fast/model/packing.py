"""Samples of any kind -> one flat batch of tokens, its row maps and its loss rows. Runs on the CPU, in the loader.

Shapes: S samples, B pictures, L patches a picture, C channels, H = W pixels, N visible patches,
T encoder rows, U decoder rows, M decoder rows that carry loss, I of them patches, W of them text tokens.

A sample's encoder rows are [cls, visible patches, visible text]; its decoder rows are [cls, all patches, all text].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


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


@dataclass(slots=True)
class Sample:
    """One picture, one caption, or both."""

    key: str  # for messages
    image: Tensor | None = None  # [C, H, W], uint8 or floating and already normalised
    image_mask: Tensor | None = None  # bool [L], True = masked
    tokens: Tensor | None = None  # int [n]; n = 0 is an empty caption, None no caption at all
    text_mask: Tensor | None = None  # bool [n]


@dataclass(slots=True)
class Segments:
    """Where the samples lie among packed rows: sample s is rows[cu_seqlens[s] : cu_seqlens[s + 1]]."""

    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int
    rows: int


@dataclass(slots=True)
class PackedBatch:
    """All that a forward pass reads. Index tensors are int32; -1 means none."""

    keys: list[str]
    images: Tensor  # [B, C, H, W], uint8 or floating and already normalised
    # encoder input: see m3ae_kernels.scatter_tokens
    patch_ids: Tensor  # [N] picture * L + patch
    encoder: Segments  # T rows
    encoder_src: Tensor  # [T] row of the patch embeddings
    token_ids: Tensor  # [T] row of the text embedding
    encoder_table_ids: Tensor  # [T] row of [cls, patch positions, text positions]
    # decoder input
    decoder: Segments  # U rows
    decoder_src: Tensor  # [U] encoder row
    mask_ids: Tensor  # [U] 0 patch mask embedding, 1 text mask embedding
    decoder_table_ids: Tensor  # [U] row of [patch positions, text positions]
    # rows that carry loss
    loss: Segments  # M rows
    loss_rows: Tensor  # [M] decoder row
    image_rows: Tensor  # [I] row among the M
    image_patch_ids: Tensor  # [I] picture * L + patch
    image_row_weight: Tensor  # float32 [I] 1 / (rows of this picture)
    text_rows: Tensor  # [W] row among the M
    text_targets: Tensor  # [W] token id
    text_row_weight: Tensor  # float32 [W] 1 / (rows of this caption)
    # what the losses are divided by; a trainer puts its share of the global counts here
    image_count: float
    text_count: float
    skipped: list = field(default_factory=list)  # samples the loader could not use

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` reads tensors that another stream made."""
        self._map(lambda t: t.record_stream(stream) or t)

    def _map(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        def one(value):
            if isinstance(value, Tensor):
                return move(value)
            if isinstance(value, Segments):
                return Segments(move(value.cu_seqlens), value.max_seqlen, value.rows)
            return value

        return PackedBatch(**{f.name: one(getattr(self, f.name)) for f in fields(self)})


def pack(samples: Sequence[Sample], geometry: Geometry) -> PackedBatch:
    """Lay `samples` out in one PackedBatch.

    The image loss is a mean over pictures of the mean over their loss rows, the text loss a mean over captions of the
    mean over theirs, an empty caption counting as 0 (official M3AE).

    Raises:
        ValueError: a sample has neither picture nor caption, or a shape does not fit `geometry`.
    """
    length = geometry.patches_per_image
    images = [sample.image for sample in samples if sample.image is not None]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _PARTS}
    encoder_lens, decoder_lens, loss_lens = [], [], []
    picture = patches = encoder_row = decoder_row = loss_row = 0
    captions = 0

    for sample in samples:
        image_mask, text_mask, tokens = _check(sample, geometry)
        image_seen, text_seen = np.flatnonzero(~image_mask), np.flatnonzero(~text_mask)
        first_patch = picture * length

        encoder_lens.append(1 + len(image_seen) + len(text_seen))
        src, words = np.full(encoder_lens[-1], -1), np.full(encoder_lens[-1], -1)
        src[1 : 1 + len(image_seen)] = patches + np.arange(len(image_seen))
        words[1 + len(image_seen) :] = tokens[text_seen]
        parts["patch_ids"].append(first_patch + image_seen)
        parts["encoder_src"].append(src)
        parts["token_ids"].append(words)
        parts["encoder_table_ids"].append(np.concatenate(([0], 1 + image_seen, 1 + length + text_seen)))

        # decoder rows: 0 cls, then patches, then text
        text_at = 1 + len(image_mask)
        decoder_lens.append(text_at + len(text_mask))
        src, mask_ids = np.full(decoder_lens[-1], -1), np.full(decoder_lens[-1], -1)
        src[0] = encoder_row
        src[1 + image_seen] = encoder_row + 1 + np.arange(len(image_seen))
        src[text_at + text_seen] = encoder_row + 1 + len(image_seen) + np.arange(len(text_seen))
        mask_ids[1:text_at][image_mask] = 0
        mask_ids[text_at:][text_mask] = 1
        parts["decoder_src"].append(src)
        parts["mask_ids"].append(mask_ids)
        parts["decoder_table_ids"].append(
            np.concatenate(([-1], np.arange(len(image_mask)), length + np.arange(len(text_mask))))
        )

        image_loss = np.flatnonzero(image_mask | geometry.image_all_tokens)
        text_loss = np.flatnonzero(text_mask | geometry.text_all_tokens)
        parts["loss_rows"].append(decoder_row + np.concatenate((1 + image_loss, text_at + text_loss)))
        parts["image_rows"].append(loss_row + np.arange(len(image_loss)))
        parts["image_patch_ids"].append(first_patch + image_loss)
        parts["image_row_weight"].append(np.full(len(image_loss), 1 / max(len(image_loss), 1)))
        parts["text_rows"].append(loss_row + len(image_loss) + np.arange(len(text_loss)))
        parts["text_targets"].append(tokens[text_loss])
        parts["text_row_weight"].append(np.full(len(text_loss), 1 / max(len(text_loss), 1)))

        loss_lens.append(len(image_loss) + len(text_loss))
        picture += sample.image is not None
        captions += sample.tokens is not None
        patches += len(image_seen)
        encoder_row += encoder_lens[-1]
        decoder_row += decoder_lens[-1]
        loss_row += loss_lens[-1]

    shape = (geometry.channels, geometry.image_size, geometry.image_size)
    return PackedBatch(
        keys=[sample.key for sample in samples],
        images=torch.stack(images) if images else torch.empty((0, *shape), dtype=torch.uint8),
        encoder=_segments(encoder_lens),
        decoder=_segments(decoder_lens),
        loss=_segments(loss_lens),
        image_count=float(picture),
        text_count=float(captions),
        **{name: _join(arrays, name) for name, arrays in parts.items()},
    )


_PARTS = [f.name for f in fields(PackedBatch) if f.type == "Tensor" and f.name != "images"]


def _check(sample: Sample, geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks and tokens as arrays, empty where the sample lacks the modality."""
    image_mask = text_mask = np.empty(0, dtype=bool)
    tokens = np.empty(0, dtype=np.int64)
    if sample.image is None and sample.tokens is None:
        raise ValueError(f"{sample.key}: has neither picture nor caption")
    if sample.image is not None:
        image_mask = sample.image_mask.numpy()
        shape = (geometry.channels, geometry.image_size, geometry.image_size)
        if sample.image.shape != shape:
            raise ValueError(f"{sample.key}: picture has shape {tuple(sample.image.shape)}, not {shape}")
        if image_mask.shape != (geometry.patches_per_image,):
            raise ValueError(f"{sample.key}: image_mask has shape {image_mask.shape}")
    if sample.tokens is not None:
        text_mask, tokens = sample.text_mask.numpy(), sample.tokens.numpy()
        if tokens.ndim != 1 or tokens.shape != text_mask.shape or len(tokens) > geometry.text_length:
            raise ValueError(f"{sample.key}: tokens {tokens.shape} and text_mask {text_mask.shape} do not fit")
    return image_mask, text_mask, tokens


def _segments(lengths: list[int]) -> Segments:
    ends = [0, *accumulate(lengths)]
    return Segments(torch.tensor(ends, dtype=torch.int32), max(lengths, default=0), ends[-1])


def _join(arrays: list[np.ndarray], name: str) -> Tensor:
    dtype = np.float32 if name.endswith("weight") else np.int32
    return torch.from_numpy(np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype))
