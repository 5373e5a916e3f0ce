"""Collectives of the default process group, for tensors on the device. With a single rank, no communication occurs.

Shapes: W ranks, P elements along the first dimension of a rank's tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3ae_fast.process.ranks import Ranks


def all_gather(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Return the tensors [P, ...] of all ranks on every rank, stacked to [W, P, ...]. All tensors must have the same
    shape."""
    if ranks is None or ranks.world == 1:
        return tensor[None]
    gathered = tensor.new_empty(ranks.world * len(tensor), *tensor.shape[1:])
    # torch 2.13 calls this function all_gather_single, and warns if the former name is used
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, tensor.contiguous())
    return gathered.unflatten(0, (ranks.world, -1))


def all_to_all(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Exchange parts of a tensor [W, ...]: the result on rank r is [W, ...] and contains `tensor[r]` of rank w at
    index w."""
    if ranks is None or ranks.world == 1:
        return tensor
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, tensor.contiguous())
    return received


def all_reduce(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Sum a tensor of any shape over ranks in place and return it. This operation is not differentiable."""
    if ranks is not None and ranks.world > 1:
        dist.all_reduce(tensor)
    return tensor


def differentiable_sum(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Return the sum of a tensor of any shape over ranks. Each rank differentiates only its own part of the common
    loss, so the backward pass also sums the gradients of the result over ranks."""
    return tensor if ranks is None or ranks.world == 1 else _Sum.apply(tensor, ranks)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_reduce(tensor.clone(), ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return all_reduce(gradient.clone(), ctx.ranks), None
