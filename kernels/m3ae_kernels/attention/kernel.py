"""What an attention kernel is, whoever wrote it and wherever it runs.

Shapes: S samples, Q query rows, K key rows, H heads, D values per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the samples lie among packed rows: sample s is rows[cu_seqlens[s] : cu_seqlens[s + 1]]."""

    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int
    rows: int


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made: `scale` times q k^T, of the keys in a band about each query's own place.

    The last query's place is the last key's: query m of M has that of key m + N - M of N, and attends to as many as
    `left` keys before it and `right` after it; a negative number is for all.
    """

    scale: float
    left: int = -1
    right: int = -1

    @property
    def reach(self) -> tuple[int, int]:
        """Return (left, right) with more keys than any sample has for all."""
        left, right = (side if side >= 0 else ALL_KEYS for side in (self.left, self.right))
        return left, right


ALL_KEYS = 1 << 29  # places of queries and keys, and sums of both, stay within 32 bits
NATS = math.log(2)  # that powers of 2 count by


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
    unit: float = 1.0  # of `lse`, in nats
    """Both take `Scores` as a last argument too where the kernel is one of `own_kernel` of choice.py."""
