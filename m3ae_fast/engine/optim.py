"""AdamW, its parameter groups and its schedule, as the official M3AE code has them."""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor, nn

from m3ae_fast.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay touches matmul weights and, as in the official code, LayerNorm scales; not biases and embeddings."""
    decayed, others = [], []
    for name, p in model.named_parameters():
        (decayed if name.endswith(".weight") else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_adamw(
    model: nn.Module, config: OptimConfig, *, cpu_offload: bool = False, partitioned: bool = False
) -> torch.optim.Optimizer:
    """The first that is there: NVIDIA apex's FusedAdam, DeepSpeed's, torch's fused AdamW.

    `cpu_offload`: DeepSpeed's CPU Adam, which ZeRO-Offload wants. `partitioned`: ZeRO-3 steps one part of a group at a
    time, which apex's, counting steps a group, cannot follow.
    """
    groups = parameter_groups(model, config.weight_decay)
    options = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    first = next(model.parameters())
    if first.is_cuda and first.dtype != torch.float64:
        for module in ("deepspeed.ops.adam",) if partitioned else ("apex.optimizers", "deepspeed.ops.adam"):
            try:
                return importlib.import_module(module).FusedAdam(groups, adam_w_mode=True, **options)
            except Exception:  # apex without its extension, PyPI's other apex, no nvcc for DeepSpeed's
                continue
    return torch.optim.AdamW(groups, fused=True, **options)


def learning_rate(step: int, config: OptimConfig, batch: int, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then a cosine (optax.warmup_cosine_decay_schedule)."""
    scale = batch / 256
    init, peak, end = (scale * lr for lr in (config.init_lr, config.peak_lr, config.end_lr))
    if step < warmup_steps:
        return init + (peak - init) * step / warmup_steps
    progress = min(step - warmup_steps, total_steps - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def clip_by_global_norm(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients so that their global norm is at most `max_norm` (optax.clip_by_global_norm). Returns the norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm is not None:
        torch._foreach_mul_(grads, (max_norm / norm).clamp(max=1.0))
    return norm
