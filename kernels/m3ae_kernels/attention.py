"""Attention over packed samples, each of which attends to itself alone.

Shapes: S samples, T rows, Q query rows, H heads, D values a head.
"""

from torch import Tensor

from . import per_sample
from .dispatch import accumulator, check_float, check_index, choose_impl, compute_dtype, no_autocast
from .registry import Op


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
    """softmax(q k^T / sqrt(D)) v within each sample.

    Args:
        qkv: [T, 3, H, D] floating, queries, keys and values; or, with q, [T, 2, H, D] keys and values.
        cu_seqlens: [S + 1] int32 or int64: sample s is the rows cu_seqlens[s] to cu_seqlens[s + 1]; from 0 to T, so
            that every row is some sample's.
        max_seqlen: rows of the longest sample, or more.
        q: [Q, H, D] floating, queries of some rows alone.
        cu_queries, max_queries: as cu_seqlens and max_seqlen, of q. A sample may have no queries; one with queries has
            keys.
        impl: "auto", "triton" (D up to 128) or "torch".

    Returns:
        [T, H, D] or [Q, H, D], in autocast's dtype where it is on, else in qkv's. Sums in float32 (float64 for
        float64). Gradients for qkv, as one contiguous tensor of its layout, and for q, without atomics.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape or device is wrong, or that lacks its companion.
    """
    check_float("qkv", qkv, (None, 3 if q is None else 2, None, None), qkv)
    check_index("cu_seqlens", cu_seqlens, (None,), qkv)
    if (q is None) != (cu_queries is None) or (q is None) != (max_queries is None):
        raise ValueError("q, cu_queries and max_queries must be given together")
    if q is not None and cu_queries is not None:
        check_float("q", q, (None, *qkv.shape[2:]), qkv)
        check_index("cu_queries", cu_queries, cu_seqlens.shape, qkv)
    dtype = compute_dtype(qkv, qkv)
    q, qkv = None if q is None else q.to(dtype), qkv.to(dtype)
    queries = cu_seqlens if cu_queries is None else cu_queries
    longest = max_seqlen if max_queries is None else max_queries
    return attention_op(q, qkv, queries, cu_seqlens, longest, max_seqlen, choose_impl(impl, qkv.device))[0]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """For callers with an op of their own, without autograd or checks; `impl` is "triton" or "torch".

    q [Q, H, D], k and v [T, H, D] may be slices of one tensor, contiguous in their last two dimensions. Returns (out
    [Q, H, D], lse [H, Q] in the accumulator's dtype, for `attention_backward` of the same `impl`)."""
    if impl == "triton":
        from .triton_impl.attention import attention

        return attention(q, k, v, cu_queries, cu_keys, max_queries, max_keys)
    with no_autocast(q):
        return per_sample.attention(q, k, v, cu_queries, cu_keys)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    impl: str,
) -> None:
    """Writes every row of dq, dk and dv, which may be such slices too; grad is contiguous."""
    if impl == "triton":
        from .triton_impl.attention import attention_backward

        attention_backward(grad, q, k, v, out, lse, dq, dk, dv, cu_queries, cu_keys, max_queries, max_keys)
        return
    with no_autocast(q):
        per_sample.attention_backward(grad, q, k, v, out, lse, dq, dk, dv, cu_queries, cu_keys)


def _parts(q: Tensor | None, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = kv.unbind(1) if q is None else (q, *kv.unbind(1))
    return q, k, v


def _rows(x: Tensor) -> Tensor:
    """Contiguous but for its rows."""
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
    """Returns (out [Q, H, D], lse [H, Q])."""
    if impl == "torch":
        _check_ends("cu_seqlens", cu_keys, max_keys, len(kv))
        _check_ends("cu_queries", cu_queries, max_queries, len(kv if q is None else q))
    parts = _parts(None if q is None else _rows(q), _rows(kv))
    return attention_forward(*parts, cu_queries.contiguous(), cu_keys.contiguous(), max_queries, max_keys, impl)


def _check_ends(name: str, cu: Tensor, longest: int, rows: int) -> None:
    """It reads the values: for CPU code alone."""
    lengths = cu.diff()
    if not len(cu) or cu[0] != 0 or cu[-1] != rows or (len(lengths) and (lengths.min() < 0 or lengths.max() > longest)):
        raise IndexError(
            f"{name} must rise from 0 to the {rows} rows there are, by at most the longest, {longest}, a step"
        )


def _fake(q, kv, cu_queries, cu_keys, max_queries, max_keys, impl):
    q = kv[:, 0] if q is None else q
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulator(q.dtype))


def _setup_context(ctx, inputs, output):
    q, kv, cu_queries, cu_keys, *ctx.options = inputs
    ctx.save_for_backward(q, kv, *output, cu_queries, cu_keys)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    dq, dkv = attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
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
    """Returns the gradients of q (without q no elements) and of kv, contiguous."""
    q, kv = None if q is None else _rows(q), _rows(kv)
    dq, dkv = _empty_gradients(grad, q, kv, out, lse, cu_queries, cu_keys, max_queries, max_keys, impl)
    cu_queries, cu_keys = cu_queries.contiguous(), cu_keys.contiguous()
    tensors = (grad.contiguous(), *_parts(q, kv), out, lse, *_parts(None if q is None else dq, dkv))
    attention_backward(*tensors, cu_queries, cu_keys, max_queries, max_keys, impl)
    return dq, dkv


def _empty_gradients(grad, q, kv, out, lse, cu_queries, cu_keys, max_queries, max_keys, impl):
    return kv.new_empty(0) if q is None else q.new_empty(q.shape), kv.new_empty(kv.shape)


attention_op = Op("packed_attention", _forward, _fake, _setup_context, _backward)
attention_backward_op = Op("packed_attention_backward", _gradients, _empty_gradients)
