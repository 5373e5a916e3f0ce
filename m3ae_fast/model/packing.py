"""Samples of any kind -> one flat batch of tokens, its row maps and its loss rows. Runs on the CPU, in the loader.

Shapes: S samples, B pictures, L patches a picture, C channels, H = W pixels, N visible patches,
T encoder rows, U decoder rows, M decoder rows that carry loss, I of them patches, W of them text tokens.

A sample's encoder rows are [cls, visible patches, visible text]; its decoder rows are [cls, all patches, all text].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

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

    def __reduce__(self):
        """Between processes go two tensors, not eighteen: a quarter of a millisecond each, while training waits."""
        others = {f.name: getattr(self, f.name) for f in fields(self)}
        segments = {name: others.pop(name) for name in _SEGMENTS}
        rows = [others.pop(name) for name in _ROWS] + [s.cu_seqlens for s in segments.values()]
        joined, lengths = torch.cat([r.view(torch.int32) for r in rows]), [len(r) for r in rows]
        return _rejoin, (joined, lengths, [(s.max_seqlen, s.rows) for s in segments.values()], others)

    def _map(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        def one(value):
            if isinstance(value, Tensor):
                return move(value)
            if isinstance(value, Segments):
                return Segments(move(value.cu_seqlens), value.max_seqlen, value.rows)
            return value

        return PackedBatch(**{f.name: one(getattr(self, f.name)) for f in fields(self)})


_SEGMENTS = [f.name for f in fields(PackedBatch) if f.type == "Segments"]
_ROWS = [f.name for f in fields(PackedBatch) if f.type == "Tensor" and f.name != "images"]


def _rejoin(joined: Tensor, lengths: list[int], segments: list[tuple[int, int]], others: dict) -> PackedBatch:
    """The batch that `__reduce__` took apart."""
    pieces = joined.split(lengths)
    rows = {name: piece.view(_dtype(name)) for name, piece in zip(_ROWS, pieces)}
    ends = zip(_SEGMENTS, pieces[len(_ROWS) :], segments)
    return PackedBatch(**others, **rows, **{name: Segments(cu_seqlens, *sizes) for name, cu_seqlens, sizes in ends})


def _dtype(rows: str) -> torch.dtype:
    return torch.float32 if rows.endswith("weight") else torch.int32


def pack(samples: Sequence[Sample], geometry: Geometry) -> PackedBatch:
    """Lay `samples` out in one PackedBatch.

    The image loss is a mean over pictures of the mean over their loss rows, the text loss a mean over captions of the
    mean over theirs, an empty caption counting as 0 (official M3AE).

    Raises:
        ValueError: a sample has neither picture nor caption, or a shape does not fit `geometry`.
    """
    length = geometry.patches_per_image
    checked = [_check(sample, geometry) for sample in samples]
    images = [sample.image for sample in samples if sample.image is not None]
    captions = sum(sample.tokens is not None for sample in samples)

    # over the decoder's rows: what each is, and whether it is masked
    patches_S = _lengths(image_mask for image_mask, _, _ in checked)
    words_S = _lengths(text_mask for _, text_mask, _ in checked)
    rows_S = 1 + patches_S + words_S
    sample_U = np.repeat(np.arange(len(samples)), rows_S)
    place_U = np.arange(len(sample_U)) - (np.cumsum(rows_S) - rows_S)[sample_U]  # 0 cls, then patches, then text
    patch_U = (place_U > 0) & (place_U <= patches_S[sample_U])
    text_U = place_U > patches_S[sample_U]
    masked_U = _flat([part for image_mask, text_mask, _ in checked for part in (_SEEN, image_mask, text_mask)], bool)
    seen_U = ~masked_U

    # what lies behind each row: a picture's patch, a caption's token, a place in [patch positions, text positions]
    patch_id_U = np.cumsum(patch_U) - 1
    token_U = np.full(len(sample_U), -1)
    token_U[text_U] = _flat([tokens for _, _, tokens in checked], np.int64)
    table_U = np.where(text_U, length + place_U - 1 - patches_S[sample_U], place_U - 1)

    # the encoder's rows are those seen, in the same order
    seen_patch_U = patch_U & seen_U
    loss_U = (patch_U & (masked_U | geometry.image_all_tokens)) | (text_U & (masked_U | geometry.text_all_tokens))
    patch_M = patch_U[loss_U]
    count = partial(np.bincount, minlength=len(samples))
    image_loss_S, text_loss_S = count(sample_U[patch_U & loss_U]), count(sample_U[text_U & loss_U])
    weight_I, weight_W = (np.repeat(1 / np.maximum(n, 1), n) for n in (image_loss_S, text_loss_S))
    rows = {
        "patch_ids": patch_id_U[seen_patch_U],
        "encoder_src": np.where(seen_patch_U, np.cumsum(seen_patch_U) - 1, -1)[seen_U],
        "token_ids": token_U[seen_U],
        "encoder_table_ids": 1 + table_U[seen_U],  # its table begins with cls
        "decoder_src": np.where(seen_U, np.cumsum(seen_U) - 1, -1),
        "mask_ids": np.where(seen_U, -1, text_U),
        "decoder_table_ids": table_U,
        "loss_rows": np.flatnonzero(loss_U),
        "image_rows": np.flatnonzero(patch_M),
        "image_patch_ids": patch_id_U[patch_U & loss_U],
        "text_rows": np.flatnonzero(~patch_M),
        "text_targets": token_U[text_U & loss_U],
        "image_row_weight": weight_I,
        "text_row_weight": weight_W,
    }
    return PackedBatch(
        keys=[sample.key for sample in samples],
        images=torch.stack(images) if images else torch.empty((0, *geometry.image_shape), dtype=torch.uint8),
        encoder=_segments(count(sample_U[seen_U])),
        decoder=_segments(rows_S),
        loss=_segments(image_loss_S + text_loss_S),
        image_count=float(len(images)),
        text_count=float(captions),
        **{name: torch.from_numpy(array).to(_dtype(name)) for name, array in rows.items()},
    )


_SEEN = np.zeros(1, dtype=bool)  # cls is never masked


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
