"""What an attention kernel is, whoever wrote it and wherever it runs.

Shapes: S samples, Q query rows, K key rows, H heads, D values per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the samples lie among packed rows: sample s is rows[cu_seqlens[s] : cu_seqlens[s + 1]]."""

    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int
    rows: int


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
