"""Attention over packed sequences: every sample attends to itself alone, and no padding exists.

Shapes: Q query rows, K key rows, H heads, D values a head.

On CUDA in bf16/fp16 this is FlashAttention's varlen kernel: flash-attn where it is installed (FA4, FA3, FA2), else
`torch.nn.attention.varlen`. Everywhere else it is `segment_attention`, written for the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.model import cpu_attention
from m3ae_fast.model.packing import Segments
from m3ae_fast.model.segment_attention import segment_attention


def packed_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sample; `queries` and `keys` hold the same samples. Returns [Q, H, D]."""
    if len(q_QHD) == 0:
        return q_QHD * 1.0 + 0.0 * (k_KHD.sum() + v_KHD.sum())  # keeps a gradient, of zeros
    # flash kernels want heads of a multiple of 8 values
    if q_QHD.is_cuda and q_QHD.dtype in (torch.bfloat16, torch.float16) and q_QHD.shape[-1] % 8 == 0:
        return _flash_attention(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)
    return _sample_attention(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)


@torch.compiler.disable  # what is installed cannot all be traced; a graph ends before each call
def _flash_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float
) -> Tensor:
    flash = _flash()
    if flash is None or (dropout_p and not flash.takes_dropout):
        return _sample_attention(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)
    return flash(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)


def _sample_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float
) -> Tensor:
    if dropout_p:
        return _dropout_attention(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)
    return segment_attention(q_QHD, k_KHD, v_KHD, queries.cu_seqlens, keys.cu_seqlens)[0]


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name of what `packed_attention` runs on, for logs."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _flash() is not None:
        return _flash().name
    if device.type == "cpu" and dtype == torch.bfloat16 and cpu_attention.kernels() is not None:
        return "AVX-512 bf16"
    return "torch, per sample"


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


def _dropout_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float
) -> Tensor:
    outs = []
    q_sizes, k_sizes = (segments.cu_seqlens.diff().tolist() for segments in (queries, keys))
    for q, k, v in zip(q_QHD.split(q_sizes), k_KHD.split(k_sizes), v_KHD.split(k_sizes)):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)[0].transpose(0, 1))
    return torch.cat(outs)
