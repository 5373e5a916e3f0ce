"""Kernels of `packed_attention` for samples of tens or a few hundred rows, with tiles chosen by the lengths of the
samples.

Shapes: Q query rows, T key rows, H heads, D head dimension; within a program instance, M queries and N keys. q, k, v
and their gradients may be slices of one tensor. Offsets within a sample have 32 bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.kernel import Kernel, Segments
from ..dispatch import accumulator
from ..tuning import config, samples_class
from .common import acc_type, cdiv, launcher, precision

LOG2E = math.log2(math.e)
MOST_ROWS = 128  # maximum number of rows of a tile
MOST_DIM = 128  # maximum head dimension; larger ones would not fit into registers
ANYWHERE = ["cu_queries", "cu_keys", "lse"]


@triton.jit
def places(rows, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return 32-bit offsets [rows, BLOCK_D] inside a sample, and a mask of the offsets whose row is below `count` and
    whose column is below D."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return rows[:, None] * stride + d[None, :], mask


@triton.jit
def load_rows(x, rows, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load [rows, BLOCK_D], zero past `count` and past D."""
    offsets, mask = places(rows, count, stride, D, BLOCK_D)
    return tl.load(x + offsets, mask=mask, other=0)


@triton.jit
def store_rows(x, rows, count, stride, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store value [rows, BLOCK_D], except past `count` and past D, in the dtype of x."""
    offsets, mask = places(rows, count, stride, D, BLOCK_D)
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["Q", "blocks"], do_not_specialize_on_alignment=ANYWHERE)
def attention_kernel(
    q, k, v, out, lse, cu_queries, cu_keys, Q, H, stride_q, stride_kv, blocks, scale,
    D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M queries of one sample and head per program instance, over all keys of the sample; scale is
    log2(e) / sqrt(D). lse [H, Q] is the base-2 logarithm of the sums of exponentials. This is FlashAttention-2's
    algorithm 1 (https://arxiv.org/abs/2307.08691): m_i is the largest score so far, l_i is the sum of exponentials, and
    acc is the sum of the weighted values.

    Cost: 4HD sum(n^2) FLOPs, 8THD bytes in bfloat16, H sum(n^2) exponentials. Estimates for M3AE-Large at 512 samples
    of 256 px on an H100 (3.35 TB/s; 16 exponentials per cycle on each of 132 multiprocessors at 1.7 GHz):
    - Encoder (n 70, H 16, D 64): 10 GFLOP. The memory traffic of 294 MB takes 88 us. Issuing the instructions (counted
      in the compiled code) takes 91 us.
    - Decoder (n 277, H 16, D 32): 80 GFLOP. The memory traffic of 581 MB takes 173 us, and the 0.6e9 exponentials take
      175 us. Issuing the instructions takes 347 us.
    """
    pid = tl.program_id(0)
    head = (pid % H).to(tl.int64)
    sample = pid // H // blocks
    query = tl.load(cu_queries + sample).to(tl.int64)
    queries = (tl.load(cu_queries + sample + 1) - query).to(tl.int32)
    m0 = pid // H % blocks * BLOCK_M
    if m0 < queries:
        key = tl.load(cu_keys + sample).to(tl.int64)
        keys = (tl.load(cu_keys + sample + 1) - key).to(tl.int32)
        m = m0 + tl.arange(0, BLOCK_M)
        k += key * stride_kv + head * D
        v += key * stride_kv + head * D
        q_MD = load_rows(q + query * stride_q + head * D, m, queries, stride_q, D, BLOCK_D)
        m_i = tl.full((BLOCK_M,), float("-inf"), dtype=ACC)
        l_i = tl.zeros((BLOCK_M,), dtype=ACC)
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
        for n0 in range(0, keys, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            k_ND = load_rows(k, n, keys, stride_kv, D, BLOCK_D)
            s = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION, out_dtype=ACC)
            s = tl.where((n < keys)[None, :], s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            m_scaled = m_new * scale
            p = tl.exp2(s * scale - m_scaled[:, None])
            alpha = tl.exp2(m_i * scale - m_scaled)
            l_i = l_i * alpha + tl.sum(p, 1)
            v_ND = load_rows(v, n, keys, stride_kv, D, BLOCK_D)
            acc = tl.dot(p.to(v_ND.dtype), v_ND, acc * alpha[:, None], input_precision=PRECISION, out_dtype=ACC)
            m_i = m_new
        # without any key, the result is 0 and has no gradient
        m_i = tl.where(l_i == 0, float("inf"), m_i)
        l_i = tl.where(l_i == 0, 1, l_i)
        row = query * H * D + head * D
        store_rows(out + row, m, queries, H * D, acc / l_i[:, None], D, BLOCK_D)
        tl.store(lse + head * Q + query + m, m_i * scale + tl.log2(l_i), mask=m < queries)


@launcher
def _forward(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
    """Return the result [Q, H, D] and the log-sum-exps [H, Q]."""
    rows, heads, dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, rows, dtype=accumulator(q.dtype))
    tile = _tile("attention", q, queries, keys)
    blocks, samples = cdiv(queries.max_seqlen, tile["BLOCK_M"]), len(keys.cu_seqlens) - 1
    if out.numel():
        attention_kernel[(samples * blocks * heads,)](
            q, k, v, out, lse, queries.cu_seqlens, keys.cu_seqlens, rows, heads, q.stride(0), k.stride(0), blocks,
            LOG2E * dim**-0.5, D=dim, ACC=acc_type(q.dtype), PRECISION=precision(q.dtype), **tile,
        )  # fmt: skip
    return out, lse


def _tile(name: str, q: Tensor, queries: Segments, keys: Segments) -> dict:
    """Return the settings of the tuning table, with tiles limited to the rows that the longest sample fills."""
    if q.shape[2] > MOST_DIM:
        raise ValueError(
            f"the head dimension is {q.shape[2]}, but the Triton kernels support at most {MOST_DIM}; use impl='torch'"
        )
    tile = config(name, q.device, q.dtype, samples_class(q.shape[2], keys.max_seqlen))
    return as_rows(tile, q.shape[2], queries.max_seqlen, keys.max_seqlen) | tile


def as_rows(tile: dict, dim: int, longest_queries: int = MOST_ROWS, longest_keys: int = MOST_ROWS) -> dict:
    """Return the settings with the tile sizes TILE_M and TILE_N converted from elements to rows of `dim` values. The
    numbers of rows are powers of two and at least 16, the minimum of a matrix instruction."""
    block_d = _power(dim)
    rows = {"BLOCK_M": (tile.pop("TILE_M"), longest_queries), "BLOCK_N": (tile.pop("TILE_N"), longest_keys)}
    fit = {name: min(max(16, elements // block_d), MOST_ROWS, _power(n)) for name, (elements, n) in rows.items()}
    return fit | {"BLOCK_D": block_d}


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@triton.jit
def key_tile_backward(
    n0, grad, q, k, v, out, lse, dq, dk, dv, partial, queries, keys, width, stride_q, stride_kv, stride_dq, stride_dkv,
    scale, scale2,
    D: tl.constexpr, LONG: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the keys n0 to n0 + BLOCK_N of one sample and head, and the gradients of the
    corresponding values. Add the contribution of these keys to the gradients of all queries. The arguments are those of
    `attention_backward_kernel`; the pointers point to the first row of the sample."""
    n = n0 + tl.arange(0, BLOCK_N)
    last = n0 + BLOCK_N >= keys
    k_ND = load_rows(k, n, keys, stride_kv, D, BLOCK_D)
    v_ND = load_rows(v, n, keys, stride_kv, D, BLOCK_D)
    dk_ND = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACC)
    dv_ND = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACC)
    for m0 in range(0, queries, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        q_MD = load_rows(q, m, queries, stride_q, D, BLOCK_D)
        g_MD = load_rows(grad, m, queries, width, D, BLOCK_D)
        o_MD = load_rows(out, m, queries, width, D, BLOCK_D)
        delta = tl.sum(g_MD.to(ACC) * o_MD.to(ACC), 1)
        lse_M = tl.load(lse + m, mask=m < queries, other=0)
        s = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION, out_dtype=ACC)
        p = tl.where((n < keys)[:, None], tl.exp2(s * scale2 - lse_M[None, :]), 0)
        dv_ND = tl.dot(p.to(g_MD.dtype), g_MD, dv_ND, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(v_ND, tl.trans(g_MD), input_precision=PRECISION, out_dtype=ACC)
        ds = (p * (dp - delta[None, :])).to(q_MD.dtype)
        dk_ND = tl.dot(ds, q_MD, dk_ND, input_precision=PRECISION, out_dtype=ACC)
        dq_MD = tl.dot(tl.trans(ds), k_ND, input_precision=PRECISION, out_dtype=ACC)
        if LONG and n0 > 0:
            dq_MD += load_rows(partial, m, queries, width, D, BLOCK_D)
        if LONG and not last:
            store_rows(partial, m, queries, width, dq_MD, D, BLOCK_D)
        else:
            store_rows(dq, m, queries, stride_dq, dq_MD * scale, D, BLOCK_D)
    store_rows(dk, n, keys, stride_dkv, dk_ND * scale, D, BLOCK_D)
    store_rows(dv, n, keys, stride_dkv, dv_ND, D, BLOCK_D)
    if LONG and not last:
        tl.debug_barrier()  # a thread may load values of `partial` that another thread has stored


@triton.jit(do_not_specialize=["Q"], do_not_specialize_on_alignment=ANYWHERE)
def attention_backward_kernel(
    grad, q, k, v, out, lse, dq, dk, dv, partial, cu_queries, cu_keys, Q, H, stride_q, stride_kv, stride_dq, stride_dkv,
    scale, scale2,
    D: tl.constexpr, LONG: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute one sample and head per program instance, so that no two instances add to the same gradients. scale is 1
    / sqrt(D), and scale2 is scale * log2(e). LONG: samples may have more than BLOCK_N keys. In this case, `partial` [Q,
    H, D], which stays in the cache, carries the running sums of dq from one tile of keys to the next, and the last tile
    of a sample has half the size if this is sufficient. This is FlashAttention-2's algorithm 2
    (https://arxiv.org/abs/2307.08691): p contains the weights, dp and ds contain the gradients of the weights and of
    the scores, and delta contains the sum of out * grad for each row.

    Cost: 10HD sum(n^2) FLOPs, 16THD bytes in bfloat16, H sum(n^2) exponentials. Estimates for the sizes and the GPU of
    `attention_kernel`:
    - Encoder: 26 GFLOP. The memory traffic of 587 MB takes 175 us. Issuing the instructions takes only 85 us, with one
      tile of 128 keys.
    - Decoder: 201 GFLOP. The memory traffic of 1.2 GB takes 347 us. Issuing the instructions takes 468 us, with two
      tiles of 128 keys and one of 64.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    HALVED: tl.constexpr = LONG and HALF >= 16  # 16 keys are the minimum of a matrix instruction
    pid = tl.program_id(0)
    head = (pid % H).to(tl.int64)
    sample = pid // H
    key = tl.load(cu_keys + sample).to(tl.int64)
    keys = (tl.load(cu_keys + sample + 1) - key).to(tl.int32)
    query = tl.load(cu_queries + sample).to(tl.int64)
    queries = (tl.load(cu_queries + sample + 1) - query).to(tl.int32)
    width = H * D
    k += key * stride_kv + head * D
    v += key * stride_kv + head * D
    dk += key * stride_dkv + head * D
    dv += key * stride_dkv + head * D
    q += query * stride_q + head * D
    dq += query * stride_dq + head * D
    grad += query * width + head * D
    out += query * width + head * D
    partial += query * width + head * D
    lse += head * Q + query
    count = tl.maximum(keys, 1)  # without keys, one tile writes dq
    end = count
    if HALVED and (count - 1) % BLOCK_N < HALF:
        end = (count - 1) // BLOCK_N * BLOCK_N
    for n0 in range(0, end, BLOCK_N):
        key_tile_backward(
            n0, grad, q, k, v, out, lse, dq, dk, dv, partial, queries, keys, width, stride_q, stride_kv, stride_dq,
            stride_dkv, scale, scale2, D, LONG, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if HALVED and end < count:
        key_tile_backward(
            end, grad, q, k, v, out, lse, dq, dk, dv, partial, queries, keys, width, stride_q, stride_kv, stride_dq,
            stride_dkv, scale, scale2, D, LONG, ACC, PRECISION, BLOCK_M, HALF, BLOCK_D,
        )  # fmt: skip


@launcher
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    queries: Segments,
    keys: Segments,
) -> None:
    """Write every row of dq, dk and dv. grad, out and lse are contiguous."""
    rows, heads, dim = q.shape
    tile = _tile("attention_backward", q, queries, keys)
    long = keys.max_seqlen > tile["BLOCK_N"]
    partial = torch.empty_like(grad, dtype=lse.dtype) if long else lse
    if dq.numel():
        attention_backward_kernel[((len(keys.cu_seqlens) - 1) * heads,)](
            grad, q, k, v, out, lse, dq, dk, dv, partial, queries.cu_seqlens, keys.cu_seqlens, rows, heads,
            q.stride(0), k.stride(0), dq.stride(0), dk.stride(0), dim**-0.5, LOG2E * dim**-0.5,
            D=dim, LONG=long, ACC=acc_type(q.dtype), PRECISION=precision(q.dtype), **tile,
        )  # fmt: skip


TRITON = Kernel("triton", _forward, _backward)
