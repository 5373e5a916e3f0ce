"""Classification heads on pooled features, as the official code has them (young-geng/m3ae_public,
`LinearCLS` and `ViTClassifier` of m3ae/model.py).

Shapes: S samples, L patches, D width, K classes, H attention heads of width d.
"""

from __future__ import annotations

import math

import torch
from m3ae_kernels.cpu.norm import LayerNorm
from torch import Tensor, nn

from m3ae_fast.model.transformer import EPS

BATCH_NORM_EPS, BATCH_NORM_MOMENTUM = 1e-5, 0.1
_TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut off at +-2


class BatchNorm(nn.Module):
    """BatchNorm over samples without scale and bias, as flax's.

    The running variance takes the biased variance of a batch; torch's BatchNorm1d would take the unbiased one.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    def forward(self, x_SD: Tensor) -> Tensor:
        mean_D, var_D = self.mean, self.var
        if self.training:
            var_D, mean_D = torch.var_mean(x_SD, dim=0, correction=0)
            self.mean.lerp_(mean_D.detach(), BATCH_NORM_MOMENTUM)
            self.var.lerp_(var_D.detach(), BATCH_NORM_MOMENTUM)
        return (x_SD - mean_D) * (var_D + BATCH_NORM_EPS).rsqrt()


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


class AttentiveHead(nn.Module):
    """One learnt query's multi-head cross-attention over patch tokens, as CAPI's probe (arXiv 2502.08769) and V-JEPA's
    (arXiv 2404.08471) pool, then `LinearProbeHead`: tokens [S, L, D] -> logits [S, K].

    It begins as a linear probe of the tokens' mean: the query is 0, which attends to all alike, and values are the
    tokens. In training mode the statistics are those of the tokens it is given.
    """

    def __init__(self, dim: int, classes: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(heads, dim // heads))
        self.keys, self.values = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        init_linear(self.keys)
        nn.init.eye_(self.values.weight)
        self.head = LinearProbeHead(dim, classes)

    def pool(self, tokens_SLD: Tensor) -> Tensor:
        """Return what the query finds, [S, D].

        One query needs no key or value of each token: it is multiplied with the weights of the keys, and those of the
        values with the mean that it takes of the tokens.
        """
        heads, width = self.query.shape
        keys_HdD, values_HdD = (part.weight.unflatten(0, (heads, width)) for part in (self.keys, self.values))
        query_HD = torch.einsum("hd,hdi->hi", self.query, keys_HdD) / math.sqrt(width)
        missing_SL = ~tokens_SLD.any(-1)  # rows of zeros fill up images of fewer patches
        scores_SHL = (query_HD @ tokens_SLD.mT).masked_fill(missing_SL[:, None], -math.inf)
        weights_SHL = scores_SHL.softmax(-1)
        return torch.einsum("shi,hdi->shd", weights_SHL @ tokens_SLD, values_HdD).flatten(1)

    def forward(self, tokens_SLD: Tensor) -> Tensor:
        return self.head(self.pool(tokens_SLD))


@torch.no_grad()
def init_linear(linear: nn.Linear) -> None:
    """Initialise as flax does: weights of variance 1 / inputs from a normal distribution cut off at two standard
    deviations (`lecun_normal`), bias 0."""
    std = math.sqrt(1 / linear.in_features) / _TRUNCATED_STD
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
