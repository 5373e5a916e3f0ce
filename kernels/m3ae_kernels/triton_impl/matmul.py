"""What the two losses share around their kernels: the plain products go to torch, whose vendor libraries do them
best."""

import torch
from torch import Tensor

from .common import cdiv


def even_chunks(count: int, most: int, multiple: int) -> int:
    """The rows of a chunk: at most `most`, all chunks about equal, a multiple of `multiple` where there are several."""
    most = max(multiple, most // multiple * multiple)
    chunks = max(1, cdiv(count, most))
    rows = cdiv(count, chunks)
    return max(1, rows if chunks == 1 else cdiv(rows, multiple) * multiple)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, in `dtype` without a rounding between where that is float32 and the device can."""
    if a.is_cuda and a.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(dtype)
