"""Attention on CPUs with AVX-512 or AMX, which is implemented in ../cpu/attention.c.

Shapes: Q query rows, K key rows, H heads, D values per head.
"""

from __future__ import annotations

import ctypes
import threading
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu.build import AVX512, BF16, TILES, load, may_use_tiles
from ..cpu.processor import this_cpu
from .kernel import Kernel, Segments


class _Work(ctypes.Structure):
    """The struct `Work` of attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_long) for name in ("q_row", "k_row", "v_row")),
        *((name, ctypes.c_void_p) for name in ("cu_q", "cu_k")),
        *((name, ctypes.c_long) for name in ("samples", "heads", "d", "queries")),
        ("out", ctypes.c_void_p),
        ("out_row", ctypes.c_long),
        ("lse", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("grad_row", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv")),
        *((name, ctypes.c_long) for name in ("dq_row", "dk_row", "dv_row")),
        ("next", ctypes.c_long),
    ]


class Build(NamedTuple):
    """A variant of attention.c for a CPU type."""

    name: str  # for logs
    flags: tuple[str, ...]  # compiler flags


def native_kernel(dtype: torch.dtype, head_dim: int) -> Kernel | None:
    """Return the compiled kernel for this dtype and head dimension; None if there is none."""
    build = best_build(dtype, head_dim)
    if build is None:
        return None
    library = load("attention.c", build.flags, "attention falls back to torch, at half the speed")
    if library is None:
        return None
    for function in (library.forward, library.backward):
        function.argtypes = [ctypes.POINTER(_Work)]
    return Kernel(build.name, partial(_forward, library), partial(_backward, library))


def best_build(dtype: torch.dtype, head_dim: int) -> Build | None:
    """Return the best build; None for unsupported dtypes and head dimensions, or if the CPU lacks the instructions."""
    cpu = this_cpu()
    if head_dim % 16 or not cpu.flags >= AVX512:
        return None
    if dtype == torch.float32:
        return Build("AVX-512", ())
    if dtype != torch.bfloat16 or "avx512_bf16" not in cpu.flags:
        return None
    if head_dim % 32 == 0 and cpu.tiles and may_use_tiles():
        return Build("AMX", TILES)
    return Build("AVX-512", (*BF16, "-DPAIRS") if cpu.pairs else BF16)


def _forward(
    library: ctypes.CDLL, q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, queries: Segments, keys: Segments
) -> tuple[Tensor, Tensor]:
    q, k, v = (_rows(x) for x in (q_QHD, k_KHD, v_KHD))
    out_QHD = q.new_empty(q.shape)
    lse_HQ = q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
    _run(library.forward, queries, keys, q=q, k=k, v=v, out=out_QHD, lse=lse_HQ)
    return out_QHD, lse_HQ


def _backward(library: ctypes.CDLL, grad, q, k, v, out, lse, dq, dk, dv, queries: Segments, keys: Segments) -> None:
    tensors = {"grad": grad, "q": q, "k": k, "v": v}
    rows = {name: _rows(x) for name, x in tensors.items()}
    _run(library.backward, queries, keys, **rows, out=out, lse=lse, dq=dq, dk=dk, dv=dv)


def _rows(x_THD: Tensor) -> Tensor:
    """Return `x_THD` if each of its rows is contiguous, as the kernels require; otherwise a contiguous copy."""
    return x_THD if x_THD.stride()[1:] == (x_THD.shape[2], 1) else x_THD.contiguous()


def _run(function, queries: Segments, keys: Segments, *, q: Tensor, lse: Tensor, **tensors: Tensor) -> None:
    """Compute all heads of all samples in as many Python threads as torch uses. These threads are synchronised only
    once, whereas torch's threads would be synchronised after every op."""
    cu_queries, cu_keys = queries.cu_seqlens, keys.cu_seqlens
    samples, (rows, heads, dim) = len(cu_queries) - 1, q.shape
    tensors["q"] = q
    work = _Work(
        cu_q=cu_queries.data_ptr(), cu_k=cu_keys.data_ptr(), lse=lse.data_ptr(), samples=samples, heads=heads, d=dim,
        queries=rows, **{name: x.data_ptr() for name, x in tensors.items()},
        **{f"{name}_row": x.stride(0) for name, x in tensors.items()},
    )  # fmt: skip
    done: list[int] = []

    def take_part() -> None:
        done.append(function(ctypes.byref(work)))

    threads = [threading.Thread(target=take_part) for _ in range(min(torch.get_num_threads(), samples * heads) - 1)]
    for thread in threads:
        thread.start()
    take_part()
    for thread in threads:
        thread.join()
    if sum(done) <= len(threads):
        raise MemoryError("not enough memory for the scores of a sample")
