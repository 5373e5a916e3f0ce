"""Import of M3AE and MAE checkpoints from the official JAX code (young-geng/m3ae_public). They are pickles that contain
the step, the flags and the state."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import ModelConfig, parse
from m3ae_fast.config.settings import SIZES
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import ENCODER, Pretrained
from m3ae_fast.weights.from_mae_or_timm import IMAGENET
from m3ae_fast.weights.inert_pickle import Inert, load_inert

# name in this package -> flax path
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
# numbers of heads by value of the official --m3ae.model_type; the decoders of the published sizes have 16 heads
_HEADS = {size: heads for size, (_, _, heads) in SIZES.items()} | {"debug": 16}
_NORMALISATION = {
    "cc12m": ((0.5762, 0.5503, 0.5213), (0.3207, 0.3169, 0.3307)),
    "imagenet": IMAGENET,
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def flax_name(name: str, head_depth: int) -> str:
    """Return the flax path of the parameter `name`, such as `encoder/LayerNorm_0/scale` for `encoder.norm.weight`.
    `head_depth`: model.output_head_depth. Raises KeyError if the official model has no such parameter."""
    for pattern, template in _NAMES.items():
        if match := re.fullmatch(pattern, name):
            path = match.expand(template).replace("Dense_last", f"Dense_{head_depth}")
            return re.sub("weight$", "scale" if "LayerNorm" in path else "kernel", path)
    raise KeyError(name)


def from_flax(path: str, array: np.ndarray) -> Tensor:
    """Return the parameter at the flax path in the layout of this package: [out, in] for matmuls, [1, D] for single
    tokens. The dtype is unchanged, and the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.T if path.endswith("kernel") else tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 2 else tensor


def read_jax_checkpoint(path: Path) -> Pretrained:
    """Convert a checkpoint of pre-training or fine-tuning; the head of fine-tuning is left out. Raises UserError if the
    file is not such a checkpoint, is damaged, or cannot be represented as an M3AE."""
    saved = load_inert(path)
    variant, params = _parts(saved, path)
    config = _config(variant, params, path)
    with torch.device("meta"):
        paths = {name: flax_name(name, config.output_head_depth) for name, _ in M3AE(config).named_parameters()}
    if not any(own.startswith("decoder/") for own in params):
        paths = {name: own for name, own in paths.items() if name.startswith(ENCODER)}
        params = {own: array for own, array in params.items() if own in paths.values()}
    for missing in (own for own in paths.values() if own not in params):
        raise UserError(f"{path}: is not an official M3AE checkpoint: it lacks the parameter {missing}")
    for unknown in params.keys() - set(paths.values()):
        raise UserError(f"{path}: has a parameter {unknown}, which an M3AE cannot represent")
    state = {name: from_flax(own, params[own]) for name, own in paths.items()}
    kind = "MAE" if config.vocab_size == 0 else "M3AE"
    steps = f", {saved['step'] + 1:,} steps" if isinstance(saved.get("step"), int) else ""
    note = f"the captions were tokenised with {_flag(variant, 'tokenizer', 'bert-base-uncased')}"
    notes = (note,) if config.vocab_size else ()
    return Pretrained(config, state, kind=f"official {kind} checkpoint{steps}", notes=notes)


