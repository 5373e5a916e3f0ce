"""The linear layer of the transformer blocks: torch's own function, except on CPUs on which another implementation is
faster.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import as_rows, with_lead
from ..registry import Op
from .build import BF16, TILES, load, may_use_tiles
from .processor import this_cpu


def _flags() -> tuple[str, ...] | None:
    """Return the compiler's flags for linear.c and weight_gradient.c; None if bf16 products are slow."""
    if this_cpu().tiles and may_use_tiles():
        return TILES
    return BF16 if this_cpu().pairs else None


# The flags are evaluated at import, because a query inside a compiled function would break the graph.
ONEDNN = torch.backends.mkldnn.is_available() and this_cpu().vendor == "AuthenticAMD"
FLAGS = _flags()
PANEL_BYTES = 1 << 20  # maximum size of the sums that a thread of weight_gradient.c computes at a time


class Linear(nn.Linear):
    """A torch.nn.Linear that is computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., O] for x [..., I]; dtypes follow autocast."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return the result of torch.nn.functional.linear, [..., O] for x [..., I], including the behaviour of autocast.

    For float32 on AMD CPUs, oneDNN is used, which is twice as fast as torch's choice, MKL; on Intel CPUs, MKL is kept,
    because it is 10 % faster. For bf16 on CPUs with AMX, and on AMD CPUs with AVX-512's bf16 dot products, linear.c and
    weight_gradient.c are used, which do not round the bias and the gradients of parameters to bf16.
    """
    dtype = matmul_dtype(x, weight_OI)
    if dtype is None or not (_by_onednn(dtype, weight_OI) or by_kernels(dtype, weight_OI)):
        return F.linear(x, weight_OI, bias_O)
    return with_lead(linear_op(as_rows(x.to(dtype), 1), weight_OI, bias_O), x.shape[:-1])


def matmul_dtype(x: Tensor, weight_OI: Tensor) -> torch.dtype | None:
    """Return the dtype in which `linear` multiplies; None if torch's own function must be used, for example on a GPU,
    for float64 or for two different dtypes. The result does not depend on the number of rows. Otherwise, the compiled
    graphs of two ranks could differ and compute gradients in different orders. With ZeRO, the order must be the same on
    all ranks, because it is also the order in which gradients are reduced."""
    if x.device.type != "cpu" or x.dtype == torch.float64:  # autocast does not change float64
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return x.dtype if x.dtype == weight_OI.dtype else None


def _by_onednn(dtype: torch.dtype, weight_OI: Tensor) -> bool:
    return ONEDNN and dtype == weight_OI.dtype == torch.float32


def by_kernels(dtype: torch.dtype, weight_OI: Tensor) -> bool:
    """Return whether linear.c and weight_gradient.c support these dtypes and sizes."""
    if FLAGS is None or dtype != torch.bfloat16 or weight_OI.dtype not in (torch.float32, torch.bfloat16):
        return False
    return weight_OI.shape[0] % 32 == 0 and weight_OI.shape[1] % 32 == 0


def linear_forward(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return the output [R, O] in x's dtype; weight and bias may be float32."""
    dtype = x_RI.dtype
    if not len(x_RI):
        return x_RI.new_empty(0, weight_OI.shape[0])
    if _by_onednn(dtype, weight_OI):
        bias_O = None if bias_O is None else bias_O.contiguous()  # oneDNN ignores the stride
        return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")
    if multiplies(x_RI, weight_OI):
        return product(x_RI, weight_OI, bias_O, transposed=True)[0]
    with torch.autocast("cpu", enabled=False):
        return F.linear(x_RI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))


def input_gradient(grad_RO: Tensor, weight_OI: Tensor) -> Tensor:
    """Return [R, I], the gradient of `linear_forward`'s x, in the dtype of grad."""
    if not len(grad_RO):
        return grad_RO.new_empty(0, weight_OI.shape[1])
    if _by_onednn(grad_RO.dtype, weight_OI):
        return linear_forward(grad_RO, weight_OI.t(), None)
    if multiplies(grad_RO, weight_OI):
        return product(grad_RO, weight_OI, None, transposed=False)[0]
    with torch.autocast("cpu", enabled=False):
        return grad_RO @ weight_OI.to(grad_RO.dtype)


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Return whether `product` supports rows x and a weight of these dtypes and sizes on this machine."""
    return len(x) > 0 and by_kernels(x.dtype, weight) and _product_library() is not None


def product(
    x_RK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    *,
    transposed: bool,
    before_gelu: bool = False,
    hidden_RN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (x @ weight + bias, None), computed by linear.c: x is [R, K], the first result is [R, N], and weight is
    [K, N], or [N, K] with `transposed`. Tensors are bf16; weight and bias may be float32. With `before_gelu`, the
    second result is GELU of the first result. With `hidden_RN`, the first result is multiplied by the derivative of
    GELU at `hidden_RN`, and the second result is GELU of `hidden_RN`. GELU is its tanh approximation. `multiplies` must
    be True for these inputs.

    Raises:
        MemoryError: there is not enough memory for the workspace.
    """
    library = _product_library()
    assert library is not None
    x_RK, weight = _rows(x_RK), weight.contiguous()
    (rows, depth), width = x_RK.shape, weight.shape[0 if transposed else 1]
    out_RN = x_RK.new_empty(rows, width)
    hidden_RN = None if hidden_RN is None else hidden_RN.contiguous()
    y_RN = torch.empty_like(out_RN) if before_gelu or hidden_RN is not None else None
    packed = x_RK.new_empty(weight.numel())
    bias_N = None if bias_N is None else bias_N.float().contiguous()
    tensors = x_RK, weight, bias_N, hidden_RN, packed, out_RN, y_RN
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    wide, threads = weight.dtype == torch.float32, torch.get_num_threads()
    done = library.linear(*pointers, rows, depth, width, x_RK.stride(0), transposed, wide, threads)
    if not done:
        raise MemoryError("not enough memory for a linear layer")
    return out_RN, y_RN


