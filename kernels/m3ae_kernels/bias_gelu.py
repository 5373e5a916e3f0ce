"""The bias of a linear layer, followed by GELU. The Triton kernel computes both gradients in one pass over memory.

Shapes: T rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import accumulator, as_rows, check_float, choose_impl, with_lead
from .registry import Op


def bias_gelu(x: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """Return GELU(x + bias), in the tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415, section 2).

    Args:
        x: [..., D] floating-point, the result of a linear layer without its bias.
        bias: [D] floating-point.
        impl: "auto", "triton" or "torch".

    Returns:
        [..., D] in x's dtype, regardless of autocast. For the backward pass, only x and the bias are kept. The backward
        pass computes the gradient of x together with the sum of its rows, which is the gradient of the bias. This sum
        is computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the dtype, shape or device of the named argument is wrong, or `impl` is unknown.
    """
    check_float("x", x, (..., None), x)
    check_float("bias", bias, (x.shape[-1],), x)
    return with_lead(bias_gelu_op(as_rows(x, 1), bias, choose_impl(impl, x.device, x.dtype)), x.shape[:-1])


def _forward(x: Tensor, bias: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        from .triton_impl.bias_gelu import bias_gelu

        return bias_gelu(x, bias)
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def _fake(x, bias, impl):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = bias_gelu_backward_op(grad, x, bias, ctx.impl)
    need_x, need_bias, _ = ctx.needs_input_grad
    return grad_x if need_x else None, grad_bias.to(bias.dtype) if need_bias else None, None


def _gradients(grad: Tensor, x: Tensor, bias: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of x [T, D] in its dtype, and that of the bias [D] in the accumulator dtype."""
    if impl == "triton":
        from .triton_impl.bias_gelu import bias_gelu_backward

        return bias_gelu_backward(grad, x, bias)
    grad_x = torch.ops.aten.gelu_backward(grad, x + bias.to(x.dtype), approximate="tanh")
    return grad_x, grad_x.sum(0, dtype=accumulator(x.dtype))


def _fake_gradients(grad, x, bias, impl):
    return x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=accumulator(x.dtype))


bias_gelu_op = Op("bias_gelu", _forward, _fake, _setup_context, _backward)
bias_gelu_backward_op = Op("bias_gelu_backward", _gradients, _fake_gradients)
