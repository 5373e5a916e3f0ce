"""Kernels of `patch_embed`: a product whose left operand is extracted from the images and normalised while it is
loaded, like an implicit GEMM for convolutions (https://arxiv.org/abs/1410.0759). The gradient of the weight is summed
over splits of the rows, as in split-K products (https://github.com/NVIDIA/cutlass).
"""

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

# For the gradient of the weight, the rows are split so that there are about this number of program instances, two for
# each multiprocessor of an H100; few rows give fewer instances, and large weights give more. The number is the same on
# every GPU, so the order of summation depends only on the sizes of the tensors and of the tiles.
TARGET_PROGRAMS = 264


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["ids", "bias"])
def patch_embed_kernel(
    images, ids, weight, bias, out, N, D, stride, table, s0, s1, s2, s3, b0, b1, b2, b3,
    P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr, NORMALISE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out [N, D] = pixels [N, K] @ weight [D, K].T + bias, one tile per program instance. K = C * P * P, and
    `stride` is the stride between rows of the weight.

    Cost: 2NKD FLOPs and at least N(K + 2D) + 2KD bytes for uint8 and bfloat16. For M3AE-Large at 512 samples (N
    32768, K 768, D 1024), 51.5 GFLOP take 52 us at 989 TFLOP/s, and 94 MB take 28 us at 3.35 TB/s. The tensor cores are
    the bottleneck.
    """
    K: tl.constexpr = C * P * P
    tiles_n = tl.cdiv(D, BLOCK_N)
    pid = tl.program_id(0)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    starts = patch_starts(tl.load(ids + m, mask=m < N, other=0), P, C, H, W, PLANAR)
    # 1. Pixels times weight, in tiles of K.
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = load_pixels(
            images, starts[:, None], k[None, :], (m < N)[:, None] & (k < K)[None, :],
            table, s0, s1, s2, s3, b0, b1, b2, b3, P, C, H, W, PLANAR, NORMALISE, ACC,
        )  # fmt: skip
        w = tl.load(weight + n[None, :] * stride + k[:, None], mask=(n < D)[None, :] & (k < stride)[:, None], other=0)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION, out_dtype=ACC)
    # 2. The bias.
    acc += tl.load(bias + n, mask=n < D, other=0).to(ACC)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * D + n[None, :], acc, mask=(m < N)[:, None] & (n < D)[None, :])


@launcher
def patch_embed(
    images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, patch_size: int, scale, shift, out: Tensor
) -> None:
    """Compute the embeddings and write them to `out` [N, D]. The matmul runs in the dtype of `out`; `bias` must have
    the same dtype."""
    if not out.numel():
        return
    (rows, dim), dtype, stride = out.shape, out.dtype, up(weight.shape[1])
    images = in_place(images)
    tile = config("patch_embed", images.device, dtype)
    grid = (cdiv(rows, tile["BLOCK_M"]) * cdiv(dim, tile["BLOCK_N"]),)
    patch_embed_kernel[grid](
        images, ids.contiguous(), padded(to_cut(weight, images, patch_size, 1), dim, stride, dtype), bias.contiguous(),
        out, rows, dim, stride,
        **pixel_arguments(images, patch_size, scale, shift), ACC=acc_type(dtype), PRECISION=precision(dtype), **tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "split_rows"], do_not_specialize_on_alignment=["ids"])
def patch_embed_dweight_kernel(
    images, ids, grad, partial, N, D, split_rows, table, s0, s1, s2, s3, b0, b1, b2, b3,
    P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr, NORMALISE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute partial [S, D, K] = grad [N, D].T @ pixels [N, K] over the rows of each split s, one tile per program
    instance. BLOCK_M, BLOCK_N and BLOCK_K are the tile sizes along D, along the elements of a patch, and along the
    rows.

    Cost: 2NKD FLOPs, and at least N(K + 2D) + 4KD bytes plus 8SKD bytes for the splits. For M3AE-Large at 512 samples
    (N 32768, K 768, D 1024, S 6), 51.5 GFLOP take 52 us at 989 TFLOP/s, and 133 MB take 40 us at 3.35 TB/s.
    """
    PATCH: tl.constexpr = C * P * P
    tiles_n: tl.constexpr = (PATCH + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    split = tl.program_id(1)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # 1. The product over the rows of this split; `patch_embed_dweight` adds the splits, in their order.
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for r0 in range(split * split_rows, tl.minimum((split + 1) * split_rows, N), BLOCK_K):
        r = r0 + tl.arange(0, BLOCK_K)
        g = tl.load(grad + r.to(tl.int64)[:, None] * D + m[None, :], mask=(r < N)[:, None] & (m < D)[None, :], other=0)
        starts = patch_starts(tl.load(ids + r, mask=r < N, other=0), P, C, H, W, PLANAR)
        x = load_pixels(
            images, starts[:, None], n[None, :], (r < N)[:, None] & (n < PATCH)[None, :],
            table, s0, s1, s2, s3, b0, b1, b2, b3, P, C, H, W, PLANAR, NORMALISE, ACC,
        )  # fmt: skip
        acc = tl.dot(tl.trans(g), x.to(g.dtype), acc, input_precision=PRECISION, out_dtype=ACC)
    out = partial + split.to(tl.int64) * D * PATCH + m[:, None] * PATCH + n[None, :]
    tl.store(out, acc, mask=(m < D)[:, None] & (n < PATCH)[None, :])


@launcher
def patch_embed_dweight(grad: Tensor, images: Tensor, ids: Tensor, patch_size: int, scale, shift, out: Tensor) -> None:
    """Compute the gradient of the weight [D, K] and write it to `out`."""
    rows, dim = grad.shape
    if not rows or not out.numel():
        out.zero_()
        return
    images = in_place(images)
    tile = config("patch_embed_dweight", images.device, grad.dtype)
    tiles = cdiv(dim, tile["BLOCK_M"]) * cdiv(out.shape[1], tile["BLOCK_N"])
    blocks = cdiv(rows, tile["BLOCK_K"])
    split_blocks = cdiv(blocks, min(blocks, cdiv(TARGET_PROGRAMS, tiles)))
    splits = cdiv(blocks, split_blocks)
    partial = out.new_empty(splits, *out.shape, dtype=accumulator(grad.dtype))
    patch_embed_dweight_kernel[(tiles, splits)](
        images, ids.contiguous(), grad.contiguous(), partial, rows, dim, split_blocks * tile["BLOCK_K"],
        **pixel_arguments(images, patch_size, scale, shift),
        ACC=acc_type(grad.dtype), PRECISION=precision(grad.dtype), **tile,
    )  # fmt: skip
    out.copy_(from_cut(partial.sum(0), images, patch_size, 1))
