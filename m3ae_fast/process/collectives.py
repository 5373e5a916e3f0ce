"""Collectives on tensors of a task's device, over the default group; without other ranks they do nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3ae_fast.process.ranks import Ranks


def all_gather(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Return every rank's tensor [P, ...] on every rank, as [W, P, ...]. All must have the same shape."""
    if ranks is None or ranks.world == 1:
        return tensor[None]
    gathered = tensor.new_empty(ranks.world * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered.unflatten(0, (ranks.world, -1))


def all_to_all(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Return [W, ...] with the w-th part from rank w: its `tensor[r]`, on rank r."""
    if ranks is None or ranks.world == 1:
        return tensor
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, tensor.contiguous())
    return received


def all_reduce(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Return the sum over ranks of a tensor, in its place, on every rank. Not differentiable."""
    if ranks is not None and ranks.world > 1:
        dist.all_reduce(tensor)
    return tensor


def differentiable_sum(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Return the sum over ranks of a tensor. Its gradient is the sum over ranks of the gradients of the results: each
    rank differentiates its own part of one loss."""
    return tensor if ranks is None or ranks.world == 1 else _Sum.apply(tensor, ranks)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_reduce(tensor.clone(), ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return all_reduce(gradient.clone(), ctx.ranks), None
