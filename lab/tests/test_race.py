"""The race, at toy size."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks import table
from lab.race import __main__ as program
from lab.race import report
from lab.race.plan import (
    ARMS,
    BASELINE,
    FAST,
    FAST_ONE_BLOCK,
    ONE_BLOCK,
    PIXELS,
    RANDOM_WEIGHTS,
    USUAL,
    Trial,
    race,
    tune,
    tuned_as,
)
from lab.race.run import SETTINGS, Race, flops, trial_of
from lab.study import shards
from lab.study.run import Stopped
from m3ae_fast import train
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Config, parse
from tests.helpers.labelled import emoji_and_clothes

SMALL = {"emb_dim": 16, "depth": 1, "num_heads": 2, "dec_emb_dim": 16, "dec_depth": 2, "dec_num_heads": 2}
TINY = {
    "lengths": [1, 2], "target": {"baseline": 2, "fast": 1},
    "sizes.S64": SMALL, "data.clothes.model.image_size": 8, "data.emoji.model.image_size": 8,
    "train.train.global_batch": 16, "tried": {"optim.peak_lr": [0.006], "train.global_batch": [16]},
    "transfer.linear": {"epochs": 1, "peak_lr": 0.1}, "finetune.epochs": 1,
}  # fmt: skip


@pytest.fixture
def call(tmp_path_factory, tmp_path, monkeypatch):
    """Return a function of options that runs a race at toy size and returns its exit code."""
    monkeypatch.setattr(shards, "CLOTHES", {"probe": 15, "validation": 8, "images": 10})
    monkeypatch.setattr(report, "REPLICATES", 20)
    data = emoji_and_clothes(tmp_path_factory.mktemp("labelled"))

    def perform(*options):
        sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        where = [str(data), "--out", str(tmp_path / "out"), "--sizes", "S64"]
        return program.main([*where, "--seeds", "1", "--final-seeds", "0", "--finetune", "0", *sets, *options])

    return perform


@pytest.mark.slow
def test_a_race_is_run_once_and_can_be_resumed(call, tmp_path, monkeypatch, capsys):
    few = ["--data", "clothes", "--arms", BASELINE, FAST, "--tune", "optim.peak_lr"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda arguments: 0)  # asked to stop before its first checkpoint
        assert call(*few) == 1
    assert call(*few, "--minutes", "0") == 0 and "0 minutes are over" in capsys.readouterr().out
    assert call(*few) == 0
    out = tmp_path / "out"
    settings = json.loads((out / report.JSON).read_text())["settings"]
    rows = Race(out / "runs", out / "shards", settings).everything()
    kinds = [(row["trial"]["arm"], row["trial"]["steps"]) for row in rows]
    runs = [(BASELINE, 1), (BASELINE, 2), (FAST, 1), (PIXELS, 0), (RANDOM_WEIGHTS, 0)]
    tried = [(BASELINE, 1), (FAST, 1), (BASELINE, 2), (FAST, 2)]  # to choose the learning rate, and to check it
    assert sorted(kinds) == sorted([*runs, *tried])
    costs = {arm: row["cost"]["flops"] for row in rows for arm in [row["trial"]["arm"]] if row["trial"]["steps"] < 2}
    assert min(costs[FAST], costs[BASELINE]) > costs[PIXELS] == 0
    by_part: dict[bool, set[str]] = {False: set(), True: set()}
    for row in rows:
        by_part[row["trial"]["validation"]] |= {*row["correct"]["clothes_knn"]}
    assert len(by_part[False]) == 12 and by_part[True].isdisjoint(by_part[False])
    page = (out / report.PAGE).read_text()
    assert "| Fashion-MNIST, S64 | steps |" in page and "tried on validation samples" in page
    assert (out / report.PLOT).stat().st_size
    pairs = Trial("emoji", "S64", FAST, 1, 0)
    running = Race(out / "pairs", out / "shards", settings)
    running.perform(pairs)
    (row,) = running.everything()
    assert {*row["correct"]} == {"knn", "linear", "shift_linear"}
    assert {key.split("-")[0] for key in row["correct"]["shift_linear"]} == {"google"}
    assert "emoji-twitter" in str(running.config(pairs)["data"]) and "google" not in str(running.config(pairs)["data"])
    assert call(*few, "--finetune", "1") == 0
    page = (out / report.PAGE).read_text()
    *_, last = page.partition("| Fashion-MNIST, S64, fine-tuned | steps |")
    assert [line.split(" | ")[:3] for line in last.splitlines()[2:6]] == [
        [f"| {arm}", steps, "1"] for arm, steps in ((RANDOM_WEIGHTS, "0"), (USUAL, "1"), (USUAL, "2"), (FAST, "1"))
    ]
    monkeypatch.setattr(Race, "perform", lambda self, trial: pytest.fail(f"{trial.name} is run again"))
    monkeypatch.setattr(Race, "finetune", lambda self, trial: pytest.fail(f"{trial.name} is fine-tuned again"))
    assert call(*few) == 0
    for result in [*(out / "runs").glob("*.result.json"), *(out / "runs").glob("*.finetuned.json")]:
        result.unlink()  # as on another machine
    assert call(*few) == 0 and (out / report.PAGE).read_text() == page
    with pytest.raises(UserError, match="has results of other settings"):
        call("--set", "transfer.encode.batch=8")
    with pytest.raises(UserError, match=r"--lengths 3: is not one of \[1, 2\]"):
        call("--lengths", "1", "3")
    assert call(*few, "--set", "lengths=[1,2,3]", "--lengths", "1") == 0  # the results of other lengths stay valid


def test_all_arms_are_configs_of_one_data_stream(tmp_path, monkeypatch):
    settings = json.loads(SETTINGS.read_text())
    monkeypatch.setattr(Race, "_samples", lambda self, shards: 55_000)
    running, costs = Race(tmp_path, tmp_path, settings), {}
    first = dict((setting, values[0]) for setting, values in settings["tried"].items())
    for data in settings["data"]:
        for size in settings["sizes"]:
            for arm in ARMS:
                trial = Trial(
                    data, size, arm, 300, 1, tuple((k, tuple(v) if k == "optim.betas" else v) for k, v in first.items())
                )
                config = parse(Config, running.config(trial), arm)
                assert (config.run.seed, config.train.steps, config.train.global_batch) == (1, 300, 128)
                costs[data, size, arm] = flops(config)
                assert trial_of(json.loads(json.dumps({"trial": asdict(trial)}))) == trial
    for (data, size, arm), cost in costs.items():
        usual, muon = costs[data, size, BASELINE], costs[data, size, "Muon"]
        if arm in ("4 blocks", "8 blocks"):
            assert cost > usual
        elif ("optim.name", "muon") not in ARMS[arm]:
            assert cost == usual if arm in (BASELINE, USUAL, "wsd") else cost <= usual
        assert usual < muon < 1.5 * usual and (size[0] == "L" or costs[data, size, FAST] < 0.7 * usual)
    other = Trial("clothes", "S64", BASELINE, 300, 1, (("train.global_batch", 64),))
    assert running.config(other)["train"] == {
        **running.config(replace(other, tuned=()))["train"],
        "global_batch": 64,
        "steps": 600,
    }


def test_the_cost_of_an_interrupted_run_includes_its_first_part(tmp_path, monkeypatch):
    running = Race(tmp_path, tmp_path, json.loads(SETTINGS.read_text()))
    trial, clock, steps = Trial("clothes", "S64", BASELINE, 2, 0), iter([10.0, 13.0, 20.0, 25.0]), []
    monkeypatch.setattr(Race, "_samples", lambda self, shards: 55_000)
    monkeypatch.setattr("lab.race.run.time.process_time", lambda: next(clock))
    monkeypatch.setattr("lab.race.run.checkpoint.saved_steps", lambda run: steps)
    monkeypatch.setattr("lab.race.run.checkpoint.step_of", lambda step: step)
    monkeypatch.setattr("lab.race.run.read_metrics", lambda run: [{"data_wait": 0.25}])
    monkeypatch.setattr(train, "main", lambda arguments: steps.append(1 if not steps else 2))
    with pytest.raises(Stopped):
        running._train(trial, tmp_path / "run")
    cost = running._train(trial, tmp_path / "run")
    assert (cost["whole_seconds"], cost["seconds"]) == (3 + 5, 0.75 * (3 + 5))
    assert running._train(trial, tmp_path / "run") == cost  # complete: it is not trained again


def test_each_arm_has_its_own_colour():
    assert len({*report.COLOURS}) == len(report.COLOURS) >= len({*ARMS} - {BASELINE, USUAL, FAST})


def test_both_sides_are_tuned_with_the_same_number_of_runs():
    tried = {"a": [1, 2, 3], "b": [1, 2], "c": [5, 6]}
    asked = []

    def accuracy(trial):
        asked.append(trial)
        found = dict(trial.tuned)
        return -abs(found["a"] - 2) - found["b"] + 100 * (found["c"] == 6)

    best = tune(Trial("clothes", "S64", FAST, 300, 0), tried, ["a", "b"], accuracy)
    assert best == (("a", 2), ("b", 1), ("c", 5)) and all(each.validation for each in asked)
    assert len({*asked}) == 4  # the best so far is not run again
    assert [tuned_as(arm) for arm in ("2 blocks", "1 block, Muon", "all")] == [BASELINE, FAST, FAST]
    assert tuned_as(USUAL) == tuned_as(ONE_BLOCK) == USUAL


def test_runs_are_ordered_with_the_shortest_part_first_and_then_the_longest_runs():
    tried = {"optim.peak_lr": [0.006, 0.003], "optim.betas": [[0.9, 0.95], [0.9, 0.999]]}
    trials = [*race("clothes", "S64", (10, 20, 40, 80, 160), {"baseline": 80, "fast": 40}, tried, 2, 3)]
    first, checks = 2 * (len(ARMS) + 4 + 2), 2 * 2
    assert len({*trials}) == len(trials) == first + checks + 3 * (10 + 2) - 2 * 4
    assert [each.seed for each in trials[:first]] == sorted([0, 1] * (first // 2))
    checked = trials[first : first + checks]
    assert all(each.validation and each.steps == 40 for each in checked)
    assert [(each.arm, dict(each.tuned)) for each in checked] == [
        (arm, {"optim.peak_lr": rate, "optim.betas": (0.9, 0.95)})
        for rate in (0.006, 0.003)
        for arm in (BASELINE, FAST)
    ]
    final, longer = trials[first + checks : -6], trials[-6:]
    assert [(each.arm, each.steps) for each in final[:2]] == [(USUAL, 80), (FAST, 80)]
    one_block = (ONE_BLOCK, FAST_ONE_BLOCK)
    assert [(each.arm, each.steps, each.seed) for each in final if each.arm in one_block] == [
        (arm, 80, seed) for seed in range(3) for arm in one_block
    ]
    assert all(each.steps < 160 for each in final)
    assert [(each.arm, each.steps, each.seed) for each in longer] == [
        (arm, 160, seed) for seed in range(3) for arm in (USUAL, FAST)
    ]
    assert all(not each.validation and not each.tuned for each in [*final, *longer])


def test_the_speed_up_factor_is_interpolated_between_runs_of_the_baseline():
    costs, ends = [1.0, 10.0, 100.0], [0.5, 0.7, 0.6]
    assert report.interpolated(0.6, costs, ends) == (pytest.approx(math.log(10) / 2), "")
    assert report.interpolated(0.8, costs, ends)[1] == ">" and report.interpolated(0.4, costs, ends) == (0.0, "<")

    def row(arm, seed, cost, right):
        return {"trial": {"arm": arm, "seed": seed, "steps": 1}, "cost": {"flops": cost},
                "correct": {"t": {f"{i}": float(i < right) for i in range(10)}}}  # fmt: skip

    labels = {f"{i}": {"emoji": f"{i}"} for i in range(10)}
    ladder = [row(BASELINE, seed, cost, right) for seed in (0, 1) for cost, right in ((1, 4), (100, 8))]
    arm = [row(FAST, seed, 2.0, 6) for seed in (0, 1)]
    found = report.factor(arm, ladder, "t", "flops", report.Weights(labels))
    assert (found.mean, found.seeds, found.beyond) == (pytest.approx(5), 2, "") and found.low < 5 < found.high
    assert report.factor([row(FAST, 7, 2.0, 6)], ladder, "t", "flops", report.Weights(labels)) is None
    assert report.factor([row(FAST, 0, 2.0, 9)], ladder, "t", "flops", report.Weights(labels)).beyond == ">"
    apart = [row(FAST, 0, 2.0, 9), row(FAST, 1, 2.0, 3)]  # above and below
    assert report.factor(apart, ladder, "t", "flops", report.Weights(labels)) is None
    pairs = report.Weights({"a": {"emoji": "x"}, "b": {"emoji": "x"}, "c": {"emoji": "y"}})
    same = pairs.accuracies({"a": 1.0, "b": 1.0, "c": 0.0})
    assert same[0] == pytest.approx(2 / 3) and {*np.round(same, 6)} <= {0, 1, *np.round(same, 6)}


def test_the_fraction_of_the_baselines_cost_is_interpolated_between_runs_of_the_fast_recipe():
    def row(arm, steps, cost, right):
        correct = {"clothes_linear": {f"{i}": float(i < right) for i in range(10)}}
        trial = {"arm": arm, "seed": 0, "steps": steps, "data": "clothes", "size": "S64"}
        return {"trial": trial, "cost": dict.fromkeys(report.COSTS, cost), "correct": correct}

    rows = [row(BASELINE, 1, 1.0, 5), row(BASELINE, 4, 8.0, 8), row(FAST, 1, 1.0, 6), row(FAST, 4, 4.0, 8)]
    weights = report.Weights({f"{i}": {"emoji": f"{i}"} for i in range(10)})
    *_, low, high = "\n".join(report._shares(rows, "clothes, S64", ["clothes_linear"], weights)).splitlines()
    assert low.startswith("| baseline, 1 | 1 | < 1.00 |") and high.startswith("| baseline, 4 | 1 | 0.50 (")
    assert report._shares(rows[:3], "clothes, S64", ["clothes_linear"], weights) == []


def test_runs_are_compared_by_seed_with_baseline_runs_of_the_given_length():
    def row(arm, steps, seed, cost, right):
        correct = {"clothes_linear": {f"{i}": float(i < right) for i in range(10)}}
        trial = {"arm": arm, "seed": seed, "steps": steps, "data": "clothes", "size": "S64"}
        return {"trial": trial, "cost": dict.fromkeys(report.COSTS, cost), "correct": correct}

    rows = [row(USUAL, 1, 0, 1.0, 9), row(USUAL, 4, 0, 8.0, 6), row(USUAL, 4, 1, 8.0, 8), row(BASELINE, 9, 2, 9.0, 1)]
    fast = [row(FAST, 4, 0, 4.0, 7), row(FAST, 4, 1, 2.0, 8), row(FAST, 4, 2, 1.0, 9)]  # the last has no counterpart
    weights = report.Weights({f"{i}": {"emoji": f"{i}"} for i in range(10)})

    def differences(rows, length):
        return report._differences(rows, length, "clothes, S64", ["clothes_linear"], weights)

    *_, last = "\n".join(differences([*rows, *fast], 4)).splitlines()
    assert last.startswith("| 4 | 2 | 0.38 | 0.38 | 0.38 | +5.0 (+0.0 to ")
    *_, last = "\n".join(differences([*rows, *fast], 1)).splitlines()
    assert last.startswith("| 4 | 1 | 4.00 | 4.00 | 4.00 | -20.0 (")
    assert differences(rows, 4) == differences(fast, 4) == []


def test_a_page_keeps_its_hand_written_text(tmp_path):
    (tmp_path / report.PAGE).write_text(f"By hand.\n{table.START}\n{table.END}\n")
    about = {"device": "CPU", "torch": "2", "m3ae_fast": "0", "date": "2026-01-01"}
    report.save(tmp_path, {"about": about, "settings": {}}, [], [], {})
    assert (tmp_path / report.PAGE).read_text().startswith("By hand.")
