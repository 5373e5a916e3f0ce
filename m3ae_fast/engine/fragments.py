"""A rank's part of an engine's state: flat slices of tensors, independent of how the engine shards them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fragment(NamedTuple):
    """One rank's part of a flattened tensor: consecutive elements, possibly none."""

    data: Tensor  # float32, 1-D
    start: int  # first element in the flattened tensor
    shape: tuple[int, ...]  # shape of the complete tensor


# Fragments by name: "model/NAME" for weights, and "KIND/NAME" for the engine's `kinds` of optimiser state: "exp_avg"
# and "exp_avg_sq" with AdamW, "momentum_buffer" with Muon and, with train.ema, "ema". The fragments of rank 0 contain
# the names of all tensors, even if rank 0 has no element of a tensor.
Fragments = dict[str, Fragment]


def whole(tensor: Tensor) -> Fragment:
    """Return a complete tensor as one fragment."""
    return Fragment(tensor.detach().reshape(-1), 0, tuple(tensor.shape))


def cut(tensors: dict[str, Tensor], rank: int, world: int) -> Fragments:
    """Return a rank's fragments of tensors that every rank has completely. The concatenation of the flattened tensors
    is split into equal parts, one per rank."""
    share = -(-sum(tensor.numel() for tensor in tensors.values()) // world)
    before, part = rank * share, {}  # number of elements from the beginning of the current tensor to this rank's part
    # created only once, because most tensors belong to other ranks, and a step waits for this function
    nothing = torch.empty(0)
    for name, tensor in tensors.items():
        size = tensor.numel()
        start, stop = (min(max(edge, 0), size) for edge in (before, before + share))
        data = tensor.detach().reshape(-1)[start:stop] if start < stop else nothing
        part[name] = Fragment(data, start, tuple(tensor.shape))
        before -= size
    return part
