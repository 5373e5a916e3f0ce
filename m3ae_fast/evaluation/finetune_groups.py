"""Layer-wise learning rates for fine-tuning (arXiv 2106.08254), with the layers of the official code.

The following properties of the official script (young-geng/m3ae_public, m3ae/finetune_main.py) are reproduced:

- the assignment to layers: the cls token and the encoder's last norm are in layer 0, and block i is in layer i + 1. All
other parameters, including the head and the patch and text embeddings, are in layer depth + 1, which has the full
learning rate;
- a peak learning rate that is not multiplied by batch / 256.

Two mistakes of the script are not reproduced: it counts layers as if the model had 24 blocks, and its weight decay has
no effect. Here, weight decay is applied to the parameters that the script intends: weight matrices, but not biases,
norms, cls and embeddings.
"""

from __future__ import annotations

import re

from torch import nn

from m3ae_fast.engine.parameter_groups import lr_scale, scaled_groups


def layer_of(name: str, depth: int) -> int:
    """Return the number of the layer, from 0 to depth + 1, to which the parameter `name` belongs. For example, it is 4
    for `backbone.encoder.blocks.3.norm1.weight`."""
    if block := re.search(r"\bencoder\.blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if re.search(r"\bencoder_input\.cls_token$|\bencoder\.norm\.", name) else depth + 1


def layer_decay_groups(model: nn.Module, depth: int, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return the parameter groups of AdamW for a Classifier; see `scaled_groups`. Only weight matrices have weight
    decay. `layer_decay`: learning rate of a layer divided by that of the next higher layer."""

    def is_matrix(name: str, p: nn.Parameter) -> bool:
        return name.endswith(".weight") and p.ndim > 1

    return scaled_groups(
        model, weight_decay, is_matrix, lambda name: lr_scale(layer_of(name, depth), depth, layer_decay)
    )
