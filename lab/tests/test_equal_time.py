"""`lab.equal_time` at toy size: all recipes are trained by `pretrain` and tested on the same images, and complete runs
are not repeated."""

import json

import pytest

from lab import equal_time
from lab.equal_time import FAST, MUON, OFFICIAL, RECIPES, Trial, plan
from m3ae_fast.config import load_config
from tests.helpers.labelled import labelled_tar
from tests.helpers.trainer import SHORT


def test_the_main_comparison_comes_first():
    trials = plan(2)
    assert len({*trials}) == len(trials) == 12 and all(trial.recipe != MUON for trial in trials[:8])
    assert [trial.seed for trial in trials[:8]] == [0] * 4 + [1] * 4


@pytest.mark.slow
def test_runs_are_trained_tested_and_compared_once(tmp_path, monkeypatch, capsys):
    for folder in ("fashion", "twitter", "google"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        labelled_tar(tmp_path / "data" / folder / "train-00000.tar", range(24))
        labelled_tar(tmp_path / "data" / folder / "val-00000.tar", range(24, 36))
    monkeypatch.setattr(equal_time, "RECIPES", {name: (own, (*more, *SHORT)) for name, (own, more) in RECIPES.items()})
    out = tmp_path / "out"
    arguments = [str(tmp_path / "data"), "--out", str(out), "--seeds", "1"]
    assert equal_time.main([*arguments, "--minutes", "0"]) == 0 and not (out / "runs").exists()
    with monkeypatch.context() as patch:
        patch.setattr(equal_time, "evaluate", lambda *args, **options: None)  # stopped
        assert equal_time.main(arguments) == 1 and not (out / "results").exists()
    assert equal_time.main(arguments) == 0
    found = json.loads((out / "results/emoji-fast-0.json").read_text())
    assert len(found["correct"]["knn"]) == len(found["correct"]["logistic"]) == 24 and found["steps"] == 2
    for recipe, expected in ((OFFICIAL, ("self", "adamw")), (FAST, ("cross", "muon")), (MUON, ("self", "muon"))):
        config = load_config(out / f"runs/{Trial('emoji', recipe, 0).name}/config.json", [])
        assert (config.model.dec_attention, config.optim.name) == expected
    text = (out / "table.md").read_text()
    assert text.count("\n| raw pixels |") == text.count("\n| random weights |") == text.count("\n| fast |") == 2
    monkeypatch.setattr(equal_time.Laboratory, "perform", lambda self, trial: pytest.fail(f"{trial.name} again"))
    capsys.readouterr()
    assert equal_time.main(arguments) == 0 and text.splitlines()[2] in capsys.readouterr().out


def test_the_two_images_of_an_emoji_count_as_one_sample():
    def row(recipe, right, seed=0):
        keys = [f"{vendor}/val.tar/{i}" for vendor in ("twitter", "google") for i in range(4)]
        correct = {key: int(number < right) for number, key in enumerate(keys)}
        facts = {
            "data": "emoji",
            "recipe": recipe,
            "seed": seed,
            "width": 8,
            "batch": 4 + seed,
            "steps": 2,
            "references": {},
        }
        return facts | {"correct": {"knn": correct, "logistic": correct}}

    text = equal_time.tables([row(OFFICIAL, 4), row(FAST, 8)])
    official, fast = text.splitlines()[2:]
    assert "| 50.0 ± 0.0 |" in official and fast.endswith("| 100.0 ± 0.0 | 100.0 ± 0.0 | +50.0 ± 0.0 | +50.0 ± 0.0 |")
    (*_, last) = equal_time.tables([row(OFFICIAL, 4), row(FAST, 8), row(FAST, 8, seed=1)]).splitlines()
    assert last.startswith("| fast | 2 | 8 | 4; 5 | 2 |")
