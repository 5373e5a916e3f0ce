"""Kernels of `bias_gelu`. Each kernel accesses each of its tensors once. The backward kernel computes the gradient of x
together with its sum over rows, the gradient of the bias.

Shapes: T rows, D width.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import accumulator
from ..tuning import config
from .common import acc_type, cdiv, launcher
from .norm import rows_by_program


@triton.jit
def weight_of_gelu(x):
    """Return GELU(x) / x = 0.5 (1 + tanh(u)) = sigmoid(2 u) for u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return 1 / (1 + tl.exp(-1.5957691216057308 * x * (1 + 0.044715 * x * x)))


@triton.jit
def load_tile(x, rows, end, d, D, stride, ACC: tl.constexpr):
    """Return x[rows, d] in the dtype ACC, and a mask of the elements whose row is below `end` and whose column is below
    D. All other elements are 0."""
    mask = (rows < end)[:, None] & (d < D)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0).to(ACC), mask


@triton.jit(do_not_specialize=["T"])
def bias_gelu_kernel(
    x, bias, y, T, D, stride, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Compute y = GELU(x + bias). Cost: 4TD bytes in bfloat16. For the MLPs of M3AE-Large's encoder at 512 samples of
    256 px (T 35.8k, D 4096), this is 587 MB, which takes 175 us at 3.35 TB/s."""
    tiles = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    t = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = pid % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    value, mask = load_tile(x, t, T, d, D, stride, ACC)
    value += tl.load(bias + d, mask=d < D, other=0).to(ACC)[None, :]
    tl.store(y + t.to(tl.int64)[:, None] * D + d[None, :], value * weight_of_gelu(value), mask=mask)


@launcher
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias), [T, D] in the dtype of x."""
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    count, dim = x.shape
    if y.numel():
        tile = config("bias_gelu", x.device, x.dtype)
        grid = (cdiv(count, tile["BLOCK_M"]) * cdiv(dim, tile["BLOCK_D"]),)
        bias_gelu_kernel[grid](x, bias.contiguous(), y, count, dim, x.stride(0), ACC=acc_type(x.dtype), **tile)
    return y


@triton.jit(do_not_specialize=["T", "program_rows"])
def bias_gelu_backward_kernel(
    grad, x, bias, grad_x, partial, T, D, stride, program_rows,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute grad_x for `program_rows` rows and BLOCK_D columns per program instance, and its sums over these rows
    (partial [programs, D]). Gradients are rounded to the dtype of grad_x before they are summed, as for the bias of a
    linear layer.

    Cost: 6TD bytes in bfloat16. For the MLPs of M3AE-Large's encoder at 512 samples of 256 px (T 35.8k, D 4096), this
    is 881 MB, which takes 263 us at 3.35 TB/s; issuing the instructions (counted in the compiled code) takes 174 us.
    Separate kernels for GELU and the sum would also have to read grad_x, another 2TD bytes.
    """
    tiles = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    d = pid % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    shift = tl.load(bias + d, mask=d < D, other=0).to(ACC)
    # Each row of the tile has its own sums. They are added across rows, and thus across threads, only once, at the end.
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    first = pid // tiles * program_rows
    end = tl.minimum(first + program_rows, T)
    for t0 in range(first, end, BLOCK_M):
        t = t0 + tl.arange(0, BLOCK_M)
        value, mask = load_tile(x, t, end, d, D, stride, ACC)
        g, _ = load_tile(grad, t, end, d, D, D, ACC)
        value += shift[None, :]
        s = weight_of_gelu(value)
        slope = s + value * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * value * value)
        out = (g * slope).to(grad_x.dtype.element_ty)
        tl.store(grad_x + t.to(tl.int64)[:, None] * D + d[None, :], out, mask=mask)
        total += out.to(ACC)
    tl.store(partial + (pid // tiles).to(tl.int64) * D + d, tl.sum(total, 0), mask=d < D)


@launcher
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of x [T, D] in its dtype, and that of the bias [D] in the accumulator dtype."""
    x = x if x.stride(1) == 1 else x.contiguous()
    count, dim = x.shape
    tile = config("bias_gelu", x.device, x.dtype)
    program_rows, programs = rows_by_program(count, tile["BLOCK_M"])
    grad_x = x.new_empty(x.shape)
    partial = x.new_empty(programs, dim, dtype=accumulator(x.dtype))
    if grad_x.numel():
        bias_gelu_backward_kernel[(programs * cdiv(dim, tile["BLOCK_D"]),)](
            grad.contiguous(), x, bias.contiguous(), grad_x, partial, count, dim, x.stride(0), program_rows,
            ACC=acc_type(x.dtype), **tile,
        )  # fmt: skip
    return grad_x, partial.sum(0)
