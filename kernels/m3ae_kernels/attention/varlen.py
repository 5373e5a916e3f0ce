"""`flash_attn_varlen_func`, attention with the interface of flash-attn and separate queries, keys and values.

Shapes: S samples, Q query rows, K key rows, H heads, G heads of keys and values, D values per head.
"""

import torch
from torch import Tensor

from ..dispatch import (
    accumulator,
    check_float,
    check_index,
    check_number,
    compute_dtype,
    is_integer,
    no_autocast,
    requested_impl,
)
from ..registry import Op, traced
from .choice import kernel_for, own_kernel
from .kernel import Kernel, Scores, Segments, as_length, check_segments, check_sizes
from .padded import padded_attention

NAME = "flash_attn_varlen_func"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Return softmax(softmax_scale * q k^T) v within each sample, as flash-attn 2.8's function of this name does.

    Args:
        q: [Q, H, D] floating-point.
        k, v: [K, G, D] floating-point; H is a multiple of G, and head h reads keys and values of head h // (H / G). If
            k and v have fewer heads than q, they are repeated.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 or int64: sample s consists of the rows cu_seqlens[s] to cu_seqlens[s
            + 1]. The values go from 0 to Q and from 0 to K, respectively. A sample may have no queries or no keys.
        max_seqlen_q, max_seqlen_k: number of rows of the longest sample, or an upper bound.
        dropout_p: fraction of the attention weights that are dropped. If it is above 0, all samples are padded to the
            longest.
        softmax_scale: positive; None for 1 / sqrt(D).
        causal: whether a query attends only to keys up to its own position. The last query of a sample has the position
            of its last key: with M queries and N keys, query m attends to keys 0 to m + N - M.
        window_size: (left, right): a query attends to `left` keys before its position and to `right` keys after it; -1
            for all keys.
        softcap, alibi_slopes, block_table: not supported.
        deterministic: whether two runs must be bitwise identical, even if this excludes faster kernels.
        return_attn_probs: whether to return (out, softmax_lse [H, Q], an empty tensor) instead of out. softmax_lse is
            the logarithm of the sum of exponentials of a query's scores; it is infinite if the query attends to no key,
            and has no gradient.
        impl: "auto", "triton" (D up to 128) or "torch". "auto" has the same meaning as in `packed_attention`. However,
            with softmax_scale, a causal mask or a window, it selects the Triton kernel on a GPU and padded matmuls on a
            CPU, and with `deterministic` on a GPU, it selects the Triton kernel.

    Returns:
        [Q, H, D] in autocast's dtype if autocast is enabled, otherwise in the dtype of q; 0 for a query that attends to
        no key. Sums are computed in float32 (float64 for float64). Gradients are computed for q, k and v.

    Raises:
        TypeError, ValueError: the dtype, shape, device or value of the named argument is wrong.
        IndexError: cu_seqlens_q or cu_seqlens_k does not increase from 0 to the number of rows in steps of at most the
            given maximum. They are checked on a CPU, and everywhere with M3AE_KERNELS_CHECK=1.
        NotImplementedError: the named argument is supported only by flash-attn itself.
    """
    asked = {"softcap": softcap != 0, "alibi_slopes": alibi_slopes is not None, "block_table": block_table is not None}
    for name, given in asked.items():
        if given:
            raise NotImplementedError(f"m3ae_kernels: {NAME} does not support {name}; flash-attn itself does, on a GPU")
    if dropout_p and return_attn_probs:
        raise NotImplementedError(f"m3ae_kernels: {NAME} does not support return_attn_probs with dropout_p")
    check_float("q", q, (None, None, None), q)
    check_float("k", k, (None, None, q.shape[2]), q)
    check_float("v", v, tuple(k.shape), q)
    check_index("cu_seqlens_q", cu_seqlens_q, (None,), q)
    check_index("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), q)
    heads, groups = q.shape[1], k.shape[1]
    check_sizes("q", heads, q.shape[2], dropout_p)
    if not groups or heads % groups:
        raise ValueError(f"q has {heads} heads, which is not a multiple of the {groups} heads of k and v")
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
        if not softmax_scale > 0:
            raise ValueError(f"softmax_scale is {softmax_scale}, but must be positive")
    dtype = compute_dtype(q, q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if groups < heads:
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    left, right = _window(window_size)
    right = 0 if causal else right
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    max_seqlen_q, max_seqlen_k = as_length("max_seqlen_q", max_seqlen_q), as_length("max_seqlen_k", max_seqlen_k)
    if dropout_p:
        segments = _segments(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if not traced(q, cu_seqlens_q):
            check_segments(NAME, cu_seqlens_q=segments[0], cu_seqlens_k=segments[1])
        return padded_attention(q, k, v, *segments, dropout_p, Scores(scale, left, right))
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    own = deterministic and q.device.type == "cuda"
    out, lse, _ = varlen_attention_op(q, k, v, *lengths, scale, left, right, own, requested_impl(impl))
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def _window(size: tuple[int, int]) -> tuple[int, int]:
    """Return (left, right). Raises TypeError unless the window is a pair of integers."""
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(map(is_integer, size)):
        raise TypeError(f"window_size is {size}, but must be a pair of integers, (left, right)")
    left, right = size
    return left, right


def _segments(
    q: Tensor, k: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> tuple[Segments, Segments]:
    queries, keys = (cu.to(torch.int32).contiguous() for cu in (cu_queries, cu_keys))
    return Segments(queries, max_queries, len(q)), Segments(keys, max_keys, len(k))


def _chosen(
    q: Tensor, max_keys: int, scale: float, left: int, right: int, own: bool, impl: str
) -> tuple[Kernel, list[Scores]]:
    """Return a kernel and the additional arguments of its functions."""
    if scale == q.shape[2] ** -0.5 and left < 0 and right < 0 and not own:
        return kernel_for(impl, q.device, q.dtype, q.shape[1], q.shape[2], max_keys), []
    return own_kernel(impl, q.device, q.dtype), [Scores(scale, left, right)]


def _rows(x: Tensor) -> Tensor:
    """Return `x`, contiguous except for the stride between rows."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in the layout of the kernels: keys and values have the same stride between rows."""
    k, v = _rows(k), _rows(v)
    return (_rows(q), k, v) if k.stride(0) == v.stride(0) else (_rows(q), k.contiguous(), v.contiguous())


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
    left: int,
    right: int,
    own: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result [Q, H, D], and the log-sum-exps [H, Q] in nats and in the kernel's units."""
    segments = _segments(q, k, cu_queries, cu_keys, max_queries, max_keys)
    check_segments(NAME, cu_seqlens_q=segments[0], cu_seqlens_k=segments[1])
    if not len(q):
        return _fake(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, left, right, own, impl)
    kernel, scores = _chosen(q, max_keys, scale, left, right, own, impl)
    with no_autocast(q):
        out, lse = kernel.forward(*_parts(q, k, v), *segments, *scores)
    return out, lse * kernel.unit, lse


def _fake(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, left, right, own, impl):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse, torch.empty_like(lse)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_queries, cu_keys, *ctx.options = inputs
    out, lse, own_lse = output
    ctx.save_for_backward(q, k, v, out, own_lse, cu_queries, cu_keys)
    ctx.mark_non_differentiable(lse, own_lse)


def _backward(ctx, grad, *_):
    tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes them at each access
    grads = varlen_attention_backward_op(grad, *tensors, *ctx.options)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), *[None] * 9


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
    left: int,
    right: int,
    own: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, contiguous."""
    dq, dk, dv = _empty_gradients(grad, q, k, v)
    if not len(q):
        return dq, dk.zero_(), dv.zero_()
    segments = _segments(q, k, cu_queries, cu_keys, max_queries, max_keys)
    kernel, scores = _chosen(q, max_keys, scale, left, right, own, impl)
    with no_autocast(q):
        kernel.backward(grad.contiguous(), *_parts(q, k, v), out, lse, dq, dk, dv, *segments, *scores)
    return dq, dk, dv


def _empty_gradients(grad, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


varlen_attention_op = Op("varlen_attention", _forward, _fake, _setup_context, _backward)
varlen_attention_backward_op = Op("varlen_attention_backward", _gradients, _empty_gradients)
