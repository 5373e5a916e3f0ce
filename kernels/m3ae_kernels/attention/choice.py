"""Choice of the attention kernel: the fastest installed kernel on CUDA, and a C kernel or torch on a CPU."""

from __future__ import annotations

import torch

from ..dispatch import choose_impl
from . import cuda
from .kernel import Kernel
from .native import native_kernel
from .padded import PADDED
from .per_sample import PER_SAMPLE


def kernel_for(impl: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int) -> Kernel:
    """Return the kernel for attention of samples with about `length` keys. `impl` is "auto", "triton" or "torch".

    For 16-bit inputs on CUDA, the first "auto" call for each head configuration benchmarks the installed kernels, which
    takes about a second. For wider inputs on CUDA, and on devices other than CUDA and the CPU, "auto" uses torch."""
    if impl != "auto":
        impl = choose_impl(impl, device, dtype)
    if impl == "triton":
        from ..triton_impl.attention import TRITON

        return TRITON
    if device.type != "cpu":
        auto = device.type == "cuda" and impl == "auto"
        return cuda.choose(device, dtype, heads, head_dim, length) if auto else PADDED
    native = None if impl == "torch" else native_kernel(dtype, head_dim)
    return native or PER_SAMPLE
