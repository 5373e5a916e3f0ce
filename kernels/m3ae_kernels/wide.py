"""Copies of CPU memory as a few wide elements, which are many times faster than copies of 8- or 16-bit elements."""

import math

import torch
from torch import Tensor

# dtypes by bytes per element
WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def widest(tensor: Tensor, count: int) -> torch.dtype:
    """Return the widest dtype in which the tensor can be viewed if each access reads or writes `count` consecutive
    elements."""
    size = tensor.element_size()
    return WIDE[math.gcd(count * size, tensor.storage_offset() * size, 16)]


def put_rows(out: Tensor, rows: Tensor, values: Tensor) -> None:
    """Set out[rows[m]] = values[m] for contiguous tensors [T, D] and [M, D] of the same dtype; rows [M] are int64 and
    distinct."""
    if values.numel():
        wide = widest(values, values.shape[1])
        out.view(wide).index_copy_(0, rows, values.view(wide))
