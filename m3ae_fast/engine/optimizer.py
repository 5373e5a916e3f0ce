"""AdamW as the official M3AE code has it, and an optimiser's state as tensors by parameter name."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from m3ae_fast.config import OptimConfig

_log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


def state_kinds(ema: float | None) -> tuple[str, ...]:
    """Return the kinds of the optimiser's state; `ema`: decay of the weights' moving average, None: none."""
    return MOMENTS if ema is None else (*MOMENTS, EMA)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's groups. Decay applies to matmul weights and, as in the official code, LayerNorm scales; not to
    biases and embeddings."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (decayed if name.endswith(".weight") else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_adamw(
    groups: list[dict], config: OptimConfig, ema: float | None = None, on_cpu: bool = False, partitioned: bool = False
) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, or NVIDIA apex's FusedAdam where that is installed and fits.

    DeepSpeed's own Adams are extensions that every new machine has to compile; the one for CPUs takes as long as
    torch's.

    Args:
        groups: parameters, on their final device, with their weight decay.
        config: decay rates and epsilon; the learning rate is set before each step.
        ema: decay of a moving average of the weights, see `track_ema`; None: none.
        on_cpu: the parameters are on a GPU, but will be updated on the CPU (ZeRO-Offload).
        partitioned: ZeRO-3 steps one part of a group at a time, which apex's, counting steps per group, cannot follow.
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    optimizer = None
    first = groups[0]["params"][0]
    if first.is_cuda and first.dtype != torch.float64 and not on_cpu and not partitioned:
        try:
            optimizer = importlib.import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True, **options)
        except Exception:  # not installed, without its extension, or PyPI's unrelated package of that name
            _log.debug("no apex", exc_info=True)
    optimizer = optimizer or torch.optim.AdamW(groups, fused=True, **options)
    track_ema(optimizer, ema)
    return optimizer


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return "torch AdamW" or "apex FusedAdam"."""
    return f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}"


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set `lr`, times a group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@torch.no_grad()
def clip_by_global_norm(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients so that their global norm is at most `max_norm` (optax.clip_by_global_norm). Returns the norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm is not None:
        torch._foreach_mul_(grads, (max_norm / norm).clamp(max=1.0))
    return norm


def track_ema(optimizer: torch.optim.Optimizer, decay: float | None) -> None:
    """Keep a moving average of the weights as one more tensor of the optimiser's state: whatever ZeRO stage shards that
    state, and wherever it is saved, the average goes along. It begins as the weights after the first update. None:
    none."""
    if decay is None:
        return
    rate = 1 - decay

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        averages, weights = [], []
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            state = optimizer.state[p]
            if EMA in state:
                averages.append(state[EMA])
                weights.append(p.detach())
            else:
                state[EMA] = p.detach().clone()
        if averages:
            torch._foreach_lerp_(averages, weights, rate)

    optimizer.register_step_post_hook(update)


def prime(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make the optimiser allocate its state, as after `step` updates with all moments 0. Parameters stay."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params]
    set_lr(optimizer, 0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, grad in zip(params, grads):
        p.grad = grad
        _set_step(optimizer.state[p], step)
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr
        _set_step(group, step)  # apex's FusedAdam counts here


def _set_step(counter: dict, step: int) -> None:
    if "step" in counter:
        counter["step"] = torch.full_like(counter["step"], step) if isinstance(counter["step"], Tensor) else step


def collect(model: nn.Module, kind: str, whole: Callable[[nn.Parameter, str], Tensor]) -> dict[str, Tensor]:
    """Return `whole(parameter, kind)` of each parameter by its name, as float32 copies on the CPU."""
    return {name: whole(p, kind).detach().to("cpu", torch.float32, copy=True) for name, p in model.named_parameters()}
