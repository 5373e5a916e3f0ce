"""The recipes of `pretrain`: the method of the official M3AE, and a faster method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from m3ae_fast.base.errors import UserError
from m3ae_fast.pretraining.automatic_settings import assumed_config

Recipe = Literal["fast", "official"]
NAMES: tuple[Recipe, ...] = get_args(Recipe)
DEFAULT: Recipe = "fast"
# A third of the masked tokens is predicted, and the optimiser is Muon; see docs/guide/faster.md.
FAST_SETTINGS = (
    "model.dec_attention=cross",
    "masking.image_predicted=0.33",
    "masking.text_predicted=0.33",
    "optim.name=muon",
)


class ChosenRecipe(NamedTuple):
    """The recipe of a run."""

    overrides: list[str]  # overrides of the settings that belong to the recipe
    line: str  # description for the user; "" for a run that starts from given weights


def check_recipe(recipe: str | None, overrides: Sequence[str], start_from: str | None) -> None:
    """Raise UserError if the recipe that the user asks for does not exist, or cannot be used with these overrides or
    with given weights. None stands for no choice of the user."""
    if recipe is None:
        return
    if recipe not in NAMES:
        raise UserError(f"--recipe {recipe}: does not exist; choose one of {', '.join(NAMES)}")
    if start_from is not None:
        raise UserError(
            f"--recipe {recipe}: cannot be combined with --from, because the weights determine the decoder; leave out "
            "--recipe"
        )
    if recipe == "fast" and (reason := _obstacle(overrides)):
        raise UserError(f"--recipe fast: {reason}; leave out this setting or --recipe fast")


def choose_recipe(recipe: str | None, overrides: Sequence[str]) -> ChosenRecipe:
    """Return the recipe for a run that starts from random weights.

    Args:
        recipe: the name of the recipe; None: the default recipe, or the official one if the default recipe cannot be
            combined with the overrides.
        overrides: the user's overrides "section.key=value".
    """
    wanted = recipe or DEFAULT
    reason = _obstacle(overrides) if wanted == "fast" else ""
    if wanted == "official" or reason:
        why = f", because the fast recipe cannot be used: {reason}" if reason else ""
        but = " except for the settings given with --set" if _given_setting(overrides) else ""
        return ChosenRecipe([], f"recipe: official, the decoder and the optimiser of the official M3AE{but}{why}")
    line = (
        "recipe: fast (cross-attention decoder, a third of the masked tokens predicted, Muon); use --recipe official "
        "for the method of the official M3AE"
    )
    return ChosenRecipe([*FAST_SETTINGS], line)


def _obstacle(overrides: Sequence[str]) -> str:
    """Return the reason why the fast recipe cannot be used with these overrides, which are valid by themselves; "" if
    it can."""
    if given := _given_setting(overrides):
        return given
    try:
        assumed_config([*FAST_SETTINGS, *overrides])
    except UserError as error:
        return str(error).removeprefix("--set: ")
    return ""


def _given_setting(overrides: Sequence[str]) -> str:
    """Return a description of the first override that sets a setting of the fast recipe, or replaces its section; "" if
    there is none."""
    fixed = [override.partition("=")[0] for override in FAST_SETTINGS]
    for override in overrides:
        name = override.partition("=")[0]
        if name in fixed:
            return f"--set {override} sets one of its settings"
        if setting := next((setting for setting in fixed if setting.startswith(f"{name}.")), ""):
            return f"--set {override} replaces the section of its setting {setting}"
    return ""
