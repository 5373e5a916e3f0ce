"""Code shared by pixel_loss.py and token_loss.py: chunks of rows, and matrix products by vendor libraries."""

import torch
from torch import Tensor

from .common import cdiv

# whether addmm can add the product of 16-bit matrices to a float32 tensor in place
WIDE_SUMS = "dtype_out" in torch.ops.aten.addmm.overloads()


def even_chunks(count: int, most: int, multiple: int) -> int:
    """Return the number of rows per chunk: at most `most`, about the same for all chunks, and a multiple of `multiple`
    if there are several chunks and `most` allows it."""
    multiple = min(multiple, max(1, most))
    most = max(1, most // multiple * multiple)
    chunks = max(1, cdiv(count, most))
    rows = cdiv(count, chunks)
    return max(1, rows if chunks == 1 else cdiv(rows, multiple) * multiple)


def workspace_rows(count: int, most: int) -> int:
    """Return the number of rows to allocate when `count` rows are processed in chunks of at most `most`. Only a few
    different sizes are returned, so that the allocator can reuse memory."""
    return max(1, min(most, 1 << max(0, count - 1).bit_length()))


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Compute total += a @ b, or total = a @ b if it is the first product.

    For 16-bit a and b, the products are summed in float32, which is the dtype of total, if the device and torch support
    this. Otherwise (on AMD GPUs, with the interpreter on a CPU, and in older versions of torch), the product is rounded
    to 16 bits once per call.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.is_cuda and torch.version.cuda and WIDE_SUMS:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
