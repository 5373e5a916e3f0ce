"""Pooling of the encoder's rows to one feature vector per sample.

Shapes: T encoder rows, S samples, D width, L patches of the largest image, G cells of a grid or other feature vectors
of a pooling, K feature vectors of several poolings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packed import PackedBatch, Segments
from m3ae_fast.config import FOR_TEXTS, GRIDS, POOLINGS, ModelConfig, Pool
from m3ae_fast.images.patch_grid import Grid


def pool_rows(
    pools: Sequence[Pool],
    x_TD: Tensor,
    segments: Segments,
    batch: PackedBatch,
    norm: nn.LayerNorm,
    config: ModelConfig,
) -> Tensor:
    """Return the features of several poolings, one after another: [S, K, D], in at least float32. `POOLINGS` contains
    the number of feature vectors of each pooling.

    Args:
        pools: the poolings.
        x_TD: rows before the final LayerNorm.
        segments: the samples' rows in `x_TD`. Segments of padding may follow.
        batch: the batch to which the rows belong.
        norm: the final LayerNorm.
        config: config of the model; its `mean_pool` is the order of pooling and norm.

    Raises:
        UserError: a pooling needs images, and a sample has none.
    """
    for pool in pools:
        if POOLINGS[pool].needs_images and len(batch.grids) < len(batch.keys):
            raise UserError(f"pool {pool}: a sample has no image; use {FOR_TEXTS}")
    before = config.mean_pool == "before_norm"
    rows_TD = x_TD if before else norm(x_TD)
    found_SKD = torch.cat([_POOLED[pool](rows_TD, segments, batch, config) for pool in pools], 1)
    if before:
        found_SKD = norm(found_SKD.to(norm.weight.dtype))
    return found_SKD.to(torch.promote_types(found_SKD.dtype, torch.float32))


def reads_only_cls(pools: Sequence[Pool]) -> bool:
    """Return whether the poolings read only the cls rows, so that the last block need not compute the others."""
    return {*pools} == {"cls"}


def _mean(x_TD: Tensor, segments: Segments, batch: PackedBatch, config: ModelConfig) -> Tensor:
    return mean_of_tokens(x_TD, segments)[: len(batch.keys), None]


def _cls(x_TD: Tensor, segments: Segments, batch: PackedBatch, config: ModelConfig) -> Tensor:
    return x_TD[segments.cu_seqlens[: len(batch.keys)].long(), None]


def _cells(side: int, x_TD: Tensor, segments: Segments, batch: PackedBatch, config: ModelConfig) -> Tensor:
    grids = batch.grids if config.resize == "native" else batch.grids[:1]
    return means_of_cells(patch_rows(x_TD, batch, config), grids, side)


# rows, segments, batch and config (see `pool_rows`) -> features [S, G, D]
_POOLED: Mapping[Pool, Callable[[Tensor, Segments, PackedBatch, ModelConfig], Tensor]] = {
    "mean": _mean,
    "cls": _cls,
    **{pool: partial(_cells, side) for pool, side in GRIDS.items()},
}


def patch_rows(x_TD: Tensor, batch: PackedBatch, config: ModelConfig) -> Tensor:
    """Return the rows of the patches of unmasked images, [S, L, D], padded with zeros."""
    cls_S = batch.encoder.cu_seqlens[: len(batch.keys)].long()  # segments of padding come after the samples
    patches_L = torch.arange(1, 1 + config.most_patches, device=cls_S.device)
    rows_SL = cls_S[:, None] + patches_L
    if config.resize != "native":
        return x_TD[rows_SL]
    lengths_S = torch.tensor([rows * columns for rows, columns in batch.grids], device=cls_S.device)
    missing_SL = patches_L > lengths_S[:, None]
    return x_TD[rows_SL.masked_fill(missing_SL, 0)].masked_fill(missing_SL[..., None], 0)


def mean_of_tokens(x_TD: Tensor, segments: Segments) -> Tensor:
    """Return the mean over each sample's rows except the first one (cls): [S, D], at least float32. The mean is 0 if
    the sample has only the cls row."""
    lengths_S = segments.cu_seqlens.diff()
    samples = len(lengths_S)
    sample_T = torch.repeat_interleave(lengths_S, output_size=segments.rows)
    # cls rows are summed into an additional row, which is dropped
    sample_T = sample_T.index_fill(0, segments.cu_seqlens[:-1].long(), samples)
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    sums_SD = wide_TD.new_zeros(samples + 1, x_TD.shape[1]).index_add(0, sample_T, wide_TD)
    return sums_SD[:samples] / (lengths_S - 1).clamp(min=1)[:, None]


def only_cls(segments: Segments) -> Segments:
    """Return segments of the same samples with one row each."""
    starts = torch.arange(len(segments.cu_seqlens), dtype=torch.int32, device=segments.cu_seqlens.device)
    return Segments(starts, min(segments.max_seqlen, 1), len(starts) - 1)


def means_of_cells(patches_SLD: Tensor, grids: Sequence[Grid], side: int) -> Tensor:
    """Return the means over the patches of each cell of a grid of `side` x `side` cells with equal areas, row by row:
    [S, G, D], at least float32. A patch that lies in several cells is weighted by its area in each of them.

    Args:
        patches_SLD: the patch tokens of unmasked images.
        grids: rows and columns of patches of each image, or of all images if there is only one.
        side: number of cells per side.
    """
    wide_SLD = patches_SLD.to(torch.promote_types(patches_SLD.dtype, torch.float32))
    weights = [_weights_of_cells(*grid, side, patches_SLD.shape[1]) for grid in grids]
    if not weights:  # a rank may have no samples
        return wide_SLD.new_zeros(0, side**2, wide_SLD.shape[2])
    return torch.stack(weights).to(wide_SLD) @ wide_SLD


@lru_cache(maxsize=256)
def _weights_of_cells(rows: int, columns: int, side: int, most: int) -> Tensor:
    """Return the weight of each patch in the mean of each cell, float32 [G, L]. `most`: L."""
    weights_GL = torch.kron(_overlaps(rows, side), _overlaps(columns, side))
    return torch.nn.functional.pad(weights_GL, (0, most - rows * columns))


def _overlaps(patches: int, side: int) -> Tensor:
    """Return the lengths that each of `side` equal parts of a line shares with each of its patches, relative to the
    length of a part: float32 [side, patches]."""
    starts = torch.arange(side)[:, None] * patches / side
    firsts = torch.arange(patches)
    shared = torch.minimum(starts + patches / side, firsts + 1) - torch.maximum(starts, firsts)
    return shared.clamp(min=0) * side / patches
