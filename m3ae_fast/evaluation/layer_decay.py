"""Layer-wise learning rates for fine-tuning (arXiv 2106.08254), with the official code's layers.

Of the official script (young-geng/m3ae_public, m3ae/finetune_main.py) this reproduces the computation:

- the layers as they come out there: the cls token and the encoder's last norm in layer 0, block i in layer i + 1, and
  everything else, the patch and text embeddings included, in layer depth + 1 with the head, at the full rate;
- a peak learning rate that is not multiplied by batch / 256.

It does not reproduce two mistakes: layers counted for 24 blocks whatever the model's depth, and a weight decay that
never acts. Here decay acts on the parameters that the script intends to decay: weight matrices, not biases, norms, cls
and embeddings.
"""

from __future__ import annotations

import re

from torch import nn


def layer_of(name: str, depth: int) -> int:
    """Return a parameter's layer, from 0 to depth + 1, by its name: `backbone.encoder.blocks.3.norm1.weight` -> 4."""
    if block := re.search(r"\bencoder\.blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if re.search(r"\bencoder_input\.cls_token$|\bencoder\.norm\.", name) else depth + 1


def lr_scale(layer: int, depth: int, layer_decay: float) -> float:
    """Return the factor of a layer's learning rate."""
    return layer_decay ** (depth + 1 - layer)


def layer_decay_groups(model: nn.Module, depth: int, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return AdamW's groups of a Classifier, two a layer, each with its `weight_decay`, 0 but for matmul weights, and
    `lr_scale` (see `engine.optimizer.set_lr`). `layer_decay`: factor from a layer to the one below."""
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        decays = name.endswith(".weight") and p.ndim > 1
        groups.setdefault((layer_of(name, depth), decays), []).append(p)
    return [
        {
            "params": params,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": lr_scale(layer, depth, layer_decay),
        }
        for (layer, decays), params in sorted(groups.items(), key=lambda item: item[0])
    ]
