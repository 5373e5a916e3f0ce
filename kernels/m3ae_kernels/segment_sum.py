"""Sums of rows that share an id, in a fixed order: the backward of every table look-up.

Shapes: T rows, D width, K ids.
"""

import torch
from torch import Tensor


def segment_sum(rows_TD: Tensor, ids_T: Tensor, count: int, dtype: torch.dtype, impl: str) -> Tensor:
    """Returns out [count, D] of `dtype`, out[k] = sum of rows[t] over the t with ids[t] == k in order of t; negative
    ids belong to nobody. Sums in float32 (float64 for float64 rows); no atomics. `impl` is "triton" or "torch"."""
    if impl == "triton":
        from .triton_impl.segment_sum import segment_sum

        return segment_sum(rows_TD, ids_T, count, dtype)
    wide = rows_TD if rows_TD.dtype == torch.float64 else rows_TD.float()
    # padding_idx -1 is the id that embedding's backward leaves out.
    sums = torch.ops.aten.embedding_dense_backward(wide, ids_T.clamp(min=-1).long(), count, -1, False)
    return sums.to(dtype)
