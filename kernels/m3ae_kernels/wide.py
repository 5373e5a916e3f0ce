"""Memory moved on a CPU as a few wide elements: many times faster than one 8- or 16-bit element at a time."""

import math

import torch
from torch import Tensor

WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by bytes


def widest(tensor: Tensor, count: int) -> torch.dtype:
    """Return the widest dtype as which runs of `count` elements of the tensor can be seen."""
    size = tensor.element_size()
    return WIDE[math.gcd(count * size, tensor.storage_offset() * size, 16)]


def put_rows(out: Tensor, rows: Tensor, values: Tensor) -> None:
    """Set out[rows[m]] = values[m], of contiguous tensors [T, D] and [M, D] of one dtype; rows [M] int64, distinct."""
    if values.numel():
        wide = widest(values, values.shape[1])
        out.view(wide).index_copy_(0, rows, values.view(wide))
