"""A residual sum and its LayerNorm in one pass, forward and backward.

Shapes: T rows, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import accumulator, check_float, choose_impl
from .gather import CHUNK_ROWS, empty_norm_gradients, norm_backward
from .registry import Op


def residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-6, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """total = x + branch, and LayerNorm(total): what stands between the two halves of a pre-norm transformer block.

    Args:
        x: [T, D] floating, the residual stream.
        branch: [T, D] floating, what the last matmul made.
        weight: [D] floating.
        bias: [D] floating, or None for none.
        eps: added to the (biased) variance.
        impl: "auto", "triton" or "torch".

    Returns:
        (total [T, D] in the wider of x's and branch's dtypes, as torch's sum; normed [T, D] in branch's, for the next
        matmul to read). Autocast changes nothing. Statistics in float32 (float64 for float64), of the total as it is
        returned. Gradients for all four, from either result or both; x and branch have the same, in one pass with
        those of weight and bias.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape or device is wrong.
    """
    check_float("x", x, (None, None), x)
    check_float("branch", branch, (x.shape[0], x.shape[1]), x)
    check_float("weight", weight, (x.shape[1],), x)
    if bias is not None:
        check_float("bias", bias, (x.shape[1],), x)
    return residual_norm_op(x, branch, weight, bias, eps, choose_impl(impl, x.device))[:2]


def _forward(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (total [T, D], normed [T, D], mean [T], reciprocal standard deviation [T])."""
    if impl == "triton":
        from .triton_impl.residual import residual_norm

        return residual_norm(x, branch, weight, bias, eps)
    total_TD = (x + branch).contiguous()
    wide = accumulator(total_TD.dtype)
    shift = None if bias is None else bias.to(wide)
    normed_TD, mean, rstd = torch.native_layer_norm(total_TD, [x.shape[1]], weight.to(wide), shift, eps)
    return total_TD, normed_TD.to(branch.dtype), mean.flatten(), rstd.flatten()


def _fake(x, branch, weight, bias, eps, impl):
    dtype = torch.promote_types(x.dtype, branch.dtype)
    stats = x.new_empty(x.shape[0], dtype=accumulator(dtype))
    return x.new_empty(x.shape, dtype=dtype), branch.new_empty(branch.shape), stats, torch.empty_like(stats)


def _setup_context(ctx, inputs, output):
    x, branch, weight, bias, _, ctx.impl = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.dtypes = x.dtype, branch.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype


def _backward(ctx, grad_total, grad_normed, _mean, _rstd):
    needs = ctx.needs_input_grad[:4]
    total = ctx.saved_tensors[0]
    grad_total, grad_normed = (torch.zeros_like(total) if g is None else g for g in (grad_total, grad_normed))
    wanted = needs[0] or needs[1], needs[2], needs[3]
    grad, *of_norm = residual_norm_backward(grad_total, grad_normed, *ctx.saved_tensors, wanted, ctx.impl)
    grads = zip((grad, grad, *of_norm), ctx.dtypes, needs)
    return *(g.to(dtype) if need else None for g, dtype, need in grads), None, None


def _gradients(
    grad_total: Tensor,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the summands in the total's dtype, and of the norm's weight and bias in the
    accumulator's; of those that `needs` wants, the others have no elements."""
    if impl == "triton":
        from .triton_impl.residual import residual_norm_backward

        return residual_norm_backward(grad_total, grad_normed, total, weight, mean, rstd, needs)
    grad, *totals = (g.zero_() for g in empty_norm_gradients(total, weight, mean, needs))
    wide_2CD = mean.new_empty(2, min(len(total), CHUNK_ROWS), total.shape[1])
    for first in range(0, len(total), CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        slope_CD = norm_backward(
            grad_normed[part], total[part], mean[part], rstd[part], weight, wide_2CD, needs, totals
        )
        if needs[0]:
            torch.add(grad_total[part], slope_CD, out=grad[part])
    return grad, totals[0], totals[1]


def _empty_gradients(grad_total, grad_normed, total, weight, mean, rstd, needs, impl):
    return empty_norm_gradients(total, weight, mean, needs)


residual_norm_op = Op("residual_norm", _forward, _fake, _setup_context, _backward)
residual_norm_backward = Op("residual_norm_backward", _gradients, _empty_gradients)
