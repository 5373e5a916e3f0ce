"""Shared code of the losses: reductions, and gradients computed in the forward pass.

Shapes: M rows, D width, V outputs of the head.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import accumulator, check_float, no_autocast
from .registry import unwrapped

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    """Raise ValueError if the reduction is unknown."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, but must be one of {', '.join(REDUCTIONS)}")


class LossHead(nn.Module):
    """Base class of modules that compute a loss with their own head: weight [V, dim] (Xavier uniform) and, unless
    `bias` is False, bias [V] (zero)."""

    def __init__(self, dim: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, dim))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight (Xavier uniform) and the bias (zero) again."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the outputs of the head, [..., V], for hidden [..., dim]: the predicted targets, or logits. They are
        in autocast's dtype if autocast is enabled, otherwise in the dtype of hidden. The module's hooks do not
        run, because they expect the arguments and the output of the loss."""
        return F.linear(hidden, self.weight.to(hidden.dtype), None if self.bias is None else self.bias.to(hidden.dtype))


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    rows: torch.Size,
    outputs: int,
    images: Tensor,
) -> None:
    """Check the arguments of a loss of image patches.

    Args:
        hidden, weight, bias, row_weight: the arguments of the loss.
        rows: the shape of the patch ids, which is the shape of hidden without its last dimension.
        outputs: number of outputs of the head.
        images: the images, on whose device all arguments must be.

    Raises:
        TypeError, ValueError: an argument is not floating-point, is on another device, or has another shape.
    """
    check_float("hidden", hidden, (*rows, None), images)
    check_float("weight", weight, (outputs, hidden.shape[-1]), hidden)
    if bias is not None:
        check_float("bias", bias, (outputs,), hidden)
    if row_weight is not None:
        check_float("row_weight", row_weight, rows, hidden)


def row_weights(
    row_weight: Tensor | None, counted: Tensor | None, hidden: Tensor, acc: torch.dtype, reduction: str
) -> Tensor:
    """Return the weight of each row in the summed loss, [M] of dtype `acc`. This is `row_weight`, or 1 if it is None.
    For a mean, the weights are divided by their sum over the rows for which `counted` is True (None: all rows). If this
    sum is 0, they are not changed."""
    weight_M = hidden.new_ones(hidden.shape[0], dtype=acc) if row_weight is None else row_weight.to(acc)
    if reduction != "mean":
        return weight_M
    total = (weight_M if counted is None else torch.where(counted, weight_M, 0)).sum()
    return weight_M / torch.where(total == 0, 1, total)


def unit_weights(weight_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row weights divided by a unit, and the unit, a 0-d tensor. The unit is the largest absolute value
    of a weight.

    The stored gradients are computed with these scaled weights, because with the original weights, such as 1e-6, the
    gradients would underflow in float16.
    """
    if not len(weight_M):
        return weight_M.clone(), weight_M.new_ones(())
    unit = weight_M.abs().max()
    unit = torch.where(unit > 0, unit, 1)
    return weight_M / unit, unit


def empty_gradients(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised gradients of hidden [M, D] in the matmul's dtype, weight [V, D] in its own dtype, and bias
    [V] in the accumulator dtype. Gradients that `needs` does not select are empty tensors."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0, dtype=dtype),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=accumulator(dtype)),
    )


def squared_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    dtype: torch.dtype,
    needs: Sequence[bool],
    compute: Callable[..., None],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, the row losses, the unit (see `unit_weights`), and the gradients of hidden, weight and bias
    divided by the unit.

    `compute(hidden, weight, bias, unit_weight, needs, row_loss, *gradients)` fills `row_loss` and the gradients. Its
    `hidden`, `weight` and `bias` are converted to `dtype`, and a missing bias is replaced with zeros. If there are no
    rows, `compute` is not called.
    """
    unit_weight_M, unit = unit_weights(row_weight)
    row_loss_M = torch.empty_like(unit_weight_M)
    grads = empty_gradients(hidden, weight, dtype, needs)
    if not len(hidden):
        for grad in grads:
            grad.zero_()
    else:
        bias_V = weight.new_zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)
        with no_autocast(hidden):
            compute(hidden.to(dtype), weight.to(dtype), bias_V, unit_weight_M, needs, row_loss_M, *grads)
    return torch.dot(row_loss_M, row_weight), row_loss_M, unit, *grads


def squared_errors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    unit_weight: Tensor,
    targets: Callable[[slice], Tensor],
    chunk: int,
    needs: Sequence[bool],
    row_loss: Tensor,
    grad_hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the mean squared error of each row to row_loss [M] and the gradient of hidden to grad_hidden. Return the
    gradients of weight and bias in the dtype of unit_weight. Gradients that `needs` does not select are not computed.

    Predictions are computed for `chunk` rows at a time. `targets(rows)` returns the targets of a slice of rows as a new
    tensor [rows, V] in the dtype of unit_weight, which is overwritten. hidden, weight and bias must have the same
    dtype.
    """
    dtype, acc = hidden.dtype, unit_weight.dtype
    sum_VD = torch.zeros_like(weight if needs[1] else weight[:0], dtype=acc)
    sum_V = torch.zeros_like(bias if needs[2] else bias[:0], dtype=acc)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        error_MV = targets(rows)
        torch.sub(torch.addmm(bias, hidden[rows], weight.t()), error_MV, out=error_MV)
        row_loss[rows] = torch.linalg.vector_norm(error_MV, dim=1).square_().div_(error_MV.shape[1])
        if not any(needs):
            continue
        grad_MV = error_MV.mul_(unit_weight[rows, None] * (2 / error_MV.shape[1]))
        grad_low_MV = grad_MV.to(dtype)
        if needs[0]:
            torch.mm(grad_low_MV, weight, out=grad_hidden[rows])
        if needs[1]:
            sum_VD += grad_low_MV.t() @ hidden[rows]
        if needs[2]:
            sum_V += grad_MV.sum(0)
    return sum_VD, sum_V


