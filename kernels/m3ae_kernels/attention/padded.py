"""Attention with all samples padded to the longest one, in plain, differentiable torch, for all devices and dtypes.

Shapes: Q query rows, K key rows, H heads, D values per head; S samples, N query rows and M key rows of the longest
sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import Kernel, Segments

_NEVER = -1e30  # score of masked keys; -inf is not used, because -inf - -inf is NaN


def padded_attention(q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v within each sample, [Q, H, D] in the dtype of q, computed by torch's
    scaled_dot_product_attention."""
    q_SHND = _pad(q_QHD, queries)
    k_SHMD, v_SHMD = (_pad(x, keys) for x in (k_KHD, v_KHD))
    return _unpad(F.scaled_dot_product_attention(q_SHND, k_SHMD, v_SHMD, attn_mask=_valid(keys)), queries)


def _pad(x_QHD: Tensor, segments: Segments) -> Tensor:
    """Return the rows padded to [S, H, N, D], with zeros as padding."""
    samples = len(segments.cu_seqlens) - 1
    out = x_QHD.new_zeros(samples * segments.max_seqlen, *x_QHD.shape[1:])
    return out.index_copy(0, _places(segments), x_QHD).unflatten(0, (samples, segments.max_seqlen)).transpose(1, 2)


def _unpad(x_SHND: Tensor, segments: Segments) -> Tensor:
    return x_SHND.transpose(1, 2).flatten(0, 1)[_places(segments)]


def _places(segments: Segments) -> Tensor:
    """Return the index of each row among the S * N padded rows."""
    starts_S, lengths_S = segments.cu_seqlens[:-1], segments.cu_seqlens.diff()
    shift_S = segments.max_seqlen * torch.arange(len(starts_S), device=starts_S.device) - starts_S
    rows = torch.arange(segments.rows, device=starts_S.device)
    return rows + shift_S.repeat_interleave(lengths_S, output_size=segments.rows)


def _valid(keys: Segments) -> Tensor:
    """Return a mask of the keys that are not padding, bool [S, 1, 1, M]."""
    lengths_S = keys.cu_seqlens.diff()
    return (torch.arange(keys.max_seqlen, device=lengths_S.device) < lengths_S[:, None])[:, None, None]


def _scores(q_SHND: Tensor, k_SHMD: Tensor, mask: Tensor) -> Tensor:
    scores = (q_SHND @ k_SHMD.mT).to(torch.promote_types(q_SHND.dtype, torch.float32)) * q_SHND.shape[-1] ** -0.5
    return scores.masked_fill(~mask, _NEVER)


def _forward(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
    mask = _valid(keys)
    scores_SHNM = _scores(_pad(q, queries), _pad(k, keys), mask)
    # a query without keys has the result 0 and no gradient
    lse_SHN1 = scores_SHNM.logsumexp(-1, keepdim=True).masked_fill(~mask.any(-1, keepdim=True), torch.inf)
    out = (scores_SHNM - lse_SHN1).exp().to(v.dtype) @ _pad(v, keys)
    return _unpad(out, queries), _unpad(lse_SHN1, queries)[..., 0].t().contiguous()


def _backward(grad, q, k, v, out, lse, dq, dk, dv, queries: Segments, keys: Segments) -> None:
    grad_SHND, q_SHND, lse_SHN1 = (_pad(x, queries) for x in (grad, q, lse.t()[..., None]))
    k_SHMD, v_SHMD = (_pad(x, keys) for x in (k, v))
    p_SHNM = (_scores(q_SHND, k_SHMD, _valid(keys)) - lse_SHN1).exp()
    dp_SHNM = (grad_SHND @ v_SHMD.mT).to(p_SHNM.dtype)
    mean = (_pad(out, queries) * grad_SHND).sum(-1, keepdim=True, dtype=p_SHNM.dtype)
    ds_SHNM = (p_SHNM * (dp_SHNM - mean) * q.shape[-1] ** -0.5).to(q.dtype)
    dq.copy_(_unpad(ds_SHNM @ k_SHMD, queries))
    dk.copy_(_unpad(ds_SHNM.mT @ q_SHND, keys))
    dv.copy_(_unpad(p_SHNM.to(grad.dtype).mT @ grad_SHND, keys))


PADDED = Kernel("padded matmuls", _forward, _backward)