def _parts(saved: Any, path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the flags and the parameters by flax path."""
    if not isinstance(saved, dict) or not {"state", "variant"} <= saved.keys():
        raise UserError(f"{path}: is not an official M3AE checkpoint: it is a pickle without 'state' and 'variant'")
    state, variant = saved["state"], _plain(saved["variant"])
    fields = _plain(getattr(state, "state", state))
    if not isinstance(fields, dict) or not isinstance(variant, dict):
        called = f"a call of {state.path}, which was not run" if isinstance(state, Inert) else type(state).__name__
        raise UserError(f"{path}: is not an official M3AE checkpoint: its state is {called}")
    params = _plain(fields.get("params"))
    params = _plain(params.get("params")) if isinstance(params, dict) else None
    if not isinstance(params, dict):
        raise UserError(f"{path}: is not an official M3AE checkpoint: its state has no params")
    flat = dict(_flatten(_plain(params.get("base_model", params)), ""))
    for name, array in flat.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim == 0:
            kind = array.path if isinstance(array, Inert) else type(array).__name__
            if isinstance(array, np.ndarray):
                kind = f"an array of {array.dtype} with shape {array.shape}"
            raise UserError(f"{path}: the parameter {name} must be an array of floats, but is {kind}")
        flat[name] = np.array(array, np.float32)
    if "image_embedding/kernel" not in flat or "cls_token" not in flat:
        raise UserError(f"{path}: contains no M3AE encoder, but the parameters {', '.join(sorted(flat)[:4]) or 'none'}")
    return variant, flat


def _plain(value: Any) -> Any:
    """Return the dictionary that flax's FrozenDict wraps; other values are unchanged."""
    if isinstance(value, Inert) and value.path.endswith("FrozenDict") and value.args:
        return value.args[0]
    return value


def _flatten(tree: Any, prefix: str) -> Any:
    tree = _plain(tree)
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flatten(value, f"{prefix}/{key}" if prefix else str(key))


def _flag(variant: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a flag of the training dataset."""
    section = "data"
    if "dataset" in variant:  # MAE's script has one section per dataset
        section = f"{variant['dataset']}_data"
    return variant.get(f"{section}.{name}", default)


def _config(variant: dict[str, Any], params: dict[str, np.ndarray], path: Path) -> ModelConfig:
    """Infer the model config: the sizes from the shapes of the arrays, and the other settings from the flags."""
    for prefix in ("m3ae", "mae"):
        flags = {key.removeprefix(f"{prefix}."): v for key, v in variant.items() if key.startswith(f"{prefix}.")}
        if "num_heads" in flags:
            break
    else:
        raise UserError(f"{path}: its flags lack the number of heads; check that it is an official M3AE checkpoint")
    if variant.get("discretized_image"):
        raise UserError(f"{path}: was trained on the ids of an image tokenizer (discretized_image), not on pixels")
    emb_dim = params["cls_token"].shape[-1]
    patch = math.isqrt(params["image_embedding/kernel"].shape[0] // 3)
    mask, words = params.get("image_mask_embedding"), params.get("text_embedding/embedding")
    hidden = params.get("encoder/Block_0/TransformerMLP_0/fc1/bias")
    model_type = flags.get("model_type")
    if model_type is not None and model_type not in _HEADS:
        raise UserError(f"{path}: the official code has no model_type {model_type!r}")
    data = {
        "size": None,
        "emb_dim": emb_dim,
        "depth": _depth(params, "encoder"),
        "num_heads": flags["num_heads"] if model_type is None else _HEADS[model_type],
        "dec_emb_dim": flags.get("dec_emb_dim", 512) if mask is None else mask.shape[-1],
        "dec_depth": _depth(params, "decoder") or 8,
        "dec_num_heads": flags.get("dec_num_heads", 16) if model_type is None else 16,
        "mlp_ratio": 4 if hidden is None else len(hidden) / emb_dim,
        "output_head_depth": max(sum("decoder_image_output/Dense_" in name for name in params) // 2 - 1, 0),
        "use_type_embedding": "encoder_image_type_embedding" in params,
        "image_size": _flag(variant, "image_size", 256),
        "patch_size": patch,
        "text_length": _flag(variant, "tokenizer_max_length", 64),
        "vocab_size": 0 if words is None else len(words),
    }
    data["image_mean"], data["image_std"] = _normalisation(variant, path)
    return parse(ModelConfig, data, str(path))


def _depth(params: dict[str, np.ndarray], part: str) -> int:
    return sum(name.startswith(f"{part}/Block_") and name.endswith("LayerNorm_0/bias") for name in params)


def _normalisation(variant: dict[str, Any], path: Path) -> tuple[Any, Any]:
    kind = _flag(variant, "image_normalization", "cc12m")
    if kind in _NORMALISATION:
        return _NORMALISATION[kind]
    try:
        texts = [_flag(variant, f"custom_image_{name}", "") for name in ("mean", "std")]
        mean, std = ([float(number) for number in text.split("-")] for text in texts)
        return mean, std
    except (AttributeError, ValueError):
        raise UserError(f"{path}: its image normalisation {kind!r} cannot be read") from None
