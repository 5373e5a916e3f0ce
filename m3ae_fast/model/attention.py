"""Attention over packed sequences: every sample attends only to itself.

One op, forward and backward, on a CPU and on a GPU: torch.compile traces it like any other, and the gradient of
queries, keys and values is written as the one tensor that the matmul before it expects. What computes it is a `Kernel`:
on CUDA the fastest that is installed (`cuda_attention`), on a CPU a custom one (`cpu.attention`).

Shapes: T rows, Q query rows, H heads, D values per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast.batch.masking import kept
from m3ae_fast.batch.packed import Segments
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.model import cuda_attention
from m3ae_fast.model.cpu.attention import cpu_kernel
from m3ae_fast.model.kernel import Kernel
from m3ae_fast.model.padded import padded_attention


def packed_attention(
    q_QHD: Tensor | None, kv_TnHD: Tensor, queries: Segments, keys: Segments, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sample.

    Args:
        q_QHD: queries of some rows; None: of all rows, in `kv_TnHD`.
        kv_TnHD: [T, 2, H, D] keys and values, or [T, 3, H, D] queries, keys and values.
        queries: where the samples' queries lie.
        keys: where the same samples' keys lie; a sample with queries has keys.
        dropout_p: above 0 each sample is padded to the longest.

    Returns:
        [Q, H, D].
    """
    if dropout_p:
        return padded_attention(*_parts(q_QHD, kv_TnHD), queries, keys, dropout_p)
    return attention_op(q_QHD, kv_TnHD, queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)[0]


def _parts(q_QHD: Tensor | None, kv_TnHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = kv_TnHD.unbind(1) if q_QHD is None else (q_QHD, *kv_TnHD.unbind(1))
    return q, k, v


def describe(config: ModelConfig, masking: MaskingConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What attention runs on in the encoder and in the decoder, for people. On CUDA this is when kernels are tried."""
    if config.att_drop:
        return "padded SDPA"
    patches, tokens = config.patches_per_image, config.text_length if config.vocab_size else 0
    visible, rows = 1 + kept(patches, masking.image_ratio) + kept(tokens, masking.text_ratio), 1 + patches + tokens
    sizes = ((config.emb_dim, config.num_heads, visible), (config.dec_emb_dim, config.dec_num_heads, rows))
    find = cuda_attention.try_out if device.type == "cuda" else kernel_for
    encoder, decoder = (find(device, dtype, heads, dim // heads, length).name for dim, heads, length in sizes)
    return encoder if encoder == decoder else f"{encoder} (encoder), {decoder} (decoder)"


def kernel_for(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int) -> Kernel:
    """What attention of samples of about `length` keys runs on. On CUDA the first call for a kind of head takes
    a second, to try what is installed."""
    if device.type == "cuda":
        return cuda_attention.choose(device, dtype, heads, head_dim, length)
    return cpu_kernel(dtype, head_dim)


@torch.library.custom_op("m3ae_fast::packed_attention", mutates_args=())
def attention_op(
    q: Tensor | None, kv: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> tuple[Tensor, Tensor]:
    """Returns (out [Q, H, D], the kernel's log-sum-exps [H, Q])."""
    q, k, v = _parts(q, kv)
    if not len(q):
        return _empty(q)
    kernel = kernel_for(q.device, q.dtype, q.shape[1], q.shape[2], max_keys)
    queries, keys = Segments(cu_queries, max_queries, len(q)), Segments(cu_keys, max_keys, len(k))
    return kernel.forward(q, k, v, queries, keys)


def _empty(q_QHD: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_QHD.dtype, torch.float32)
    return q_QHD.new_empty(q_QHD.shape), q_QHD.new_empty((q_QHD.shape[1], q_QHD.shape[0]), dtype=wide)


@attention_op.register_fake
def _(q, kv, cu_queries, cu_keys, max_queries, max_keys):
    return _empty(kv[:, 0] if q is None else q)


@torch.library.custom_op("m3ae_fast::packed_attention_backward", mutates_args=())
def attention_backward_op(
    grad: Tensor,
    q: Tensor | None,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of q (without q no rows) and of kv, contiguous."""
    dq, dkv = _empty_grads(q, kv)
    parts, grads = _parts(q, kv), _parts(None if q is None else dq, dkv)
    if not len(parts[0]):
        return dq, dkv.zero_()
    kernel = kernel_for(kv.device, kv.dtype, kv.shape[2], kv.shape[3], max_keys)
    queries, keys = Segments(cu_queries, max_queries, len(parts[0])), Segments(cu_keys, max_keys, len(kv))
    kernel.backward(grad.contiguous(), *parts, out, lse, *grads, queries, keys)
    return dq, dkv


@attention_backward_op.register_fake
def _(grad, q, kv, out, lse, cu_queries, cu_keys, max_queries, max_keys):
    return _empty_grads(q, kv)


def _empty_grads(q: Tensor | None, kv: Tensor) -> tuple[Tensor, Tensor]:
    return kv.new_empty(0) if q is None else q.new_empty(q.shape), kv.new_empty(kv.shape)


def _save(ctx, inputs, output):
    q, kv, cu_queries, cu_keys, *ctx.longest = inputs
    ctx.save_for_backward(q, kv, *output, cu_queries, cu_keys)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_QHD, _):
    q, *others = ctx.saved_tensors  # read once: activation checkpointing recomputes them at each access
    dq, dkv = attention_backward_op(grad_QHD, q, *others, *ctx.longest)
    return None if q is None else dq, dkv, None, None, None, None


attention_op.register_autograd(_backward, setup_context=_save)
