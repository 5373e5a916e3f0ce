"""The choice of the recipe of `pretrain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.recipes import METHODS, Recipe, as_overrides, check_name
from m3ae_fast.pretraining.automatic_settings import assumed_config

# without --recipe, `pretrain` uses the first of these recipes that can be combined with the user's settings
PREFERRED: tuple[Recipe, ...] = ("hog", "fast", "official")
_LINES: dict[Recipe, str] = {
    "fast": "recipe: fast (cross-attention decoder, a third of the masked tokens predicted, Muon)",
    "hog": "recipe: hog (cross-attention decoder, a third of the masked tokens predicted, Muon; the targets of images "
    "are histograms of oriented gradients)",
    "official": "recipe: official, the decoder and the optimiser of the official M3AE",
    "mae": "recipe: mae, the official MAE, which ignores captions",
}


class ChosenRecipe(NamedTuple):
    """The recipe of a run."""

    overrides: list[str]  # overrides of the settings that belong to the recipe
    line: str  # description for the user; "" for a run that starts from given weights


def check_recipe(recipe: str | None, overrides: Sequence[str], start_from: str | None) -> None:
    """Raise UserError if the user's recipe does not exist, or cannot be combined with the overrides or with the weights
    from which the run starts.

    Args:
        recipe: name of the recipe; None: the user has chosen none, and there is nothing to check.
        overrides: the user's overrides "section.key=value".
        start_from: name of the weights from which the run starts; None: it starts from random weights.
    """
    if recipe is None:
        return
    name = check_name(recipe)
    if start_from is not None:
        raise UserError(
            f"recipe {recipe}: cannot be combined with given weights, because they determine the decoder; leave out "
            "recipe"
        )
    if reason := _obstacle(name, overrides):
        raise UserError(f"recipe {recipe}: {reason}; leave out this setting or the recipe")


def choose_recipe(
    recipe: Recipe | None, overrides: Sequence[str], preferred: Sequence[Recipe] = PREFERRED
) -> ChosenRecipe:
    """Return the recipe for a run that starts from random weights.

    Args:
        recipe: name of the recipe; None: the first recipe of `preferred` that can be combined with the overrides, and
            of which the overrides set none of the settings.
        overrides: the user's overrides "section.key=value", which take precedence over the recipe.
        preferred: the recipes to choose from.
    """
    chosen, why = recipe, ""
    if chosen is None:
        chosen, why = preferred[0], "; use --recipe official for the method of the official M3AE"
        for other in preferred[1:]:
            if not (reason := _own_setting(chosen, overrides) or _obstacle(chosen, overrides)):
                break
            chosen, why = other, f", because the {chosen} recipe cannot be used: {reason}"
    but = " except for the settings given with --set" if _own_setting(chosen, overrides) else ""
    return ChosenRecipe(as_overrides(METHODS[chosen]), f"{_LINES[chosen]}{but}{why}")


def _obstacle(recipe: Recipe, overrides: Sequence[str]) -> str:
    """Return the reason why the recipe cannot be combined with the overrides, or "" if it can. The overrides must be
    valid without the recipe."""
    try:
        assumed_config([*as_overrides(METHODS[recipe]), *overrides])
    except UserError as error:
        return str(error).removeprefix("overrides: ")
    return ""


def _own_setting(recipe: Recipe, overrides: Sequence[str]) -> str:
    """Return a description of the first override that sets a setting of the recipe or replaces the section of such a
    setting; "" if there is none."""
    fixed = METHODS[recipe]
    for override in overrides:
        name = override.partition("=")[0]
        if name in fixed:
            return f"{override} sets one of its settings"
        if setting := next((setting for setting in fixed if setting.startswith(f"{name}.")), ""):
            return f"{override} replaces the section of its setting {setting}"
    return ""
