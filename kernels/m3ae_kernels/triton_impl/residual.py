"""Kernels of `residual_norm`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import accumulator
from .common import acc_type, cdiv, launcher
from .norm import norm_rows, norm_slope, row_shares, summed, whole_rows


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["mean", "rstd"])
def residual_norm_kernel(
    x, branch, weight, bias, total, normed, mean, rstd, T, D, stride_x, stride_branch, eps,
    BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows a program. Bytes 8TD in bfloat16: M3AE-Large's encoder at 512 samples (T 37k, D 1024): 306 MB,
    91 us at 3.35 TB/s."""
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (d < D)[None, :]
    row = t.to(tl.int64)[:, None]
    value = tl.load(x + row * stride_x + d[None, :], mask=mask, other=0).to(ACC)
    value += tl.load(branch + row * stride_branch + d[None, :], mask=mask, other=0).to(ACC)
    value = value.to(total.dtype.element_ty)
    tl.store(total + row * D + d[None, :], value, mask=mask)
    value = value.to(ACC)  # as whoever reads it sees it
    out, mu, r = norm_rows(value, mask, weight, bias, d, D, eps, BIAS, ACC)
    tl.store(normed + row * D + d[None, :], out, mask=mask)
    tl.store(mean + t, mu, mask=t < T)
    tl.store(rstd + t, r, mask=t < T)


@launcher
def residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, branch = (t if t.stride(1) == 1 else t.contiguous() for t in (x, branch))
    (rows, dim), dtype = x.shape, torch.promote_types(x.dtype, branch.dtype)
    total, normed = x.new_empty(x.shape, dtype=dtype), branch.new_empty(branch.shape)
    mean = x.new_empty(rows, dtype=accumulator(dtype))
    rstd = torch.empty_like(mean)
    if rows:
        tile = whole_rows("residual_norm", total)
        given = weight if bias is None else bias
        residual_norm_kernel[(cdiv(rows, tile["BLOCK_M"]),)](
            x, branch, weight.contiguous(), given.contiguous(), total, normed, mean, rstd, rows, dim, x.stride(0),
            branch.stride(0), eps, BIAS=bias is not None, ACC=acc_type(dtype), **tile,
        )  # fmt: skip
    return total, normed, mean, rstd


@triton.jit(do_not_specialize=["T", "share"], do_not_specialize_on_alignment=["mean", "rstd"])
def residual_norm_backward_kernel(
    grad_total, grad_normed, total, weight, mean, rstd, grad, partial_weight, partial_bias, T, D, share,
    GRAD: tl.constexpr, PARAMETERS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program's `share` of the rows of grad, and its sums for the weight's and bias's gradients [programs, D].

    Bytes 8TD in bfloat16: M3AE-Large's encoder at 512 samples (T 37k, D 1024): 306 MB, 91 us at 3.35 TB/s.
    """
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0).to(ACC)
    # One sum a lane: across the program's threads they are added once, at the end.
    sum_w = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    sum_b = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    end = tl.minimum((pid + 1) * share, T)
    for t0 in range(pid * share, end, BLOCK_M):
        t = t0 + tl.arange(0, BLOCK_M)
        mask = (t < end)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        g = tl.load(grad_normed + at, mask=mask, other=0).to(ACC)
        value = tl.load(total + at, mask=mask, other=0).to(ACC)
        mu = tl.load(mean + t, mask=t < end, other=0)
        r = tl.load(rstd + t, mask=t < end, other=0)
        rows = tl.where(mask, (value - mu[:, None]) * r[:, None], 0)
        if GRAD:
            slope = norm_slope(g * w[None, :], rows, r, D)
            tl.store(grad + at, slope + tl.load(grad_total + at, mask=mask, other=0).to(ACC), mask=mask)
        if PARAMETERS:
            sum_w += g * rows
            sum_b += g
    if PARAMETERS:
        at = pid.to(tl.int64) * D + d
        tl.store(partial_weight + at, tl.sum(sum_w, 0), mask=d < D)
        tl.store(partial_bias + at, tl.sum(sum_b, 0), mask=d < D)


@launcher
def residual_norm_backward(
    grad_total: Tensor,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = total.shape
    grad = total.new_empty(total.shape if needs[0] else 0)
    parameters = needs[1] or needs[2]
    tile = whole_rows("residual_norm_backward", total)
    share, programs = row_shares(rows, tile["BLOCK_M"])
    partial_weight, partial_bias = (mean.new_empty(programs if parameters else 0, dim) for _ in range(2))
    if programs:
        residual_norm_backward_kernel[(programs,)](
            grad_total.contiguous(), grad_normed.contiguous(), total, weight.contiguous(), mean, rstd, grad,
            partial_weight, partial_bias, rows, dim, share,
            GRAD=needs[0], PARAMETERS=parameters, ACC=acc_type(total.dtype), **tile,
        )  # fmt: skip
    return grad, summed(partial_weight, needs[1]), summed(partial_bias, needs[2])