@functools.cache
def _product_library() -> ctypes.CDLL | None:
    assert FLAGS is not None
    library = load("linear.c", FLAGS, "linear layers run on torch, which is 10 to 25 % slower")
    if library is not None:
        library.linear.argtypes = [*[ctypes.c_void_p] * 7, *[ctypes.c_long] * 4, *[ctypes.c_int] * 3]
    return library


def parameter_gradients(
    grad_RO: Tensor, x_RI: Tensor, weight_OI: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight [O, I] and bias [O] in the dtype of the weight. A gradient that is not selected by
    `needs` may be None."""
    need_weight, need_bias = needs
    dtype = weight_OI.dtype
    if not len(x_RI):
        return torch.zeros_like(weight_OI), weight_OI.new_zeros(weight_OI.shape[0])
    if need_weight and by_kernels(x_RI.dtype, weight_OI):
        sums, of_bias = weight_gradient(grad_RO, x_RI)
        return sums.to(dtype), of_bias.to(dtype)
    grad_bias = grad_RO.sum(0, dtype=dtype) if need_bias else None
    if not need_weight:
        return None, grad_bias
    if _by_onednn(x_RI.dtype, weight_OI):
        return linear_forward(grad_RO.t(), x_RI.t(), None), grad_bias
    with torch.autocast("cpu", enabled=False):
        return (grad_RO.t() @ x_RI).to(dtype), grad_bias


def weight_gradient(grad_RO: Tensor, x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad^T x, [O, I], and grad's sum over rows, [O], both in float32. Inputs are bf16; O and I are multiples
    of 32.

    Raises:
        MemoryError: there is not enough memory for the workspace.
    """
    library = _library()
    if library is None:
        with torch.autocast("cpu", enabled=False):
            return (grad_RO.t() @ x_RI).float(), grad_RO.sum(0, dtype=torch.float32)
    grad, x = (_rows(tensor) for tensor in (grad_RO, x_RI))
    transposed = x.shape[1] > grad.shape[1]
    wide, narrow = (x, grad) if transposed else (grad, x)
    (rows, width), columns, threads = wide.shape, narrow.shape[1], torch.get_num_threads()
    most = max(1, PANEL_BYTES // (4 * columns))
    panel = -(-width // (threads * -(-width // (threads * most))))  # so that each thread has the same number of panels
    packed = narrow.new_empty(-(-rows // 32) * 32 * columns)
    out = grad.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)
    wide_sums, narrow_sums = (out.new_zeros(size) for size in (width, columns))
    done = library.weight_gradient(
        wide.data_ptr(), narrow.data_ptr(), rows, width, columns, wide.stride(0), narrow.stride(0), transposed,
        packed.data_ptr(), out.data_ptr(), wide_sums.data_ptr(), narrow_sums.data_ptr(), panel, threads,
    )  # fmt: skip
    if not done:
        raise MemoryError("not enough memory for a weight's gradient")
    return out, narrow_sums if transposed else wide_sums


@functools.cache
def _library() -> ctypes.CDLL | None:
    assert FLAGS is not None
    library = load("weight_gradient.c", FLAGS, "torch computes the gradients of weights, which is slower")
    if library is not None:
        tensor, size = ctypes.c_void_p, ctypes.c_long
        library.weight_gradient.argtypes = [*[tensor] * 2, *[size] * 5, ctypes.c_int, *[tensor] * 4, size, ctypes.c_int]
    return library


def _rows(x: Tensor) -> Tensor:
    """Return x if its rows are contiguous, as the C code requires; otherwise a contiguous copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def wanted(grads: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Return the gradients in the form that a custom op may return: gradients that are not needed are replaced by empty
    tensors."""
    return [grad if need and grad is not None else like.new_empty(0) for grad, need in zip(grads, needs)]


def _fake(x_RI, weight_OI, bias_O):
    return x_RI.new_empty(x_RI.shape[0], weight_OI.shape[0])


def _gradients(
    grad_RO: Tensor, x_RI: Tensor, weight_OI: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    grad_x = input_gradient(grad_RO, weight_OI) if needs[0] else None
    grad_x, grad_weight, grad_bias = wanted(
        (grad_x, *parameter_gradients(grad_RO, x_RI, weight_OI, needs[1:])), needs, grad_RO
    )
    return grad_x, grad_weight, grad_bias


def _fake_gradients(grad_RO, x_RI, weight_OI, needs):
    grads = torch.empty_like(x_RI), torch.empty_like(weight_OI), weight_OI.new_empty(weight_OI.shape[0])
    return tuple(wanted(grads, needs, grad_RO))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad_RO):
    needs = list(ctx.needs_input_grad)
    grads = linear_backward_op(grad_RO, *ctx.saved_tensors, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs))


linear_op = Op("linear", linear_forward, _fake, _setup_context, _backward)
linear_backward_op = Op("linear_backward", _gradients, _fake_gradients)
