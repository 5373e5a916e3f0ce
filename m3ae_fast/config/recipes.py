"""The recipes of `train` and `pretrain`: named groups of settings that make up a method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from m3ae_fast.base.errors import UserError

Recipe = Literal["official", "fast", "hog", "mae"]
NAMES: tuple[Recipe, ...] = get_args(Recipe)
HELP = (
    "official: the official M3AE; fast: a cheaper decoder, a third of the masked tokens predicted, and Muon; hog: "
    "fast, with image gradients instead of pixels as targets; mae: the official MAE, without captions"
)
_OFFICIAL: dict[str, Any] = {
    "model.dec_attention": "self",
    "masking.image_predicted": 1.0,
    "masking.text_predicted": 1.0,
    "optim.name": "adamw",
}
_FAST: dict[str, Any] = {
    "model.dec_attention": "cross",
    "masking.image_predicted": 0.33,
    "masking.text_predicted": 0.33,
    "optim.name": "muon",
}
# The settings of each recipe that define the method. Their measurements are in docs/guide/faster.md.
METHODS: dict[Recipe, dict[str, Any]] = {
    "official": _OFFICIAL,
    "fast": _FAST,
    "hog": _FAST | {"model.image_targets": "hog", "loss.norm_pix": False},
    "mae": _OFFICIAL | {"model.vocab_size": 0, "loss.norm_pix": True},
}
# Further settings, which a recipe has only in `train`, because `pretrain` has its own rules for them. The settings of
# `mae` are those with which the official MAE was trained on ImageNet.
_FURTHER: dict[Recipe, dict[str, Any]] = {
    "official": {},
    "fast": {"optim.clip_grad": 1.0},
    "hog": {"optim.clip_grad": 1.0},
    "mae": {
        "model.image_mean": [0.485, 0.456, 0.406],
        "model.image_std": [0.229, 0.224, 0.225],
        "optim.warmup_epochs": 40,
    },
}
_LENGTH = {"train.steps": None, "train.epochs": 800}


def check_name(recipe: str) -> Recipe:
    """Return the name of a recipe. Raises UserError if there is no such recipe."""
    for name in NAMES:
        if name == recipe:
            return name
    raise UserError(f"recipe {recipe}: does not exist; choose one of {', '.join(NAMES)}")


def with_recipe(recipe: str | None, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a config for `train`: the settings of a recipe (None: no settings), followed by the
    user's overrides, which therefore take precedence. Raises UserError if there is no such recipe."""
    if recipe is None:
        return [*overrides]
    name = check_name(recipe)
    settings = METHODS[name] | _FURTHER[name]
    if name == "mae" and not {override.partition("=")[0] for override in overrides} & {*_LENGTH, "train"}:
        settings |= _LENGTH
    return [*as_overrides(settings), *overrides]


def as_overrides(settings: dict[str, Any]) -> list[str]:
    """Return settings by "section.key" as overrides "section.key=value"."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]
