"""Our parameters by the official JAX code's names (young-geng/m3ae_public, m3ae/model.py)."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

# our name -> flax path
_NAMES = {
    r"patch_embed\.(weight|bias)": r"image_embedding/\1",
    r"encoder_input\.cls_token": r"cls_token",
    r"encoder_input\.text_embedding": r"text_embedding/embedding",
    r"encoder_input\.(image|text)_type": r"encoder_\1_type_embedding",
    r"decoder_input\.proj\.(weight|bias)": r"decoder_input_projection/\1",
    r"decoder_input\.unshuffle\.(image|text)_mask": r"\1_mask_embedding",
    r"decoder_input\.unshuffle\.(image|text)_type": r"decoder_\1_type_embedding",
    r"(encoder|decoder)\.blocks\.(\d+)\.norm1\.(weight|bias)": r"\1/Block_\2/LayerNorm_0/\3",
    r"(encoder|decoder)\.blocks\.(\d+)\.norm2\.(weight|bias)": r"\1/Block_\2/LayerNorm_1/\3",
    r"(encoder|decoder)\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"\1/Block_\2/Attention_0/Dense_0/\3",
    r"(encoder|decoder)\.blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"\1/Block_\2/Attention_0/Dense_1/\3",
    r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)": r"\1/Block_\2/TransformerMLP_0/\3/\4",
    r"(encoder|decoder)\.norm\.(weight|bias)": r"\1/LayerNorm_0/\2",
    r"(image|text)_mlp\.norms\.(\d+)\.(weight|bias)": r"decoder_\1_output/LayerNorm_\2/\3",
    r"(image|text)_mlp\.layers\.(\d+)\.(weight|bias)": r"decoder_\1_output/Dense_\2/\3",
    r"(image|text)_head\.(weight|bias)": r"decoder_\1_output/Dense_last/\2",
}


def flax_name(name: str, head_depth: int) -> str:
    """Return the flax path of our parameter `name`: `encoder.norm.weight` -> `encoder/LayerNorm_0/scale`."""
    for pattern, template in _NAMES.items():
        if match := re.fullmatch(pattern, name):
            path = match.expand(template).replace("Dense_last", f"Dense_{head_depth}")
            return re.sub("weight$", "scale" if "LayerNorm" in path else "kernel", path)
    raise KeyError(name)


def from_flax(path: str, array: np.ndarray) -> Tensor:
    """Return the parameter at `path` in our layout: [out, in] for matmuls, rows of vectors for single tokens."""
    tensor = torch.from_numpy(array)
    return tensor.T if path.endswith("kernel") else tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 2 else tensor
