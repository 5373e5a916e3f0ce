"""Pooling of the encoder's rows to one feature vector per sample.

Shapes: T encoder rows, S samples, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast.batch.packed import Segments


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
