"""LARS (arXiv 1708.03888) as the official linear probe runs it: `optax.lars`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LARS(torch.optim.Optimizer):
    """For each parameter p:

        u = gradient + weight_decay * p
        u = u * trust_coefficient * |p| / |u|        (u as it is where |p| or |u| is 0)
        buffer = momentum * buffer - lr * u
        p = p + buffer

    The learning rate goes into the momentum buffer, unlike in torch's SGD and in the LARS of timm and of MAE, which
    differ wherever the learning rate changes. No parameter is left out: biases are decayed and scaled too. A bias that
    starts at 0 is not scaled in its first effective step, which is then about 1 / trust_coefficient times as large.

    So `trust_coefficient` is the size of a step at lr 1, as a fraction of the parameter's norm. A schedule sets `lr`
    before each step.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                update = _scaled(p, p.grad + group["weight_decay"] * p, group["trust_coefficient"])
                p.add_(state["momentum_buffer"].mul_(group["momentum"]).sub_(group["lr"] * update))


def _scaled(p: Tensor, update: Tensor, trust_coefficient: float) -> Tensor:
    size, length = p.norm(), update.norm()
    # without waiting for the GPU
    ratio = torch.where((size > 0) & (length > 0), trust_coefficient * size / length, torch.ones_like(size))
    return ratio * update
