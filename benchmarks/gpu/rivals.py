"""What the ops are timed beside: plain torch, torch.compile of it, and other libraries' losses where installed."""

from collections.abc import Callable
from types import SimpleNamespace

import m3ae_kernels
import torch
from m3ae_kernels import reference
from torch import Tensor

from .workloads import Workload


def rivals(work: Workload, compiled: bool = True) -> dict[str, object]:
    """Modules by name, each with a function named as the op."""
    found: dict[str, object] = {"m3ae_kernels": m3ae_kernels, "eager": reference}
    if compiled:
        found["torch.compile"] = SimpleNamespace(**{work.op: torch.compile(getattr(reference, work.op))})
    if work.op == "masked_token_loss":
        for name, loss in (("Liger", _liger()), ("ml-cross-entropy", _cce())):
            if loss is not None:
                found[name] = SimpleNamespace(masked_token_loss=loss)
    return found


def _liger() -> Callable[..., Tensor] | None:
    """Liger's fused linear cross-entropy: a mean over rows, without row weights or accuracy."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None

    def loss(hidden, weight, bias, targets, row_weight) -> Tensor:
        result = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets.long(), bias)
        return result[0] if isinstance(result, tuple) else result

    return loss


def _cce() -> Callable[..., Tensor] | None:
    """Apple's linear cross-entropy: a mean over rows, without row weights or accuracy."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return None

    def loss(hidden, weight, bias, targets, row_weight) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets.long(), bias=bias)

    return loss
