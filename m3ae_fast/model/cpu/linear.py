"""The linear layer of the trunk: torch's own, except on CPUs where another library is faster.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.hardware import this_cpu
from m3ae_fast.model.cpu.build import TILES, load, may_use_tiles

# evaluated at import; inside a compiled function they would break the graph
ONEDNN = torch.backends.mkldnn.is_available() and this_cpu().vendor == "AuthenticAMD"
AMX = this_cpu().tiles and may_use_tiles()
PANEL_BYTES = 1 << 20  # of sums that a thread of weight_gradient.c keeps in its core's cache


class Linear(nn.Linear):
    def forward(self, x_RI: Tensor) -> Tensor:
        return linear(x_RI, self.weight, self.bias)


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """As torch.nn.functional.linear, autocast included.

    In float32 on AMD's CPUs through oneDNN, where torch takes MKL, which reaches half of that there; on Intel's MKL is
    the faster by a tenth. In bf16 on CPUs with AMX the gradient of the weight is made by weight_gradient.c, and is of
    the weight's own dtype rather than rounded to bf16.
    """
    if x_RI.device.type != "cpu" or len(x_RI) == 0:
        return F.linear(x_RI, weight_OI, bias_O)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else weight_OI.dtype
    if dtype == torch.float32 and ONEDNN and x_RI.dtype == dtype and not autocast:
        return onednn_linear(x_RI, weight_OI, bias_O)
    in_tiles = weight_OI.shape[0] % 32 == 0 and weight_OI.shape[1] % 32 == 0
    if dtype == torch.bfloat16 and AMX and in_tiles and (autocast or x_RI.dtype == dtype):
        return amx_linear(x_RI.to(dtype), weight_OI, bias_O)
    return F.linear(x_RI, weight_OI, bias_O)


@torch.library.custom_op("m3ae_fast::onednn_linear", mutates_args=())
def onednn_linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


@onednn_linear.register_fake
def _(x_RI, weight_OI, bias_O):
    return x_RI.new_empty(x_RI.shape[0], weight_OI.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad_RO):
    x_RI, weight_OI = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    grad_x = onednn_linear(grad_RO, weight_OI.t(), None) if need_x else None
    grad_weight = onednn_linear(grad_RO.t(), x_RI.t(), None) if need_weight else None
    return grad_x, grad_weight, grad_RO.sum(0) if need_bias else None


onednn_linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("m3ae_fast::amx_linear", mutates_args=())
def amx_linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """In bf16, which is x's dtype; weight and bias may be float32."""
    with torch.autocast("cpu", enabled=False):
        return F.linear(x_RI, weight_OI.to(x_RI.dtype), bias_O.to(x_RI.dtype))


@amx_linear.register_fake
def _(x_RI, weight_OI, bias_O):
    return x_RI.new_empty(x_RI.shape[0], weight_OI.shape[0])


def _amx_backward(ctx, grad_RO):
    x_RI, weight_OI = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    with torch.autocast("cpu", enabled=False):
        grad_x = grad_RO @ weight_OI.to(grad_RO.dtype) if need_x else None
    grad_weight = grad_bias = None
    if need_weight:
        grad_weight, grad_bias = (g.to(weight_OI.dtype) for g in weight_gradient(grad_RO, x_RI))
    elif need_bias:
        grad_bias = grad_RO.sum(0, dtype=weight_OI.dtype)
    return grad_x, grad_weight, grad_bias


amx_linear.register_autograd(_amx_backward, setup_context=_save)


@torch.library.custom_op("m3ae_fast::weight_gradient", mutates_args=())
def weight_gradient(grad_RO: Tensor, x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """grad^T x, [O, I], and grad's sum over rows, [O], both float32, from bf16; O and I are multiples of 32."""
    library = _library()
    if library is None:
        with torch.autocast("cpu", enabled=False):
            return (grad_RO.t() @ x_RI).float(), grad_RO.sum(0, dtype=torch.float32)
    grad, x = (_rows(tensor) for tensor in (grad_RO, x_RI))
    turned = x.shape[1] > grad.shape[1]
    wide, narrow = (x, grad) if turned else (grad, x)
    (rows, width), columns, threads = wide.shape, narrow.shape[1], torch.get_num_threads()
    panel = min(PANEL_BYTES // (4 * columns), -(-width // threads))
    packed = narrow.new_empty(-(-rows // 32) * 32 * columns)
    out = grad.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)
    wide_sums, narrow_sums = (out.new_zeros(size) for size in (width, columns))
    done = library.weight_gradient(
        wide.data_ptr(), narrow.data_ptr(), rows, width, columns, wide.stride(0), narrow.stride(0), turned,
        packed.data_ptr(), out.data_ptr(), wide_sums.data_ptr(), narrow_sums.data_ptr(), max(32, -(-panel // 32) * 32),
        threads,
    )  # fmt: skip
    if not done:
        raise MemoryError("no memory for a weight's gradient")
    return out, narrow_sums if turned else wide_sums


@weight_gradient.register_fake
def _(grad_RO, x_RI):
    out = grad_RO.new_empty(grad_RO.shape[1], x_RI.shape[1], dtype=torch.float32)
    return out, out.new_empty(grad_RO.shape[1])


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load("weight_gradient.c", TILES, "gradients of weights run on torch, at half the speed")
    if library is not None:
        tensor, size = ctypes.c_void_p, ctypes.c_long
        library.weight_gradient.argtypes = [*[tensor] * 2, *[size] * 5, ctypes.c_int, *[tensor] * 4, size, ctypes.c_int]
    return library


def _rows(x: Tensor) -> Tensor:
    """weight_gradient.c knows one stride, that between rows; torch's allocations are aligned to 64 bytes."""
    return x if x.stride(1) == 1 else x.contiguous()
