"""Classification heads on pooled features, as the official code has them (young-geng/m3ae_public,
`LinearCLS` and `ViTClassifier` of m3ae/model.py), and stacks of such heads that train together.

Shapes: S samples, L patches, D width, K classes, H heads of a stack, a attention heads of width d of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from m3ae_kernels.cpu.norm import LayerNorm
from torch import Tensor, nn

from m3ae_fast.model.transformer import EPS
from m3ae_fast.process.collectives import all_reduce, differentiable_sum
from m3ae_fast.process.ranks import Ranks

BATCH_NORM_EPS, BATCH_NORM_MOMENTUM = 1e-5, 0.1
_KEYS = 1 << 32  # added to the seed of what else a head draws
_TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut off at +-2


class BatchNorm(nn.Module):
    """BatchNorm over samples without scale and bias, as flax's: the statistics are those of a step of all ranks.

    The running variance takes the biased variance of a batch; torch's BatchNorm1d would take the unbiased one.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, *shape: int, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))

    def forward(self, x_S: Tensor) -> Tensor:
        """Return the samples [S, ...], normalised; each rank gives its part of a step."""
        mean, var = self.mean, self.var
        if self.training:
            var, mean = self._moments(x_S)
            self.mean.lerp_(mean.detach(), BATCH_NORM_MOMENTUM)
            self.var.lerp_(var.detach(), BATCH_NORM_MOMENTUM)
        return (x_S - mean) * (var + BATCH_NORM_EPS).rsqrt()

    def _moments(self, x_S: Tensor) -> tuple[Tensor, Tensor]:
        samples = all_reduce(x_S.new_tensor(len(x_S)), self.ranks)
        mean = differentiable_sum(x_S.sum(0), self.ranks) / samples
        return differentiable_sum((x_S - mean).square().sum(0), self.ranks) / samples, mean


class Head(nn.Module):
    """A norm, then a linear layer: pooled features [S, D] -> logits [S, K]."""

    def __init__(self, norm: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(dim, classes)
        init_linear(self.linear)

    def forward(self, features_SD: Tensor) -> Tensor:
        return self.linear(self.norm(features_SD))


class LinearProbeHead(Head):
    """The norm is a BatchNorm without scale and bias; in training mode, it uses the statistics of its input, which must
    therefore be the features of a whole step."""

    norm: BatchNorm

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(BatchNorm(dim), dim, classes)


class FineTuneHead(Head):
    """The norm is a LayerNorm (eps 1e-6)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(LayerNorm(dim, eps=EPS), dim, classes)


class StackedLinear(nn.Module):
    """A linear layer of each of H heads: [S, D], or [S, H, D] with an input of its own for each, -> [S, H, K]."""

    def __init__(self, dim: int, classes: int, seeds: Sequence[int]) -> None:
        super().__init__()
        layers = {seed: _begun(seed, dim, classes) for seed in dict.fromkeys(seeds)}
        self.weight = nn.Parameter(torch.stack([layers[seed].weight.data for seed in seeds]))
        self.bias = nn.Parameter(torch.stack([layers[seed].bias.data for seed in seeds]))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return torch.einsum("shd,hkd->shk", x, self.weight) + self.bias
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)


class LinearHeads(nn.Module):
    """H linear probes of the same features, whose BatchNorm they share: [S, D] -> logits [S, H, K]. One is as
    `LinearProbeHead`. `seeds`: of the weights of each."""

    def __init__(self, dim: int, classes: int, seeds: Sequence[int], ranks: Ranks | None = None) -> None:
        super().__init__()
        self.norm, self.linear = BatchNorm(dim, ranks=ranks), StackedLinear(dim, classes, seeds)

    def forward(self, features_SD: Tensor) -> Tensor:
        return self.linear(self.norm(features_SD))

    def head(self, number: int) -> LinearProbeHead:
        """Return one of the heads, in evaluation mode."""
        _, classes, dim = self.linear.weight.shape
        head = LinearProbeHead(dim, classes).to(self.linear.weight.device).eval()
        weights = {f"linear.{name}": tensor[number] for name, tensor in self.linear.state_dict().items()}
        head.load_state_dict(weights | {f"norm.{name}": tensor for name, tensor in self.norm.state_dict().items()})
        return head


class AttentiveHeads(nn.Module):
    """H attentive probes of the same patch tokens [S, L, D] -> logits [S, H, K]: each has one learnt query whose
    multi-head cross-attention pools the tokens, as CAPI's probe (arXiv 2502.08769) and V-JEPA's (arXiv 2404.08471),
    then a BatchNorm and a linear layer as `LinearProbeHead`.

    They begin as linear probes of the tokens' mean: the query is 0, which attends to all alike, and values are the
    tokens. In training mode the statistics are those of the tokens it is given.
    """

    def __init__(
        self, dim: int, classes: int, attention_heads: int, seeds: Sequence[int], ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        count = len(seeds)
        self.query = nn.Parameter(torch.zeros(count, attention_heads, dim // attention_heads))
        self.keys = nn.Parameter(torch.stack([_begun(seed + _KEYS, dim, dim).weight.data for seed in seeds]))
        self.values = nn.Parameter(torch.eye(dim).repeat(count, 1, 1))
        self.norm, self.linear = BatchNorm(count, dim, ranks=ranks), StackedLinear(dim, classes, seeds)

    def pool(self, tokens_SLD: Tensor) -> Tensor:
        """Return what the queries find, [S, H, D].

        One query needs no key or value of each token: it is multiplied with the weights of the keys, and those of the
        values with the mean that it takes of the tokens.
        """
        count, heads, width = self.query.shape
        keys_HadD, values_HadD = (part.unflatten(1, (heads, width)) for part in (self.keys, self.values))
        query_HaD = torch.einsum("had,hadi->hai", self.query, keys_HadD) / math.sqrt(width)
        missing_SL = ~tokens_SLD.any(-1)  # rows of zeros fill up images of fewer patches
        scores_SaL = (query_HaD.flatten(0, 1) @ tokens_SLD.mT).masked_fill(missing_SL[:, None], -math.inf)
        found_SHaD = (scores_SaL.softmax(-1) @ tokens_SLD).unflatten(1, (count, heads))
        return torch.einsum("shai,hadi->shad", found_SHaD, values_HadD).flatten(2)

    def forward(self, tokens_SLD: Tensor) -> Tensor:
        return self.linear(self.norm(self.pool(tokens_SLD)))


def _begun(seed: int, dim: int, classes: int) -> nn.Linear:
    """Return a linear layer with the weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(dim, classes)
        init_linear(layer)
    return layer


@torch.no_grad()
def init_linear(linear: nn.Linear) -> None:
    """Initialise as flax does: weights of variance 1 / inputs from a normal distribution cut off at two standard
    deviations (`lecun_normal`), bias 0."""
    std = math.sqrt(1 / linear.in_features) / _TRUNCATED_STD
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
