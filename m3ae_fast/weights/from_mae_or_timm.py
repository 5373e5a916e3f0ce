"""Import of ViTs with the parameter names of facebookresearch/mae. For the encoder, these are also timm's names.

Shapes: D encoder width, E decoder width, L patches, C channels, P patch size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import check_dtypes
from m3ae_fast.base.wording import counted
from m3ae_fast.config import ModelConfig, parse
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import ENCODER

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std
# name in this package -> name in MAE; `_ours` handles the positions, the cls and mask tokens, and the weight of the
# patch embedding separately
_NAMES = {
    r"patch_embed\.bias": r"patch_embed.proj.bias",
    r"encoder\.(blocks\..+|norm\..+)": r"\1",
    r"decoder_input\.proj\.(.+)": r"decoder_embed.\1",
    r"decoder\.blocks\.(.+)": r"decoder_blocks.\1",
    r"decoder\.norm\.(.+)": r"decoder_norm.\1",
    r"image_head\.(.+)": r"decoder_pred.\1",
}
# weights that are not part of the encoder: classifiers, and weights that fine-tuning adds
_LEFT_OUT = re.compile(r"(head|head_drop|fc)(\.|$).*")
# numbers of attention heads of the published sizes, by width; files do not contain the number of heads
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {512: 16}


@dataclass(frozen=True)
class ViTOptions:
    """Properties of a ViT that cannot be inferred from its weights."""

    num_heads: int | None = None  # None: the number of heads of the published size with the same width
    dec_num_heads: int | None = None
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    gelu: str = "exact"


def from_vit(
    weights: dict[str, Tensor], options: ViTOptions, where: str
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Return the config and weights of an MAE, or of its encoder if the file has no decoder, and notes about them. The
    weights are float32, by the parameter names of this package.

    Args:
        weights: tensors of any floating-point dtype, by MAE's or timm's parameter names.
        options: properties that cannot be inferred from the weights.
        where: beginning of error messages.

    Raises:
        UserError: a weight is missing or cannot be represented in an M3AE; also as in `config_of`.
    """
    theirs = {name: tensor for name, tensor in weights.items() if not _LEFT_OUT.fullmatch(name)}
    notes = []
    norms_the_mean = "norm.weight" not in theirs and "fc_norm.weight" in theirs
    if norms_the_mean:
        theirs = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in theirs.items()}
        notes.append("the last norm (fc_norm) is applied to the mean of the patches, so model.mean_pool is before_norm")
    for name, axes in {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}.items():
        if name not in theirs or theirs[name].ndim != axes:
            raise UserError(f"{where}: is neither an MAE nor a timm ViT: it lacks the weight {name} with {axes} axes")
    check_dtypes(theirs, where)
    config = config_of(theirs, options, "before_norm" if norms_the_mean else "after_norm", where)
    with torch.device("meta"):
        own = M3AE(config).state_dict()
    if "decoder_embed.weight" not in theirs:
        own = {name: tensor for name, tensor in own.items() if name.startswith(ENCODER)}
    taken: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in theirs:
            raise UserError(f"{where}: lacks the weight {name}, which an M3AE requires")
        taken.add(name)
        return theirs[name].to(torch.float32)

    state = {name: _ours(name, take, where) for name in own}
    for name in sorted(theirs.keys() - taken):
        raise UserError(f"{where}: has a weight {name}, which an M3AE cannot represent")
    return config, state, notes


def _ours(name: str, take: Callable[[str], Tensor], where: str) -> Tensor:
    if name == "patch_embed.weight":
        return take("patch_embed.proj.weight").permute(0, 2, 3, 1).flatten(1)  # [D, C, P, P] -> [D, P * P * C]
    if name == "encoder_input.cls_token":
        return take("cls_token")[0] + take("pos_embed")[0, :1]
    if name == "encoder_input.positions.image":
        return take("pos_embed")[0, 1:]
    if name == "decoder_input.unshuffle.image_mask":
        return take("mask_token")[0]
    if name == "decoder_input.unshuffle.positions.image":
        positions_LE = take("decoder_pos_embed")[0]
        if positions_LE[0].any():
            raise UserError(f"{where}: decoder_pos_embed is not 0 for the cls token, which an M3AE cannot represent")
        return positions_LE[1:]
    for pattern, template in _NAMES.items():
        if match := re.fullmatch(pattern, name):
            return take(match.expand(template))
    raise KeyError(name)


def config_of(theirs: dict[str, Tensor], options: ViTOptions, mean_pool: str, where: str) -> ModelConfig:
    """Return the config that follows from the options and from the shapes of the weights `theirs` (as in `from_vit`).
    If there are no weights of a decoder, it has MAE's decoder: width 512, depth 8. `mean_pool`: model.mean_pool;
    `where`: beginning of error messages. Raises UserError if the patches or the image are not square, if the number of
    attention heads, a mean or a standard deviation is unknown, or if a value is invalid."""
    width, channels, patch, columns = theirs["patch_embed.proj.weight"].shape
    patches = theirs["pos_embed"].shape[1] - 1
    side = math.isqrt(max(patches, 0))
    if patch != columns or side * side != patches:
        raise UserError(
            f"{where}: its patches are not square, or their number, {patches}, is not that of a square image"
        )
    if not len(options.mean) == len(options.std) == channels:
        raise UserError(
            f"{where}: has {counted(channels, 'channel')}, but {len(options.mean)} means and "
            f"{len(options.std)} standard deviations are known; use a folder that timm has saved, whose config.json "
            "contains one of each for every channel"
        )
    dec_width = theirs["decoder_embed.weight"].shape[0] if "decoder_embed.weight" in theirs else 512
    data = {
        "size": None,
        "emb_dim": width,
        "depth": _depth(theirs, "blocks"),
        "num_heads": _heads(options.num_heads, HEADS, width, "--num-heads", where),
        "dec_emb_dim": dec_width,
        "dec_depth": _depth(theirs, "decoder_blocks") or 8,
        "dec_num_heads": _heads(options.dec_num_heads, _DECODER_HEADS, dec_width, "--num-heads ENCODER DECODER", where),
        "mlp_ratio": theirs["blocks.0.mlp.fc1.weight"].shape[0] / width if "blocks.0.mlp.fc1.weight" in theirs else 4,
        "use_type_embedding": False,
        "image_size": side * patch,
        "patch_size": patch,
        "channels": channels,
        "image_mean": options.mean,
        "image_std": options.std,
        "vocab_size": 0,
        "gelu": options.gelu,
        "positions": "stored",
        "mean_pool": mean_pool,
    }
    return parse(ModelConfig, data, where)


def _depth(theirs: dict[str, Tensor], part: str) -> int:
    return sum(re.fullmatch(rf"{part}\.\d+\.norm1\.weight", name) is not None for name in theirs)


def _heads(given: int | None, known: dict[int, int], width: int, flag: str, where: str) -> int:
    if given is None and width not in known:
        raise UserError(
            f"{where}: the number of attention heads for width {width} is unknown; specify it with m3ae-fast convert "
            f"{flag}"
        )
    return known[width] if given is None else given
