"""Kernels of `gather_tokens` with a LayerNorm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import accumulator
from ..tuning import config
from .common import acc_type, cdiv, launcher

MAX_PARTIALS = 512  # programs of the backward, each with its own sums for weight and bias


@triton.jit(do_not_specialize=["M"])
def gather_norm_kernel(
    x, rows, weight, bias, y, mean, rstd, M, D, stride, eps,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(x[rows]), BLOCK_M whole rows a program. Bytes 4MD in bfloat16: M3AE-Large's decoder output at 512
    samples (M 123k, D 512): 252 MB, 75 us at 3.35 TB/s."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = (m < M)[:, None] & (d < D)[None, :]
    row = tl.load(rows + m, mask=m < M, other=0).to(tl.int64)
    value = tl.load(x + row[:, None] * stride + d[None, :], mask=mask, other=0).to(ACC)
    mu = tl.sum(value, 1) / D
    centred = tl.where(mask, value - mu[:, None], 0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    w = tl.load(weight + d, mask=d < D, other=0).to(ACC)
    b = tl.load(bias + d, mask=d < D, other=0).to(ACC)
    out = centred * r[:, None] * w[None, :] + b[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * D + d[None, :], out, mask=mask)
    tl.store(mean + m, mu, mask=m < M)
    tl.store(rstd + m, r, mask=m < M)


@launcher
def gather_norm(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    count, dim = len(rows), x.shape[1]
    y = x.new_empty(count, dim)
    mean = x.new_empty(count, dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    if count:
        tile = _whole_rows("gather_norm", x)
        gather_norm_kernel[(cdiv(count, tile["BLOCK_M"]),)](
            x, rows.contiguous(), weight.contiguous(), bias.contiguous(), y, mean, rstd, count, dim, x.stride(0), eps,
            ACC=acc_type(x.dtype), **tile,
        )  # fmt: skip
    return y, mean, rstd


def _whole_rows(name: str, x: Tensor) -> dict:
    """A table's TILE elements as BLOCK_M rows of the next power of two."""
    tile = config(name, x.device, x.dtype)
    block_d = triton.next_power_of_2(x.shape[1])
    return {"BLOCK_M": max(1, tile.pop("TILE") // block_d), "BLOCK_D": block_d} | tile


@triton.jit(do_not_specialize=["M", "share"])
def gather_norm_backward_kernel(
    grad, x, rows, weight, mean, rstd, grad_x, partial_weight, partial_bias, M, D, stride, share,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of grad_x, and each program's sums over its `share` of rows for the weight's and bias's gradients
    [programs, D].

    Bytes at least 6MD in bfloat16: M3AE-Large at 512 samples (M 123k, D 512): 378 MB, 113 us at 3.35 TB/s.
    """
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0).to(ACC)
    sum_w = tl.zeros((BLOCK_D,), dtype=ACC)
    sum_b = tl.zeros((BLOCK_D,), dtype=ACC)
    end = tl.minimum((pid + 1) * share, M)
    for m0 in range(pid * share, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m < end)[:, None] & (d < D)[None, :]
        row = tl.load(rows + m, mask=m < end, other=0).to(tl.int64)
        g = tl.load(grad + m.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0).to(ACC)
        value = tl.load(x + row[:, None] * stride + d[None, :], mask=mask, other=0).to(ACC)
        mu = tl.load(mean + m, mask=m < end, other=0)
        r = tl.load(rstd + m, mask=m < end, other=0)
        normed = tl.where(mask, (value - mu[:, None]) * r[:, None], 0)
        gw = g * w[None, :]
        along = tl.sum(gw * normed, 1) / D
        level = tl.sum(gw, 1) / D
        out = (gw - normed * along[:, None] - level[:, None]) * r[:, None]
        tl.store(grad_x + row[:, None] * D + d[None, :], out, mask=mask)
        sum_w += tl.sum(g * normed, 0)
        sum_b += tl.sum(g, 0)
    at = pid.to(tl.int64) * D + d
    tl.store(partial_weight + at, sum_w, mask=d < D)
    tl.store(partial_bias + at, sum_b, mask=d < D)


@launcher
def gather_norm_backward(
    grad: Tensor, x: Tensor, rows: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    count, dim = grad.shape
    grad_x = x.new_zeros(x.shape)
    if not count:
        empty = mean.new_zeros(dim)
        return grad_x, empty, empty.clone()
    tile = _whole_rows("gather_norm_backward", x)
    share = cdiv(cdiv(count, tile["BLOCK_M"]), MAX_PARTIALS) * tile["BLOCK_M"]
    programs = cdiv(count, share)
    partial = mean.new_empty(2, programs, dim)
    gather_norm_backward_kernel[(programs,)](
        grad.contiguous(), x, rows.contiguous(), weight.contiguous(), mean, rstd, grad_x, partial[0], partial[1],
        count, dim, x.stride(0), share, ACC=acc_type(x.dtype), **tile,
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(1).unbind()
    return grad_x, grad_weight.clone(), grad_bias.clone()
