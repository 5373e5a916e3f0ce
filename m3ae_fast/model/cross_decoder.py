"""The decoder of CrossMAE (arXiv 2401.14391): masked tokens attend to the encoder's output, but not to each other.

Shapes: T rows of the encoder, M rows that are predicted, E decoder width, H heads of size d, S samples, B blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from m3ae_kernels import packed_attention
from m3ae_kernels.attention import Segments
from m3ae_kernels.cpu.linear import Linear
from m3ae_kernels.cpu.norm import LayerNorm
from torch import Tensor, nn

from m3ae_fast.model.transformer import EPS, MLP, Blocks, Gelu, drop_path


class CrossAttention(nn.Module):
    """Cross-attention with precomputed keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.proj = Linear(dim, dim), Linear(dim, dim)

    def forward(self, x_ME: Tensor, kv_TX: Tensor, keys: Segments, queries: Segments) -> Tensor:
        """Map [M, E] to [M, E]. `kv_TX`: keys and values of the encoder's rows, [T, 2 E]; `keys`, `queries`: the
        samples' segments of the encoder's rows and of `x_ME`."""
        out_MHd = packed_attention(
            kv_TX.unflatten(-1, (2, self.num_heads, -1)),
            keys.cu_seqlens,
            keys.max_seqlen,
            q=self.q(x_ME).unflatten(-1, (self.num_heads, -1)),
            cu_queries=queries.cu_seqlens,
            max_queries=queries.max_seqlen,
        )
        return self.proj(out_MHd.flatten(1))


class CrossBlock(nn.Module):
    """A pre-norm block of cross-attention and an MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, gelu: Gelu) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=EPS)
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio), gelu)

    def forward(
        self, x_ME: Tensor, kv_TX: Tensor, keys: Segments, queries: Segments, factors_2S: Tensor | None = None
    ) -> Tensor:
        """Map [M, E] to [M, E]. `factors_2S`: factors of stochastic depth for attention and MLP, float32 [2, S]; None:
        no branch is dropped. The other arguments are those of `CrossAttention.forward`."""
        attention_S, mlp_S = (None, None) if factors_2S is None else factors_2S.unbind()
        x_ME = x_ME + drop_path(self.attn(self.norm1(x_ME), kv_TX, keys, queries), queries, attention_S)
        return x_ME + drop_path(self.mlp(self.norm2(x_ME)), queries, mlp_S)


class CrossDecoder(Blocks):
    """Blocks of cross-attention. The keys and values of all blocks are computed by one matrix product, because all
    blocks attend to the same rows."""

    block = CrossBlock

    def __init__(self, dim: int, depth: int, num_heads: int, *args: Any, **options: Any) -> None:
        """Build the blocks with the arguments of `Blocks`."""
        super().__init__(dim, depth, num_heads, *args, **options)
        self.kv = Linear(dim, 2 * depth * dim)

    def reset_keys_and_values(self) -> None:
        """Initialise the stacked weights of keys and values as if each block had its own matrix."""
        with torch.no_grad():
            for weight_XE in self.kv.weight.chunk(len(self.blocks)):
                nn.init.xavier_uniform_(weight_XE)

    def forward(self, x_ME: Tensor, memory_TE: Tensor, keys: Segments, queries: Segments, draws_S: Tensor) -> Tensor:
        """Return the hidden rows [M, E], to which the final norm has not been applied.

        Args:
            x_ME: mask embeddings with positions.
            memory_TE: the encoder's output at the decoder's width.
            keys, queries: segments of the encoder's rows, and the same number of segments of `x_ME`.
            draws_S: int32 seeds of stochastic depth; see `drop_path_factors`.
        """
        kv_BTX = self.kv(memory_TE).unflatten(-1, (len(self.blocks), -1)).unbind(1)
        for block, kv_TX, factors_2S in zip(self.blocks, kv_BTX, self.factors(draws_S)):
            x_ME = self._run(block, x_ME, kv_TX, keys, queries, factors_2S)
        return x_ME
