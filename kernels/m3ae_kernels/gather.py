"""Gathering of rows of a packed tensor, with an optional LayerNorm in the same pass.

Shapes: T packed rows, M chosen rows, D width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .dispatch import accumulator, as_rows, check_float, check_index, check_number, choose_impl, with_lead
from .ids import check_distinct, check_range, checks_enabled
from .registry import Op, traced
from .wide import put_rows

CHUNK_ROWS = 768  # rows that the backward pass in torch processes at a time, so that float32 copies are small


def gather_tokens(
    x: Tensor,
    rows: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Return y = x[rows], with LayerNorm applied if `norm_weight` is given.

    Args:
        x: [..., D] floating-point; T rows in total.
        rows: [...] int32 or int64, from 0 to T - 1. Each row must occur at most once, so that the backward pass is a
            scatter without atomics. `flat_ids` converts rows that are numbered per image.
        norm_weight: [D] floating-point, or None for no LayerNorm.
        norm_bias: [D] floating-point, or None for no bias.
        eps: added to the (biased) variance.
        impl: "auto", "triton" or "torch".

    Returns:
        [..., D], where ... is the shape of `rows`, in x's dtype, regardless of autocast. Statistics are computed in
        float32 (float64 for float64). Gradients are computed for x and the parameters of the norm.

    Raises:
        TypeError, ValueError: the dtype, shape or device of the named argument is wrong, `impl` is unknown, or
            norm_bias is given without norm_weight.
        IndexError: a row is out of range (checked by torch's implementation on a CPU, and everywhere with
            M3AE_KERNELS_CHECK=1), or occurs twice (checked only with M3AE_KERNELS_CHECK=1).
    """
    check_float("x", x, (..., None), x)
    check_index("rows", rows, (...,), x)
    impl, lead = choose_impl(impl, x.device, x.dtype), rows.shape
    x, rows = as_rows(x, 1), as_rows(rows, 0)
    if norm_weight is None:
        if norm_bias is not None:
            raise ValueError("norm_bias requires norm_weight")
        if impl == "torch" and not traced(x, rows):
            # A direct call of torch.embedding is as fast as the op at any size, and has half its overhead per call.
            _check(x, rows)
            return with_lead(_taken(torch.embedding, x, rows), lead)
        return with_lead(gather_rows(x, rows, impl), lead)
    check_float("norm_weight", norm_weight, (x.shape[1],), x)
    if norm_bias is not None:
        check_float("norm_bias", norm_bias, (x.shape[1],), x)
    check_number("eps", eps)
    return with_lead(gather_norm(x, rows, norm_weight, norm_bias, eps, impl)[0], lead)


def _check(x: Tensor, rows: Tensor) -> None:
    """Raise IndexError for invalid rows if M3AE_KERNELS_CHECK is set. torch's code on a CPU always checks the range."""
    if checks_enabled():
        check_range("gather_tokens", "rows", rows, len(x))
        check_distinct("gather_tokens", "rows", rows)


def _taken(take: Callable[[Tensor, Tensor], Tensor], x: Tensor, rows: Tensor) -> Tensor:
    """Return `take(x, rows)`, computed by torch. If a row is out of range, raise an IndexError that names it."""
    try:
        return take(x, rows)
    except IndexError:
        check_range("gather_tokens", "rows", rows, len(x))
        raise


def _rows_forward(x: Tensor, rows: Tensor, impl: str) -> Tensor:
    _check(x, rows)
    if impl == "triton":
        from .triton_impl.rows import take_rows

        return take_rows(x, rows)
    return _taken(_select, x, rows)


def _select(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows)


def _rows_fake(x, rows, impl):
    return x.new_empty(rows.shape[0], x.shape[1])


def _rows_setup_context(ctx, inputs, output):
    x, rows, ctx.impl = inputs
    ctx.save_for_backward(rows)
    ctx.count = x.shape[0]


def _rows_backward(ctx, grad):
    (rows,) = ctx.saved_tensors
    return gather_rows_backward(grad, rows, ctx.count, ctx.impl), None, None


def _place_rows(grad: Tensor, rows: Tensor, count: int, impl: str) -> Tensor:
    if impl == "triton":
        from .triton_impl.rows import place_rows

        return place_rows(grad, rows, count)
    out_TD = grad.new_zeros(count, grad.shape[1])
    put_rows(out_TD, rows.long(), grad.contiguous())
    return out_TD


gather_rows = Op("gather_rows", _rows_forward, _rows_fake, _rows_setup_context, _rows_backward)
gather_rows_backward = Op(
    "gather_rows_backward",
    _place_rows,
    lambda grad, rows, count, impl: grad.new_empty(count, grad.shape[1]),
)


