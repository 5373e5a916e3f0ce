"""Classification heads on pooled features, as the official code has them (young-geng/m3ae_public,
`LinearCLS` and `ViTClassifier` of m3ae/model.py).

Shapes: S samples, D width, K classes.
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
    """The norm is a BatchNorm without scale and bias; in training mode its statistics are those of the features it is
    given: give it a whole step's."""

    norm: BatchNorm

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(BatchNorm(dim), dim, classes)


class FineTuneHead(Head):
    """The norm is a LayerNorm (eps 1e-6)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(LayerNorm(dim, eps=EPS), dim, classes)


@torch.no_grad()
def init_linear(linear: nn.Linear) -> None:
    """Initialise as flax does: weights of variance 1 / inputs from a normal distribution cut off at two standard
    deviations (`lecun_normal`), bias 0."""
    std = math.sqrt(1 / linear.in_features) / _TRUNCATED_STD
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
