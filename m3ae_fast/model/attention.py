"""Attention over packed sequences: every sample attends to itself alone, and no padding exists.

Shapes: Q query rows, K key rows, H heads, D values a head.

On CUDA in bf16/fp16 this is FlashAttention's varlen kernel: flash-attn where it is installed (FA4, FA3, FA2), else
`torch.nn.attention.varlen`. Everywhere else it is one attention a sample, written for the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.model.packing import Segments


def packed_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sample; `queries` and `keys` hold the same samples. Returns [Q, H, D]."""
    if len(q_QHD) == 0:
        return q_QHD * 1.0 + 0.0 * (k_KHD.sum() + v_KHD.sum())  # keeps a gradient, of zeros
    if q_QHD.is_cuda and q_QHD.dtype in (torch.bfloat16, torch.float16):
        flash = _flash()
        if flash is not None and (dropout_p == 0 or flash.takes_dropout):
            return flash(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)
    if dropout_p:
        return _dropout_attention(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)
    return segment_attention(q_QHD, k_KHD, v_KHD, queries.cu_seqlens, keys.cu_seqlens)[0]


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name of what `packed_attention` runs on, for logs."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _flash() is not None:
        return _flash().name
    return "per-sample"


class _Flash:
    """One varlen kernel behind one signature."""

    def __init__(self, name: str, run: Callable, takes_dropout: bool) -> None:
        self.name, self.run, self.takes_dropout = name, run, takes_dropout

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, dropout_p: float) -> Tensor:
        options = {"dropout_p": dropout_p} if self.takes_dropout else {}
        out = self.run(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen, **options)
        return out[0] if isinstance(out, tuple) else out


@functools.cache
def _flash() -> _Flash | None:
    """The fastest varlen kernel that is installed and made for this GPU."""
    major = torch.cuda.get_device_capability()[0]
    if major >= 9:
        try:
            from flash_attn.cute import flash_attn_varlen_func

            return _Flash("flash-attn 4", _cute_order(flash_attn_varlen_func), takes_dropout=False)
        except ImportError:
            pass
    if major == 9:
        try:
            from flash_attn_interface import flash_attn_varlen_func

            return _Flash("flash-attn 3", flash_attn_varlen_func, takes_dropout=False)
        except ImportError:
            pass
    try:
        from flash_attn import flash_attn_varlen_func

        return _Flash("flash-attn 2", flash_attn_varlen_func, takes_dropout=True)
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn

        return _Flash("torch varlen", varlen_attn, takes_dropout=False)
    except ImportError:
        return None


def _cute_order(run: Callable) -> Callable:
    """FA4 takes the lengths by name."""

    def call(q, k, v, cu_q, cu_k, max_q, max_k):
        return run(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k)

    return call


def _spans(cu_queries: Tensor, cu_keys: Tensor) -> list[tuple[slice, slice]]:
    """Row ranges of the samples that have queries. On a GPU this waits for the device; the flash kernels do not."""
    q_ends, k_ends = cu_queries.tolist(), cu_keys.tolist()
    pairs = zip(q_ends, q_ends[1:], k_ends, k_ends[1:])
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in pairs if q1 > q0]


def _dropout_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float
) -> Tensor:
    outs = []
    for rows, cols in _spans(queries.cu_seqlens, keys.cu_seqlens):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_QHD[rows], k_KHD[cols], v_KHD[cols]))
        outs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)[0].transpose(0, 1))
    return torch.cat(outs)


@torch.library.custom_op("m3ae_fast::segment_attention", mutates_args=())
def segment_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, cu_queries: Tensor, cu_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of each sample by itself. Returns [Q, H, D] and the log-sum-exp of the scores [H, Q]."""
    out_QHD = torch.empty(q_QHD.shape, dtype=q_QHD.dtype, device=q_QHD.device)
    lse_HQ = torch.empty(q_QHD.shape[1], q_QHD.shape[0], dtype=_wide(q_QHD.dtype), device=q_QHD.device)
    scale = q_QHD.shape[-1] ** -0.5
    for rows, cols in _spans(cu_queries, cu_keys):
        q, k, v = (x.transpose(0, 1) for x in (q_QHD[rows], k_KHD[cols], v_KHD[cols]))  # [H, n, D]
        scores_Hqk = torch.bmm(q * scale, k.transpose(1, 2)).to(lse_HQ.dtype)
        lse = scores_Hqk.logsumexp(-1)
        lse_HQ[:, rows] = lse
        p_Hqk = scores_Hqk.sub_(lse[..., None]).exp_().to(q.dtype)
        out_QHD[rows] = torch.bmm(p_Hqk, v).transpose(0, 1)
    return out_QHD, lse_HQ


@segment_attention.register_fake
def _(q_QHD, k_KHD, v_KHD, cu_queries, cu_keys):
    lse_HQ = q_QHD.new_empty((q_QHD.shape[1], q_QHD.shape[0]), dtype=_wide(q_QHD.dtype))
    return torch.empty(q_QHD.shape, dtype=q_QHD.dtype, device=q_QHD.device), lse_HQ


@torch.library.custom_op("m3ae_fast::segment_attention_backward", mutates_args=())
def segment_attention_backward(
    grad_QHD: Tensor,
    q_QHD: Tensor,
    k_KHD: Tensor,
    v_KHD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. The probabilities are computed again: exp(scores - lse)."""
    dq, dk, dv = torch.empty_like(q_QHD), torch.zeros_like(k_KHD), torch.zeros_like(v_KHD)
    scale = q_QHD.shape[-1] ** -0.5
    delta_HQ = (grad_QHD.to(lse_HQ.dtype) * out_QHD).sum(-1).T
    for rows, cols in _spans(cu_queries, cu_keys):
        q, k, v, grad = (x.transpose(0, 1) for x in (q_QHD[rows] * scale, k_KHD[cols], v_KHD[cols], grad_QHD[rows]))
        p_Hqk = torch.bmm(q, k.transpose(1, 2)).to(lse_HQ.dtype).sub_(lse_HQ[:, rows, None]).exp_()
        dv[cols] = torch.bmm(p_Hqk.to(q.dtype).transpose(1, 2), grad).transpose(0, 1)
        dp_Hqk = torch.bmm(grad, v.transpose(1, 2)).to(lse_HQ.dtype)
        ds_Hqk = p_Hqk.mul_(dp_Hqk.sub_(delta_HQ[:, rows, None])).to(q.dtype)
        dq[rows] = (torch.bmm(ds_Hqk, k) * scale).transpose(0, 1)
        dk[cols] = torch.bmm(ds_Hqk.transpose(1, 2), q).transpose(0, 1)
    return dq, dk, dv


@segment_attention_backward.register_fake
def _(grad_QHD, q_QHD, k_KHD, v_KHD, out_QHD, lse_HQ, cu_queries, cu_keys):
    return torch.empty_like(q_QHD), torch.empty_like(k_KHD), torch.empty_like(v_KHD)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_QHD, _):
    q, k, v, out, lse, cu_queries, cu_keys = ctx.saved_tensors
    return *segment_attention_backward(grad_QHD, q, k, v, out, lse, cu_queries, cu_keys), None, None


segment_attention.register_autograd(_backward, setup_context=_save)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
