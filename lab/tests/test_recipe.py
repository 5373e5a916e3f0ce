"""`lab.recipe` at toy size: the parts have no emoji in common, each trial is run once, and the tables contain the
difference of each variant."""

import json
from dataclasses import replace

import pytest

from lab import recipe
from lab.recipe import ALL, TEST, TRAIN, VALIDATION, Laboratory, Trial
from m3ae_fast.evaluation.default_hyperparameters import OFFICIAL
from tests.helpers.labelled import described_tar, emoji_and_clothes
from tests.helpers.shards import picture

SIZES = {"emb_dim": 16, "depth": 1, "num_heads": 2, "dec_emb_dim": 16, "image_size": 16, "patch_size": 8}


@pytest.fixture
def data(tmp_path, monkeypatch):
    for split, count in (("train", 24), ("val", 6)):
        samples = {f"{i}": (picture(i), None, {"label": i % 3 - 1, "category": f"c{i % 3}"}) for i in range(count)}
        described_tar(tmp_path / f"clip/{split}-0.tar", samples)
    monkeypatch.setattr(recipe, "CLIPART", tmp_path / "clip")
    monkeypatch.setattr(recipe, "VALIDATED", 3)
    monkeypatch.setattr(recipe, "MODEL", recipe.MODEL | SIZES)
    monkeypatch.setattr(recipe, "PROBES", {"drawings": {ALL: 1}, "emoji": {12: 2}, "clothes": {}})
    monkeypatch.setattr(recipe, "TUNINGS", {"clothes": {10: ("rule", "steps x 2")}})
    for task, official in OFFICIAL.items():
        short = replace(official, recipe=replace(official.recipe, epochs=2), fewest_steps=2)
        monkeypatch.setitem(OFFICIAL, task, short)
    return emoji_and_clothes(tmp_path / "labelled")


def test_variants_are_trained_once_and_compared(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = [str(data), "--out", str(out), "--steps", "2"]
    assert recipe.main([*arguments, "--minutes", "0"]) == 0
    assert "| --- |" in capsys.readouterr().out and not (out / "drawings").exists()
    labels = json.loads((out / "shards/labels.json").read_text())
    parts = {f"{name}-{part}": {*recipe.keys(out / f"shards/{name}-{part}.tar")}
             for name in ("emoji", "clothes", "drawings") for part in (TRAIN, VALIDATION, TEST)}  # fmt: skip
    assert sum(map(len, parts.values())) == len(labels) == 2 * 60 + 45 + 20  # without skin tones and without label -1
    units = [{labels[key]["emoji"] for key in parts[f"emoji-{part}"]} for part in (TRAIN, VALIDATION, TEST)]
    assert all(units) and sum(map(len, units)) == 60
    assert len(parts["clothes-test"]) == 12 and len(parts["drawings-test"]) == 4

    assert recipe.main(arguments) == 0
    text = (out / "table.md").read_text()
    assert text.count("| emoji | random | 12 | ") == 2 and text.count("| clothes | mae | 10 | ") == 2
    assert "(2) | " in text and " ± " in text and "On validation samples:" in text
    found = json.loads((out / "results/linear-emoji-mae-12-1-ratex3.json").read_text())
    assert found["settings"]["peak_lr"] == pytest.approx(3 * OFFICIAL["linear"].scaled(12).peak_lr, rel=0.01)
    assert found["train_samples"] == 12 and {*found["correct"]} == parts["emoji-validation"] | parts["emoji-test"]
    tuned = json.loads((out / "results/finetune-clothes-mae-10-0-stepsx2.json").read_text())
    assert tuned["settings"] == {"epochs": 4, "peak_lr": 0.001}
    assert {*tuned["correct"]} == parts["clothes-validation"] | parts["clothes-test"]
    monkeypatch.setattr(Laboratory, "perform", lambda self, trial: pytest.fail(f"{trial.name} is done again"))
    assert recipe.main(arguments) == 0


def test_trials_without_enough_time_are_shown_as_a_dash(data, tmp_path):
    recipe.prepare(data, tmp_path / "shards")
    laboratory = Laboratory(tmp_path, 2)
    right = recipe.keys(laboratory.shard("emoji", TEST))
    for variant, correct in (("rule", right[1:]), ("rate x 3", right)):
        trial = Trial("linear", "emoji", "mae", 12, 0, variant)
        laboratory.result(trial).parent.mkdir(exist_ok=True)
        marks = {key: int(key in correct) for key in right}
        laboratory.result(trial).write_text(json.dumps({"train_samples": 12, "correct": marks}))
    head, _, row = laboratory.tables(["linear"], TEST).splitlines()
    assert head.endswith("| rule | rate x 3 |")
    first, second = row.split(" | ")[-2:]
    assert first.startswith(f"{100 - 100 / len(right):.1f} ± ") and first.endswith(" (1)")
    assert second.startswith(f"+{100 / len(right):.1f} ± ")
