"""A rank's part of an engine's state: flat slices of tensors, independent of how the engine shards them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fragment(NamedTuple):
    """What one rank keeps of a tensor: the elements from `start` on, as many as `data` has, maybe none."""

    data: Tensor  # float32, 1-D
    start: int
    shape: tuple[int, ...]  # of the whole tensor


# "model/NAME" and "KIND/NAME" for the engine's `kinds`: with AdamW "exp_avg", "exp_avg_sq", with Muon "momentum_buffer"
# and, with train.ema, "ema".
# Rank 0 names every tensor, also those of which it has nothing.
Fragments = dict[str, Fragment]


def whole(tensor: Tensor) -> Fragment:
    """Return all of a tensor as one fragment."""
    return Fragment(tensor.detach().reshape(-1), 0, tuple(tensor.shape))


def cut(tensors: dict[str, Tensor], rank: int, world: int) -> Fragments:
    """Return a rank's part of tensors that every rank has whole: laid in a row, they are cut into equal parts."""
    share = -(-sum(tensor.numel() for tensor in tensors.values()) // world)
    before, part = rank * share, {}  # elements of the row from this tensor's first to the part
    nothing = torch.empty(0)  # a step waits for this function, and most tensors are other ranks'
    for name, tensor in tensors.items():
        size = tensor.numel()
        start, stop = (min(max(edge, 0), size) for edge in (before, before + share))
        data = tensor.detach().reshape(-1)[start:stop] if start < stop else nothing
        part[name] = Fragment(data, start, tuple(tensor.shape))
        before -= size
    return part
