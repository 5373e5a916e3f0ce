"""Attention over packed samples: one op (op.py), its kernels, and the choice of a kernel (choice.py)."""

from .kernel import Kernel, Segments
from .op import packed_attention
from .varlen import flash_attn_varlen_func

__all__ = ["Kernel", "Segments", "flash_attn_varlen_func", "packed_attention"]
