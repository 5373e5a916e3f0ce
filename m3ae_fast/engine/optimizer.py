"""AdamW as the official M3AE code has it, Muon beside it, and an optimiser's state as tensors by parameter name."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3ae_fast.config import OptimConfig, PretrainingOptimConfig
from m3ae_fast.engine.muon import MOMENTUM, Muon
from m3ae_fast.model.m3ae import M3AE

_log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
Kinds = Mapping[str, tuple[str, ...]]  # of the optimiser's state, by parameter name


def state_kinds(model: nn.Module, groups: list[dict], ema: float | None) -> Kinds:
    """Return the kinds of the optimiser's state; `ema`: decay of the weights' moving average, None: none."""
    by_muon = {p for group in groups if "momentum" in group for p in group["params"]}
    average = () if ema is None else (EMA,)
    return {name: (*((MOMENTUM,) if p in by_muon else MOMENTS), *average) for name, p in model.named_parameters()}


def optimizer_groups(model: M3AE, config: PretrainingOptimConfig) -> list[dict]:
    """Return the groups of pre-training's optimiser: AdamW's, and, with Muon, before them the hidden matrices."""
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "adamw":
        return groups
    stacked = model.hidden_matrices()
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in stacked]
    muon = {
        "params": list(stacked),
        "matrices": list(stacked.values()),
        "momentum": config.muon_momentum,
        "weight_decay": config.weight_decay,
        "lr_scale": config.muon_lr_ratio,
    }
    return [muon, *groups]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's groups. Decay applies to matmul weights and, as in the official code, LayerNorm scales; not to
    biases and embeddings."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (decayed if name.endswith(".weight") else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(
    groups: list[dict], config: OptimConfig, ema: float | None = None, on_cpu: bool = False, partitioned: bool = False
) -> torch.optim.Optimizer:
    """Return AdamW, with Muon for the group that is Muon's, if any: see `optimizer_groups`. `ema`: decay of a moving
    average of the weights, see `track_ema`; None: none. Other arguments as of `build_adamw`."""
    adamw = build_adamw([group for group in groups if "momentum" not in group], config, on_cpu, partitioned)
    muon = [group for group in groups if "momentum" in group]
    optimizer = Muon(muon[0], adamw) if muon else adamw
    track_ema(optimizer, ema)
    return optimizer


def build_adamw(
    groups: list[dict], config: OptimConfig, on_cpu: bool = False, partitioned: bool = False
) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, or NVIDIA apex's FusedAdam where that is installed and fits.

    DeepSpeed's own Adams are extensions that every new machine has to compile; the one for CPUs takes as long as
    torch's.

    Args:
        groups: parameters, on their final device, with their weight decay.
        config: decay rates and epsilon; the learning rate is set before each step.
        on_cpu: the parameters are on a GPU, but will be updated on the CPU (ZeRO-Offload).
        partitioned: ZeRO-3 steps one part of a group at a time, which apex's, counting steps per group, cannot follow.
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    first = groups[0]["params"][0]
    if first.is_cuda and first.dtype != torch.float64 and not on_cpu and not partitioned:
        try:
            return importlib.import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True, **options)
        except Exception:  # not installed, without its extension, or PyPI's unrelated package of that name
            _log.debug("no apex", exc_info=True)
    return torch.optim.AdamW(groups, fused=True, **options)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return "torch AdamW" or "apex FusedAdam", and what Muon updates."""
    if isinstance(optimizer, Muon):
        ratio = optimizer.param_groups[0]["lr_scale"]
        return f"Muon for hidden matrices (learning rate x {ratio:g}), {name_of(optimizer.others)} for the rest"
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
    """Keep a moving average of the weights as one more tensor of the optimiser's state: so the average is sharded and
    saved together with the optimiser state, at any ZeRO stage. It begins as the weights after the first update. None:
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
    """Allocate the optimiser state with zero moments and the step count set to `step`. Parameters are not changed."""
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


def collect(
    model: nn.Module, kind: str, kinds: Kinds, whole: Callable[[nn.Parameter, str], Tensor]
) -> dict[str, Tensor]:
    """Return `whole(parameter, kind)` of each parameter that has a state of this kind, or all for "model", by its name,
    as float32 copies on the CPU."""
    return {
        name: whole(p, kind).detach().to("cpu", torch.float32, copy=True)
        for name, p in model.named_parameters()
        if kind in ("model", *kinds[name])
    }
