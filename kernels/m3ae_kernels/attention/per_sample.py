"""The torch implementation of `packed_attention`, optimised for CPUs.

Shapes: Q query rows, T key rows, H heads, D values per head; in a group of samples (see below), B = samples * H, with q
queries and k keys per sample.

Samples of equal length are processed together by batched matmuls, so no padding and no mask are needed. The scores of a
group fit into the cache. Probabilities are computed as powers of 2, which are several times faster in torch on a CPU
than powers of e.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..dispatch import accumulator
from .kernel import Kernel, Segments

CHUNK_SCORES = 1 << 20  # maximum number of scores per batched matmul: a few MB, which fit into a CPU's caches


@dataclass(frozen=True)
class _Group:
    """A group of samples that all have the same number of queries and the same number of keys."""

    q_starts: list[int]
    k_starts: list[int]
    q_len: int
    k_len: int


def _groups(queries: Segments, keys: Segments, heads: int) -> Iterator[_Group]:
    """Yield the samples that have queries and keys, in groups."""
    by_size: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for (q, q_end), (k, k_end) in zip(_ends(queries), _ends(keys)):
        if q_end > q and k_end > k:
            by_size[q_end - q, k_end - k].append((q, k))
    for (q_len, k_len), starts in by_size.items():
        size = max(1, CHUNK_SCORES // (heads * q_len * k_len))
        for first in range(0, len(starts), size):
            q_starts, k_starts = zip(*starts[first : first + size])
            yield _Group(list(q_starts), list(k_starts), q_len, k_len)


def _keys_lack(queries: Segments, keys: Segments) -> bool:
    """Return whether any sample has queries but no keys."""
    return any(q_end > q and k_end == k for (q, q_end), (k, k_end) in zip(_ends(queries), _ends(keys)))


def _ends(segments: Segments) -> Iterator[tuple[int, int]]:
    return pairwise(segments.cu_seqlens.tolist())


def _rows(starts: list[int], length: int, device: torch.device) -> Tensor:
    return (torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)).flatten()


def _take(x_THD: Tensor, starts: list[int], length: int) -> Tensor:
    """Return [samples * H, length, D], contiguous."""
    if len(starts) == 1:
        return x_THD[starts[0] : starts[0] + length].transpose(0, 1).contiguous()
    rows = x_THD.index_select(0, _rows(starts, length, x_THD.device))
    return rows.unflatten(0, (len(starts), length)).transpose(1, 2).flatten(0, 1)


def _put(x_BnD: Tensor, out_THD: Tensor, starts: list[int], length: int) -> None:
    """Write rows, in the layout in which `_take` returns them, to `out_THD`."""
    rows = x_BnD.unflatten(0, (len(starts), -1)).transpose(1, 2).flatten(0, 1)
    if len(starts) == 1:
        out_THD[starts[0] : starts[0] + length] = rows
    else:
        out_THD.index_copy_(0, _rows(starts, length, out_THD.device), rows)


def _powers(scores_Bqk: Tensor, scale: float, shift_Bq1: Tensor) -> Tensor:
    """Compute 2 ** (scale * scores - shift), in place."""
    return torch.add(-shift_Bq1, scores_Bqk, alpha=scale, out=scores_Bqk).exp2_()


def _forward(q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
    """Return (out [Q, H, D], the base-2 logarithm of the sums of exponentials [H, Q])."""
    out_QHD = q_QHD.new_empty(q_QHD.shape)
    lse_HQ = q_QHD.new_empty((q_QHD.shape[1], len(q_QHD)), dtype=accumulator(q_QHD.dtype))
    if _keys_lack(queries, keys):
        out_QHD.zero_()
        lse_HQ.fill_(torch.inf)
    scale = q_QHD.shape[-1] ** -0.5 * math.log2(math.e)
    for group in _groups(queries, keys, q_QHD.shape[1]):
        q = _take(q_QHD, group.q_starts, group.q_len)
        k, v = (_take(x, group.k_starts, group.k_len) for x in (k_THD, v_THD))
        scores_Bqk = torch.bmm(q, k.mT).to(lse_HQ.dtype)
        top_Bq1 = scores_Bqk.amax(-1, keepdim=True).mul_(scale)
        p_Bqk = _powers(scores_Bqk, scale, top_Bq1)
        sum_Bq1 = p_Bqk.sum(-1, keepdim=True)
        out = torch.bmm(p_Bqk.to(v.dtype), v).div_(sum_Bq1)
        _put(out, out_QHD, group.q_starts, group.q_len)
        _put(top_Bq1 + sum_Bq1.log2(), lse_HQ.t()[..., None], group.q_starts, group.q_len)
    return out_QHD, lse_HQ


def _backward(
    grad_QHD: Tensor,
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    queries: Segments,
    keys: Segments,
) -> None:
    """Write every row of dq, dk and dv. The probabilities are recomputed."""
    for x in (dk, dv, *([dq] if _keys_lack(queries, keys) else [])):
        x.zero_()  # rows of samples without queries or without keys have no gradient
    scale = q_QHD.shape[-1] ** -0.5
    for group in _groups(queries, keys, q_QHD.shape[1]):
        q, grad, lse = (_take(x, group.q_starts, group.q_len) for x in (q_QHD, grad_QHD, lse_HQ.t()[..., None]))
        k, v = (_take(x, group.k_starts, group.k_len) for x in (k_THD, v_THD))
        p_Bqk = _powers(torch.bmm(q, k.mT).to(lse.dtype), scale * math.log2(math.e), lse).to(q.dtype)
        _put(torch.bmm(p_Bqk.mT, grad), dv, group.k_starts, group.k_len)
        ds_Bqk = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.mT), p_Bqk, -1, p_Bqk.dtype)
        _put(torch.bmm(ds_Bqk, k).mul_(scale), dq, group.q_starts, group.q_len)
        _put(torch.bmm(ds_Bqk.mT, q).mul_(scale), dk, group.k_starts, group.k_len)


PER_SAMPLE = Kernel("torch, per sample", _forward, _backward)
