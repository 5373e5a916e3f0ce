"""fc2(GELU(fc1(x))) as one op, forward and backward, on CPUs with AVX-512.

GELU is fused with the matmul before it (linear.c) or computed separately (gelu.c); code compiled by torch takes two to
three times as long, mainly because of e ** x. For the backward pass, only the input of GELU is kept; GELU is recomputed
together with its gradient.

Shapes: R rows, I inputs, H hidden values, O outputs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import as_rows, with_lead
from ..registry import Op
from .build import BF16, DTYPES, load
from .linear import (
    input_gradient,
    linear_backward_op,
    linear_forward,
    matmul_dtype,
    multiplies,
    parameter_gradients,
    product,
    wanted,
)


def mlp(x: Tensor, weight_HI: Tensor, bias_H: Tensor, weight_OH: Tensor, bias_O: Tensor) -> Tensor | None:
    """Return fc2(gelu(fc1(x))), [..., O] for x [..., I], with the tanh approximation of GELU. Dtypes follow autocast.
    Return None if there is no kernel for this device, CPU or dtype."""
    dtype = matmul_dtype(x, weight_HI)
    if dtype not in DTYPES:
        return None
    return with_lead(mlp_op(as_rows(x.to(dtype), 1), weight_HI, bias_H, weight_OH, bias_O)[0], x.shape[:-1])


def _forward(
    x_RI: Tensor, weight_HI: Tensor, bias_H: Tensor, weight_OH: Tensor, bias_O: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the MLP's output, and the input of GELU."""
    if multiplies(x_RI, weight_HI):
        hidden_RH, y_RH = product(x_RI, weight_HI, bias_H, transposed=True, before_gelu=True)
        assert y_RH is not None
    else:
        hidden_RH = linear_forward(x_RI, weight_HI, bias_H)
        y_RH = gelu(hidden_RH)
    return linear_forward(y_RH, weight_OH, bias_O), hidden_RH


def _fake(x_RI, weight_HI, bias_H, weight_OH, bias_O):
    return tuple(x_RI.new_empty(x_RI.shape[0], weight.shape[0]) for weight in (weight_OH, weight_HI))


def _hidden_gradients(
    grad_RO: Tensor, weight_OH: Tensor, hidden_RH: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of GELU's input and of fc2's weight and bias."""
    grad_RH, y_RH = hidden_gradient(grad_RO, weight_OH, hidden_RH)
    weight, bias = wanted(parameter_gradients(grad_RO, y_RH, weight_OH, needs), needs, grad_RO)
    return grad_RH, weight, bias


def _fake_hidden_gradients(grad_RO, weight_OH, hidden_RH, needs):
    parameters = torch.empty_like(weight_OH), weight_OH.new_empty(weight_OH.shape[0])
    return hidden_RH.new_empty(hidden_RH.shape), *wanted(parameters, needs, grad_RO)


def _setup_context(ctx, inputs, output):
    x_RI, weight_HI, _, weight_OH, _ = inputs
    # without this, autograd would pass zeros as the gradient of GELU's input, the largest tensor of the backward pass
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_RI, weight_HI, weight_OH, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_RO, _):
    if grad_RO is None:
        return (None,) * 5
    x_RI, weight_HI, weight_OH, hidden_RH = ctx.saved_tensors
    needs = list(ctx.needs_input_grad)
    # With two ops, a compiled graph can free GELU's input after the first op. If the graph recomputes x, it can wait
    # until the first op has run.
    grad_RH, *of_fc2 = mlp_backward_op(grad_RO, weight_OH, hidden_RH, needs[3:])
    grads = *linear_backward_op(grad_RH, x_RI, weight_HI, needs[:3]), *of_fc2
    return tuple(grad if need else None for grad, need in zip(grads, needs))


mlp_op = Op("mlp", _forward, _fake, _setup_context, _backward)
mlp_backward_op = Op("mlp_backward", _hidden_gradients, _fake_hidden_gradients)


def hidden_gradient(grad_RO: Tensor, weight_OH: Tensor, hidden_RH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of GELU's input, [R, H], and the recomputed GELU, [R, H], in the dtype of `hidden_RH`."""
    if multiplies(grad_RO, weight_OH):
        grad_RH, y_RH = product(grad_RO, weight_OH, None, transposed=False, hidden_RN=hidden_RH)
        assert y_RH is not None
        return grad_RH, y_RH
    return gelu_gradient(input_gradient(grad_RO, weight_OH), hidden_RH)


def gelu(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415, section 2) for x of any shape,
    whose dtype is one of `DTYPES`."""
    library = _library(x.dtype)
    if library is None:
        return F.gelu(x, approximate="tanh")
    x = x.contiguous()
    y = torch.empty_like(x)
    library.forward(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y


def gelu_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and the recomputed `gelu(x)`, both with the shape and dtype of x."""
    library = _library(x.dtype)
    if library is None:
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh"), F.gelu(x, approximate="tanh")
    grad, x = grad.contiguous(), x.contiguous()
    dx, y = torch.empty_like(x), torch.empty_like(x)
    pointers = (tensor.data_ptr() for tensor in (grad, x, dx, y))
    library.backward(*pointers, x.numel(), torch.get_num_threads())
    return dx, y


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the C library; None without a C compiler."""
    library = load("gelu.c", BF16 if dtype == torch.bfloat16 else (), "GELU runs on torch, at half the speed")
    if library is not None:
        library.forward.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_long, ctypes.c_int]
        library.backward.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_long, ctypes.c_int]
    return library
