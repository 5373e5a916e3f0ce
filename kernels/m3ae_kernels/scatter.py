"""Assembly of a packed sequence from existing rows and learned fill rows, with a table row added to each.

Shapes: T rows of the result, N rows of x, F rows of fill, K rows of the table, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import as_rows, check_float, check_index, choose_impl, with_lead
from .ids import check_distinct, check_range, checked, checks_enabled
from .registry import Op
from .segment_sum import segment_order, segment_sum


def scatter_tokens(
    x: Tensor,
    src: Tensor,
    fill: Tensor | None = None,
    fill_ids: Tensor | None = None,
    table: Tensor | None = None,
    table_ids: Tensor | None = None,
    *,
    fill_order: Tensor | None = None,
    table_order: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return out[t] = (x[src[t]] if src[t] >= 0 else fill[fill_ids[t]] if fill_ids[t] >= 0 else 0)
    + (table[table_ids[t]] if table_ids[t] >= 0 else 0).

    Args:
        x: [..., D] floating-point; N rows in total.
        src: [...] int32 or int64, T elements below N; negative for no row of x. Each row of x must occur at most once,
            so that the backward pass is a gather.
        fill: [..., D] floating-point, F rows: mask embeddings, or the table of a text embedding; None for zeros.
        fill_ids: int32 or int64, with src's shape; required with fill.
        table: [..., D] floating-point, K rows: embeddings of positions and types; None for zeros.
        table_ids: int32 or int64, with src's shape; required with table.
        fill_order, table_order: results of `scatter_orders(src, fill_ids, table_ids)`, for example from a data loader,
            so that the backward pass does not sort.
        impl: "auto", "triton" or "torch".

    Returns:
        [..., D], where ... is the shape of src, in x's dtype; autocast has no effect, as for torch's Embedding. The sum
            is computed in float32 (float64 for float64). Gradients are computed for x, fill and table, each in its own
            dtype; the gradients of fill and table are summed in a fixed order, without atomics.

    Raises:
        TypeError, ValueError: the dtype, shape or device of the named argument is wrong, another argument that it
            requires is missing, or `impl` is unknown.
        IndexError: an id is out of range (checked by torch's implementation on a CPU, and everywhere with
            M3AE_KERNELS_CHECK=1), or a row of x occurs twice (checked only with M3AE_KERNELS_CHECK=1).
    """
    check_float("x", x, (..., None), x)
    check_index("src", src, (...,), x)
    for name, rows, ids, order in (("fill", fill, fill_ids, fill_order), ("table", table, table_ids, table_order)):
        if (rows is None) != (ids is None):
            raise ValueError(f"{name} and {name}_ids must be given together")
        if rows is None and order is not None:
            raise ValueError(f"{name}_order needs {name} and {name}_ids")
        if rows is not None and ids is not None:
            check_float(name, rows, (..., x.shape[-1]), x)
            check_index(f"{name}_ids", ids, src.shape, x)
        if order is not None:
            check_index(f"{name}_order", order, (src.numel(),), x)
    fill, table = (None if rows is None else as_rows(rows, 1) for rows in (fill, table))
    fill_ids, table_ids = (None if ids is None else as_rows(ids, 0) for ids in (fill_ids, table_ids))
    tensors = as_rows(x, 1), as_rows(src, 0), fill, fill_ids, table, table_ids, fill_order, table_order
    return with_lead(scatter_tokens_op(*tensors, choose_impl(impl, x.device, x.dtype)), src.shape)


