"""LayerNorm: torch's own function, except for 16-bit inputs on a CPU. For these inputs, torch would sum the gradients
of weight and bias in 16 bits, with errors of 7 %, or of 58 % if a sum is small compared with its terms.

Shapes: R rows, D width.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import as_rows, with_lead
from ..registry import NAMESPACE, once
from .build import BF16, DTYPES, load

BLOCK_ROWS = 64  # rows that norm.c sums at once


class LayerNorm(nn.LayerNorm):
    """A torch.nn.LayerNorm that is computed by `layer_norm` if it has a weight [D]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised rows [..., D]."""
        if self.weight is None or self.weight.dim() != 1:
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """Return the result of torch.nn.functional.layer_norm, [..., D] in the dtype of x, with gradients that are
    accumulated in float32. Under torch.compile, torch's own function is used, because its compiled code accumulates in
    float32."""
    low = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    if torch.compiler.is_compiling() or not low:
        return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)
    return with_lead(_LayerNorm.apply(as_rows(x, 1), weight_D, bias_D, eps)[0], x.shape[:-1])


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(x_RD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, mean and reciprocal standard deviation."""
        shift_D = None if bias_D is None else bias_D.float()
        return torch.native_layer_norm(x_RD, weight_D.shape, weight_D.float(), shift_D, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x_RD, weight_D, bias_D, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x_RD, weight_D, *output[1:])
        ctx.dtypes = x_RD.dtype, weight_D.dtype, weight_D.dtype if bias_D is None else bias_D.dtype

    @staticmethod
    def backward(ctx, *grads):
        return _backward(ctx, *grads)


def _gradients(ctx, grad_RD: Tensor, *_) -> tuple[Tensor | None, ...]:
    x_RD, weight_D, mean_R1, rstd_R1 = ctx.saved_tensors
    grads = layer_norm_gradients(grad_RD, x_RD, weight_D.float(), mean_R1, rstd_R1)
    return *(g.to(d) if need else None for g, d, need in zip(grads, ctx.dtypes, ctx.needs_input_grad)), None


_backward = once("layer_norm", _gradients)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_gradients", mutates_args=())
def layer_norm_gradients(
    grad_RD: Tensor, x_RD: Tensor, weight_D: Tensor, mean_R1: Tensor, rstd_R1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, in its dtype, and of weight and bias, in float32. weight, mean and rstd are float32 as
    well."""
    library = _library() if x_RD.dtype == torch.bfloat16 and x_RD.dtype in DTYPES else None
    if library is None:
        wide = grad_RD.float(), x_RD.float(), weight_D.shape, mean_R1, rstd_R1, weight_D, weight_D
        dx, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(*wide, [True] * 3)
        return dx.to(x_RD.dtype), of_weight, of_bias
    grad_RD, x_RD, weight_D = grad_RD.contiguous(), x_RD.contiguous(), weight_D.contiguous()
    rows, width = x_RD.shape
    dx = torch.empty_like(x_RD)
    sums_B2D = weight_D.new_zeros(-(-rows // BLOCK_ROWS), 2, width)
    tensors = grad_RD, x_RD, weight_D, mean_R1, rstd_R1, dx, sums_B2D
    library.backward(*(t.data_ptr() for t in tensors), rows, width, BLOCK_ROWS, torch.get_num_threads())
    return dx, sums_B2D[:, 0].sum(0), sums_B2D[:, 1].sum(0)


@layer_norm_gradients.register_fake
def _(grad_RD, x_RD, weight_D, mean_R1, rstd_R1):
    return x_RD.new_empty(x_RD.shape), torch.empty_like(weight_D), torch.empty_like(weight_D)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the C library; None without a C compiler."""
    library = load("norm.c", BF16, "torch computes the gradients of LayerNorms, which is slower")
    if library is not None:
        library.backward.argtypes = [*[ctypes.c_void_p] * 7, *[ctypes.c_long] * 3, ctypes.c_int]
    return library
