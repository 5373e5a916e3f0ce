"""Choose what computes attention: on CUDA the fastest kernel that is installed, on a CPU a C kernel or torch."""

from __future__ import annotations

import torch

from ..dispatch import choose_impl
from . import cuda
from .kernel import Kernel
from .native import native_kernel
from .padded import PADDED
from .per_sample import PER_SAMPLE


def own_kernel(impl: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel of this package for `Scores` of any kind, which on CUDA is also the one whose runs are bitwise
    equal; `impl` as in `kernel_for`."""
    if choose_impl(impl, device, dtype) == "torch":
        return PADDED
    from ..triton_impl.attention import TRITON

    return TRITON


def kernel_for(impl: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, length: int) -> Kernel:
    """Return what attention of samples of about `length` keys runs on; `impl` is "auto", "triton" or "torch".

    On CUDA the first call for a kind of head takes a second, to try what is installed; float64 runs on torch there."""
    if impl != "auto":
        impl = choose_impl(impl, device, dtype)
    if impl == "triton":
        from ..triton_impl.attention import TRITON

        return TRITON
    if device.type == "cuda":
        return PADDED if impl == "torch" else cuda.choose(device, dtype, heads, head_dim, length)
    native = None if impl == "torch" else native_kernel(dtype, head_dim)
    return native or PER_SAMPLE
