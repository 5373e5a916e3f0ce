"""Pre-norm ViT blocks over packed rows.

Shapes: T rows, R query rows (R = T except in a pruned last block), D width, H heads, S samples.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import m3ae_kernels
import torch
import torch._functorch.config
import torch.nn.functional as F
from m3ae_kernels import bias_gelu, gather_tokens, packed_attention
from m3ae_kernels.attention import Segments
from m3ae_kernels.cpu.linear import Linear, linear
from m3ae_kernels.cpu.mlp import mlp
from m3ae_kernels.cpu.norm import LayerNorm
from m3ae_kernels.dispatch import choose_impl
from m3ae_kernels.plain import is_plain
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

EPS = 1e-6  # epsilon of all LayerNorms, which is flax's default
Gelu: TypeAlias = Literal["tanh", "exact"]
MEMORY_BUDGET = 0.9  # fraction of the activations that are kept; below 0.8, matmuls would be recomputed too


class QKV(Linear):
    """One matmul for queries, keys and values. With `rows_R`, queries are computed only for these rows."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim)

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, rows_R: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the queries, keys and values [T, 3 D] or, with `rows_R`, the queries [R, D] of these rows and the keys
        and values [T, 2 D]."""
        if rows_R is None:
            return super().forward(x_TD)
        dim = self.in_features
        q_RD = linear(gather_tokens(x_TD, rows_R), self.weight[:dim], self.bias[:dim])
        return q_RD, linear(x_TD, self.weight[dim:], self.bias[dim:])


class Attention(nn.Module):
    """Self-attention within each sample."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QKV(dim)
        self.proj = Linear(dim, dim)

    def forward(self, x_TD: Tensor, keys: Segments, rows_R: Tensor | None, queries: Segments) -> Tensor:
        """Map [T, D] to [R, D]. `keys`: the samples' segments of `x_TD`; `rows_R`: int, the rows that are queries
        (None: all rows); `queries`: their segments."""
        q_RD, kv = self._projected(x_TD, rows_R)
        kv_TnHd = kv.unflatten(-1, (3 if q_RD is None else 2, self.num_heads, -1))
        options: dict[str, Any] = {}
        if q_RD is not None:
            options["q"] = q_RD.unflatten(-1, (self.num_heads, -1))
            options |= {"cu_queries": queries.cu_seqlens, "max_queries": queries.max_seqlen}
        out_RHd = packed_attention(kv_TnHd, keys.cu_seqlens, keys.max_seqlen, **options)
        return self.proj(out_RHd.flatten(1))

    def _projected(self, x_TD: Tensor, rows_R: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Return the queries [R, D] of `rows_R` and the keys and values [T, 2 D]. Without `rows_R`, return None and the
        queries, keys and values [T, 3 D]."""
        if rows_R is None:
            return None, self.qkv(x_TD)
        if is_plain(self.qkv, QKV):
            return self.qkv(x_TD, rows_R)
        q_TD, kv_TX = self.qkv(x_TD).tensor_split([x_TD.shape[1]], 1)  # adapters and hooks expect a linear layer
        return gather_tokens(q_TD, rows_R), kv_TX


class MLP(nn.Module):
    """Two linear layers with a GELU between them. Unless the layers have been replaced or have hooks, this module reads
    their parameters itself, so the engine must configure ZeRO-3 to gather them for this module instead of for the
    layers."""

    def __init__(self, dim: int, hidden_dim: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden_dim), Linear(hidden_dim, dim)
        self.gelu = gelu
        self.recomputed = False  # whether the compiler is to recompute GELU's output, which it cannot do inside an op

    def forward(self, x_RD: Tensor) -> Tensor:
        """Map [R, D] to [R, D]."""
        fc1, fc2 = self.fc1, self.fc2
        plain = is_plain(fc1, Linear) and is_plain(fc2, Linear) and not _has_any_global_hook()
        if self.gelu == "tanh" and plain:
            out_RD = mlp(x_RD, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
            if out_RD is not None:
                return out_RD
            if choose_impl("auto", x_RD.device, x_RD.dtype) == "triton" and not self.recomputed:
                return fc2(bias_gelu(linear(x_RD, fc1.weight, None), fc1.bias))
        return fc2(gelu(fc1(x_RD), self.gelu))


def gelu(x: Tensor, kind: Gelu) -> Tensor:
    """Return x times the standard normal CDF of x, or its tanh approximation (arXiv 1606.08415, section 2)."""
    if kind == "exact":
        return F.gelu(x)
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # 0.5 (1 + tanh(u)) = sigmoid(2 u) needs one cheap exponential, whereas tanh on a CPU takes several times longer.
    # The factor 2 sqrt(2 / pi) is a literal, because with dynamic shapes a named constant would become an input of the
    # graph that every backward pass reads.
    return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def drop_path_factors(draws_S: Tensor, branches: int, p: float, key: int) -> Tensor:
    """Return the factors by which stochastic depth (arXiv 1603.09382) multiplies the branches of each sample: float32
    [branches, S], 0 with probability `p`, else 1 / (1 - p).

    Args:
        draws_S: int32 seed of each sample; the result depends on nothing else. -1: torch's generator is used instead.
        branches: number of branches in the transformer.
        p: probability of dropping a branch.
        key: key of the transformer, so that different transformers drop independently.
    """
    fresh_S = torch.randint(1 << 31, draws_S.shape, device=draws_S.device)
    sample_S = _mixed(torch.where(draws_S < 0, fresh_S, draws_S.long()) ^ (key * _GOLDEN & _MASK))
    branch_B = torch.arange(1, branches + 1, device=draws_S.device) * _GOLDEN & _MASK
    uniform_BS = _mixed(sample_S ^ branch_B[:, None]).double() / (_MASK + 1)
    return (uniform_BS >= p).float() / (1 - p)


_MASK, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


def _mixed(x: Tensor) -> Tensor:
    """Return a 32-bit hash of `x` as int64, computed by the finaliser of MurmurHash3."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def drop_path(x_RD: Tensor, segments: Segments, factors_S: Tensor | None) -> Tensor:
    """Return the rows of a branch, [R, D], multiplied by the factors of their samples (None: unchanged), in the dtype
    of `x_RD`. Rows of padding segments are unchanged. `segments`: the samples' segments of `x_RD`, of which the first S
    are real."""
    if factors_S is None:
        return x_RD
    lengths_P = segments.cu_seqlens.diff()
    factors_P = F.pad(factors_S, (0, len(lengths_P) - len(factors_S)), value=1.0).to(x_RD.dtype)
    return x_RD * factors_P.repeat_interleave(lengths_P, output_size=segments.rows)[:, None]


class Block(nn.Module):
    """A pre-norm block of self-attention and an MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, gelu: Gelu) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio), gelu)
        self.two_graphs = False  # whether attention and the MLP are compiled separately

    def forward(
        self,
        x_TD: Tensor,
        keys: Segments,
        rows_R: Tensor | None = None,
        queries: Segments | None = None,
        factors_2S: Tensor | None = None,
    ) -> Tensor:
        """Map [T, D] to [T, D], or to [R, D] if `rows_R` selects the output rows and `queries` their segments.
        `factors_2S`: factors of stochastic depth for attention and MLP, float32 [2, S]; None: no branch is dropped."""
        queries = queries or keys
        attention_S, mlp_S = (None, None) if factors_2S is None else factors_2S.unbind()
        branch_RD = self.attn(self.norm1(x_TD), keys, rows_R, queries)
        x_RD = (x_TD if rows_R is None else gather_tokens(x_TD, rows_R)) + drop_path(branch_RD, queries, attention_S)
        if self.two_graphs:
            torch._dynamo.graph_break()
        return x_RD + drop_path(self.mlp(self.norm2(x_RD)), queries, mlp_S)


class RowNorm(LayerNorm):
    """LayerNorm of all rows, or of selected rows in a single pass."""

    def forward(self, x_TD: Tensor, rows_R: Tensor | None = None) -> Tensor:
        """Return the normalised rows `rows_R` (int, distinct), [R, D], or all rows, [T, D]."""
        if rows_R is None:
            return super().forward(x_TD)
        return gather_tokens(x_TD, rows_R, norm_weight=self.weight, norm_bias=self.bias, eps=self.eps)


@functools.cache
def _source_tag() -> str:
    """Return a hash of the code of the model and its ops. torch's cache of compiled graphs identifies an op by its
    name, so without the hash, a graph cached before an update would run the old backward pass."""
    folders = (Path(__file__).parent, Path(m3ae_kernels.__file__).parent)
    sources = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return f"m3ae_fast-{hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()[:16]}"


class _Depth(threading.local):
    whole = False  # whether this thread computes all branches, whatever the mode of the model


_depth = _Depth()


@contextmanager
def whole_depth() -> Iterator[None]:
    """Enter a context in which this thread computes no stochastic depth, whatever the mode of the model."""
    before, _depth.whole = _depth.whole, True
    try:
        yield
    finally:
        _depth.whole = before


class Blocks(nn.Module):
    """A stack of blocks, which can be compiled and checkpointed, and a final norm, which the caller applies to selected
    rows."""

    block: Callable[[int, int, float, Gelu], nn.Module]  # class of the blocks

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4,
        *,
        gelu: Gelu = "tanh",
        drop_path: float = 0.0,
        drop_key: int = 0,
    ) -> None:
        """Build the blocks. `drop_key`: the argument `key` of `drop_path_factors`."""
        super().__init__()
        self.blocks = nn.ModuleList(self.block(dim, num_heads, mlp_ratio, gelu) for _ in range(depth))
        self.norm = RowNorm(dim, eps=EPS)
        self.checkpointing = False
        self.drop_path, self.drop_key = drop_path, drop_key

    def factors(self, draws_S: Tensor) -> list[Tensor | None]:
        """Return the factors of stochastic depth for the two branches of each block, [2, S], or None without stochastic
        depth, as in eval mode and in `whole_depth`."""
        if not (self.drop_path and self.training) or _depth.whole:
            return [None] * len(self.blocks)
        return list(drop_path_factors(draws_S, 2 * len(self.blocks), self.drop_path, self.drop_key).split(2))

    def compile_blocks(self, samples: int = 0, keep_activations: bool = False) -> None:
        """Compile the blocks with torch.compile, for any number of rows; equal blocks share one graph. `samples`:
        number of samples per micro-batch. It becomes part of the key of torch's cache of compiled graphs, because sums
        over rows are tuned for the number of rows of the first batch, and torch's own key does not contain that number.

        Without `keep_activations`, the backward pass recomputes GELU and LayerNorm outputs. A block with mlp_ratio 4
        then keeps 10 values per row and unit of its width instead of 16, or instead of 12 with the op in
        `m3ae_kernels.cpu.mlp`, which never keeps the output of GELU. On a CPU, the recomputation takes no measurable
        time, because it is fused with the ops that read its results; on a GPU, the results are written to memory again.

        With `keep_activations`, attention and the MLP of a block are compiled separately. In a single graph, torch's
        compiler would compute the gradients of norm2's parameters together with those of norm1's, and would read
        norm2's input again for this purpose (`kernels/TRIED.md`).
        """
        budget = 1.0 if keep_activations else MEMORY_BUDGET
        if budget != torch._functorch.config.activation_memory_budget:
            # otherwise, equal blocks would share the graphs that were compiled for an earlier engine
            torch._dynamo.reset()
        torch._functorch.config.activation_memory_budget = budget
        torch.compiler.config.cache_key_tag = f"{_source_tag()}-{samples}"
        for module in self.modules():
            if isinstance(module, MLP):
                module.recomputed = not keep_activations
            elif isinstance(module, Block):
                module.two_graphs = keep_activations
        for block in self.blocks:
            block.compile(dynamic=True)

    def _run(self, block: nn.Module, *args) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class Transformer(Blocks):
    """A stack of self-attention blocks."""

    block = Block

    def forward(
        self,
        x_TD: Tensor,
        segments: Segments,
        draws_S: Tensor,
        rows_M: Tensor | None = None,
        queries: Segments | None = None,
    ) -> Tensor:
        """Map [T, D] to [T, D] before the final norm. With `rows_M`, the last block computes only these rows, whose
        segments are `queries`, and the result is [M, D]. `segments`: the samples' segments of `x_TD`; `draws_S`: int32
        seeds of stochastic depth; see `drop_path_factors`."""
        return deque(self.layers(x_TD, segments, draws_S, rows_M, queries), maxlen=1)[0]

    def layers(
        self,
        x_TD: Tensor,
        segments: Segments,
        draws_S: Tensor,
        rows_M: Tensor | None = None,
        queries: Segments | None = None,
    ) -> Iterator[Tensor]:
        """Yield the output of each block, [T, D]. The arguments are those of `forward`, whose result is the output of
        the last block."""
        *body, last = self.blocks
        factors = self.factors(draws_S)
        for block, factors_2S in zip(body, factors):
            x_TD = self._run(block, x_TD, segments, None, None, factors_2S)
            yield x_TD
        yield self._run(last, x_TD, segments, rows_M, queries, factors[-1])
