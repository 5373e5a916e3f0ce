"""Attention over packed sequences: every sample attends to itself alone.

Shapes: Q query rows, K key rows, H heads, D values a head; S samples, N rows of the longest.

On CUDA in bf16/fp16 this is FlashAttention's varlen kernel: flash-attn where it is installed (FA4, FA3, FA2), else
`torch.nn.attention.varlen`. On a CPU it is `segment_attention`. Neither pads. What they do not take (dropout, float32
on CUDA, old GPUs) goes through torch's scaled_dot_product_attention, padded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.model.batch import Segments
from m3ae_fast.model.cpu import avx512
from m3ae_fast.model.cpu.attention import segment_attention


def packed_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sample; `queries` and `keys` hold the same samples. Returns [Q, H, D]."""
    if len(q_QHD) == 0:
        return q_QHD * 1.0 + 0.0 * (k_KHD.sum() + v_KHD.sum())  # keeps a gradient, of zeros
    if q_QHD.is_cuda:
        return _cuda_attention(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)
    if dropout_p:
        return padded_attention(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)
    return segment_attention(q_QHD, k_KHD, v_KHD, queries.cu_seqlens, keys.cu_seqlens)[0]


@torch.compiler.disable  # what is installed cannot all be traced; a graph ends before each call
def _cuda_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float
) -> Tensor:
    flash = _flash(q_QHD.dtype, q_QHD.shape[-1], dropout_p > 0)
    if flash is None:
        return padded_attention(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)
    return flash(q_QHD, k_KHD, v_KHD, queries, keys, dropout_p)


def padded_attention(
    q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments, dropout_p: float = 0.0
) -> Tensor:
    """The same by scaled_dot_product_attention, each sample padded to the longest."""
    places_Q = _padded_places(queries)
    q_SHND, k_SHND, v_SHND = (
        x.new_zeros((len(segments.cu_seqlens) - 1) * segments.max_seqlen, *x.shape[1:])
        .index_copy(0, _padded_places(segments), x)
        .unflatten(0, (-1, segments.max_seqlen))
        .transpose(1, 2)
        for x, segments in ((q_QHD, queries), (k_KHD, keys), (v_KHD, keys))
    )
    valid_SN = torch.arange(keys.max_seqlen, device=q_QHD.device) < keys.cu_seqlens.diff()[:, None]
    out_SHND = F.scaled_dot_product_attention(
        q_SHND, k_SHND, v_SHND, attn_mask=valid_SN[:, None, None], dropout_p=dropout_p
    )
    return out_SHND.transpose(1, 2).flatten(0, 1)[places_Q]


def _padded_places(segments: Segments) -> Tensor:
    """Where each row lies among the S * N padded ones."""
    starts_S, lengths_S = segments.cu_seqlens[:-1], segments.cu_seqlens.diff()
    shift_S = segments.max_seqlen * torch.arange(len(starts_S), device=starts_S.device) - starts_S
    rows = torch.arange(segments.rows, device=starts_S.device)
    return rows + shift_S.repeat_interleave(lengths_S, output_size=segments.rows)


def attention_backend(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool) -> str:
    """Name of what `packed_attention` runs on, for logs."""
    if device.type == "cuda" and (flash := _flash(dtype, head_dim, dropout)) is not None:
        return flash.name
    if device.type == "cuda" or dropout:
        return "padded SDPA"
    return "AVX-512" if avx512.takes(dtype, device, head_dim) else "torch, per sample"


@dataclass(frozen=True)
class _Flash:
    """One varlen kernel behind one signature."""

    name: str
    run: Callable
    max_dim: int = 256
    takes_dropout: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, dropout_p: float) -> Tensor:
        options = {"dropout_p": dropout_p} if self.takes_dropout else {}
        out = self.run(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen, **options)
        return out[0] if isinstance(out, tuple) else out


@functools.cache
def _flash(dtype: torch.dtype, head_dim: int, dropout: bool) -> _Flash | None:
    """The fastest varlen kernel that is installed, made for this GPU, and takes such heads."""
    major = torch.cuda.get_device_capability()[0]
    if dtype not in (torch.bfloat16, torch.float16) or major < 8 or head_dim % 8:
        return None
    makers = {9: (_fa3, _fa4), 10: (_fa4,)}.get(major, ())
    for make in (*makers, _fa2, _torch_varlen):
        try:
            flash = make()
        except Exception:  # not installed, too old, or broken by what it stands on
            continue
        if head_dim <= flash.max_dim and (flash.takes_dropout or not dropout):
            return flash
    return None


def _fa4() -> _Flash:
    from flash_attn.cute import flash_attn_varlen_func as varlen

    if "max_seqlen_q" not in inspect.signature(varlen).parameters:
        raise ImportError("the FA4 that flash-attn 2 brought along has no varlen backward")

    def call(q, k, v, cu_q, cu_k, max_q, max_k):
        return varlen(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k)

    return _Flash("flash-attn 4", call, max_dim=256 if torch.cuda.get_device_capability()[0] == 9 else 128)


def _fa3() -> _Flash:
    from flash_attn_interface import flash_attn_varlen_func

    return _Flash("flash-attn 3", flash_attn_varlen_func)


def _fa2() -> _Flash:
    from flash_attn import flash_attn_varlen_func

    return _Flash("flash-attn 2", flash_attn_varlen_func, takes_dropout=True)


def _torch_varlen() -> _Flash:
    from torch.nn.attention.varlen import varlen_attn

    return _Flash("torch varlen", varlen_attn)
