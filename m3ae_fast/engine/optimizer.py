"""AdamW as the official M3AE code has it, and an optimiser's state as tensors by parameter name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from m3ae_fast.config import OptimConfig
from m3ae_fast.engine.interface import State

MOMENTS = ("exp_avg", "exp_avg_sq")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay touches matmul weights and, as in the official code, LayerNorm scales; not biases and embeddings."""
    decayed, others = [], []
    for name, p in model.named_parameters():
        (decayed if name.endswith(".weight") else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_adamw(
    groups: list[dict], config: OptimConfig, *, cpu_offload: bool = False, partitioned: bool = False
) -> torch.optim.Optimizer:
    """Of `groups` with their weight decay. The first that is there: NVIDIA apex's FusedAdam, DeepSpeed's, torch's fused
    AdamW.

    `cpu_offload`: DeepSpeed's CPU Adam, which ZeRO-Offload wants. `partitioned`: ZeRO-3 steps one part of a group at a
    time, which apex's, counting steps a group, cannot follow.
    """
    options = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    first = groups[0]["params"][0]
    if first.is_cuda and first.dtype != torch.float64:
        for module in ("deepspeed.ops.adam",) if partitioned else ("apex.optimizers", "deepspeed.ops.adam"):
            try:
                return importlib.import_module(module).FusedAdam(groups, adam_w_mode=True, **options)
            except Exception:  # apex without its extension, PyPI's other apex, no nvcc for DeepSpeed's
                continue
    return torch.optim.AdamW(groups, fused=True, **options)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """ "torch AdamW", "deepspeed FusedAdam", "apex FusedAdam"."""
    return f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}"


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """`lr`, times a group's `lr_scale` where it has one."""
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
        _set_step(group, step)  # apex's and DeepSpeed's FusedAdam count here


def _set_step(counter: dict, step: int) -> None:
    if "step" in counter:
        counter["step"] = torch.full_like(counter["step"], step) if isinstance(counter["step"], Tensor) else step


def collect(
    model: nn.Module, weight: Callable[[Tensor], Tensor], moment: Callable[[Tensor, str], Tensor], keep: bool
) -> State | None:
    """Gather whole float32 tensors one by one; `keep` says whether this rank wants them."""
    state: State = {}
    for kind, name, tensor in _walk(model, weight, moment):
        if keep:
            state[f"{kind}/{name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
    return state if keep else None


def _walk(
    model: nn.Module, weight: Callable[[Tensor], Tensor], moment: Callable[[Tensor, str], Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    for name, p in model.named_parameters():
        yield "model", name, weight(p)
        for key in MOMENTS:
            yield key, name, moment(p, key)
