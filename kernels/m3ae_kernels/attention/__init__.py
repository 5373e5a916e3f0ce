"""Attention over packed samples: one op (`op`), and the kernels that may compute it (`choice` says which does)."""

from .kernel import Kernel, Segments
from .op import packed_attention

__all__ = ["Kernel", "Segments", "packed_attention"]
