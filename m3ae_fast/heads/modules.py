"""Classification heads on pooled features, as in the official code (young-geng/m3ae_public, `LinearCLS` and
`ViTClassifier` in m3ae/model.py), and stacks of heads that are trained together.

Shapes: S samples, L patches, D width, K classes, H heads of a stack; a: number of attention heads, d: their width.
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
_KEYS = 1 << 32  # added to a head's seed for the initial weights of the keys
_TRUNCATED_STD = 0.87962566103423978  # standard deviation of a standard normal distribution truncated at +-2


class BatchNorm(nn.Module):
    """BatchNorm over samples without scale and bias, like flax's. In training mode, it uses the statistics of a step
    over all ranks.

    The running variance is computed from the biased variances of batches, whereas torch's BatchNorm1d uses unbiased
    ones.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, *shape: int, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))

    def forward(self, x_S: Tensor) -> Tensor:
        """Return the normalised samples [S, ...]. In training mode, every rank must call it with its part of the
        step."""
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
    """A head that consists of a norm and a linear layer: pooled features [S, D] -> logits [S, K]."""

    def __init__(self, norm: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(dim, classes)
        init_linear(self.linear)

    def forward(self, features_SD: Tensor) -> Tensor:
        return self.linear(self.norm(features_SD))


class LinearProbeHead(Head):
    """The head of the linear probe, with a BatchNorm without scale and bias. In training mode, the norm uses the
    statistics of its input, which must therefore be the features of a whole step."""

    norm: BatchNorm

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(BatchNorm(dim), dim, classes)


class FineTuneHead(Head):
    """The head of fine-tuning, with a LayerNorm (eps 1e-6)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(LayerNorm(dim, eps=EPS), dim, classes)


class StackedLinear(nn.Module):
    """The linear layers of H heads: [S, D] -> [S, H, K], or [S, H, D] -> [S, H, K] if each head has its own input.
    `seeds`: random seed of each layer's initial weights."""

    def __init__(self, dim: int, classes: int, seeds: Sequence[int]) -> None:
        super().__init__()
        layers = {seed: _initialised(seed, dim, classes) for seed in dict.fromkeys(seeds)}
        self.weight = nn.Parameter(torch.stack([layers[seed].weight.data for seed in seeds]))
        self.bias = nn.Parameter(torch.stack([layers[seed].bias.data for seed in seeds]))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return torch.einsum("shd,hkd->shk", x, self.weight) + self.bias
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)


class LinearHeads(nn.Module):
    """H linear probes of the same features, which share their BatchNorm: [S, D] -> logits [S, H, K]. Each of them is
    equivalent to a `LinearProbeHead`. `seeds`: random seed of each probe's initial weights."""

    def __init__(self, dim: int, classes: int, seeds: Sequence[int], ranks: Ranks | None = None) -> None:
        super().__init__()
        self.norm, self.linear = BatchNorm(dim, ranks=ranks), StackedLinear(dim, classes, seeds)

    def forward(self, features_SD: Tensor) -> Tensor:
        return self.linear(self.norm(features_SD))

    def head(self, number: int) -> LinearProbeHead:
        """Return a copy of one of the heads, in evaluation mode."""
        _, classes, dim = self.linear.weight.shape
        head = LinearProbeHead(dim, classes).to(self.linear.weight.device).eval()
        weights = {f"linear.{name}": tensor[number] for name, tensor in self.linear.state_dict().items()}
        head.load_state_dict(weights | {f"norm.{name}": tensor for name, tensor in self.norm.state_dict().items()})
        return head


class AttentiveHeads(nn.Module):
    """H attentive probes of the same patch tokens: [S, L, D] -> logits [S, H, K]. In each of them, the multi-head
    cross-attention of one learnable query pools the tokens, as in the probes of CAPI (arXiv 2502.08769) and V-JEPA
    (arXiv 2404.08471); a BatchNorm and a linear layer follow, as in `LinearProbeHead`.

    At initialisation, they are linear probes of the mean token: the query is 0 and therefore attends equally to all
    tokens, and the values are the tokens themselves.
    """

    def __init__(
        self, dim: int, classes: int, attention_heads: int, seeds: Sequence[int], ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        count = len(seeds)
        self.query = nn.Parameter(torch.zeros(count, attention_heads, dim // attention_heads))
        self.keys = nn.Parameter(torch.stack([_initialised(seed + _KEYS, dim, dim).weight.data for seed in seeds]))
        self.values = nn.Parameter(torch.eye(dim).repeat(count, 1, 1))
        self.norm, self.linear = BatchNorm(count, dim, ranks=ranks), StackedLinear(dim, classes, seeds)

    def pool(self, tokens_SLD: Tensor) -> Tensor:
        """Return the tokens pooled by the attention of each probe's query, [S, H, D].

        Because there is only one query, the keys and values of all tokens need not be computed. Instead, the query is
        multiplied by the weights of the keys before it is compared with the tokens, and the weights of the values are
        applied to the weighted mean of the tokens.
        """
        count, heads, width = self.query.shape
        keys_HadD, values_HadD = (part.unflatten(1, (heads, width)) for part in (self.keys, self.values))
        query_HaD = torch.einsum("had,hadi->hai", self.query, keys_HadD) / math.sqrt(width)
        missing_SL = ~tokens_SLD.any(-1)  # zero rows are padding of images with fewer patches
        scores_SaL = (query_HaD.flatten(0, 1) @ tokens_SLD.mT).masked_fill(missing_SL[:, None], -math.inf)
        found_SHaD = (scores_SaL.softmax(-1) @ tokens_SLD).unflatten(1, (count, heads))
        return torch.einsum("shai,hadi->shad", found_SHaD, values_HadD).flatten(2)

    def forward(self, tokens_SLD: Tensor) -> Tensor:
        return self.linear(self.norm(self.pool(tokens_SLD)))


def _initialised(seed: int, dim: int, classes: int) -> nn.Linear:
    """Return a linear layer whose initial weights depend on `seed` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(dim, classes)
        init_linear(layer)
    return layer


@torch.no_grad()
def init_linear(linear: nn.Linear) -> None:
    """Initialise a layer as flax does: weights from a normal distribution truncated at two standard deviations, with
    variance 1 / in_features (`lecun_normal`), and bias 0."""
    std = math.sqrt(1 / linear.in_features) / _TRUNCATED_STD
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
