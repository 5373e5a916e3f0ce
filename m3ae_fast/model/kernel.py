"""What an attention kernel is, whoever wrote it and wherever it runs.

Shapes: Q query rows, K key rows, H heads, D values per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from m3ae_kernels.attention import attention_backward, attention_forward
from torch import Tensor

from m3ae_fast.batch.packed import Segments


@dataclass(frozen=True)
class Kernel:
    """softmax(q k^T / sqrt(D)) v of each sample, and its gradients.

    Inputs are q [Q, H, D] and k, v [K, H, D], maybe slices of one tensor, contiguous in their last two dimensions;
    `out` is [Q, H, D], `lse` float32 (float64 for float64) [H, Q]: what `backward` needs of the scores' sums.
    """

    name: str  # for logs
    forward: Callable[[Tensor, Tensor, Tensor, Segments, Segments], tuple[Tensor, Tensor]]
    """(q, k, v, queries, keys) -> (out, lse)."""
    backward: Callable[..., None]
    """(grad, q, k, v, out, lse, dq, dk, dv, queries, keys): writes every row of dq, dk, dv, maybe such slices too."""


def library_kernel(name: str, impl: str) -> Kernel:
    """m3ae_kernels' packed attention; `impl` is "triton" or "torch"."""

    def forward(q, k, v, queries: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
        return attention_forward(q, k, v, *_ends(queries, keys), impl)

    def backward(grad, q, k, v, out, lse, dq, dk, dv, queries: Segments, keys: Segments) -> None:
        attention_backward(grad, q, k, v, out, lse, dq, dk, dv, *_ends(queries, keys), impl)

    return Kernel(name, forward, backward)


def _ends(queries: Segments, keys: Segments) -> tuple[Tensor, Tensor, int, int]:
    return queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen
