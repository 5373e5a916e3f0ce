"""The optimisers AdamW (as in the official M3AE code) and Muon, and access to their state by parameter name."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3ae_fast.config import OptimConfig
from m3ae_fast.engine.muon import MOMENTUM, Muon

_log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
ADAM_EPS = 1e-8  # Adam's epsilon, as in the official code
Kinds = Mapping[str, tuple[str, ...]]  # kinds of optimiser state, such as MOMENTS, by parameter name


def state_kinds(model: nn.Module, groups: list[dict], ema: float | None) -> Kinds:
    """Return the kinds of optimiser state of each parameter. `ema`: decay of the weights' moving average; None: no
    average."""
    by_muon = {p for group in groups if "momentum" in group for p in group["params"]}
    average = () if ema is None else (EMA,)
    return {name: (*((MOMENTUM,) if p in by_muon else MOMENTS), *average) for name, p in model.named_parameters()}


def tensors_of(model: nn.Module, kinds: Kinds) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield each tensor's name in an engine's state, its parameter, and its kind: "model" for a weight, or a kind of
    optimiser state."""
    for name, p in model.named_parameters():
        for kind in ("model", *kinds[name]):
            yield f"{kind}/{name}", p, kind


def build_optimizer(
    groups: list[dict],
    config: OptimConfig,
    dtype: torch.dtype,
    ema: float | None = None,
    on_cpu: bool = False,
    partitioned: bool = False,
) -> torch.optim.Optimizer:
    """Return AdamW, combined with Muon if one of the groups is for Muon (see `parameter_groups.optimizer_groups`).

    Args:
        dtype: dtype of the model's matrix products, in which Muon computes its own products.
        ema: decay of a moving average of the weights (see `track_ema`); None: no average.
        config, on_cpu, partitioned: as for `build_adamw`.
    """
    adamw = build_adamw([group for group in groups if "momentum" not in group], config, on_cpu, partitioned)
    muon = [group for group in groups if "momentum" in group]
    optimizer = Muon(muon[0], adamw, dtype) if muon else adamw
    track_ema(optimizer, ema)
    return optimizer


def build_adamw(
    groups: list[dict], config: OptimConfig, on_cpu: bool = False, partitioned: bool = False
) -> torch.optim.Optimizer:
    """Return NVIDIA apex's FusedAdam if it is installed and applicable, otherwise torch's fused AdamW.

    DeepSpeed's Adam implementations are not used: they have to be compiled on every new machine, and the one for CPUs
    is no faster than torch's.

    Args:
        groups: groups of parameters, on their final device, with their weight decay.
        config: decay rates; the learning rate is set before each step.
        on_cpu: whether parameters that are on a GPU will be updated on the CPU (ZeRO-Offload).
        partitioned: whether the optimiser updates one partition of a group at a time (ZeRO-3). FusedAdam does not
            support this, because it counts steps per group.
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": ADAM_EPS}
    first = groups[0]["params"][0]
    if first.is_cuda and first.dtype != torch.float64 and not on_cpu and not partitioned:
        try:
            return importlib.import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True, **options)
        except Exception:  # apex or its extension is missing, or `apex` is an unrelated package of the same name
            _log.debug("apex is not available", exc_info=True)
    return torch.optim.AdamW(groups, fused=True, **options)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return a description of the optimiser: "torch AdamW" or "apex FusedAdam", preceded by Muon and the parameters
    that it updates, if Muon is used."""
    if isinstance(optimizer, Muon):
        ratio = optimizer.param_groups[0]["lr_scale"]
        return f"Muon for hidden matrices (learning rate x {ratio:g}), {name_of(optimizer.others)} for the rest"
    return f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}"


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups to `lr`, multiplied by the group's `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients in place so that their global L2 norm is at most `max_norm` (optax.clip_by_global_norm; None: no
    limit), and return the norm before scaling, a 0-d tensor."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm is not None:
        torch._foreach_mul_(grads, (max_norm / norm).clamp(max=1.0))
    return norm


def track_ema(optimizer: torch.optim.Optimizer, decay: float | None) -> None:
    """Keep a moving average of the weights as a further tensor of the optimiser's state, so that it is sharded and
    saved together with that state at any ZeRO stage. It is initialised with the weights after the first update.
    `decay`: decay of the average; None: no average is kept."""
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
        _set_step(group, step)  # FusedAdam stores the step count in the group


def _set_step(counter: dict, step: int) -> None:
    if "step" in counter:
        counter["step"] = torch.full_like(counter["step"], step) if isinstance(counter["step"], Tensor) else step


def collect(
    model: nn.Module, kind: str, kinds: Kinds, whole: Callable[[nn.Parameter, str], Tensor]
) -> dict[str, Tensor]:
    """Return complete tensors of one kind of state by parameter name, as float32 copies on the CPU: the results of
    `whole(parameter, kind)` for all parameters that have this kind of state (for "model", all parameters)."""
    return {
        name: whole(p, kind).detach().to("cpu", torch.float32, copy=True)
        for name, p in model.named_parameters()
        if kind in ("model", *kinds[name])
    }
