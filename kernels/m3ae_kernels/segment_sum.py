"""Sums of rows with equal ids, added in a fixed order: the backward pass of table look-ups.

Shapes: T rows, D width, K ids.
"""

import torch
from torch import Tensor


def segment_order(ids: Tensor) -> Tensor:
    """Return the order [T] int32 in which `segment_sum` adds rows with these ids [T]: a stable sort with negative ids
    first. Callers that know the ids in advance can compute the order early."""
    return torch.argsort(ids, stable=True).int()


def segment_sum(
    rows_TD: Tensor, ids_T: Tensor, count: int, dtype: torch.dtype, impl: str, order_T: Tensor | None = None
) -> Tensor:
    """Return out [count, D] of `dtype`, where out[k] is the sum of rows[t] over all t with ids[t] == k, in order of t.
    Rows with negative ids are left out. Sums are computed in float32 (float64 for float64 rows), without atomics.
    `impl` is "triton" or "torch". `order_T` is the result of `segment_order(ids_T)`; if it is not given, it is
    computed."""
    if impl == "triton":
        from .triton_impl.segment_sum import segment_sum

        return segment_sum(rows_TD, ids_T, count, dtype, order_T)
    wide = rows_TD if rows_TD.dtype == torch.float64 else rows_TD.float()
    ids = ids_T.clamp(min=-1).long()
    if count <= len(ids):
        return _sums(wide, ids, count).to(dtype)
    # Most rows of a large table are not looked up. Sums are computed only for the ids that occur, and then written to
    # their positions. The last position is for negative ids.
    order = torch.argsort(ids, stable=True) if order_T is None else order_T
    ordered = ids.index_select(0, order)
    run = torch.cumsum(ordered.diff(prepend=ordered[:1]) != 0, 0)
    sums = _sums(wide.index_select(0, order), run, len(ids))
    out = rows_TD.new_zeros(count + 1, rows_TD.shape[1], dtype=dtype)
    out.index_copy_(0, torch.where(ordered < 0, count, ordered), sums.index_select(0, run).to(dtype))
    return out[:count]


def _sums(rows_TD: Tensor, ids_T: Tensor, count: int) -> Tensor:
    # The backward pass of Embedding leaves out rows whose id is the padding index, here -1.
    return torch.ops.aten.embedding_dense_backward(rows_TD, ids_T, count, -1, False)