def save_gradients(ctx, inputs, output) -> None:
    """Save the gradients of a loss; this is the `setup_context` of an op. Inputs start with (hidden, weight, bias), and
    outputs are (loss, row losses, unit, the gradients of hidden, weight and bias, others)."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:6])
    ctx.dtypes = _dtypes(inputs)


def scale_gradients(ctx, upstream: Tensor | None, inputs: int) -> tuple[Tensor | None, ...]:
    """Return the gradients of a loss's inputs, given the gradient of the loss. `inputs`: the number of inputs; only the
    first four (hidden, weight, bias, row_weight) have gradients."""
    if upstream is None:
        return (None,) * inputs
    row_loss, unit, *grads = ctx.saved_tensors
    needs = ctx.needs_input_grad
    scale = upstream * unit
    scaled = [_scaled(g, scale).to(dtype) if need else None for g, dtype, need in zip(grads, ctx.dtypes, needs)]
    return *scaled, upstream * row_loss if needs[3] else None, *[None] * (inputs - 4)


def save_inputs(ctx, inputs, output) -> None:
    """Save the inputs of a loss with reduction "none", because its gradients are computed in the backward pass. This is
    the `setup_context` of an op. Inputs start with (hidden, weight, bias). `output`: the row losses, or a tuple that
    begins with them."""
    ctx.set_materialize_grads(False)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*output[1:])
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.dtypes = _dtypes(inputs)


def row_gradients(ctx, upstream: Tensor | None, loss) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs saved by `save_inputs`, given the gradients of the row losses. The result
    equals the gradients of a summed loss, in which the weight of each row is the gradient of its row loss.
    `loss(inputs, row_weight, needs)` computes this summed loss and its gradients."""
    if upstream is None:
        return (None,) * len(ctx.others)
    inputs = [other if tensor is None else unwrapped(tensor) for tensor, other in zip(ctx.saved_tensors, ctx.others)]
    needs = ctx.needs_input_grad[:3]
    _, _, unit, *grads = loss(inputs, upstream, needs)
    scaled = [_scaled(g, unit).to(dtype) if need else None for g, dtype, need in zip(grads, ctx.dtypes, needs)]
    return *scaled, *[None] * (len(inputs) - 3)


def rows_backward(loss_op):
    """Return the backward pass of an op with reduction "none" whose inputs were saved by `save_inputs`. `loss_op`: the
    op of the summed loss. It has two inputs more than the saved ones: row_weight after bias, and `needs` before the
    last input."""

    def loss(inputs, row_weight, needs):
        *inputs, impl = inputs
        return loss_op(*inputs[:3], row_weight, *inputs[3:], needs, impl)

    return lambda ctx, upstream: row_gradients(ctx, upstream, loss)


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """Return the product of a gradient and a 0-d scale. On devices other than the CPU, torch first rounds a 0-d factor
    to the dtype of the other factor, so that in float16, a usual loss scale of 65,536 would become infinite. On these
    devices, the scale is therefore given a dimension, because torch does not round a factor with a dimension. On a CPU,
    a 0-d factor is not rounded, and is faster."""
    return grad * (scale if grad.device.type == "cpu" else scale[None])


def _dtypes(inputs) -> list[torch.dtype]:
    hidden, weight, bias = inputs[:3]
    return [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
