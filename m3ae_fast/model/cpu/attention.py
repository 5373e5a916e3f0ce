"""What computes attention on a CPU: in bf16 and float32 on CPUs with AVX-512 the kernel of `native`, else torch."""

from __future__ import annotations

import torch

from m3ae_fast.model.cpu.native import native_kernel
from m3ae_fast.model.kernel import Kernel, library_kernel

PER_SAMPLE = library_kernel("torch, per sample", "torch")


def cpu_kernel(dtype: torch.dtype, head_dim: int) -> Kernel:
    """The fastest for such heads on this CPU."""
    return native_kernel(dtype, head_dim) or PER_SAMPLE