def _norm_forward(
    x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y [M, D], mean [M], reciprocal standard deviation [M])."""
    _check(x, rows)
    if impl == "triton":
        from .triton_impl.norm import gather_norm

        return gather_norm(x, rows, weight, bias, eps)
    wide = accumulator(x.dtype)
    shift = None if bias is None else bias.to(wide)
    y_MD, mean, rstd = torch.native_layer_norm(_taken(_select, x, rows), [x.shape[1]], weight.to(wide), shift, eps)
    return y_MD, mean.flatten(), rstd.flatten()


def _norm_fake(x, rows, weight, bias, eps, impl):
    stats = x.new_empty(rows.shape[0], dtype=accumulator(x.dtype))
    return x.new_empty(rows.shape[0], x.shape[1]), stats, torch.empty_like(stats)


def _norm_setup_context(ctx, inputs, output):
    x, rows, weight, bias, _, ctx.impl = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, rows, weight, mean, rstd)
    ctx.bias_dtype = weight.dtype if bias is None else bias.dtype


def _norm_backward(ctx, grad, _mean, _rstd):
    x, rows, weight, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]
    grads = gather_norm_backward(grad, x, rows, weight, mean, rstd, needs, ctx.impl)
    dtypes = x.dtype, weight.dtype, ctx.bias_dtype
    grad_x, grad_weight, grad_bias = (g.to(dtype) if need else None for g, dtype, need in zip(grads, dtypes, needs))
    return grad_x, None, grad_weight, grad_bias, None, None


def _norm_gradients(
    grad: Tensor,
    x: Tensor,
    rows: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, and of the norm's weight and bias in the accumulator dtype. Gradients that `needs`
    does not select are empty tensors."""
    if impl == "triton":
        from .triton_impl.norm import gather_norm_backward

        return gather_norm_backward(grad, x, rows, weight, mean, rstd, needs)
    grad_x, *totals = (g.zero_() for g in empty_norm_gradients(x, weight, mean, needs))
    places, low_CD = rows.long(), x.new_empty(min(len(rows), CHUNK_ROWS), x.shape[1])
    wide_2CD = mean.new_empty(2, *low_CD.shape)
    for first in range(0, len(rows), CHUNK_ROWS):
        part = slice(first, min(first + CHUNK_ROWS, len(rows)))
        x_CD = torch.index_select(x, 0, rows[part], out=low_CD[: part.stop - first])
        part_x = norm_backward(grad[part], x_CD, mean[part], rstd[part], weight, wide_2CD, needs, totals)
        if needs[0]:
            put_rows(grad_x, places[part], part_x)
    return grad_x, totals[0], totals[1]


def norm_backward(
    grad_CD: Tensor,
    x_CD: Tensor,
    mean_C: Tensor,
    rstd_C: Tensor,
    weight_D: Tensor,
    wide_2CD: Tensor,
    needs: Sequence[bool],
    totals: Sequence[Tensor],
) -> Tensor:
    """Run a LayerNorm's backward pass with torch. Return the gradient of x in its dtype, and add the gradients of
    weight and bias to `totals` [D]. For 16-bit inputs, these two gradients are summed in float32, because torch's sums
    in 16 bits have errors of 3 to 7 %. `wide_2CD` is a buffer for the float32 copies of grad and x."""
    scale_D = weight_D.to(mean_C.dtype)
    # The second scale_D is passed as the bias, which has no effect on the gradients.
    norm = [x_CD.shape[1]], mean_C[:, None], rstd_C[:, None], scale_D, scale_D
    backward = torch.ops.aten.native_layer_norm_backward
    need_x, *need_sums = needs
    if x_CD.dtype == mean_C.dtype or not any(need_sums):
        grad_x, *sums = backward(grad_CD.to(x_CD.dtype), x_CD, *norm, needs)
    else:
        grad_x, *_ = backward(grad_CD, x_CD, *norm, [need_x, False, False])
        wide_grad, wide_x = (copy[: len(x_CD)].copy_(t) for copy, t in zip(wide_2CD, (grad_CD, x_CD)))
        _, *sums = backward(wide_grad, wide_x, *norm, [False, *need_sums])
    for total, part_sum, need in zip(totals, sums, need_sums):
        if need:
            total += part_sum
    return grad_x


def _empty_gradients(grad, x, rows, weight, mean, rstd, needs, impl):
    return empty_norm_gradients(x, weight, mean, needs)


def empty_norm_gradients(x: Tensor, weight: Tensor, mean: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Return uninitialised gradients of a LayerNorm's input x [M, D] in its dtype, and of its weight and bias [D] in
    the accumulator dtype. Gradients that `needs` does not select are empty tensors."""
    parameters = (weight.new_empty(weight.shape if need else 0, dtype=mean.dtype) for need in needs[1:])
    return x.new_empty(x.shape if needs[0] else 0), *parameters


gather_norm = Op("gather_norm", _norm_forward, _norm_fake, _norm_setup_context, _norm_backward)
gather_norm_backward = Op("gather_norm_backward", _norm_gradients, _empty_gradients)


class GatherNorm(nn.Module):
    """A module that applies `gather_tokens` with its own LayerNorm: weight [dim], initialised to one, and, unless
    `bias` is False, bias [dim], initialised to zero."""

    def __init__(self, dim: int, *, eps: float = 1e-6, bias: bool = True, impl: str = "auto"):
        super().__init__()
        self.eps, self.impl = eps, impl
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the normalised rows [..., dim] of x [..., dim] at the indices `rows` [...] (int, distinct)."""
        return gather_tokens(x, rows, norm_weight=self.weight, norm_bias=self.bias, eps=self.eps, impl=self.impl)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"
