"""`train` and `pretrain` have the same recipes. `pretrain` uses the hog recipe unless the user's settings or weights
prevent it, and says which recipe it uses."""

import re
from types import SimpleNamespace

import pytest

from m3ae_fast import pretrain, train
from m3ae_fast.base.errors import UserError
from m3ae_fast.checkpoint import read_info, saved_steps
from m3ae_fast.cli.pretrain import main
from m3ae_fast.config import load_config, shipped_configs
from m3ae_fast.config.recipes import METHODS, NAMES, as_overrides, with_recipe
from m3ae_fast.pretraining import stages
from m3ae_fast.pretraining.recipe_choice import PREFERRED, check_recipe, choose_recipe
from tests.helpers.shards import members, write_tar
from tests.helpers.trainer import ROOT, SHORT

SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "huge": (1280, 32), "quickstart": (192, 6)}
# settings that a recipe changes only for `train`, because `pretrain` chooses them by its own rules
OF_TRAIN = {
    "official": {},
    "fast": {"optim.clip_grad": 1.0},
    "hog": {"optim.clip_grad": 1.0},
    "mae": {
        "model.image_mean": [0.485, 0.456, 0.406], "model.image_std": [0.229, 0.224, 0.225],
        "optim.warmup_epochs": 40, "train.epochs": 800, "train.steps": None,
    },
}  # fmt: skip


def test_every_shipped_config_has_its_documented_size():
    assert {*SIZES} == {*shipped_configs()}
    for name, size in SIZES.items():
        model = load_config(name).model
        assert (model.emb_dim, model.depth) == size, name


def of(config, *overrides, recipe):
    """Return a config with the settings of a recipe as one flat dict, without the samples."""
    dumped = load_config(config, with_recipe(recipe, overrides)).model_dump(mode="json")
    flat = {f"{section}.{key}": value for section, keys in dumped.items() for key, value in (keys or {}).items()}
    return {name: value for name, value in flat.items() if name not in ("data.train", "data.val")}


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_changes_only_its_own_settings_of_a_config(config, recipe):
    """The official recipe changes no shipped config, because all of them use the method of the official M3AE."""
    before, after = of(config, recipe=None), of(config, recipe=recipe)
    changed = {name: value for name, value in after.items() if value != before[name]}
    wanted = METHODS[recipe] | OF_TRAIN[recipe]
    assert changed == {name: value for name, value in wanted.items() if value != before[name]}
    assert (changed == {}) == (recipe == "official")


@pytest.mark.parametrize("recipe", NAMES)
def test_overrides_take_precedence_over_the_recipe_of_train(recipe):
    found = of("quickstart", "train.steps=3", "optim.name=muon", "masking.image_predicted=0.5", recipe=recipe)
    assert (found["train.steps"], found["train.epochs"]) == (3, None)
    assert (found["optim.name"], found["masking.image_predicted"]) == ("muon", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", NAMES)
def test_train_takes_steps_with_every_recipe_and_refuses_another_one_when_it_resumes(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(ROOT)  # for the shards of the config
    small = ["data.workers=0", "train.global_batch=8", "train.steps=1", "train.eval_samples=8"]
    small += ["deepspeed=null", "optim.warmup_epochs=0"]
    run = {"out": tmp_path / "run", "device": "cpu"}
    train("quickstart", recipe=recipe, overrides=small, **run)
    info = read_info(saved_steps(tmp_path / "run")[-1])
    assert info.step == 1 and info.config["optim"]["name"] == METHODS[recipe]["optim.name"]
    other = "fast" if recipe != "fast" else "official"
    with pytest.raises(UserError, match="was made with "):
        train("quickstart", recipe=other, overrides=[*small, "train.steps=2"], resume="auto", **run)


def test_the_hog_recipe_is_used_if_nothing_prevents_it():
    for recipe in ("hog", None):
        found = choose_recipe(recipe, ["train.steps=9", "optim.schedule=wsd"])
        assert found.overrides == as_overrides(METHODS["hog"]) and found.line.startswith("recipe: hog")


@pytest.mark.parametrize(("override", "reason"), [
    ("model.image_targets=pixels", "model.image_targets=pixels sets one of its settings"),
    ("loss.norm_pix=true", "loss.norm_pix=true sets one of its settings"),
    ("model.resize=native", "image_targets hog needs resize square"),
])  # fmt: skip
def test_the_fast_recipe_is_used_if_a_setting_prevents_only_the_targets(override, reason):
    found = choose_recipe(None, [override])
    assert found.overrides == as_overrides(METHODS["fast"])
    assert re.match(f"recipe: fast .*, because the hog recipe cannot be used: .*{reason}", found.line)


@pytest.mark.parametrize(("override", "reason"), [
    ("optim.name=adamw", "optim.name=adamw sets one of its settings"),
    ("masking.image_predicted=0.5", "masking.image_predicted=0.5 sets one of its settings"),
    ('optim={"weight_decay": 0.1}', "optim={.weight_decay.: 0.1} replaces the section of its setting optim.name"),
    ('masking={"image_ratio": 0.6}', "masking=.* replaces the section of its setting masking.image_predicted"),
    ("loss.image_all_tokens=true", "model.dec_attention cross predicts only masked tokens"),
    ('deepspeed={"zero_optimization": {"stage": 3}}', "optim.name muon needs whole matrices"),
])  # fmt: skip
def test_the_official_recipe_is_used_if_a_setting_prevents_the_others(override, reason):
    found = choose_recipe(None, [override])
    assert found.overrides == as_overrides(METHODS["official"])
    assert found.line.startswith("recipe: official") and re.search(
        f"the fast recipe cannot be used: {reason}", found.line
    )
    check_recipe("official", [override], None)
    if reason.startswith(
        ("optim.name=", "masking", "optim=")
    ):  # the override takes precedence over the recipe that the user asks for
        check_recipe("fast", [override], None)
        assert choose_recipe("fast", [override]).line.endswith("except for the settings given with --set")
    else:
        with pytest.raises(UserError, match=f"recipe fast: {reason}.*; leave out this setting or the recipe$"):
            check_recipe("fast", [override], None)


@pytest.mark.parametrize("recipe", ["official", None])
def test_the_line_about_the_official_recipe_mentions_settings_of_the_user_that_depart_from_it(recipe):
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
            with pytest.raises(UserError, match=f"recipe {recipe}: cannot be combined with given weights"):
                refuse()


def test_an_unknown_recipe_is_refused_before_any_output_is_written(tmp_path):
    with pytest.raises(
        UserError,
        match=r"^recipe slow: must be official, fast, hog or mae",
    ):
        pretrain(tmp_path, tmp_path / "run", recipe="slow")
    with pytest.raises(UserError, match=r"--recipe: .*slow.*official.*fast.*hog.*mae"):
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
    used = recipe or PREFERRED[0]
    assert f"recipe: {used}" in capsys.readouterr().out
    config = load_config(out / "config.json", [])
    assert (config.model.vocab_size == 0) == (used == "mae")
    expected = ("cross", 0.33, 0.33, "muon") if used in ("fast", "hog") else ("self", 1.0, 1.0, "adamw")
    assert config.model.image_targets == ("hog" if used == "hog" else "pixels")
    masking = config.masking
    found = (config.model.dec_attention, masking.image_predicted, masking.text_predicted, config.optim.name)
    assert found == expected
    other = "official" if used == "fast" else "fast"
    assert pretrain(shards, out, recipe=other, overrides=overrides).finished
    assert "--hours, --recipe, --from and --labels have no effect" in capsys.readouterr().out
    assert load_config(out / "config.json", []) == config
