"""Attention over packed samples: one op (op.py), its kernels, and the choice of a kernel (choice.py)."""

from .kernel import Kernel, Segments
from .op import packed_attention

__all__ = ["Kernel", "Segments", "packed_attention"]
