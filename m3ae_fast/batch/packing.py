"""Packing of samples of any modality into one batch, on the CPU in the loader.

Shapes: S samples, P samples and segments of padding, B images, L patches of an image, T encoder rows, U decoder rows,
M decoder rows that carry loss (I patches, W text tokens).

A sample's encoder rows are [cls, visible patches, visible text]; its decoder rows are [cls, patches, text] without the
masked tokens that are not predicted or, for a decoder with cross-attention, only the rows that carry loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from m3ae_kernels import scatter_orders
from torch import Tensor

from m3ae_fast.batch.packed import LossCounts, PackedBatch, Segments
from m3ae_fast.config import ModelConfig, Range
from m3ae_fast.images.patch_grid import Grid, Native, grid_of, patch_rows


@dataclass(frozen=True)
class Geometry:
    """The settings that packing depends on: sizes, the tokens that carry loss, and the value range of images."""

    image_size: int
    patch_size: int
    channels: int
    text_length: int
    image_all_tokens: bool = False  # whether visible patches carry loss too
    text_all_tokens: bool = False
    loss_per_batch: bool = False  # whether losses are means over tokens instead of samples
    value_range: Range | None = None  # values of black and white in images with more than 8 bits per value
    image_dtype: str = "uint8"  # dtype of stored pixels
    image_mean: tuple[float, ...] = ()  # per channel
    image_std: tuple[float, ...] = ()
    native: Native | None = None  # size bounds for native aspect ratio; None: images are square
    cross: bool = False  # whether the decoder has cross-attention, so that its rows are only those that carry loss

    @classmethod
    def of(cls, config: ModelConfig) -> Geometry:
        """Return the geometry of a model, with default loss settings."""
        sizes = (config.image_size, config.patch_size, config.channels, config.text_length)
        same = ("value_range", "image_dtype", "image_mean", "image_std")
        cross = config.dec_attention == "cross"
        return cls(*sizes, **{name: getattr(config, name) for name in same}, native=Native.of(config), cross=cross)

    @property
    def patches_per_image(self) -> int:
        """Return L, the number of patches of a square image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def most_patches(self) -> int:
        """Return the number of patches of the largest image."""
        return self.patches_per_image if self.native is None else self.native.most

    @property
    def frame(self) -> int | Native:
        """Return the size of cropped images: the side of the square, or the bounds for native aspect ratio."""
        return self.image_size if self.native is None else self.native

    def grid(self, image: Tensor) -> Grid:
        """Return the patch grid of an image [C, H, W]. Raises ValueError if the image does not fit the model."""
        if self.native is None:
            shape, side = (self.channels, self.image_size, self.image_size), self.image_size // self.patch_size
            if image.shape != shape:
                raise ValueError(f"the image has shape {tuple(image.shape)}, but the model expects {shape}")
            return side, side
        grid = grid_of(image, self.patch_size)
        if image.shape[0] != self.channels or not self.native.fits(grid):
            raise ValueError(
                f"the image has shape {tuple(image.shape)}, but must have {self.channels} channels, at most "
                f"{self.native.most} patches, and at most {self.native.longest} patches along a side"
            )
        return grid


@dataclass(slots=True)
class Sample:
    """One image, one caption, or both."""

    key: str  # name of the sample, for messages
    # [C, H, W] of the model's size: uint8, uint16, or floating-point and already normalised
    image: Tensor | None = None
    image_mask: Tensor | None = None  # bool [L], True = masked
    tokens: Tensor | None = None  # int [n]; n is 0 for an empty caption; None: no caption
    text_mask: Tensor | None = None  # bool [n]
    label: int | None = None  # id of its class
    image_hash: str = ""  # equal for images with equal bytes; "": there is no image, or the sample is for training
    loss_weight: float = 1.0  # factor by which the sample's losses are multiplied
    draw: int = -1  # 31-bit seed of the random numbers in its forward pass; -1: torch's generator is used
    position: int | None = None  # index in the training stream
    # int [L]: token ids of the patches, as image targets; None: the targets are pixels, or the ids are computed later
    image_ids: Tensor | None = None
    image_predicted: Tensor | None = None  # bool [L]: the masked patches that are predicted; None: all of them
    text_predicted: Tensor | None = None  # bool [n]: the masked text tokens that are predicted; None: all of them
    same_image: bool = False  # whether the image is that of the sample before it, so that the batch contains it once


