"""The interface that the attention kernels of all libraries and devices share.

Shapes: S samples, Q query rows, K key rows, H heads, D values per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .. import ids
from ..dispatch import is_integer


@dataclass(frozen=True, slots=True)
class Segments:
    """The boundaries of samples in packed rows: sample s is rows[cu_seqlens[s] : cu_seqlens[s + 1]]."""

    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int  # number of rows of the longest sample, or an upper bound
    rows: int  # number of rows of all samples


def check_segments(op: str, **segments: Segments) -> None:
    """Raise IndexError unless the boundaries increase from 0 to the number of rows in steps of at most `max_seqlen`.
    They are always checked on a CPU; on other devices, they are checked only if M3AE_KERNELS_CHECK=1 is set. The
    message names the keyword argument that is wrong."""
    for name, each in segments.items():
        if ids.checks_enabled() or each.cu_seqlens.device.type == "cpu":
            ids.check_ends(op, name, each.cu_seqlens, each.rows, each.max_seqlen)


def check_sizes(name: str, heads: int, dim: int) -> None:
    """Raise ValueError if the number of heads or the head dimension is 0."""
    if not heads or not dim:
        raise ValueError(f"{name} has {heads} heads of dimension {dim}, but both must be at least 1")


def as_length(name: str, length: int | Tensor) -> int:
    """Return the number of rows of the longest sample as an integer. If the length is a tensor on a GPU, the host waits
    for it.

    Raises:
        TypeError: the length is not an integer.
    """
    if isinstance(length, Tensor):
        if length.is_floating_point() or length.numel() != 1:
            shape = tuple(length.shape)
            raise TypeError(f"{name} is a tensor of {length.dtype} with shape {shape}, but must be an integer")
        return int(length)
    if not is_integer(length):
        raise TypeError(f"{name} is {length}, but must be an integer")
    return length


@dataclass(frozen=True)
class Kernel:
    """An implementation of softmax(q k^T / sqrt(D)) v for each sample, and of its gradients.

    Inputs are q [Q, H, D] and k, v [K, H, D], which are contiguous in their last two dimensions and may be slices of
    one tensor. `out` is [Q, H, D]. `lse` [H, Q] contains the log-sum-exps of the scores. Only `backward` of the
    same kernel reads them, so a kernel may use natural or base-2 logarithms. The dtype of `lse` is float32, or float64
    for float64 inputs.
    """

    name: str  # for logs
    forward: Callable[[Tensor, Tensor, Tensor, Segments, Segments], tuple[Tensor, Tensor]]
    """(q, k, v, queries, keys) -> (out, lse)."""
    backward: Callable[..., None]
    """(grad, q, k, v, out, lse, dq, dk, dv, queries, keys): writes every row of dq, dk and dv, which may also be slices
    of one tensor."""
