"""Attention over packed samples: one op (`op`), and the kernels that compute it, which `choice` selects."""

from .kernel import Kernel, Segments
from .op import packed_attention
from .varlen import flash_attn_varlen_func

__all__ = ["Kernel", "Segments", "flash_attn_varlen_func", "packed_attention"]
