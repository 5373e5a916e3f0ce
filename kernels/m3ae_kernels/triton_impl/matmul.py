"""What the two losses share around their kernels: chunks of rows, and plain products, which go to torch, whose vendor
libraries do them best."""

import torch
from torch import Tensor

from .common import cdiv

WIDE_SUMS = "dtype_out" in torch.ops.aten.addmm.overloads()  # 16-bit products summed in float32, in place


def even_chunks(count: int, most: int, multiple: int) -> int:
    """Return the rows of a chunk: at most `most`, all chunks about equal, a multiple of `multiple` where there are
    several and `most` allows it."""
    multiple = min(multiple, max(1, most))
    most = max(1, most // multiple * multiple)
    chunks = max(1, cdiv(count, most))
    rows = cdiv(count, chunks)
    return max(1, rows if chunks == 1 else cdiv(rows, multiple) * multiple)


def workspace_rows(count: int, most: int) -> int:
    """Return the rows to allocate for chunks of at most `most` of `count` rows: few different sizes, whatever the
    counts, so that the allocator meets the same ones again."""
    return max(1, min(most, 1 << max(0, count - 1).bit_length()))


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Compute total += a @ b, or total = a @ b where it is the first.

    Summed in total's float32 where a and b have 16 bits and device and torch can; elsewhere (AMD, the interpreter on a
    CPU, a torch without such sums) the product of 16-bit matrices is rounded to 16 bits once a call.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.is_cuda and torch.version.cuda and WIDE_SUMS:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
