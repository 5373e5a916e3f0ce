"""GELU on CPUs with AVX-512: gelu.c. Compiled torch takes two to three times as long, most of it for e ** x."""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.hardware import this_cpu
from m3ae_fast.model.cpu.build import AVX512, BF16, load

_NEEDS = {torch.float32: AVX512, torch.bfloat16: AVX512 | {"avx512_bf16"}}
# evaluated at import; inside a compiled function it would break the graph
DTYPES = {dtype for dtype, flags in _NEEDS.items() if this_cpu().flags >= flags}


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """None without a C compiler."""
    library = load("gelu.c", BF16 if dtype == torch.bfloat16 else (), "GELU runs on torch, at half the speed")
    if library is not None:
        library.forward.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_long, ctypes.c_int]
        library.backward.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_long, ctypes.c_int]
    return library


@torch.library.custom_op("m3ae_fast::gelu", mutates_args=())
def gelu_op(x: Tensor) -> Tensor:
    """GELU's tanh approximation, of one of the `DTYPES`."""
    library = _library(x.dtype)
    if library is None:
        return F.gelu(x, approximate="tanh")
    x = x.contiguous()
    y = torch.empty_like(x)
    library.forward(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y


@torch.library.custom_op("m3ae_fast::gelu_backward", mutates_args=())
def gelu_backward_op(grad: Tensor, x: Tensor) -> Tensor:
    library = _library(x.dtype)
    if library is None:
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    library.backward(grad.data_ptr(), x.data_ptr(), dx.data_ptr(), x.numel(), torch.get_num_threads())
    return dx


@gelu_op.register_fake
def _(x):
    return x.new_empty(x.shape)


@gelu_backward_op.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


gelu_op.register_autograd(
    lambda ctx, grad: gelu_backward_op(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
