"""Keeps DeepSpeed's ZeRO stages 1 and 2 from making the host wait for the GPU, with the same results."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


def read_no_norms() -> None:
    """Let the optimisers of stages 1 and 2 neither look whether a norm is valid, which `LossWatch` finds out without
    waiting, nor whether it is large enough to clip. Holds for all engines of this process."""
    for module in ("bf16_optimizer", "zero.stage_1_and_2"):
        names = vars(importlib.import_module(f"deepspeed.runtime.{module}"))
        names["is_invalid_grad_norm"] = lambda norm: False
    vars(importlib.import_module("deepspeed.runtime.bf16_optimizer"))["clip_tensors_by_global_norm"] = _clip


def _clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, **_: Any) -> Tensor:
    """Clip as DeepSpeed does, which reads the norm: a factor of 1 leaves every gradient as it is."""
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + 1e-6)).clamp(max=1))
    return global_norm


def valid_norm(norm: Tensor) -> Tensor:
    """Return NaN for the -1 by which DeepSpeed says that a norm is not finite."""
    return norm.masked_fill(norm < 0, torch.nan)


def wait_for_one_stream(optimizer: Any) -> None:
    """Replace the wait for the whole device after each micro-batch's backward by one, on the device, for the stream
    that reduces gradients. Not for offloaded optimisers, whose host reads what that stream copies."""
    epilogue = optimizer.independent_gradient_partition_epilogue

    def quietly() -> None:
        accelerator = get_accelerator()
        accelerator.synchronize = lambda *_: accelerator.current_stream().wait_stream(optimizer.reduction_stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    optimizer.independent_gradient_partition_epilogue = quietly
