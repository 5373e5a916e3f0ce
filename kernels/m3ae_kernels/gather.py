"""Rows of a packed tensor, LayerNorm'ed on the way where asked, in one pass.

Shapes: T packed rows, M chosen rows, D width.
"""

import torch
from torch import Tensor, nn

from .dispatch import accumulator, check_float, check_index, choose_impl

CHUNK_ROWS = 2048  # that torch normalises at a time


def gather_tokens(
    x: Tensor,
    rows: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """y = x[rows], LayerNorm'ed where the norm's parameters are given.

    Args:
        x: [T, D] floating.
        rows: [M] int32, each at most once: the backward is then a scatter without atomics.
        norm_weight, norm_bias: [D] floating, both or none.
        eps: added to the (biased) variance.
        impl: "auto", "triton" or "torch".

    Returns:
        [M, D] in x's dtype; autocast changes nothing. Statistics in float32 (float64 for float64). Gradients for x and
        the norm's parameters.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape or device is wrong.
    """
    check_float("x", x, (None, None), x)
    check_index("rows", rows, (None,), x)
    if norm_weight is None and norm_bias is None:
        return gather_rows_op(x, rows, impl)
    if norm_weight is None or norm_bias is None:
        raise ValueError("norm_weight and norm_bias must be given together")
    check_float("norm_weight", norm_weight, (x.shape[1],), x)
    check_float("norm_bias", norm_bias, (x.shape[1],), x)
    return gather_norm_op(x, rows, norm_weight, norm_bias, eps, impl)[0]


@torch.library.custom_op("m3ae::gather_rows", mutates_args=())
def gather_rows_op(x: Tensor, rows: Tensor, impl: str) -> Tensor:
    if choose_impl(impl, x.device) == "triton":
        from .triton_impl.rows import take_rows

        return take_rows(x, rows)
    return x.index_select(0, rows)


@gather_rows_op.register_fake
def _(x, rows, impl):
    return x.new_empty(rows.shape[0], x.shape[1])


@torch.library.custom_op("m3ae::gather_rows_backward", mutates_args=())
def gather_rows_backward_op(grad: Tensor, rows: Tensor, count: int, impl: str) -> Tensor:
    if choose_impl(impl, grad.device) == "triton":
        from .triton_impl.rows import place_rows

        return place_rows(grad, rows, count)
    return grad.new_zeros(count, grad.shape[1]).index_copy_(0, rows.long(), grad)


@gather_rows_backward_op.register_fake
def _(grad, rows, count, impl):
    return grad.new_empty(count, grad.shape[1])


def _rows_setup_context(ctx, inputs, output):
    x, rows, ctx.impl = inputs
    ctx.save_for_backward(rows)
    ctx.count = x.shape[0]


def _rows_backward(ctx, grad):
    (rows,) = ctx.saved_tensors
    return gather_rows_backward_op(grad, rows, ctx.count, ctx.impl), None, None


gather_rows_op.register_autograd(_rows_backward, setup_context=_rows_setup_context)


def _chunks(rows: int) -> list[slice]:
    """The float32 copies of a chunk stay in the cache. They are needed: torch's bf16 LayerNorm sums the gradient of its
    weight in bf16, which is 6 % off."""
    return [slice(first, first + CHUNK_ROWS) for first in range(0, rows, CHUNK_ROWS)]


@torch.library.custom_op("m3ae::gather_norm", mutates_args=())
def gather_norm_op(
    x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y [M, D], mean [M], reciprocal standard deviation [M])."""
    if choose_impl(impl, x.device) == "triton":
        from .triton_impl.norm import gather_norm

        return gather_norm(x, rows, weight, bias, eps)
    acc = accumulator(x.dtype)
    y_MD = x.new_empty(rows.shape[0], x.shape[1])
    mean, rstd = (x.new_empty(rows.shape[0], 1, dtype=acc) for _ in range(2))
    for part in _chunks(rows.shape[0]):
        chunk = x.index_select(0, rows[part]).to(acc)
        y_MD[part], mean[part], rstd[part] = torch.native_layer_norm(
            chunk, [x.shape[1]], weight.to(acc), bias.to(acc), eps
        )
    return y_MD, mean.flatten(), rstd.flatten()


@gather_norm_op.register_fake
def _(x, rows, weight, bias, eps, impl):
    stats = x.new_empty(rows.shape[0], dtype=accumulator(x.dtype))
    return x.new_empty(rows.shape[0], x.shape[1]), stats, torch.empty_like(stats)


@torch.library.custom_op("m3ae::gather_norm_backward", mutates_args=())
def gather_norm_backward_op(
    grad: Tensor, x: Tensor, rows: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, and of the norm's weight and bias in the accumulator dtype."""
    if choose_impl(impl, x.device) == "triton":
        from .triton_impl.norm import gather_norm_backward

        return gather_norm_backward(grad, x, rows, weight, mean, rstd)
    acc = accumulator(x.dtype)
    grad_x = x.new_zeros(x.shape)
    grad_weight, grad_bias = (torch.zeros_like(weight, dtype=acc) for _ in range(2))
    for part in _chunks(rows.shape[0]):
        grad_chunk, *grads = torch.ops.aten.native_layer_norm_backward(
            grad[part].to(acc),
            x.index_select(0, rows[part]).to(acc),
            [x.shape[1]],
            mean[part, None],
            rstd[part, None],
            weight.to(acc),
            weight.to(acc),  # the bias's value plays no part, only that there is one
            [True, True, True],
        )
        grad_x.index_copy_(0, rows[part].long(), grad_chunk.to(x.dtype))
        grad_weight += grads[0]
        grad_bias += grads[1]
    return grad_x, grad_weight, grad_bias


@gather_norm_backward_op.register_fake
def _(grad, x, rows, weight, mean, rstd, impl):
    grad_weight = torch.empty_like(weight, dtype=accumulator(x.dtype))
    return x.new_empty(x.shape), grad_weight, torch.empty_like(grad_weight)


def _norm_setup_context(ctx, inputs, output):
    x, rows, weight, bias, _, ctx.impl = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, rows, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype


def _norm_backward(ctx, grad, _mean, _rstd):
    x, rows, weight, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = gather_norm_backward_op(grad, x, rows, weight, mean, rstd, ctx.impl)
    return grad_x, None, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None, None


gather_norm_op.register_autograd(_norm_backward, setup_context=_norm_setup_context)


class GatherNorm(nn.Module):
    """`gather_tokens` with the LayerNorm that it owns: weight [dim] (one) and bias [dim] (zero)."""

    def __init__(self, dim: int, *, eps: float = 1e-6, impl: str = "auto"):
        super().__init__()
        self.eps, self.impl = eps, impl
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [T, dim], rows [M] int32, distinct -> [M, dim]."""
        return gather_tokens(x, rows, norm_weight=self.weight, norm_bias=self.bias, eps=self.eps, impl=self.impl)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[0]}, eps={self.eps}"
