"""Optimisers for stacks of heads. The first dimension of each parameter is the head, and each head has its own learning
rate. All heads are updated together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults for AdamW


class StackedOptimizer(torch.optim.Optimizer):
    """Base class of optimisers of parameters [H, ...]. The `lr` of the groups is set before each step: a number, or a
    tensor [H]."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. `closure` is not supported."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    lr = group["lr"]
                    each = lr.view(-1, *[1] * (p.ndim - 1)) if isinstance(lr, Tensor) else lr
                    self._update(p, p.grad, each, group, self.state[p])

    @abstractmethod
    def _update(self, p: Tensor, grad: Tensor, lr: float | Tensor, group: dict[str, Any], state: Any) -> None:
        """Update a parameter and its state. `lr`: a number, or a tensor that can be multiplied with the parameter."""


class LARS(StackedOptimizer):
    """LARS (arXiv 1708.03888) as in the official linear probe, which uses `optax.lars`. For each parameter p of a head:

        u = gradient + weight_decay * p
        u = u * trust_coefficient * |p| / |u|        (u is unchanged if |p| or |u| is 0)
        buffer = momentum * buffer - lr * u
        p = p + buffer

    At a learning rate of 1, `trust_coefficient` is therefore the size of a step relative to the norm of the parameter.

    The learning rate is included in the momentum buffer, unlike in torch's SGD and in the LARS of timm and of MAE; the
    results differ if the learning rate changes. No parameter is excluded: biases are decayed and scaled too. An
    exception is the first update of a bias that is still 0, which is not scaled (|p| is 0): it is about 1 /
    trust_coefficient times as large as a scaled update.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, options)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def _update(self, p: Tensor, grad: Tensor, lr: float | Tensor, group: dict[str, Any], state: Any) -> None:
        update = _scaled(p, grad + group["weight_decay"] * p, group["trust_coefficient"])
        p.add_(state["momentum_buffer"].mul_(group["momentum"]).sub_(lr * update))


def _scaled(p: Tensor, update: Tensor, trust_coefficient: float) -> Tensor:
    size, length = (torch.linalg.vector_norm(each, dim=[*range(1, p.ndim)], keepdim=True) for each in (p, update))
    # `where` avoids a synchronisation with the GPU
    ratio = torch.where((size > 0) & (length > 0), trust_coefficient * size / length, torch.ones_like(size))
    return ratio * update


class AdamW(StackedOptimizer):
    """AdamW (arXiv 1711.05101) with the defaults of torch.optim.AdamW, which supports only one learning rate per
    tensor."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.0, *, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _update(self, p: Tensor, grad: Tensor, lr: float | Tensor, group: dict[str, Any], state: Any) -> None:
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        state["step"] += 1
        mean_share, square_share = (1 - beta ** state["step"] for beta in BETAS)
        mean = state["mean"].lerp_(grad, 1 - BETAS[0])
        square = state["square"].mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr / mean_share * mean / ((square / square_share).sqrt() + EPS))
