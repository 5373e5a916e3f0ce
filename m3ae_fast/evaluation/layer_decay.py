"""Layer-wise learning rates for fine-tuning (arXiv 2106.08254), with the layers of the official code.

The following properties of the official script (young-geng/m3ae_public, m3ae/finetune_main.py) are reproduced:

- the assignment to layers: the cls token and the encoder's last norm are in layer 0, block i is in layer i + 1, and all
other parameters, including the patch and text embeddings, are in layer depth + 1 with the head and have the full
learning rate;
- a peak learning rate that is not multiplied by batch / 256.

Two mistakes of the script are not reproduced: it counts layers as if the model had 24 blocks, and its weight decay has
no effect. Here, weight decay is applied to the parameters that the script intends: weight matrices, but not biases,
norms, cls and embeddings.
"""

from __future__ import annotations

import re

from torch import nn


def layer_of(name: str, depth: int) -> int:
    """Return the layer of the parameter `name`, from 0 to depth + 1: 4 for `backbone.encoder.blocks.3.norm1.weight`."""
    if block := re.search(r"\bencoder\.blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if re.search(r"\bencoder_input\.cls_token$|\bencoder\.norm\.", name) else depth + 1


def lr_scale(layer: int, depth: int, layer_decay: float) -> float:
    """Return the factor by which the learning rate of a layer is multiplied."""
    return layer_decay ** (depth + 1 - layer)


def layer_decay_groups(model: nn.Module, depth: int, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return the parameter groups of AdamW for a Classifier: for each layer, one group with weight decay (weight
    matrices) and one without. Each group has the layer's `lr_scale`, see `engine.optimizer.set_lr`. `layer_decay`:
    factor between the learning rates of a layer and of the layer above."""
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
