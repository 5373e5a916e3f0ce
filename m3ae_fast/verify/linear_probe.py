"""Golden files of the official linear probe: BatchNorm and a linear layer on given features, trained with LARS.

Shapes: N samples, T tokens of a sample (the first is cls), D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m3ae_fast.engine.schedule import warmup_cosine
from m3ae_fast.heads.fit_heads import Stack
from m3ae_fast.heads.modules import LinearHeads
from m3ae_fast.heads.stacked_optimizers import LARS
from m3ae_fast.verify.golden import Golden, Quantity

TOLERANCE = 1e-5
TOLERANCE_GRADIENT = 3e-5
TOLERANCE_CHANGE = 1e-4  # tolerance of parameter changes; at low learning rates, most of a change is rounding error
# minimum peak lr at which parameter changes are compared; at the published lr, the changes are only 3e-4 of the
# parameters
STRONG_LR = 1.0


def quantities(golden: Golden, device: torch.device, dtype: torch.dtype) -> Iterator[Quantity]:
    """Yield all comparisons of a file, for each variant of the settings, computed on `device` in `dtype`."""
    for variant, settings in golden.meta["variants"].items():
        yield from _replay(golden, variant, settings, device, dtype)


def _replay(
    golden: Golden, variant: str, settings: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Iterator[Quantity]:
    meta = golden.meta

    def quantity(name: str, ours: Tensor, key: str, tolerance: float = TOLERANCE) -> Quantity:
        return Quantity(f"{variant} {name}", ours.detach().clone(), golden.at(f"{variant}/{key}"), tolerance)

    def pooled(name: str) -> Tensor:
        tokens_NTD = golden.tensor(f"in/{name}").to(device, dtype)
        return tokens_NTD[:, 1:].mean(1) if settings["global_pool"] else tokens_NTD[:, 0]

    features_ND, labels_N = pooled("features"), golden.tensor("in/labels").long().to(device)
    head = LinearHeads(features_ND.shape[1], meta["C"], [0]).to(device, dtype)  # a single head
    weights = {"kernel": head.linear.weight, "bias": head.linear.bias}
    # tensors of the head, by their names in the file
    tensors = {**weights, "mean": head.norm.mean, "var": head.norm.var}
    for name, tensor in tensors.items():
        tensor.data.copy_(golden.at(f"{variant}/init/{name}"))
    optimizer = LARS(
        head.parameters(),
        momentum=meta["momentum"],
        weight_decay=settings["weight_decay"],
        trust_coefficient=meta["trust_coefficient"],
    )
    stack = Stack(head, optimizer, torch.ones(1, device=device))
    scale, warmup_steps = meta["B"] / 256, meta["warmup_epochs"] * meta["steps_per_epoch"]
    rates = [scale * rate for rate in (meta["lr_init_value"], settings["lr_peak_value"], meta["lr_end_value"])]
    recorded = 0  # the last step whose parameters are in the file
    trajectory: dict[str, list[float]] = {"lr": [], "loss": [], "accuracy": []}
    for step in range(meta["steps"]):
        first = step % meta["steps_per_epoch"] * meta["B"]
        batch, labels = features_ND[first : first + meta["B"]], labels_N[first : first + meta["B"]]
        lr = warmup_cosine(step, warmup_steps, meta["steps"], *rates)
        loss_H, accuracy_H = stack.step(batch, labels, len(labels), lr)
        for name, p in weights.items() if step == 0 else ():
            assert p.grad is not None
            yield quantity(f"grad {name}", p.grad[0], f"grad0/{name}", TOLERANCE_GRADIENT)
        trajectory["lr"].append(lr)
        trajectory["loss"].append(loss_H.item())
        trajectory["accuracy"].append(accuracy_H.item())
        if f"{variant}/after_{step + 1}/kernel" in golden.arrays:
            recorded, reached = step + 1, {name: p[0].detach().cpu().clone() for name, p in weights.items()}
            for name, tensor in tensors.items():
                reached_now = tensor[0] if name in weights else tensor
                yield quantity(f"after {step + 1} {name}", reached_now, f"after_{step + 1}/{name}")
    for name, values in trajectory.items():
        yield quantity(name, torch.tensor(values, dtype=torch.float64), name)
    for name, p in weights.items():
        buffer = optimizer.state[p]["momentum_buffer"][0]
        yield quantity(f"momentum {name}", buffer, f"trace_end/{name}", TOLERANCE_CHANGE)
        if recorded and settings["lr_peak_value"] >= STRONG_LR:
            before = golden.at(f"{variant}/init/{name}")
            change = golden.at(f"{variant}/after_{recorded}/{name}") - before
            yield Quantity(f"{variant} change {name}", reached[name] - before, change, TOLERANCE_CHANGE)
    with torch.no_grad():
        logits_NK = head.eval()(pooled("eval_features"))[:, 0].cpu()
    yield quantity("eval_logits", logits_NK, "eval_logits")
    accuracy = (logits_NK.argmax(1) == golden.tensor("in/eval_labels")).double().mean()
    yield quantity("eval_accuracy", accuracy, "eval_accuracy")
