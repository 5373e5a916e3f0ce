"""`pretrain` uses the fast recipe unless the user's settings or weights prevent it, and says which recipe it uses."""

import re
from types import SimpleNamespace

import pytest

from m3ae_fast import pretrain
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.pretrain import main
from m3ae_fast.config import load_config
from m3ae_fast.pretraining import stages
from m3ae_fast.pretraining.recipes import DEFAULT, FAST_SETTINGS, NAMES, check_recipe, choose_recipe
from tests.helpers.shards import members, write_tar
from tests.helpers.trainer import SHORT


def test_the_recipes_have_a_default():
    assert DEFAULT in NAMES


def test_the_official_recipe_changes_no_setting():
    assert choose_recipe("official", []).overrides == []


def test_the_fast_configs_use_the_settings_of_the_fast_recipe():
    """The configs also set a schedule, which is not part of the recipe."""
    settings = [override.partition("=")[::2] for override in FAST_SETTINGS]
    for size in ("small", "base", "large"):
        dumped = load_config(f"fast-{size}").model_dump(mode="json")
        for name, value in settings:
            section, key = name.split(".")
            assert str(dumped[section][key]) == value


def test_the_fast_recipe_is_used_if_nothing_prevents_it():
    for recipe in ("fast", None):
        found = choose_recipe(recipe, ["train.steps=9", "optim.schedule=wsd"])
        assert found.overrides == [*FAST_SETTINGS] and found.line.startswith("recipe: fast")


@pytest.mark.parametrize(("override", "reason"), [
    ("optim.name=adamw", "--set optim.name=adamw sets one of its settings"),
    ("masking.image_predicted=0.5", "--set masking.image_predicted=0.5 sets one of its settings"),
    ('optim={"weight_decay": 0.1}', "--set optim={.weight_decay.: 0.1} replaces the section of its setting optim.name"),
    ('masking={"image_ratio": 0.6}', "--set masking=.* replaces the section of its setting masking.image_predicted"),
    ("loss.image_all_tokens=true", "model.dec_attention cross predicts only masked tokens"),
    ('deepspeed={"zero_optimization": {"stage": 3}}', "optim.name muon needs whole matrices"),
])  # fmt: skip
def test_the_official_recipe_is_used_if_a_setting_prevents_the_fast_one(override, reason):
    found = choose_recipe(None, [override])
    assert not found.overrides and found.line.startswith("recipe: official") and re.search(reason, found.line)
    with pytest.raises(UserError, match=f"--recipe fast: {reason}.*; leave out this setting or --recipe fast$"):
        check_recipe("fast", [override], None)
    check_recipe("official", [override], None)


@pytest.mark.parametrize("recipe", ["official", None])
def test_the_line_of_the_official_recipe_does_not_deny_what_the_user_sets(recipe):
    """With --set optim.name=muon, the optimiser is not that of the official M3AE."""
    exception = "the official M3AE except for the settings given with --set"
    assert exception in choose_recipe(recipe, ["train.steps=9", "optim.name=muon"]).line
    assert exception not in choose_recipe(recipe, ["loss.image_all_tokens=true"]).line


def test_a_recipe_is_not_combined_with_given_weights(tmp_path):
    check_recipe(None, [], "runs/a")
    for recipe in NAMES:
        for refuse in (
            lambda recipe=recipe: check_recipe(recipe, [], "runs/a"),
            lambda recipe=recipe: pretrain(tmp_path, tmp_path / "run", start_from="runs/a", recipe=recipe),
        ):
            with pytest.raises(UserError, match=f"--recipe {recipe}: cannot be combined with --from"):
                refuse()


def test_an_unknown_recipe_is_refused_before_any_output_is_written(tmp_path):
    with pytest.raises(UserError, match="--recipe slow: does not exist; choose one of fast, official"):
        pretrain(tmp_path, tmp_path / "run", recipe="slow")
    with pytest.raises(UserError, match=r"--recipe: .*slow.*fast.*official"):
        main([str(tmp_path), "--out", str(tmp_path / "run"), "--recipe", "slow"])
    assert not (tmp_path / "run").exists()


def test_the_command_passes_on_the_recipe(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(
        stages, "pretrain", lambda *_, recipe, **__: given.append(recipe) or SimpleNamespace(finished=1)
    )
    for recipe in NAMES:
        assert main([str(tmp_path), "--out", str(tmp_path / "run"), "--recipe", recipe]) == 0
    assert given == [*NAMES]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*NAMES, None])
def test_a_run_uses_the_recipe_and_keeps_it_when_it_is_resumed(tmp_path, recipe, capsys):
    shards = write_tar(tmp_path / "a.tar", members(range(40), "paired"))
    overrides = SHORT
    out = tmp_path / "run"
    assert pretrain(shards, out, recipe=recipe, overrides=overrides).finished
    used = recipe or DEFAULT
    assert f"recipe: {used}" in capsys.readouterr().out
    config = load_config(out / "config.json", [])
    expected = ("cross", 0.33, 0.33, "muon") if used == "fast" else ("self", 1.0, 1.0, "adamw")
    masking = config.masking
    found = (config.model.dec_attention, masking.image_predicted, masking.text_predicted, config.optim.name)
    assert found == expected
    other = "official" if used == "fast" else "fast"
    assert pretrain(shards, out, recipe=other, overrides=overrides).finished
    assert "--hours, --recipe, --from and --labels have no effect" in capsys.readouterr().out
    assert load_config(out / "config.json", []) == config