def scatter_orders(
    src: Tensor, fill_ids: Tensor | None = None, table_ids: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (fill_order, table_order) for `scatter_tokens`: each is [T] int32, or None if its ids are None. These are
    the orders in which the backward pass sums the rows of fill and table. Data loaders can call this function in
    advance, with the same ids, [...] int32 or int64.

    Raises:
        TypeError, ValueError: the dtype, shape or device of the named argument is wrong.
    """
    check_index("src", src, (...,), src)
    for name, ids in (("fill_ids", fill_ids), ("table_ids", table_ids)):
        if ids is not None:
            check_index(name, ids, src.shape, src)
    return (
        None if fill_ids is None else segment_order(as_rows(_filled(src, fill_ids), 0)),
        None if table_ids is None else segment_order(as_rows(table_ids, 0)),
    )


def _filled(src_T: Tensor, fill_ids_T: Tensor) -> Tensor:
    """Return the fill ids, with -1 for rows that come from x."""
    return torch.where(src_T < 0, fill_ids_T, -1)


def _rows_or_zero(ids_T: Tensor, *parts: Tensor) -> Tensor:
    """Return the rows of the concatenated parts that have these ids, and zeros for negative ids. On a CPU, this is much
    faster than masking."""
    rows = torch.cat((*parts, parts[0].new_zeros(1, parts[0].shape[1])))
    return rows.index_select(0, torch.where(ids_T < 0, len(rows) - 1, ids_T))


def _forward(
    x: Tensor,
    src: Tensor,
    fill: Tensor | None,
    fill_ids: Tensor | None,
    table: Tensor | None,
    table_ids: Tensor | None,
    fill_order: Tensor | None,
    table_order: Tensor | None,
    impl: str,
) -> Tensor:
    if checked(src, impl):
        for name, ids, rows in (("src", src, x), ("fill_ids", fill_ids, fill), ("table_ids", table_ids, table)):
            if ids is not None and rows is not None:
                check_range("scatter_tokens", name, ids, len(rows), none=True)
    if checks_enabled():
        check_distinct("scatter_tokens", "src", src)
        for name, order in (("fill_order", fill_order), ("table_order", table_order)):
            if order is not None:
                check_range("scatter_tokens", name, order, len(src))
                check_distinct("scatter_tokens", name, order)
    if impl == "triton":
        from .triton_impl.rows import scatter_tokens

        return scatter_tokens(x, src, fill, fill_ids, table, table_ids)
    parts, ids_T = [x], src
    if fill is not None and fill_ids is not None:
        if len(fill) > len(src):  # if fill is a whole vocabulary, only the required rows are used
            fill = fill.index_select(0, fill_ids.clamp(min=0))
            fill_ids = torch.where(fill_ids < 0, -1, torch.arange(len(src), device=src.device))
        parts.append(fill)
        ids_T = torch.where(src >= 0, src, torch.where(fill_ids < 0, -1, fill_ids + len(x)))
    if table is None or table_ids is None:
        return _rows_or_zero(ids_T, *parts).to(x.dtype)
    out_TD = x.new_empty(len(src), x.shape[1])
    return torch.add(_rows_or_zero(ids_T, *parts), _rows_or_zero(table_ids, table), out=out_TD)


def _fake(x, src, fill, fill_ids, table, table_ids, fill_order, table_order, impl):
    return x.new_empty(src.shape[0], x.shape[1])


def _setup_context(ctx, inputs, output):
    x, src, fill, fill_ids, table, table_ids, fill_order, table_order, ctx.impl = inputs
    ctx.save_for_backward(src, fill_ids, table_ids, fill_order, table_order)
    parts = x, fill, table
    ctx.rows = [-1 if part is None else part.shape[0] for part in parts]
    ctx.dtypes = [x.dtype if part is None else part.dtype for part in parts[1:]]


def _backward(ctx, grad):
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 4)]
    counts = [rows if need else -1 for rows, need in zip(ctx.rows, needs)]
    grads = scatter_tokens_backward_op(grad, *ctx.saved_tensors, counts, *ctx.dtypes, ctx.impl)
    grad_x, grad_fill, grad_table = (g if need else None for g, need in zip(grads, needs))
    return grad_x, None, grad_fill, None, grad_table, *[None] * 4


def _gradients(
    grad: Tensor,
    src: Tensor,
    fill_ids: Tensor | None,
    table_ids: Tensor | None,
    fill_order: Tensor | None,
    table_order: Tensor | None,
    counts: Sequence[int],
    fill_dtype: torch.dtype,
    table_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, fill and table. `counts` contains their numbers of rows, or -1 for a gradient that is
    not required and is returned as an empty tensor."""
    x_rows, fill_rows, table_rows = counts
    orders = fill_order, table_order
    grad_x, grad_fill, grad_table = _empty_gradients(
        grad, src, fill_ids, table_ids, *orders, counts, fill_dtype, table_dtype, impl
    )
    if x_rows > 0:
        grad_x = _place_rows(grad, src, x_rows, impl)
    if fill_rows >= 0 and fill_ids is not None:
        grad_fill = segment_sum(grad, _filled(src, fill_ids), fill_rows, fill_dtype, impl, fill_order)
    if table_rows >= 0 and table_ids is not None:
        grad_table = segment_sum(grad, table_ids, table_rows, table_dtype, impl, table_order)
    return grad_x, grad_fill, grad_table


def _empty_gradients(
    grad, src, fill_ids, table_ids, fill_order, table_order, counts, fill_dtype, table_dtype, impl
):  # fmt: skip
    dtypes = (grad.dtype, fill_dtype, table_dtype)
    shapes = ((rows, grad.shape[1]) if rows >= 0 else (0, 0) for rows in counts)
    return tuple(grad.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


def _place_rows(grad_TD: Tensor, src_T: Tensor, count: int, impl: str) -> Tensor:
    """Return out [count, D] with out[src[t]] = grad[t] for src[t] >= 0; rows that do not occur in `src` are zero."""
    if impl == "triton":
        from .triton_impl.rows import place_rows

        return place_rows(grad_TD, src_T, count)
    # The scatter is computed as a gather: `places` contains the row of grad for each row of the result, or -1. The
    # additional last entry receives the rows with a negative `src`.
    places = src_T.new_full((count + 1,), -1)
    index_T = torch.where(src_T < 0, count, src_T).long()
    places.scatter_(0, index_T, torch.arange(len(src_T), dtype=src_T.dtype, device=src_T.device))
    return _rows_or_zero(places[:-1], grad_TD)


scatter_tokens_op = Op("scatter_tokens", _forward, _fake, _setup_context, _backward)
scatter_tokens_backward_op = Op("scatter_tokens_backward", _gradients, _empty_gradients)
