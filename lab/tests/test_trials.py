"""Trials are trained and tested as their list states, and only once. The shipped lists are valid."""

import json

import pytest

from lab import __main__ as program
from lab import trials
from lab.report import mean_and_error
from lab.trials import Trial, TrialList, config_of
from m3ae_fast import train
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Config, parse
from tests.helpers.labelled import labelled_tar

TINY = {
    "size": None, "emb_dim": 16, "depth": 1, "num_heads": 2, "dec_emb_dim": 16, "dec_depth": 1, "dec_num_heads": 2,
    "image_size": 16, "patch_size": 8, "vocab_size": 0,
}  # fmt: skip
LIST = {
    "about": "Two recipes",
    "common": {
        "model": TINY,
        "data": {"workers": 0, "tokenizer": None},
        "train": {"global_batch": 8, "log_every": 1, "pictures": 0, "compile": False},
        "deepspeed": None,
    },
    "data": {
        "colours": {
            "train": ["train-*.tar"],
            "common": {"data": {"crop_scale": [0.5, 1.0]}},
            "tests": {
                "k-NN": {"task": "knn", "train": "train-*.tar", "val": "val-*.tar"},
                "logistic": {"task": "logistic", "train": "train-*.tar", "val": "val-*.tar"},
                "AUROC": {
                    "task": "ood", "train": "train-*.tar", "val": "val-*.tar", "ood": {"others": "val-*.tar"},
                    "value": ["others_mahalanobis_auroc"],
                },
            },
            "evaluation": {"encode": {"batch": 16}},
        }
    },
    "arms": {"official": {}, "half the rate": {"optim.peak_lr": 1e-3}},
    "trials": [
        {"data": "colours", "arms": "all", "steps": [1], "seeds": 2},
        {"data": "colours", "arms": ["official"], "steps": [2], "seeds": 1},
    ],
}  # fmt: skip


@pytest.fixture
def call(tmp_path):
    """Return a function of options that runs LIST and returns the exit code."""
    (tmp_path / "data").mkdir()
    labelled_tar(tmp_path / "data/train-0.tar", range(30))
    labelled_tar(tmp_path / "data/val-0.tar", range(30, 42))
    (tmp_path / "list.json").write_text(json.dumps(LIST))
    return lambda *options: program.main(
        [str(tmp_path / "list.json"), str(tmp_path / "data"), "--out", str(tmp_path / "out"), *options]
    )


@pytest.mark.slow
def test_trials_are_run_once_and_reported(call, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda arguments: 0)  # as if stopped before the first checkpoint
        assert call() == 1
    assert call("--minutes", "0") == 0 and "0 minutes are over" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # stopped during the second test
        evaluate = trials.m3ae_fast.evaluate
        patch.setattr(
            trials.m3ae_fast, "evaluate", lambda task, *a, **k: evaluate(task, *a, **k) if task == "knn" else None
        )
        assert call("--arms", "official", "--seeds", "1") == 1
    assert call("--arms", "official", "--seeds", "1") == 0
    assert call() == 0
    content = json.loads((tmp_path / "out/results.json").read_text())
    found = {(own["trial"]["arm"], own["trial"]["steps"], own["trial"]["seed"]) for own in content["trials"]}
    assert found == {
        ("official", 1, 0), ("half the rate", 1, 0), ("official", 2, 0), ("official", 1, 1), ("half the rate", 1, 1)
    }  # fmt: skip
    first = content["trials"][0]
    assert {*first["tests"]} == {"k-NN", "logistic", "AUROC"} and first["cost"]["flops"] > 0
    assert {"value", "standard_error", "random weights"} <= {*first["tests"]["k-NN"]}
    rate = (tmp_path / "out/runs/colours-half-the-rate-steps1-seed1.json").read_text()
    assert json.loads(rate)["optim"]["peak_lr"] == 1e-3 and json.loads(rate)["run"]["seed"] == 1
    page = (tmp_path / "out/README.md").read_text()
    assert "| half the rate | 1 | 2 |" in page and "| random weights | - |" in page
    monkeypatch.setattr(train, "main", lambda arguments: pytest.fail("a trial is run again"))
    assert call() == 0


def test_user_errors_are_reported_in_one_line(call, tmp_path):
    with pytest.raises(UserError, match="--arms other: is not one of official, half the rate"):
        call("--arms", "other")
    with pytest.raises(UserError, match=r"nosuch\.json: is not a list of trials"):
        program.main(["nosuch", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"--set train\.steps=10: each trial has its own value; change the list"):
        call("--set", "train.steps=10")
    (tmp_path / "list.json").write_text("{}")
    with pytest.raises(UserError, match="is not a list of trials"):
        call()


@pytest.mark.parametrize("name", sorted(path.stem for path in program.LISTS.glob("*.json")))
def test_all_trials_of_the_shipped_lists_are_valid_configs(name, tmp_path):
    trial_list = TrialList.read(program.LISTS / f"{name}.json")
    for trial in trial_list.trials():
        config = parse(Config, config_of(trial_list, trial, tmp_path, tmp_path / "run"), trial.name)
        assert config.train.steps == trial.steps and config.run.seed == trial.seed
        assert trial.arm in trial_list.arms


def test_an_override_replaces_the_settings_of_datasets_and_arms(tmp_path):
    trial_list = TrialList.read(program.LISTS / "race.json", ["model.depth=2", "optim.name=adamw"])
    configs = [config_of(trial_list, trial, tmp_path, tmp_path / "run") for trial in trial_list.trials()]
    assert {(each["model"]["depth"], each["optim"]["name"]) for each in configs} == {(2, "adamw")}


def test_the_error_of_a_mean_covers_seeds_and_samples():
    values = [{"value": 0.5, "standard_error": 0.03}, {"value": 0.6, "standard_error": 0.05}]
    assert mean_and_error(values) == "55.0 ± 6.4"  # the root of (0.05**2 + 0.04**2)
    assert mean_and_error(values[:1]) == "50.0 ± 3.0"
    assert mean_and_error([{"value": 0.5}]) == "50.0 ± 0.0"


def test_the_first_seed_of_each_group_is_run_before_the_second():
    own = TrialList(*LIST.values()).trials()
    assert own[:3] == [
        Trial("colours", "official", 1, 0), Trial("colours", "half the rate", 1, 0), Trial("colours", "official", 2, 0)
    ]  # fmt: skip
    assert [trial.seed for trial in own] == [0, 0, 0, 1, 1]
