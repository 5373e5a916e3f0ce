"""Export and import of timm's VisionTransformer as a folder for `timm.create_model("local-dir:FOLDER",
pretrained=True)`.

Shapes: D width, L patches, C channels, P patch size.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    output_folder,
    read_folder_config,
    read_tensors,
    write_tensors,
)
from m3ae_fast.config import POOLINGS, ModelConfig
from m3ae_fast.images.decoding import PIL_MODES
from m3ae_fast.model.positions import sincos_2d
from m3ae_fast.model.pretrained import Pretrained
from m3ae_fast.weights.from_mae_or_timm import ViTOptions, from_vit

_ACT_LAYERS = {"tanh": "gelu_tanh", "exact": "gelu"}
_CARD = """---
library_name: timm
license: other
tags: [image-feature-extraction, masked-autoencoder]
---

# {name}

The image encoder of an M3AE as timm's VisionTransformer: image positions and the type embedding are in pos_embed.

```python
import timm
{imports}
model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # on the Hub: hf-hub:OWNER/{name}
{code}```
{explanation}
`model.forward_features` returns all tokens, [B, 1 + {patches}, {emb_dim}], with the cls token first. The input is the
central square of an image, scaled so that black is 0 and white is 1 (8-bit levels / 255), minus {mean}, divided by
{std}. Without config.json, use `timm.models.VisionTransformer({arguments})`, with LayerNorms whose eps is 1e-6.
"""

_IMPORTS = "from PIL import Image, ImageOps\n"
_CODE = """prepare = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
image = ImageOps.exif_transpose(image)  # a PIL image
{opaque}image = image.convert("{mode}")
side = min(image.size)
left, top = (image.width - side) // 2, (image.height - side) // 2
square = image.crop((left, top, left + side, top + side))
features = model(prepare(square)[None])  # [1, {emb_dim}], equal to M3AE.encode(image, pool="{pool}")
"""
_OPAQUE = """if image.has_transparency_data:  # white where it is transparent
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
"""
_EXPLANATION = """
The image is prepared as in pre-training: its orientation is applied, and transparent pixels become white unless the
model has a channel for them. The central square is cropped first: timm's own transform resizes an image before it crops
it, which gives different pixels, and therefore different features, if the image is not square.
"""
_CODE_OF_BANDS = """# pixels: float32 [{channels}, {image_size}, {image_size}], prepared as described below
features = model(pixels[None])  # [1, {emb_dim}], equal to M3AE.encode(image, pool="{pool}")
"""


def write_timm(folder: str | Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Write the encoder as config.json, model.safetensors and README.md, atomically. `state`: the model's weights by
    parameter name. Raises UserError if the folder contains other files or cannot be written."""
    arguments = model_arguments(config)
    about = {
        # any architecture of this class, because model_args contains all settings
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": config.emb_dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.channels, config.image_size, config.image_size],
            "fixed_input_size": True,
            "mean": config.image_mean,
            "std": config.image_std,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "custom_load": False,
        },
    }
    mode = PIL_MODES.get(config.channels)
    names = config.model_dump() | {"mode": mode, "opaque": _OPAQUE if config.channels < 4 else ""}
    card = _CARD.format(
        **names,
        imports=_IMPORTS if mode else "",
        code=(_CODE if mode else _CODE_OF_BANDS).format(**names),
        explanation=_EXPLANATION if mode else "",
        mean=config.image_mean,
        std=config.image_std,
        name=Path(folder).resolve().name,
        patches=config.patches_per_image,
        arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()),
    )
    with output_folder(folder) as path:
        write_tensors(path / MODEL_FILE, timm_weights(config, state))
        (path / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (path / CARD_FILE).write_text(card, encoding="utf-8")


def model_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments with which timm's VisionTransformer computes the same features as `M3AE.encode`, with mean
    pooling if timm does not have `config.pool`. If the last norm is applied to the mean, it is `fc_norm`."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.channels,
        "embed_dim": config.emb_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "act_layer": _ACT_LAYERS[config.gelu],
        "num_classes": 0,
        "global_pool": POOLINGS[config.pool].timm or "avg",
        "fc_norm": config.mean_pool == "before_norm",
    }


def timm_weights(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's weights with timm's names and shapes: pos_embed [1, 1 + L, D], cls_token [1, 1, D],
    patch_embed.proj.weight [D, C, P, P]. The position of cls is 0. `state`: the model's weights by parameter name."""
    side = config.image_size // config.patch_size
    positions_LD = state.get("encoder_input.positions.image", sincos_2d(config.emb_dim, side))
    if config.use_type_embedding:
        positions_LD = positions_LD + state["encoder_input.image_type"]
    patch = config.patch_size
    weights = {
        "cls_token": state["encoder_input.cls_token"][None],
        "pos_embed": torch.cat((torch.zeros_like(positions_LD[:1]), positions_LD))[None],
        "patch_embed.proj.weight": state["patch_embed.weight"]
        .unflatten(1, (patch, patch, config.channels))
        .permute(0, 3, 1, 2),
        "patch_embed.proj.bias": state["patch_embed.bias"],
    }
    parts = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    if config.mean_pool == "before_norm":
        parts = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in parts.items()}
    return weights | parts


def is_timm_folder(folder: Path) -> bool:
    """Return whether the folder's config.json is that of a timm model."""
    return "architecture" in read_folder_config(folder)


def read_timm_folder(folder: Path, heads: ViTOptions) -> Pretrained:
    """Convert a VisionTransformer saved by timm or by `write_timm`. Raises UserError if a file is missing or damaged,
    or if the model cannot be represented as an M3AE."""
    about = read_folder_config(folder)
    arguments, pretrained = about.get("model_args") or {}, about.get("pretrained_cfg") or about
    where = str(folder)
    activation = arguments.get("act_layer") or "gelu"
    gelu = {name: kind for kind, name in _ACT_LAYERS.items()}.get(activation)
    if gelu is None:
        raise UserError(f"{where}: has the activation {activation}, which an M3AE cannot represent")
    if arguments.get("norm_layer") not in (None, "layernorm"):
        raise UserError(f"{where}: has the norm {arguments['norm_layer']}, which an M3AE cannot represent")
    options = replace(heads, gelu=gelu)
    if heads.num_heads is None:
        options = replace(options, num_heads=arguments.get("num_heads"))
    if "mean" in pretrained and "std" in pretrained:
        options = replace(options, mean=tuple(pretrained["mean"]), std=tuple(pretrained["std"]))
    try:
        weights = read_tensors(folder / MODEL_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: {MODEL_FILE} cannot be read ({error})") from None
    config, state, notes = from_vit(weights, options, where)
    return Pretrained(config, state, kind=f"timm model {about['architecture']}", notes=tuple(notes))
