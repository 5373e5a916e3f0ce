"""Kernels of `gather_tokens` with a LayerNorm (https://arxiv.org/abs/1607.06450).

Whole rows are kept in registers, so mean and variance are computed exactly, in two passes, and not by a running
formula. In the backward pass, each program instance computes partial sums over rows, which are added afterwards in a
fixed order.

Shapes: T packed rows, M chosen rows, D width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import accumulator
from ..tuning import config
from .common import acc_type, cdiv, launcher
from .rows import invert

# maximum number of program instances of the backward pass; each computes partial sums for weight and bias
MAX_PARTIALS = 512


@triton.jit
def norm_rows(value, mask, weight, bias, d, D, eps, BIAS: tl.constexpr, ACC: tl.constexpr):
    """Return the LayerNorm of whole rows, their means and reciprocal standard deviations. `value` must be 0 where
    `mask` is false."""
    # 1. Mean, then variance around it.
    mu = tl.sum(value, 1) / D
    centred = tl.where(mask, value - mu[:, None], 0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    # 2. Scale and shift.
    out = centred * r[:, None] * tl.load(weight + d, mask=d < D, other=0).to(ACC)[None, :]
    if BIAS:
        out += tl.load(bias + d, mask=d < D, other=0).to(ACC)[None, :]
    return out, mu, r


@triton.jit
def norm_gradient(gw, normed, r, D):
    """Return the gradient of a LayerNorm's input, r * (gw - mean(gw) - normed * mean(gw * normed)). gw is the gradient
    of the output times the weight, normed is the normalised input before the weight is applied, and r is the reciprocal
    standard deviation; gw and normed are 0 beyond D."""
    along = tl.sum(gw * normed, 1) / D
    level = tl.sum(gw, 1) / D
    return (gw - normed * along[:, None] - level[:, None]) * r[:, None]


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["rows"])
def gather_norm_kernel(
    x, rows, weight, bias, y, mean, rstd, M, D, stride, eps,
    BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute y = LayerNorm(x[rows]), BLOCK_M whole rows per program instance. Cost: 4MD bytes in bfloat16.
    For M3AE-Large's decoder output at 512 samples (M 123k, D 512), this is 252 MB, which takes 75 us at 3.35 TB/s."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = (m < M)[:, None] & (d < D)[None, :]
    row = tl.load(rows + m, mask=m < M, other=0).to(tl.int64)
    value = tl.load(x + row[:, None] * stride + d[None, :], mask=mask, other=0).to(ACC)
    out, mu, r = norm_rows(value, mask, weight, bias, d, D, eps, BIAS, ACC)
    tl.store(y + m.to(tl.int64)[:, None] * D + d[None, :], out, mask=mask)
    tl.store(mean + m, mu, mask=m < M)
    tl.store(rstd + m, r, mask=m < M)


@launcher
def gather_norm(
    x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return LayerNorm(x[rows]), [M, D] in the dtype of x [T, D], and the means and reciprocal standard deviations [M]
    in the accumulator dtype."""
    x = x if x.stride(1) == 1 else x.contiguous()
    count, dim = len(rows), x.shape[1]
    y = x.new_empty(count, dim)
    mean = x.new_empty(count, dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    if count:
        tile = whole_rows("gather_norm", x)
        given = weight if bias is None else bias
        gather_norm_kernel[(cdiv(count, tile["BLOCK_M"]),)](
            x, rows.contiguous(), weight.contiguous(), given.contiguous(), y, mean, rstd, count, dim, x.stride(0), eps,
            BIAS=bias is not None, ACC=acc_type(x.dtype), **tile,
        )  # fmt: skip
    return y, mean, rstd


def whole_rows(name: str, x: Tensor) -> dict:
    """Return the settings with TILE converted from elements to BLOCK_M rows. The width of a row, BLOCK_D, is rounded up
    to a power of two."""
    tile = config(name, x.device, x.dtype)
    block_d = triton.next_power_of_2(x.shape[1])
    return {"BLOCK_M": max(1, tile.pop("TILE") // block_d), "BLOCK_D": block_d} | tile


def rows_by_program(rows: int, block: int) -> tuple[int, int]:
    """Return the number of rows per program instance of a backward pass, a multiple of `block`, and the number of
    instances."""
    program_rows = cdiv(cdiv(rows, block), MAX_PARTIALS) * block
    return program_rows, cdiv(rows, program_rows) if rows else 0


def summed(partial: Tensor, wanted: bool) -> Tensor:
    """Return the sum over the partial sums of all program instances, [programs, D] -> [D]; an empty tensor if the
    gradient is not needed."""
    return partial.sum(0) if wanted else partial.new_empty(0)


@triton.jit(do_not_specialize=["T", "program_rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def gather_norm_backward_kernel(
    grad, x, source, weight, mean, rstd, grad_x, partial_weight, partial_bias, T, D, stride, program_rows,
    GRAD_X: tl.constexpr, PARAMETERS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute grad_x for `program_rows` rows per program instance (zero for rows with a negative `source`), and the
    sums over these rows for the gradients of weight and bias [programs, D].

    Cost: at least 4MD + 2TD bytes in bfloat16. For M3AE-Large at 512 samples (M 123k, T 164k, D 512), this is 420
    MB, which takes 125 us at 3.35 TB/s.
    """
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0).to(ACC)
    # Each row of the tile has its own sums. They are added across rows, and thus across threads, only once, at the end.
    sum_w = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    sum_b = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    end = tl.minimum((pid + 1) * program_rows, T)
    for t0 in range(pid * program_rows, end, BLOCK_M):
        # 1. The normalised rows of the forward pass, recomputed from its mean and rstd.
        t = t0 + tl.arange(0, BLOCK_M)
        m = tl.load(source + t, mask=t < end, other=-1).to(tl.int64)
        mask = (m >= 0)[:, None] & (d < D)[None, :]
        g = tl.load(grad + m[:, None] * D + d[None, :], mask=mask, other=0).to(ACC)
        value = tl.load(x + t.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0).to(ACC)
        mu = tl.load(mean + m, mask=m >= 0, other=0)
        r = tl.load(rstd + m, mask=m >= 0, other=0)
        normed = tl.where(mask, (value - mu[:, None]) * r[:, None], 0)
        # 2. The gradient of x.
        if GRAD_X:
            out = norm_gradient(g * w[None, :], normed, r, D)
            tl.store(grad_x + t.to(tl.int64)[:, None] * D + d[None, :], out, mask=(t < end)[:, None] & (d < D)[None, :])
        # 3. The sums for weight and bias.
        if PARAMETERS:
            sum_w += g * normed
            sum_b += g
    if PARAMETERS:
        at = pid.to(tl.int64) * D + d
        tl.store(partial_weight + at, tl.sum(sum_w, 0), mask=d < D)
        tl.store(partial_bias + at, tl.sum(sum_b, 0), mask=d < D)


@launcher
def gather_norm_backward(
    grad: Tensor, x: Tensor, rows: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [T, D] in its dtype, and of weight and bias [D] in the accumulator dtype, given `grad`
    [M, D]. Gradients that `needs` does not select are empty tensors."""
    x = x if x.stride(1) == 1 else x.contiguous()
    count, dim = x.shape
    grad_x = x.new_empty(x.shape if needs[0] else 0)
    parameters = needs[1] or needs[2]
    tile = whole_rows("gather_norm_backward", x)
    program_rows, programs = rows_by_program(count, tile["BLOCK_M"])
    partial_weight, partial_bias = (mean.new_empty(programs if parameters else 0, dim) for _ in range(2))
    if programs:
        gather_norm_backward_kernel[(programs,)](
            grad.contiguous(), x, invert(rows, count), weight.contiguous(), mean, rstd, grad_x, partial_weight,
            partial_bias, count, dim, x.stride(0), program_rows,
            GRAD_X=needs[0], PARAMETERS=parameters, ACC=acc_type(x.dtype), **tile,
        )  # fmt: skip
    return grad_x, summed(partial_weight, needs[1]), summed(partial_bias, needs[2])
