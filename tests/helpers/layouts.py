"""Tensors in memory layouts that ops may handle incorrectly."""

from collections.abc import Iterator

import torch
from torch import Tensor

SHARED = ("expanded", "expanded rows")  # layouts in which elements share memory, which changes the values


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensor in layouts that are not contiguous, the tensor at an offset of one element in its storage, and
    tensors of the same shape whose elements share memory."""
    yield "apart", torch.stack([t, t + 1], -1)[..., 0]
    yield "offset", torch.cat([t[:1].flatten()[:1], t.flatten()])[1:].view(t.shape)
    yield "expanded", t.select(-1, 0)[..., None].expand(t.shape)
    if t.dim() > 1:
        yield "across", t.transpose(0, -1).contiguous().transpose(0, -1)
        yield "expanded rows", t[:1].expand(t.shape)
