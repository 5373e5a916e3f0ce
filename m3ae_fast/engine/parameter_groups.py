"""The parameter groups of the optimisers. They define the parameters that Muon updates, the weight decay, and
layer-wise learning rates (arXiv 2106.08254): the lower a layer of the encoder, the lower its learning rate.

In pre-training, the embeddings are layer 0, and block i of the encoder is layer i + 1. The encoder's final LayerNorm
and the decoder are layer depth + 1, which has the full learning rate. Fine-tuning uses the layers of the official code;
see `evaluation.finetune_groups`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from m3ae_fast.config import OptimConfig
from m3ae_fast.model.m3ae import M3AE

# the decoder's type embeddings
_IMAGE_TYPE, _TEXT_TYPE = (f"decoder_input.unshuffle.{kind}_type" for kind in ("image", "text"))


def optimizer_groups(model: M3AE, config: OptimConfig) -> list[dict]:
    """Return the parameter groups of the optimiser for pre-training: the groups of AdamW, preceded by the group of
    hidden matrices if Muon is used."""
    depth, decay = model.config.depth, config.layer_decay
    groups = parameter_groups(model, config.weight_decay, lambda name: lr_scale(layer_of(name, depth), depth, decay))
    if config.name == "adamw":
        return groups
    stacked = model.hidden_matrices()
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in stacked]
    muon = {
        "params": list(stacked),
        "matrices": list(stacked.values()),
        "momentum": config.muon_momentum,
        "weight_decay": config.weight_decay,
        "lr_scale": config.muon_lr_ratio,
    }
    return [muon, *groups]


def parameter_groups(
    model: nn.Module, weight_decay: float, scale_of: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """Return the parameter groups of AdamW (see `scaled_groups`). Weight decay applies to matmul weights and, as in the
    official code, to LayerNorm scales, but not to biases and embeddings. The only exception is the decoder's type
    embedding of an image-only model, which the official MAE decays."""
    names = {name for name, _ in model.named_parameters()}
    decayed_embeddings = set() if _TEXT_TYPE in names else {_IMAGE_TYPE}

    def is_decayed(name: str, p: nn.Parameter) -> bool:
        return name.endswith(".weight") or name in decayed_embeddings

    return scaled_groups(model, weight_decay, is_decayed, scale_of)


def layer_of(name: str, depth: int) -> int:
    """Return the number of the layer, from 0 to depth + 1, to which the parameter `name` belongs in pre-training. For
    example, it is 4 for `encoder.blocks.3.norm1.weight`."""
    if block := re.match(r"encoder\.blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if name.startswith(("patch_embed.", "encoder_input.")) else depth + 1


def lr_scale(layer: int, depth: int, layer_decay: float) -> float:
    """Return the factor by which the learning rate of a layer is multiplied."""
    return layer_decay ** (depth + 1 - layer)


def scaled_groups(
    model: nn.Module,
    weight_decay: float,
    is_decayed: Callable[[str, nn.Parameter], bool],
    scale_of: Callable[[str], float],
) -> list[dict]:
    """Return the parameter groups of AdamW: for each learning rate, highest first, one group with weight decay and one
    without. Each group contains the factor of its learning rate as `lr_scale`; see `engine.optimizer.set_lr`.

    Args:
        model: the module to train.
        weight_decay: weight decay of the parameters for which `is_decayed` is true.
        is_decayed: function of a parameter's name and value.
        scale_of: function that returns the factor of a parameter's learning rate, given the parameter's name.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        groups.setdefault((scale_of(name), is_decayed(name, p)), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for (scale, decayed), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
