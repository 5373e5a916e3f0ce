"""`lab.continuing` at toy size: sources and target share no image, each run is executed once and starts from the
weights of its arm, and the tables compare equal times."""

import json

import pytest
import torch

from lab import continuing
from lab.continuing import FAR, FULL, LAYERED, ON, RELATED, SCRATCH, UNRELATED, Result, Trial, plan
from lab.recipe import TEST, TRAIN, keys
from m3ae_fast import checkpoint, train
from m3ae_fast.model.pretrained import read_pretrained
from tests.helpers.labelled import described_tar, emoji_and_clothes
from tests.helpers.shards import picture


@pytest.fixture
def data(tmp_path, monkeypatch):
    samples = {f"{i}": (picture(i), None, {"label": i % 2, "category": f"c{i % 2}"}) for i in range(8)}
    for split in ("train", "val"):
        described_tar(tmp_path / f"clip/{split}-0.tar", samples)
    monkeypatch.setattr(continuing.recipe, "CLIPART", tmp_path / "clip")
    short = {"TARGET": ("kind 0", "kind 1"), "IMAGES": 12, "BATCH": 4, "SOURCE_STEPS": 2, "LENGTHS": (1, 2), "LONG": 4}
    short |= {"SIZES": continuing.SIZES | {"emb_dim": 16}}
    for name, value in short.items():
        monkeypatch.setattr(continuing, name, value)
    return emoji_and_clothes(tmp_path / "labelled")


@pytest.mark.slow
def test_runs_start_from_their_source_model_and_are_run_once(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [str(data), "--out", str(out), "--seeds", "1"]
    few = [trial for trial in plan(1) if trial.steps != 1 and trial != Trial(ON, 4, 0)]
    monkeypatch.setattr(continuing, "plan", lambda seeds: few)
    assert continuing.main([*arguments, "--minutes", "0"]) == 0 and not (out / "runs").exists()
    parts = {name: {*keys(out / f"shards/{name}.tar")} for name in (RELATED, UNRELATED, f"{TRAIN}-0", TEST)}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 11 + (2 * 60 + 16) + 12 + 8
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda arguments: 0)  # stopped before its first checkpoint
        assert continuing.main(arguments) == 1
    assert continuing.main(arguments) == 0

    def config(arm, steps=2):
        return json.loads((out / f"runs/{Trial(arm, steps, 0).name}.json").read_text())

    scratch, on = config(SCRATCH), config(ON)
    assert on["optim"]["peak_lr"] == pytest.approx(scratch["optim"]["peak_lr"] / 4, rel=0.01)
    assert config(FULL)["optim"]["peak_lr"] == 0.0048  # for batches of 64 samples
    assert [config(arm)["optim"]["layer_decay"] for arm in (ON, LAYERED)] == [1, 0.75]
    assert scratch["model"]["init_from"] is None and scratch["data"]["train"] == on["data"]["train"]
    assert (on["train"]["steps"], config(SCRATCH, 4)["train"]["steps"]) == (2, 4) and on["train"]["global_batch"] == 4
    for arm, source in ((ON, RELATED), (FAR, UNRELATED)):
        started = read_pretrained(out / f"runs/{Trial(arm, 2, 0).name}/start").state
        trained = checkpoint.read_weights(checkpoint.locate(out / f"runs/{Trial(source, 2, 0).name}"))
        assert all(torch.equal(started[name], tensor) for name, tensor in trained.items())
    text = (out / "table.md").read_text()
    assert text.count("\n| ") == 2 + 10 + 2 + 3 and "| 2 on the related source, then 2 on the target |" in text
    found = json.loads((out / "results/continued-2-0.json").read_text())
    assert {*found["correct"]} == {"knn", "logistic"} and {*found["correct"]["knn"]} == parts[TEST]
    assert found["cpu_s"] > 0
    monkeypatch.setattr(continuing.Laboratory, "perform", lambda self, trial: pytest.fail(f"{trial.name} again"))
    capsys.readouterr()
    assert continuing.main(arguments) == 0 and text.splitlines()[2] in capsys.readouterr().out


def test_the_main_comparison_of_all_seeds_comes_first():
    trials = plan(2)
    assert len({*trials}) == len(trials)
    for number, trial in enumerate(trials):
        assert trial.source is None or trial.source in trials[:number]
    first = trials[: trials.index(Trial(SCRATCH, continuing.LONG, 0))]
    assert {(arm, steps, seed) for arm in (SCRATCH, ON) for steps in continuing.LENGTHS for seed in (0, 1)} < {*first}
    assert continuing.SOURCE_STEPS + continuing.LENGTHS[-1] == continuing.LONG


def test_differences_compare_runs_of_equal_steps_and_the_initial_weights():
    def row(right: int, cpu_s: float) -> Result:
        marks = {f"{i}": int(i < right) for i in range(10)}
        return Result({task: {0: marks} for task in continuing.TASKS}, cpu_s)

    last, source = continuing.LENGTHS[-1], continuing.SOURCE_STEPS
    found = {
        (SCRATCH, last): row(5, 9),
        (ON, last): row(8, 9),
        (RELATED, source): row(7, 20),
        (SCRATCH, continuing.LONG): row(9, 30),
    }
    lines = continuing.tables(found, {f"{i}": {"emoji": f"{i}"} for i in range(10)}).splitlines()
    (on,) = [line.split(" | ") for line in lines if line.startswith("| continued from the related source | ")]
    assert on[4].startswith("80.0 ± ") and on[6].startswith("+30.0 ± ") and on[8].startswith("+10.0 ± ")
    assert lines[-1].split(" | ")[3].startswith("-10.0 ± ") and " | 29 | " in lines[-3]
