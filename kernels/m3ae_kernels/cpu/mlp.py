"""GELU on CPUs with AVX-512: gelu.c. Compiled torch takes two to three times as long, most of it for e ** x.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import BF16, DTYPES, load
from .linear import (
    by_kernels,
    input_gradient,
    linear,
    linear_backward,
    linear_op,
    matmul_dtype,
    multiplies,
    parameter_gradients,
    product,
)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """None without a C compiler."""
    library = load("gelu.c", BF16 if dtype == torch.bfloat16 else (), "GELU runs on torch, at half the speed")
    if library is not None:
        library.forward.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_long, ctypes.c_int]
        library.backward.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_long, ctypes.c_int]
    return library


@torch.library.custom_op("m3ae::gelu", mutates_args=())
def gelu_op(x: Tensor) -> Tensor:
    """GELU's tanh approximation, of one of the `DTYPES`."""
    library = _library(x.dtype)
    if library is None:
        return F.gelu(x, approximate="tanh")
    x = x.contiguous()
    y = torch.empty_like(x)
    library.forward(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y


@torch.library.custom_op("m3ae::gelu_gradient", mutates_args=())
def gelu_gradient_op(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and `gelu_op(x)` once more."""
    library = _library(x.dtype)
    if library is None:
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh"), F.gelu(x, approximate="tanh")
    grad, x = grad.contiguous(), x.contiguous()
    dx, y = torch.empty_like(x), torch.empty_like(x)
    pointers = (tensor.data_ptr() for tensor in (grad, x, dx, y))
    library.backward(*pointers, x.numel(), torch.get_num_threads())
    return dx, y


@gelu_op.register_fake
def _(x):
    return x.new_empty(x.shape)


@gelu_gradient_op.register_fake
def _(grad, x):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def linear_gelu(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor | None]:
    """`linear(x)`, and GELU of it, without a gradient, for `gelu_linear`: None where it would be made apart."""
    dtype = matmul_dtype(x_RI, weight_OI)
    if dtype is None or not by_kernels(dtype, weight_OI):
        return linear(x_RI, weight_OI, bias_O), None
    return linear_gelu_op(x_RI.to(dtype), weight_OI, bias_O)


@torch.library.custom_op("m3ae::linear_gelu", mutates_args=())
def linear_gelu_op(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    if multiplies(x_RI, weight_OI):
        out_RO, y_RO = product(x_RI, weight_OI, bias_O, turned=True, before_gelu=True)
        assert y_RO is not None
        return out_RO, y_RO
    out_RO = linear_op(x_RI, weight_OI, bias_O)
    return out_RO, gelu_op(out_RO)


@linear_gelu_op.register_fake
def _(x_RI, weight_OI, bias_O):
    out_RO = x_RI.new_empty(x_RI.shape[0], weight_OI.shape[0])
    return out_RO, torch.empty_like(out_RO)


def _keep_inputs(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2])


linear_gelu_op.register_autograd(lambda ctx, grad_RO, _: linear_backward(ctx, grad_RO), setup_context=_keep_inputs)


def gelu_linear(x_RI: Tensor, y_RI: Tensor | None, weight_OI: Tensor, bias_O: Tensor) -> Tensor | None:
    """`linear(gelu(x))` that keeps x alone for the backward pass, which makes gelu(x) along with its gradient: the
    compiler would keep both, since it does not know what the op costs. `y` is gelu(x) where it is known. None where
    this CPU has no kernel for it."""
    dtype = matmul_dtype(x_RI, weight_OI)
    if dtype not in DTYPES or x_RI.dtype != dtype:
        return None
    return gelu_linear_op(x_RI, y_RI, weight_OI, bias_O)


@torch.library.custom_op("m3ae::gelu_linear", mutates_args=())
def gelu_linear_op(x_RI: Tensor, y_RI: Tensor | None, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    return linear_op(gelu_op(x_RI) if y_RI is None else y_RI, weight_OI, bias_O)


@gelu_linear_op.register_fake
def _(x_RI, y_RI, weight_OI, bias_O):
    return x_RI.new_empty(x_RI.shape[0], weight_OI.shape[0])


@torch.library.custom_op("m3ae::gelu_input_gradient", mutates_args=())
def gelu_input_gradient(grad_RO: Tensor, weight_OI: Tensor, x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gelu_linear_op`'s x, and `gelu_op(x)` once more."""
    if multiplies(grad_RO, weight_OI):
        dx, y_RI = product(grad_RO, weight_OI, None, turned=False, hidden_RN=x_RI)
        assert y_RI is not None
        return dx, y_RI
    return gelu_gradient_op(input_gradient(grad_RO, weight_OI), x_RI)


@gelu_input_gradient.register_fake
def _(grad_RO, weight_OI, x_RI):
    return x_RI.new_empty(x_RI.shape), x_RI.new_empty(x_RI.shape)


def _backward(ctx, grad_RO):
    x_RI, weight_OI = ctx.saved_tensors
    need_x, _, *needs = ctx.needs_input_grad
    dx, y_RI = gelu_input_gradient(grad_RO, weight_OI, x_RI)
    return dx if need_x else None, None, *parameter_gradients(grad_RO, y_RI, weight_OI, needs)


gelu_linear_op.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], inputs[2])
)
