"""What the two losses share: gradients made in the forward pass, and the autograd formula that hands them out."""

import torch
from torch import Tensor

from .dispatch import accumulator


def unit_weights(row_weight: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (row weights divided by the largest magnitude, that magnitude, 0-d), of dtype `acc`.

    The stored gradients are those of the scaled weights: weights such as 1e-6 would push them below what float16 holds.
    """
    weight_M = row_weight.to(acc)
    if not len(weight_M):
        return weight_M.clone(), weight_M.new_ones(())
    unit = weight_M.abs().max()
    unit = torch.where(unit > 0, unit, 1)
    return weight_M / unit, unit


def room_for_grads(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, hidden_grad: bool, param_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of hidden [M, D] in the matmul's dtype, weight [V, D] in its own, and bias [V] in the
    accumulator's; no elements where not wanted."""
    return (
        hidden.new_empty(hidden.shape if hidden_grad else 0, dtype=dtype),
        weight.new_empty(weight.shape if param_grad else 0),
        weight.new_empty(weight.shape[0] if param_grad else 0, dtype=accumulator(dtype)),
    )


def save_grads(ctx, inputs, output) -> None:
    """`setup_context` of a loss op: inputs start with (hidden, weight, bias), outputs are (loss, row losses, unit, the
    gradients of hidden, weight and bias, others)."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:6])
    ctx.dtypes = [t.dtype for t in inputs[:3]]


def scale_grads(ctx, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of (hidden, weight, bias, row_weight) for the gradient of the loss."""
    if upstream is None:
        return None, None, None, None
    row_loss, unit, *grads = ctx.saved_tensors
    scale = upstream * unit
    needs = ctx.needs_input_grad
    scaled = [(g * scale).to(dtype) if need else None for g, dtype, need in zip(grads, ctx.dtypes, needs)]
    return *scaled, upstream * row_loss
