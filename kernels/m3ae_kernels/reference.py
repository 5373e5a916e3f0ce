"""Reference implementations of all ops in a few lines of plain, differentiable torch, for tests and benchmarks.

They have the same results as the ops and, except for `impl` and other arguments that affect only speed and memory, the
same arguments. Rows must have a single dimension. The code is written for readability: nothing is chunked or
recomputed. Most sums are computed in the dtype of the inputs, so use float64 inputs to obtain reliable results.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .pixels import LARGEST


def patches(
    images: Tensor, patch_size: int, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    """Return all patches [B * patches_per_image, P * P * C] of images [B, C, H, W] in `dtype`, normalised if `mean` and
    `std` are given; P is `patch_size`."""
    x_BCHW = images.to(dtype)
    if mean is not None and std is not None:
        mean_C, std_C = (torch.tensor(v, dtype=dtype, device=images.device)[:, None, None] for v in (mean, std))
        x_BCHW = (x_BCHW / LARGEST.get(images.dtype, 1) - mean_C) / std_C
    x = x_BCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, patch_size**2 * images.shape[1])


def patch_embed(
    images: Tensor,
    patch_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """See `m3ae_kernels.patch_embed`."""
    return F.linear(patches(images, patch_size, mean, std, weight.dtype)[patch_ids.long()], weight, bias)


def gather_tokens(
    x: Tensor, rows: Tensor, *, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """See `m3ae_kernels.gather_tokens`."""
    y = x[rows.long()]
    return y if norm_weight is None else F.layer_norm(y, y.shape[1:], norm_weight, norm_bias, eps)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """See `m3ae_kernels.bias_gelu`."""
    return F.gelu(x + bias, approximate="tanh")


def scatter_tokens(
    x: Tensor,
    src: Tensor,
    fill: Tensor | None = None,
    fill_ids: Tensor | None = None,
    table: Tensor | None = None,
    table_ids: Tensor | None = None,
) -> Tensor:
    """See `m3ae_kernels.scatter_tokens`."""

    def rows_or_zero(rows: Tensor, ids: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, 1))[torch.where(ids < 0, len(rows), ids).long()]

    token = rows_or_zero(x, src)
    if fill is not None and fill_ids is not None:
        token = torch.where(src[:, None] >= 0, token, rows_or_zero(fill, fill_ids))
    return token if table is None or table_ids is None else token + rows_or_zero(table, table_ids)


def masked_pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm_pix: bool = False,
    reduction: str,
) -> Tensor:
    """See `m3ae_kernels.masked_pixel_loss`."""
    row_weight = _ones(hidden) if row_weight is None else row_weight
    prediction = F.linear(hidden, weight, bias).to(row_weight.dtype)
    target = patches(images, patch_size, mean, std, row_weight.dtype)[patch_ids.long()]
    if norm_pix:
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    return _reduced((prediction - target).square().mean(1), row_weight, reduction)


def hog_targets(
    images: Tensor,
    patch_ids: Tensor,
    *,
    patch_size: int,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `m3ae_kernels.hog_targets`. `dtype`: dtype of the computation and of the result."""
    x_BCHW = images.to(dtype) / LARGEST.get(images.dtype, 1)
    if std is not None:
        x_BCHW = x_BCHW * torch.tensor(std, dtype=dtype, device=images.device)[:, None, None]
    x = F.pad(x_BCHW.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dx, dy = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    angle = torch.atan2(dy, dx) % math.pi * 9 / math.pi
    away = (angle - torch.arange(9, device=images.device)[:, None, None]).abs()
    votes_B9HW = torch.hypot(dx, dy) * (1 - torch.minimum(away, 9 - away)).clamp(min=0)
    cells_B9hw = F.avg_pool2d(votes_B9HW, patch_size)
    squares = F.avg_pool2d(cells_B9hw.square().sum(1, keepdim=True), 3, 1, 1, count_include_pad=False)
    shares = (cells_B9hw / ((9 * squares).sqrt() + 0.01)).clamp(max=0.2)
    return ((shares - 0.06) / 0.07).flatten(2).mT.flatten(0, 1)[patch_ids.long()]


def masked_hog_loss(
    hidden: Tensor,
    weight: Tensor,
    images: Tensor,
    patch_ids: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    patch_size: int,
    std: Sequence[float] | None = None,
    reduction: str,
) -> Tensor:
    """See `m3ae_kernels.masked_hog_loss`."""
    row_weight = _ones(hidden) if row_weight is None else row_weight
    prediction = F.linear(hidden, weight, bias).to(row_weight.dtype)
    target = hog_targets(images, patch_ids, patch_size=patch_size, std=std, dtype=row_weight.dtype)
    return _reduced((prediction - target).square().mean(1), row_weight, reduction)


def masked_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str,
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `m3ae_kernels.masked_token_loss`."""
    counted = targets != ignore_index
    row_weight = torch.where(counted, _ones(hidden) if row_weight is None else row_weight, 0)
    logits = F.linear(hidden, weight, bias).to(row_weight.dtype)
    row_loss = F.cross_entropy(
        logits, targets.long(), ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        row_loss = row_loss + z_loss * torch.where(counted, logits.logsumexp(1).square(), 0)
    loss = _reduced(row_loss, row_weight, reduction)
    return (loss, logits.argmax(1) == targets) if return_correct else loss


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    q: Tensor | None = None,
    cu_queries: Tensor | None = None,
    max_queries: int | None = None,
) -> Tensor:
    """See `m3ae_kernels.packed_attention`. All samples are padded to the longest one."""
    q, k, v = qkv.unbind(1) if q is None else (q, *qkv.unbind(1))
    cu_queries = cu_seqlens if cu_queries is None else cu_queries
    longest = max_seqlen if max_queries is None else max_queries
    # F.pad appends a row of zeros as padding. If all keys are padding, the weights are uniform and receive no gradient.
    q_SHND, k_SHMD, v_SHMD = (
        F.pad(x, (0, 0, 0, 0, 0, 1))[_padded_rows(cu, n, len(x))].transpose(1, 2)
        for x, cu, n in ((q, cu_queries, longest), (k, cu_seqlens, max_seqlen), (v, cu_seqlens, max_seqlen))
    )
    scores = q_SHND @ k_SHMD.mT * q.shape[-1] ** -0.5
    padding = (_padded_rows(cu_seqlens, max_seqlen, len(k)) == len(k))[:, None, None]
    weights = scores.masked_fill(padding, torch.finfo(scores.dtype).min).softmax(-1)
    rows = torch.arange(len(q), device=q.device)
    sample = torch.bucketize(rows, cu_queries[1:], right=True)
    return (weights @ v_SHMD).transpose(1, 2)[sample, rows - cu_queries[sample]]


def _padded_rows(cu_seqlens: Tensor, longest: int, rows: int) -> Tensor:
    """Return the index of the row of each sample's n-th token, [S, longest], or `rows` if the sample has fewer
    tokens."""
    place = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    return torch.where(place < cu_seqlens[1:, None], place, rows).long()


def _ones(hidden: Tensor) -> Tensor:
    return hidden.new_ones(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))


def _reduced(row_loss: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    weighted = row_loss * row_weight
    if reduction == "none":
        return weighted
    return weighted.sum() / row_weight.sum() if reduction == "mean" else weighted.sum()
