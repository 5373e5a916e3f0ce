"""Files of the official linear probe: BatchNorm and a linear layer on given features, trained by LARS.

Shapes: N samples, T tokens of each (cls first), D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.config import OptimConfig
from m3ae_fast.engine.optimizer import set_lr
from m3ae_fast.engine.schedule import learning_rate
from m3ae_fast.transfer.heads import LinearProbeHead
from m3ae_fast.transfer.lars import LARS
from m3ae_fast.verify.golden import Golden, Quantity

TOLERANCE = 1e-5
TOLERANCE_GRADIENT = 3e-5
TOLERANCE_CHANGE = 1e-4  # of what the steps changed, where that is not mostly rounding
STRONG_LR = 1.0  # a peak from which on it is not: at the published one parameters move by 3e-4 of their size


def quantities(golden: Golden, device: torch.device, dtype: torch.dtype) -> Iterator[Quantity]:
    for variant, settings in golden.meta["variants"].items():
        yield from _replay(golden, variant, settings, device, dtype)


def _replay(
    golden: Golden, variant: str, settings: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Iterator[Quantity]:
    meta = golden.meta
    features_ND, eval_features_ND = (
        _pooled(golden.tensor(f"in/{name}"), settings["global_pool"]).to(device, dtype)
        for name in ("features", "eval_features")
    )
    labels_N = golden.tensor("in/labels").long().to(device)
    head = LinearProbeHead(features_ND.shape[1], meta["C"]).to(device, dtype)
    tensors = _tensors(head)
    for name, tensor in tensors.items():
        tensor.data.copy_(golden.at(f"{variant}/init/{name}"))
    optimizer = LARS(
        head.parameters(),
        momentum=meta["momentum"],
        weight_decay=settings["weight_decay"],
        trust_coefficient=meta["trust_coefficient"],
    )
    schedule = OptimConfig(
        init_lr=meta["lr_init_value"], peak_lr=settings["lr_peak_value"], end_lr=meta["lr_end_value"]
    )
    warmup_steps = meta["warmup_epochs"] * meta["steps_per_epoch"]
    trajectory: dict[str, list[float]] = {"lr": [], "loss": [], "accuracy": []}
    for step in range(meta["steps"]):
        first = step % meta["steps_per_epoch"] * meta["B"]
        batch, labels = features_ND[first : first + meta["B"]], labels_N[first : first + meta["B"]]
        logits = head(batch)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name in ("kernel", "bias"):
                grad = tensors[name].grad
                assert grad is not None
                yield Quantity(f"{variant} grad {name}", grad, golden.at(f"{variant}/grad0/{name}"), TOLERANCE_GRADIENT)
        lr = learning_rate(step, schedule, meta["B"], warmup_steps, meta["steps"])
        set_lr(optimizer, lr)
        optimizer.step()
        trajectory["lr"].append(lr)
        trajectory["loss"].append(loss.item())
        trajectory["accuracy"].append((logits.argmax(1) == labels).double().mean().item())
        if f"{variant}/after_{step + 1}/kernel" in golden.arrays:
            for name, tensor in tensors.items():
                official = golden.at(f"{variant}/after_{step + 1}/{name}")
                yield Quantity(f"{variant} after {step + 1} {name}", tensor.clone(), official, TOLERANCE)
    for name, values in trajectory.items():
        ours = torch.tensor(values, dtype=torch.float64)
        yield Quantity(f"{variant} {name}", ours, golden.tensor(f"{variant}/{name}"), TOLERANCE)
    yield from _end(golden, variant, settings, optimizer, tensors)
    yield from _evaluation(golden, variant, head, eval_features_ND)


def _end(
    golden: Golden, variant: str, settings: dict[str, Any], optimizer: LARS, tensors: dict[str, Tensor]
) -> Iterator[Quantity]:
    """Yield the momentum buffers, and what the steps changed."""
    tolerance = TOLERANCE_CHANGE
    for name in ("kernel", "bias"):
        buffer = optimizer.state[tensors[name]]["momentum_buffer"]
        yield Quantity(f"{variant} momentum {name}", buffer, golden.at(f"{variant}/trace_end/{name}"), tolerance)
        if settings["lr_peak_value"] >= STRONG_LR:
            before, after = (
                golden.at(f"{variant}/{when}/{name}") for when in ("init", f"after_{golden.meta['steps']}")
            )
            change = tensors[name].detach().cpu() - before
            yield Quantity(f"{variant} change {name}", change, after - before, tolerance)


@torch.no_grad()
def _evaluation(golden: Golden, variant: str, head: LinearProbeHead, features_ND: Tensor) -> Iterator[Quantity]:
    logits_NK = head.eval()(features_ND).cpu()
    accuracy = (logits_NK.argmax(1) == golden.tensor("in/eval_labels")).double().mean()
    yield Quantity(f"{variant} eval_logits", logits_NK, golden.tensor(f"{variant}/eval_logits"), TOLERANCE)
    official = torch.as_tensor(golden.arrays[f"{variant}/eval_accuracy"])
    yield Quantity(f"{variant} eval_accuracy", accuracy, official, TOLERANCE)


def _tensors(head: LinearProbeHead) -> dict[str, Tensor]:
    """Return the tensors by their names in the file."""
    return {"kernel": head.linear.weight, "bias": head.linear.bias, "mean": head.norm.mean, "var": head.norm.var}


def _pooled(tokens_NTD: Tensor, global_pool: bool) -> Tensor:
    return tokens_NTD[:, 1:].mean(1) if global_pool else tokens_NTD[:, 0]
