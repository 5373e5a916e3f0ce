"""Attention over packed samples, each of which attends only to itself.

On every device, attention is a single op that a `Kernel` computes, so torch.compile traces it like any other op. The
gradient of queries, keys and values is one tensor, as the matmul before the op expects.

Shapes: S samples, T rows, Q query rows, H heads, D values per head.
"""

import torch
from torch import Tensor

from ..dispatch import (
    accumulator,
    as_rows,
    check_float,
    check_index,
    compute_dtype,
    no_autocast,
    requested_impl,
    with_lead,
)
from ..registry import Op
from .choice import kernel_for
from .kernel import Kernel, Segments, as_length, check_segments, check_sizes


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    q: Tensor | None = None,
    cu_queries: Tensor | None = None,
    max_queries: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v within each sample.

    Args:
        qkv: [..., 3, H, D] floating-point, T rows of queries, keys and values. If q is given: [..., 2, H, D], T rows of
            keys and values.
        cu_seqlens: [S + 1] int32 or int64: sample s consists of the rows cu_seqlens[s] to cu_seqlens[s + 1]. The values
            go from 0 to T, so that every row belongs to a sample.
        max_seqlen: number of rows of the longest sample, or an upper bound.
        q: [..., H, D] floating-point, Q rows: separate queries, for example of only some of the rows.
        cu_queries, max_queries: cu_seqlens and max_seqlen of q. A sample may have no queries. It may also have no keys;
            the result of its queries is then 0.
        impl: "auto" for the fastest installed kernel, "triton" (D up to 128) or "torch".

    Returns:
        [..., H, D], one row per query, in autocast's dtype if autocast is enabled, otherwise in the dtype of qkv. Sums
        are computed in float32 (float64 for float64). Gradients are computed for qkv and q; the gradient of qkv is one
        contiguous tensor with the layout of qkv. This package's kernels use no atomics. On a GPU, however, "auto" may
        choose a kernel of another library that uses atomics; two runs then differ by rounding.

    Raises:
        TypeError, ValueError: the dtype, shape, device or value of the named argument is wrong, or another argument
            that it requires is missing.
        IndexError: cu_seqlens or cu_queries does not increase from 0 to the number of rows in steps of at most the
            given maximum. The values are checked on a CPU, and everywhere with M3AE_KERNELS_CHECK=1.
    """
    check_float("qkv", qkv, (..., 3 if q is None else 2, None, None), qkv)
    check_sizes("qkv", qkv.shape[-2], qkv.shape[-1])
    check_index("cu_seqlens", cu_seqlens, (None,), qkv)
    if (q is None) != (cu_queries is None) or (q is None) != (max_queries is None):
        raise ValueError("q, cu_queries and max_queries must be given together")
    if q is not None and cu_queries is not None:
        check_float("q", q, (..., *qkv.shape[-2:]), qkv)
        check_index("cu_queries", cu_queries, cu_seqlens.shape, qkv)
    impl, dtype = requested_impl(impl), compute_dtype(qkv, qkv)
    lead = qkv.shape[:-3] if q is None else q.shape[:-2]
    q, qkv = None if q is None else as_rows(q.to(dtype), 2), as_rows(qkv.to(dtype), 3)
    cu_queries = cu_seqlens if cu_queries is None else cu_queries
    max_seqlen = as_length("max_seqlen", max_seqlen)
    max_queries = max_seqlen if max_queries is None else as_length("max_queries", max_queries)
    return with_lead(attention_op(q, qkv, cu_queries, cu_seqlens, max_queries, max_seqlen, impl)[0], lead)


def _parts(q: Tensor | None, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = kv.unbind(1) if q is None else (q, *kv.unbind(1))
    return q, k, v


def _segments(
    q: Tensor | None, kv: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> tuple[Segments, Segments]:
    queries, keys = (cu.to(torch.int32).contiguous() for cu in (cu_queries, cu_keys))
    return Segments(queries, max_queries, (kv if q is None else q).shape[0]), Segments(keys, max_keys, kv.shape[0])


def _kernel(kv: Tensor, max_keys: int, impl: str) -> Kernel:
    return kernel_for(impl, kv.device, kv.dtype, kv.shape[2], kv.shape[3], max_keys)


def _rows(x: Tensor) -> Tensor:
    """Return `x`, contiguous except for the stride between rows."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _forward(
    q: Tensor | None,
    kv: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return the result [Q, H, D] and the kernel's log-sum-exps [H, Q]."""
    queries, keys = _segments(q, kv, cu_queries, cu_keys, max_queries, max_keys)
    check_segments("packed_attention", cu_seqlens=keys, cu_queries=queries)
    if not queries.rows:
        return _fake(q, kv, cu_queries, cu_keys, max_queries, max_keys, impl)
    with no_autocast(kv):
        parts = _parts(None if q is None else _rows(q), _rows(kv))
        return _kernel(kv, max_keys, impl).forward(*parts, queries, keys)


def _fake(q, kv, cu_queries, cu_keys, max_queries, max_keys, impl):
    q = kv[:, 0] if q is None else q
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulator(q.dtype))


def _setup_context(ctx, inputs, output):
    q, kv, cu_queries, cu_keys, *ctx.options = inputs
    ctx.save_for_backward(q, kv, *output, cu_queries, cu_keys)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    tensors = ctx.saved_tensors  # read only once, because activation checkpointing recomputes them each time
    dq, dkv = attention_backward_op(grad, *tensors, *ctx.options)
    need_q, need_kv = ctx.needs_input_grad[:2]
    return dq if need_q else None, dkv if need_kv else None, *[None] * 5


def _gradients(
    grad: Tensor,
    q: Tensor | None,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q (empty without q) and of kv, contiguous."""
    dq, dkv = _empty_gradients(grad, q, kv, out, lse, cu_queries, cu_keys, max_queries, max_keys, impl)
    queries, keys = _segments(q, kv, cu_queries, cu_keys, max_queries, max_keys)
    if not queries.rows:
        return dq, dkv.zero_()
    with no_autocast(kv):
        parts = _parts(None if q is None else _rows(q), _rows(kv))
        grads = _parts(None if q is None else dq, dkv)
        kernel = _kernel(kv, max_keys, impl)
        kernel.backward(grad.contiguous(), *parts, out, lse, *grads, queries, keys)
    return dq, dkv


def _empty_gradients(grad, q, kv, out, lse, cu_queries, cu_keys, max_queries, max_keys, impl):
    return kv.new_empty(0) if q is None else q.new_empty(q.shape), kv.new_empty(kv.shape)


attention_op = Op("packed_attention", _forward, _fake, _setup_context, _backward)
attention_backward_op = Op("packed_attention_backward", _gradients, _empty_gradients)
