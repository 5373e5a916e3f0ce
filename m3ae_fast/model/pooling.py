"""Pooling of the encoder's rows to one feature vector per sample.

Shapes: T encoder rows, S samples, D width, L patches of the largest image, G cells of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from m3ae_fast.batch.packed import Segments
from m3ae_fast.config import GRIDS, Pool
from m3ae_fast.images.patch_grid import Grid


def vectors(pool: Pool) -> int:
    """Return the number of feature vectors of width D to which a pooling reduces a sample."""
    return GRIDS.get(pool, 1) ** 2


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