# Numbers of rows are rounded up to a multiple of 64. In large batches, they are rounded up to a multiple of a larger
# power of two, with which padding is still less than 1/128 of the rows.
FEWEST_ROWS, FINENESS = 64, 128


def rounded(rows: int) -> int:
    """Return `rows` rounded up to one of a few sizes, so that batch shapes repeat. The result is monotonic in
    `rows`."""
    multiple = max(FEWEST_ROWS, 1 << max(rows // FINENESS, 1).bit_length() - 1)
    return -(-rows // multiple) * multiple


def pack(samples: Sequence[Sample], geometry: Geometry, *, repeat_shapes: bool = False) -> PackedBatch:
    """Pack a (possibly empty) list of samples into one PackedBatch.

    The image loss is the mean over images of the mean over each image's loss rows. The text loss is the mean over
    captions of the mean over each caption's loss rows; an empty caption counts as 0 (official M3AE). With
    `loss_per_batch`, each loss is the mean over all its loss rows (official MAE). A sample's `loss_weight` multiplies
    the weights of its rows, and does not change the denominators.

    Args:
        repeat_shapes: whether numbers of rows are rounded up by padding. Padding consists of rows that belong to no
            sample, in separate segments, and of loss rows with weight 0. Losses and gradients are unchanged, but matmul
            libraries, compilers and allocators see only a few distinct shapes.

    Raises:
        ValueError: a sample has neither image nor caption, a shape does not fit `geometry`, only some of the images
            have ids, the images have different dtypes, a sample with `same_image` has another image, or a token to
            predict is not masked.
    """
    size = rounded if repeat_shapes else int
    checked = [_check(sample, geometry) for sample in samples]
    layout = _layout(checked, geometry, int if geometry.cross else size)
    encoder, encoder_rows = _encoder_rows(layout, len(samples), size)
    counts, terms = _loss_terms(samples, layout, geometry)
    decoder_part = _queries(layout, terms, len(encoder.cu_seqlens) - 1, size) if geometry.cross else None
    decoder, loss, decoder_rows, weights = decoder_part or _all_rows(layout, terms, size)
    targets = _image_targets(samples, decoder_rows["image_patch_ids"], weights["image_row_weight"])
    rows = {**encoder_rows, **decoder_rows, "image_targets": targets}
    rows["draws"] = np.array([sample.draw for sample in samples], np.int64)
    index: dict[str, Any] = {name: torch.from_numpy(array).to(torch.int32) for name, array in rows.items()}
    for part, ids in (("encoder", "token"), ("decoder", "mask")):
        scattered = (index[name] for name in (f"{part}_src", f"{ids}_ids", f"{part}_table_ids"))
        index[f"{ids}_order"], index[f"{part}_table_order"] = scatter_orders(*scattered)
    return PackedBatch(
        keys=[sample.key for sample in samples],
        images=_images(samples, geometry),
        grids=[sample.grid for sample in checked if sample.grid is not None],
        encoder=encoder,
        decoder=decoder,
        loss=loss,
        captions=sum(sample.tokens is not None for sample in samples),
        counts=counts,
        labels=_labels(samples),
        positions=[sample.position for sample in samples],
        image_hashes=[sample.image_hash for sample in samples],
        **index,
        **{name: torch.from_numpy(array).to(torch.float32) for name, array in weights.items()},  # type: ignore[arg-type]
    )


class _Layout(NamedTuple):
    """The decoder's rows: for each sample cls, the patches and the text tokens, except masked tokens that are not
    predicted; then padding rows. A decoder with cross-attention uses only some of these rows; see `_queries`."""

    rows_P: np.ndarray  # number of rows of each sample, then of each segment of padding
    sample_U: np.ndarray  # for each row, the index in `rows_P` of its sample or of its segment of padding
    # the next four arrays are bool
    patch_U: np.ndarray
    text_U: np.ndarray
    masked_U: np.ndarray
    visible_U: np.ndarray
    patch_id_U: np.ndarray  # image in the batch * L + patch; for native images, an index into all their patches
    token_U: np.ndarray  # vocabulary id; -1 for rows that are not text tokens
    table_U: np.ndarray  # row of [patch positions, text positions], -1 for cls and padding


def _layout(checked: Sequence[_Checked], geometry: Geometry, size: Callable[[int], int]) -> _Layout:
    S = len(checked)
    patches_S = _lengths(sample.image_mask for sample in checked)
    tokens_S = _lengths(sample.text_mask for sample in checked)
    rows_S = 1 + patches_S + tokens_S
    sample_U = np.repeat(np.arange(S), rows_S)
    # position in the sample: cls, then patches, then text
    position_U = np.arange(len(sample_U)) - (np.cumsum(rows_S) - rows_S)[sample_U]
    patch_U = (position_U > 0) & (position_U <= patches_S[sample_U])
    text_U = position_U > patches_S[sample_U]
    masked_U = _flat([part for s in checked for part in (_CLS, s.image_mask, s.text_mask)], bool)
    left_out_U = _flat([part for s in checked for part in (_CLS, s.image_left_out, s.text_left_out)], bool)
    token_U = np.full(len(sample_U), -1)
    token_U[text_U] = _flat([sample.tokens for sample in checked], np.int64)
    place_U, length = position_U - 1, geometry.patches_per_image
    if geometry.native is not None:
        first_S, step_S, columns_S = np.ones((3, S), np.int64)
        with_image = np.flatnonzero(patches_S)
        grids = [sample.grid for sample in checked if sample.grid is not None]
        first_S[with_image], step_S[with_image], length = geometry.native.position_indices(grids)
        columns_S[with_image] = [columns for _, columns in grids]
        row_U, column_U = np.divmod(place_U, columns_S[sample_U])
        place_U = np.where(patch_U, first_S[sample_U] + row_U * step_S[sample_U] + column_U, place_U)
    table_U = np.where(text_U, length + position_U - 1 - patches_S[sample_U], place_U)
    shared_S = np.cumsum([len(sample.image_mask) if sample.same_image else 0 for sample in checked], dtype=np.int64)
    patch_id_U = np.cumsum(patch_U) - 1 - shared_S[sample_U]
    rows = sample_U, patch_U, text_U, masked_U, ~masked_U, patch_id_U, token_U, table_U
    if left_out_U.any():
        rows = tuple(values_U[~left_out_U] for values_U in rows)  # type: ignore[assignment]
    sample_U, patch_U, text_U, masked_U, visible_U, patch_id_U, token_U, table_U = rows

    images = int(np.count_nonzero(patch_U & (masked_U | geometry.image_all_tokens)))
    texts = int(np.count_nonzero(text_U & (masked_U | geometry.text_all_tokens)))
    rows_P = _padded(np.bincount(sample_U, minlength=S), max(size(len(sample_U)), size(images) + size(texts)))
    padded = partial(_extended, size=int(rows_P.sum()))
    return _Layout(
        rows_P=rows_P,
        sample_U=np.repeat(np.arange(len(rows_P)), rows_P),
        patch_U=padded(patch_U, fill=False),
        text_U=padded(text_U, fill=False),
        masked_U=padded(masked_U, fill=False),
        visible_U=padded(visible_U, fill=False),
        patch_id_U=padded(patch_id_U, fill=0),
        token_U=padded(token_U, fill=-1),
        table_U=padded(table_U, fill=-1),
    )


def _encoder_rows(layout: _Layout, samples: int, size: Callable[[int], int]) -> tuple[Segments, dict[str, np.ndarray]]:
    """Return the encoder's segments and index maps. The encoder's rows are the visible rows, in the decoder's order."""
    visible_U, visible_patch_U = layout.visible_U, layout.patch_U & layout.visible_U
    visible_S = np.bincount(layout.sample_U[visible_U], minlength=samples)
    visible_P = _padded(visible_S, size(int(visible_S.sum())))
    patches, visible = int(np.count_nonzero(visible_patch_U)), int(visible_P.sum())
    source_U = np.where(visible_patch_U, np.cumsum(visible_patch_U) - 1, -1)
    return _segments(visible_P), {
        "patch_ids": _extended(layout.patch_id_U[visible_patch_U], size(patches), 0),
        "encoder_src": _extended(source_U[visible_U], visible, -1),
        "token_ids": _extended(layout.token_U[visible_U], visible, -1),
        # the encoder's table begins with cls
        "encoder_table_ids": _extended(1 + layout.table_U[visible_U], visible, -1),
    }


class _LossTerms(NamedTuple):
    """The rows of a layout that carry loss, and their weights."""

    image_U: np.ndarray  # bool
    text_U: np.ndarray  # bool
    # the next three arrays are float64, and 0 for rows that do not carry this loss
    image_weight_U: np.ndarray
    text_weight_U: np.ndarray
    text_mean_weight_U: np.ndarray


def _loss_terms(samples: Sequence[Sample], layout: _Layout, geometry: Geometry) -> tuple[LossCounts, _LossTerms]:
    """Return the denominators of the losses, and the rows that carry loss with their weights."""
    sample_U = layout.sample_U
    image_U = layout.patch_U & (layout.masked_U | geometry.image_all_tokens)
    text_U = layout.text_U & (layout.masked_U | geometry.text_all_tokens)
    count = partial(np.bincount, minlength=len(layout.rows_P))
    image_P, text_P = count(sample_U[image_U]), count(sample_U[text_U])
    if geometry.loss_per_batch:
        counts = LossCounts(float(image_P.sum()), float(text_P.sum()))
        per_image_P = per_caption_P = np.ones(len(layout.rows_P))
    else:
        images, captions = (sum(getattr(s, name) is not None for s in samples) for name in ("image", "tokens"))
        counts = LossCounts(float(images), float(captions))
        per_image_P, per_caption_P = (1 / np.maximum(n, 1) for n in (image_P, text_P))
    weight_P = np.ones(len(layout.rows_P))
    weight_P[: len(samples)] = [sample.loss_weight for sample in samples]
    return counts, _LossTerms(
        image_U,
        text_U,
        image_U * (weight_P * per_image_P)[sample_U],
        text_U * (weight_P * per_caption_P)[sample_U],
        text_U * per_caption_P[sample_U],
    )


_DecoderPart = tuple[Segments, Segments, dict[str, np.ndarray], dict[str, np.ndarray]]


def _all_rows(layout: _Layout, terms: _LossTerms, size: Callable[[int], int]) -> _DecoderPart:
    """Return the decoder's segments, the segments of its loss rows, and the index maps and weights of both, for a
    decoder that uses all rows of the layout."""
    image_I, text_W = _loss_rows(terms.image_U, terms.text_U, size)
    loss_M = np.sort(np.concatenate((image_I, text_W)))
    row_in_M = np.zeros(len(layout.sample_U), np.int64)
    row_in_M[loss_M] = np.arange(len(loss_M))
    rows = {
        "decoder_src": np.where(layout.visible_U, np.cumsum(layout.visible_U) - 1, -1),
        "mask_ids": np.where(layout.masked_U, layout.text_U, -1),
        "decoder_table_ids": layout.table_U,
        "loss_rows": loss_M,
        "image_rows": row_in_M[image_I],
        "text_rows": row_in_M[text_W],
    }
    loss_P = np.bincount(layout.sample_U[loss_M], minlength=len(layout.rows_P))
    targets, weights = _targets(layout, terms, image_I, text_W)
    return _segments(layout.rows_P), _segments(loss_P), rows | targets, weights


def _queries(layout: _Layout, terms: _LossTerms, segments: int, size: Callable[[int], int]) -> _DecoderPart:
    """Return the decoder's segments, the segments of its loss rows, and the index maps and weights of both, for a
    decoder with cross-attention. Its rows are only the loss rows, which attend to the encoder's rows. Padding rows have
    weight 0 and are distributed evenly over the segments. `segments`: number of the encoder's segments."""
    loss_U = np.flatnonzero(terms.image_U | terms.text_U)
    images, texts = (int(np.count_nonzero(part_U)) for part_U in (terms.image_U, terms.text_U))
    more_images, padding = size(images) - images, size(images) - images + size(texts) - texts
    sample_M = np.concatenate((layout.sample_U[loss_U], np.arange(padding) * len(layout.rows_P) // max(padding, 1)))
    order_M = sample_M.argsort(kind="stable")
    row_M = _extended(loss_U, len(sample_M), -1)[order_M]  # row of the layout; -1: padding
    for_image_M = np.concatenate((terms.image_U[loss_U], np.arange(padding) < more_images))[order_M]
    image_rows, text_rows = np.flatnonzero(for_image_M), np.flatnonzero(~for_image_M)
    rows = {
        "decoder_src": np.full(len(row_M), -1),
        "mask_ids": _taken(layout.text_U.astype(np.int64), row_M, -1),
        "decoder_table_ids": _taken(layout.table_U, row_M, -1),
        "loss_rows": np.arange(len(row_M)),
        "image_rows": image_rows,
        "text_rows": text_rows,
    }
    part = _segments(np.bincount(sample_M, minlength=segments))
    targets, weights = _targets(layout, terms, row_M[image_rows], row_M[text_rows])
    return part, part, rows | targets, weights


def _targets(
    layout: _Layout, terms: _LossTerms, image_I: np.ndarray, text_W: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the targets and weights of the given rows of the layout; a row of -1 is padding. If the weight is 0, the
    target is arbitrary."""
    targets = {
        "image_patch_ids": np.maximum(_taken(layout.patch_id_U, image_I, 0), 0),
        "text_targets": np.maximum(_taken(layout.token_U, text_W, 0), 0),
    }
    return targets, {
        "image_row_weight": _taken(terms.image_weight_U, image_I, 0),
        "text_row_weight": _taken(terms.text_weight_U, text_W, 0),
        "text_row_mean_weight": _taken(terms.text_mean_weight_U, text_W, 0),
    }


def _taken(values_U: np.ndarray, rows: np.ndarray, fill: float) -> np.ndarray:
    """Return `values_U[rows]`, with `fill` for rows of -1."""
    return np.append(values_U, np.array([fill], values_U.dtype))[rows]


def _image_targets(samples: Sequence[Sample], patch_ids_I: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
    """Return the token ids of the patches in the image loss, with 0 for patches of weight 0. The result is empty if
    images have no ids. Raises ValueError if only some of the images have ids."""
    ids = [sample.image_ids for sample in samples if sample.image is not None and not sample.same_image]
    known = [each.numpy() for each in ids if each is not None]
    if not known:
        return _flat([], np.int64)
    if len(known) < len(ids):
        raise ValueError(f"{len(known)} of {len(ids)} images have image_ids: pass ids for all images or for none")
    return np.where(weight_I != 0, _flat(known, np.int64)[patch_ids_I], 0)


_CLS = np.zeros(1, dtype=bool)  # cls is never masked


class _Checked(NamedTuple):
    """Masks and tokens of a sample as arrays; empty if the sample lacks the modality."""

    image_mask: np.ndarray
    text_mask: np.ndarray
    tokens: np.ndarray
    grid: Grid | None  # patch grid of the image; None if there is no image
    image_left_out: np.ndarray  # bool, True for patches that are masked and not predicted
    text_left_out: np.ndarray
    same_image: bool


def _check(sample: Sample, geometry: Geometry) -> _Checked:
    """Return a sample's masks and tokens as arrays. Raises ValueError if they do not fit `geometry`."""
    image_mask = text_mask = np.empty(0, dtype=bool)
    tokens, grid = np.empty(0, dtype=np.int64), None
    if sample.image is None and sample.tokens is None:
        raise ValueError(f"{sample.key}: the sample has neither image nor caption")
    if sample.image is not None:
        image_mask = sample.image_mask.numpy()  # type: ignore[union-attr]
        try:
            grid = geometry.grid(sample.image)
        except ValueError as error:
            raise ValueError(f"{sample.key}: {error}") from None
        if image_mask.shape != (grid[0] * grid[1],):
            raise ValueError(f"{sample.key}: image_mask has shape {image_mask.shape}, which does not fit the image")
        if sample.image_ids is not None and sample.image_ids.shape != image_mask.shape:
            raise ValueError(
                f"{sample.key}: image_ids has shape {tuple(sample.image_ids.shape)}, which does not fit the image"
            )
    if sample.tokens is not None:
        text_mask, tokens = sample.text_mask.numpy(), sample.tokens.numpy()  # type: ignore[union-attr]
        if tokens.ndim != 1 or tokens.shape != text_mask.shape or len(tokens) > geometry.text_length:
            raise ValueError(
                f"{sample.key}: tokens has shape {tokens.shape} and text_mask has shape {text_mask.shape}, but both "
                f"must have the same shape [tokens], with at most {geometry.text_length} tokens"
            )
    image_left_out = _left_out(sample.key, "image_predicted", image_mask, sample.image_predicted)
    text_left_out = _left_out(sample.key, "text_predicted", text_mask, sample.text_predicted)
    return _Checked(image_mask, text_mask, tokens, grid, image_left_out, text_left_out, sample.same_image)


def _left_out(key: str, name: str, mask: np.ndarray, predicted: Tensor | None) -> np.ndarray:
    """Return a mask of the masked tokens that are not predicted. Raises ValueError if `predicted` does not fit the
    mask."""
    if predicted is None:
        return np.zeros(len(mask), dtype=bool)
    wanted = predicted.numpy()
    if wanted.shape != mask.shape or (wanted & ~mask).any():
        raise ValueError(
            f"{key}: {name}, of shape {wanted.shape}, must have the shape {mask.shape} and select only masked tokens"
        )
    return mask & ~wanted


def _images(samples: Sequence[Sample], geometry: Geometry) -> Tensor:
    """Return the images of a batch in the layout of `PackedBatch.images`."""
    for before, sample in zip((None, *samples), samples):
        if sample.same_image and (before is None or sample.image is None or sample.image is not before.image):
            raise ValueError(f"{sample.key}: same_image is set, but the image is not that of the sample before it")
    images = [sample.image for sample in samples if sample.image is not None and not sample.same_image]
    side = geometry.image_size if geometry.native is None else geometry.patch_size
    if not images:
        return torch.empty((0, geometry.channels, side, side), dtype=getattr(torch, geometry.image_dtype))
    if len(kinds := {image.dtype for image in images}) > 1:
        raise ValueError(
            f"the images have different dtypes, {', '.join(sorted(map(str, kinds)))}: a batch must have a single dtype"
        )
    return torch.stack(images) if geometry.native is None else patch_rows(images, side)


def _labels(samples: Sequence[Sample]) -> Tensor | None:
    """Return the labels, int64 [S]; None if any sample has no label."""
    labels = [sample.label for sample in samples if sample.label is not None]
    return torch.tensor(labels, dtype=torch.int64) if len(labels) == len(samples) else None


def _lengths(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.array([len(array) for array in arrays], dtype=np.int64)


def _flat(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays, dtype=dtype) if arrays else np.empty(0, dtype)


def _segments(lengths_S: np.ndarray) -> Segments:
    ends = np.concatenate(([0], np.cumsum(lengths_S)))
    return Segments(torch.from_numpy(ends.astype(np.int32)), int(lengths_S.max(initial=0)), int(ends[-1]))


def _padded(lengths_S: np.ndarray, rows: int) -> np.ndarray:
    """Return the samples' lengths, followed by the lengths of padding segments that bring the sum to `rows`. No padding
    segment is longer than the longest sample."""
    longest, missing = int(lengths_S.max(initial=1)), rows - int(lengths_S.sum())
    pieces = [min(longest, missing - first) for first in range(0, missing, longest)]
    return np.concatenate((lengths_S, np.array(pieces, np.int64)))


def _loss_rows(image_U: np.ndarray, text_U: np.ndarray, size: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the image loss and of the text loss. The number of rows of each loss is rounded up by the
    function `size`; the last rows that carry no loss serve as padding. No row is in both, as the backward pass of
    `head_inputs` requires.
    """
    image_I, text_W, without = map(np.flatnonzero, (image_U, text_U, ~(image_U | text_U)))
    more_images, more_texts = (size(len(rows)) - len(rows) for rows in (image_I, text_W))
    spare = without[len(without) - more_images - more_texts :]
    return np.union1d(image_I, spare[:more_images]), np.union1d(text_W, spare[more_images:])


def _extended(ids: np.ndarray, size: int, fill: int) -> np.ndarray:
    return np.concatenate((ids, np.full(size - len(ids), fill)))
