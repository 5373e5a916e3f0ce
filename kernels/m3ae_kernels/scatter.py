"""Lays a packed sequence out: rows that exist, learned rows where none does, and a table row added to each.

Shapes: T rows of the result, N rows of x, F rows of fill, K rows of the table, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import check_float, check_index, check_range, choose_impl
from .segment_sum import segment_sum


def scatter_tokens(
    x: Tensor, src: Tensor, fill: Tensor, fill_ids: Tensor, table: Tensor, table_ids: Tensor, *, impl: str = "auto"
) -> Tensor:
    """out[t] = (x[src[t]] if src[t] >= 0 else fill[fill_ids[t]] if fill_ids[t] >= 0 else 0)
             + (table[table_ids[t]] if table_ids[t] >= 0 else 0)

    Args:
        x: [N, D] floating.
        src: [T] int32, each row of x at most once: its backward is then a gather.
        fill: [F, D] floating: mask embeddings, or a whole text embedding.
        fill_ids: [T] int32.
        table: [K, D] floating: positions and types.
        table_ids: [T] int32.
        impl: "auto", "triton" or "torch".

    Returns:
        [T, D] in x's dtype; autocast changes nothing, as with torch's Embedding. The sum is taken in float32 (float64
        for float64). Gradients for x, fill and table, each in its own dtype; those of fill and table are summed in a
        fixed order, without atomics.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape or device is wrong.
    """
    check_float("x", x, (None, None), x)
    check_float("fill", fill, (None, x.shape[1]), x)
    check_float("table", table, (None, x.shape[1]), x)
    check_index("src", src, (None,), x)
    check_index("fill_ids", fill_ids, (src.shape[0],), x)
    check_index("table_ids", table_ids, (src.shape[0],), x)
    return scatter_tokens_op(x, src, fill, fill_ids, table, table_ids, impl)


def _rows_or_zero(ids_T: Tensor, *parts: Tensor) -> Tensor:
    """Rows of the parts, one below the other, by id; zero where an id is negative. Far faster on a CPU than masking."""
    rows = torch.cat((*parts, parts[0].new_zeros(1, parts[0].shape[1])))
    return rows.index_select(0, torch.where(ids_T < 0, len(rows) - 1, ids_T))


@torch.library.custom_op("m3ae::scatter_tokens", mutates_args=())
def scatter_tokens_op(
    x: Tensor, src: Tensor, fill: Tensor, fill_ids: Tensor, table: Tensor, table_ids: Tensor, impl: str
) -> Tensor:
    if choose_impl(impl, x.device) == "triton":
        from .triton_impl.rows import scatter_tokens

        return scatter_tokens(x, src, fill, fill_ids, table, table_ids)
    for name, ids, rows in (("src", src, x), ("fill_ids", fill_ids, fill), ("table_ids", table_ids, table)):
        check_range(name, ids, len(rows), none=True)
    if len(fill) > len(src):  # a whole vocabulary: only the rows that are asked for
        fill = fill.index_select(0, fill_ids.clamp(min=0))
        rows = torch.arange(len(src), dtype=src.dtype, device=src.device)
        fill_ids = torch.where(fill_ids < 0, -1, rows)
    ids_T = torch.where(src >= 0, src, torch.where(fill_ids < 0, -1, fill_ids + len(x)))
    out_TD = x.new_empty(len(src), x.shape[1])
    return torch.add(_rows_or_zero(ids_T, x, fill), _rows_or_zero(table_ids, table), out=out_TD)


@scatter_tokens_op.register_fake
def _(x, src, fill, fill_ids, table, table_ids, impl):
    return x.new_empty(src.shape[0], x.shape[1])


def _place_rows(grad_TD: Tensor, src_T: Tensor, count: int, impl: str) -> Tensor:
    """out [count, D], out[src[t]] = grad[t] where src[t] >= 0, zero where no t points."""
    if impl == "triton":
        from .triton_impl.rows import place_rows

        return place_rows(grad_TD, src_T, count)
    # Turned into a gather: where each row went, with a last entry for what came from elsewhere.
    places = src_T.new_full((count + 1,), -1)
    index_T = torch.where(src_T < 0, count, src_T).long()
    places.scatter_(0, index_T, torch.arange(len(src_T), dtype=src_T.dtype, device=src_T.device))
    return _rows_or_zero(places[:-1], grad_TD)


@torch.library.custom_op("m3ae::scatter_tokens_backward", mutates_args=())
def scatter_tokens_backward_op(
    grad: Tensor,
    src: Tensor,
    fill_ids: Tensor,
    table_ids: Tensor,
    counts: Sequence[int],
    fill_dtype: torch.dtype,
    table_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, fill and table, whose rows `counts` holds; -1 there: not wanted, no rows."""
    impl = choose_impl(impl, grad.device)
    x_rows, fill_rows, table_rows = counts
    grad_x, grad_fill, grad_table = _empty_grads(grad, counts, fill_dtype, table_dtype)
    if x_rows > 0:
        grad_x = _place_rows(grad, src, x_rows, impl)
    if fill_rows >= 0:
        grad_fill = segment_sum(grad, torch.where(src < 0, fill_ids, -1), fill_rows, fill_dtype, impl)
    if table_rows >= 0:
        grad_table = segment_sum(grad, table_ids, table_rows, table_dtype, impl)
    return grad_x, grad_fill, grad_table


@scatter_tokens_backward_op.register_fake
def _(grad, src, fill_ids, table_ids, counts, fill_dtype, table_dtype, impl):
    return _empty_grads(grad, counts, fill_dtype, table_dtype)


def _empty_grads(grad, counts, fill_dtype, table_dtype):
    dtypes = (grad.dtype, fill_dtype, table_dtype)
    shapes = ((rows, grad.shape[1]) if rows >= 0 else (0, 0) for rows in counts)
    return tuple(grad.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


def _setup_context(ctx, inputs, output):
    x, src, fill, fill_ids, table, table_ids, ctx.impl = inputs
    ctx.save_for_backward(src, fill_ids, table_ids)
    ctx.rows = (x.shape[0], fill.shape[0], table.shape[0])
    ctx.dtypes = (fill.dtype, table.dtype)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[4]
    counts = [rows if need else -1 for rows, need in zip(ctx.rows, needs)]
    grads = scatter_tokens_backward_op(grad, *ctx.saved_tensors, counts, *ctx.dtypes, ctx.impl)
    grad_x, grad_fill, grad_table = (g if need else None for g, need in zip(grads, needs))
    return grad_x, None, grad_fill, None, grad_table, None, None


scatter_tokens_op.register_autograd(_backward, setup_context=_setup_context)
