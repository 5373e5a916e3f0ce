"""Kernels of `masked_pixel_loss`, MAE's loss (https://arxiv.org/abs/2111.06377, section 3).

1. For norm_pix only: mean and standard deviation of all patches (`patch_stats`).
2. Chunk by chunk: predictions, targets and errors in one kernel (`pixel_error`), which writes the gradients with
   respect to the predictions. While these gradients are in the cache, two plain products compute the gradients of
   hidden and weight from them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import accumulator
from ..pixels import from_cut, to_cut
from ..tuning import config
from .common import (
    acc_type,
    cdiv,
    in_place,
    launcher,
    load_pixels,
    padded,
    patch_starts,
    pixel_arguments,
    precision,
    up,
)
from .matmul import add_product, even_chunks, workspace_rows

NORM_PIX_EPS = tl.constexpr(1e-6)
WORKSPACE_BYTES = 24 << 20  # bytes of gradients per chunk: half of an H100's L2 cache


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["ids", "mean", "rstd"])
def patch_stats_kernel(
    images, ids, mean, rstd, N, table, s0, s1, s2, s3, b0, b1, b2, b3,
    P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr, NORMALISE: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute each patch's mean and 1 / sqrt(unbiased variance + eps), in two exact passes. Cost: NK bytes for uint8,
    which take 23 us at 3.35 TB/s for 98304 patches of 768 elements. Patches of more than BLOCK_D elements are read
    twice."""
    K: tl.constexpr = C * P * P
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_D)
    mask = (m < N)[:, None] & (k < K)[None, :]
    starts = patch_starts(tl.load(ids + m, mask=m < N, other=0), P, C, H, W, PLANAR)
    if K <= BLOCK_D:  # a whole patch fits into registers
        x = load_pixels(
            images, starts[:, None], k[None, :], mask, table, s0, s1, s2, s3, b0, b1, b2, b3,
            P, C, H, W, PLANAR, NORMALISE, ACC,
        )  # fmt: skip
        mu = tl.sum(tl.where(mask, x, 0), 1) / K
        centred = tl.where(mask, x - mu[:, None], 0)
        tl.store(mean + m, mu, mask=m < N)
        squares = centred * centred
    else:
        total = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
        for k0 in range(0, K, BLOCK_D):
            mask = (m < N)[:, None] & (k0 + k < K)[None, :]
            x = load_pixels(
                images, starts[:, None], k0 + k[None, :], mask, table, s0, s1, s2, s3, b0, b1, b2, b3,
                P, C, H, W, PLANAR, NORMALISE, ACC,
            )  # fmt: skip
            total += tl.where(mask, x, 0)
        mu = tl.sum(total, 1) / K
        squares = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
        for k0 in range(0, K, BLOCK_D):
            mask = (m < N)[:, None] & (k0 + k < K)[None, :]
            x = load_pixels(
                images, starts[:, None], k0 + k[None, :], mask, table, s0, s1, s2, s3, b0, b1, b2, b3,
                P, C, H, W, PLANAR, NORMALISE, ACC,
            )  # fmt: skip
            centred = tl.where(mask, x - mu[:, None], 0)
            squares += centred * centred
        tl.store(mean + m, mu, mask=m < N)
    tl.store(rstd + m, 1 / tl.sqrt(tl.sum(squares, 1) / (K - 1) + EPS), mask=m < N)


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["bias", "ids", "unit_weight", "mean", "rstd", "tile_loss", "tile_bias"],
)
def pixel_error_kernel(
    hidden, weight, bias, images, ids, unit_weight, mean, rstd, tile_loss, tile_bias, grad, N, D, stride,
    table, s0, s1, s2, s3, b0, b1, b2, b3,
    P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr, NORMALISE: tl.constexpr,
    NORM_PIX: tl.constexpr, GRAD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compare predictions hidden [N, D] @ weight [K, D].T + bias with the pixels, one tile per program instance.
    Compute the tile's squared errors by row (tile_loss [tiles of K, N]) and, if gradients are needed, the gradients
    unit_weight[r] * 2 / K * error (grad [N, stride], zero beyond K) and their sums by column (tile_bias [tiles of N,
    K]).

    Cost: 2NDK FLOPs and at least N(2D + K + 2K) + 2KD bytes. For M3AE-Large at 512 samples (N 98304, D 512, K 768),
    77 GFLOP take 78 us at 989 TFLOP/s, and 328 MB take 98 us at 3.35 TB/s. Of these 328 MB, 151 MB are gradients, which
    stay in the L2 cache because they are computed in chunks. Together with the two matrix products that
    follow, the cost is 6NDK FLOPs, which take 234 us.
    """
    K: tl.constexpr = C * P * P
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    tile_m = pid // tiles_n
    tile_n = pid % tiles_n
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # 1. Predictions, in tiles of D.
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for d0 in range(0, D, BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        h = tl.load(
            hidden + m.to(tl.int64)[:, None] * D + d[None, :], mask=(m < N)[:, None] & (d < D)[None, :], other=0
        )
        w = tl.load(weight + n[None, :] * D + d[:, None], mask=(n < stride)[None, :] & (d < D)[:, None], other=0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION, out_dtype=ACC)
    # 2. Targets, extracted from the images.
    mask = (m < N)[:, None] & (n < K)[None, :]
    starts = patch_starts(tl.load(ids + m, mask=m < N, other=0), P, C, H, W, PLANAR)
    target = load_pixels(
        images, starts[:, None], n[None, :], mask, table, s0, s1, s2, s3, b0, b1, b2, b3,
        P, C, H, W, PLANAR, NORMALISE, ACC,
    )  # fmt: skip
    if NORM_PIX:
        mu = tl.load(mean + m, mask=m < N, other=0)
        r = tl.load(rstd + m, mask=m < N, other=0)
        target = (target - mu[:, None]) * r[:, None]
    # 3. Squared errors by row.
    error = tl.where(mask, acc + tl.load(bias + n, mask=n < K, other=0).to(ACC)[None, :] - target, 0)
    tl.store(tile_loss + tile_n * N + m, tl.sum(error * error, 1), mask=m < N)
    # 4. Gradients with respect to the predictions, and their sums by column.
    if GRAD:
        error *= tl.load(unit_weight + m, mask=m < N, other=0)[:, None] * (2 / K)
        inside = (m < N)[:, None] & (n < stride)[None, :]
        tl.store(grad + m.to(tl.int64)[:, None] * stride + n[None, :], error, mask=inside)
        tl.store(tile_bias + tile_m * K + n, tl.sum(error, 0), mask=n < K)


def whole_patches(tile: dict[str, int], patch: int) -> dict[str, int]:
    """Return the settings of `patch_stats` for patches of `patch` elements. A warp processes as many elements as in
    `tile`, and a program instance has no more warps than a patch needs, because warps that share a patch have to wait
    for each other."""
    block_d = min(triton.next_power_of_2(patch), tile["TILE"])
    of_warp = tile["TILE"] // tile.get("num_warps", 1)
    return {"BLOCK_M": max(1, of_warp // block_d), "BLOCK_D": block_d, "num_warps": max(1, block_d // of_warp)}


@launcher
def pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    unit_weight: Tensor,
    needs: Sequence[bool],
    row_loss: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    *,
    target: tuple,
) -> None:
    """Fill row_loss [M] and the gradients selected by `needs`; hidden, weight and bias must have the same dtype.
    `target`: the arguments listed in `Target` of ../pixel_loss.py."""
    images, ids, patch_size, scale, shift, norm_pix = target
    dtype, acc = hidden.dtype, accumulator(hidden.dtype)
    (count, dim), patch = hidden.shape, len(weight)
    wide, stride = up(dim), up(patch)  # rows are aligned to 16 bytes for wide loads and vendor BLAS
    images, ids, bias = in_place(images), ids.contiguous(), to_cut(bias, images, patch_size, 0)
    hidden = padded(hidden, count, wide, dtype)
    weight = padded(to_cut(weight, images, patch_size, 0), stride, wide, dtype)
    pixels = pixel_arguments(images, patch_size, scale, shift) | {"ACC": acc_type(dtype)}
    mean = rstd = unit_weight  # not used without norm_pix
    if norm_pix:
        mean, rstd = torch.empty_like(unit_weight), torch.empty_like(unit_weight)
        tile = whole_patches(config("patch_stats", images.device, dtype), patch)
        grid = (cdiv(count, tile["BLOCK_M"]),)
        patch_stats_kernel[grid](images, ids, mean, rstd, count, **pixels, EPS=NORM_PIX_EPS, **tile)
    tile = config("pixel_error", images.device, dtype)
    most = max(1, WORKSPACE_BYTES // (stride * dtype.itemsize))
    chunk = even_chunks(count, most, tile["BLOCK_M"])
    grad = hidden.new_empty(workspace_rows(count, most) if any(needs) else 0, stride)
    total = hidden.new_empty(weight.shape if needs[1] else 0, dtype=acc)
    total_bias = torch.zeros_like(grad_bias)
    tiles_n = cdiv(patch, tile["BLOCK_N"])
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        size = rows.stop - start
        tiles_m = cdiv(size, tile["BLOCK_M"])
        tile_loss = unit_weight.new_empty(tiles_n, size)
        tile_bias = unit_weight.new_empty(tiles_m if any(needs) else 0, patch)
        pixel_error_kernel[(tiles_m * tiles_n,)](
            hidden[rows], weight, bias, images, ids[rows], unit_weight[rows], mean[rows], rstd[rows],
            tile_loss, tile_bias, grad, size, wide, stride, **pixels,
            NORM_PIX=norm_pix, GRAD=any(needs), PRECISION=precision(dtype), **tile,
        )  # fmt: skip
        torch.div(tile_loss.sum(0), patch, out=row_loss[rows])
        if needs[0] and wide == dim:
            torch.mm(grad[:size], weight, out=grad_hidden[rows])
        elif needs[0]:
            grad_hidden[rows] = (grad[:size] @ weight)[:, :dim]
        if needs[1]:
            add_product(total, grad[:size].t(), hidden[rows], start == 0)
        if needs[2]:
            total_bias += tile_bias.sum(0)
    if needs[1]:
        grad_weight.copy_(from_cut(total[:patch, :dim], images, patch_size, 0))
    if needs[2]:
        grad_bias.copy_(from_cut(total_bias, images, patch_size, 0))
