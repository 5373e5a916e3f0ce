"""`pretrain --tune`: the learning rate is chosen by short runs, and a stopped call resumes with the run that was
stopped."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from m3ae_fast import pretrain
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Config, load_config, parse
from m3ae_fast.pretraining import learning_rate_search, stages
from m3ae_fast.training.metrics_log import METRICS_FILE
from m3ae_fast.training.run_state import RECORD_FILE
from tests.helpers.trainer import TINY


def tuned_config(tmp_path, **train):
    given = {"run": {"dir": str(tmp_path)}, "train": TINY["train"] | {"steps": 1000} | train}
    return parse(Config, TINY | given | {"optim": {"peak_lr": 1e-3, "warmup_epochs": 2.0}}, "test")


def trials(monkeypatch, losses):
    """Let trials end with these losses, by learning rate; "stop" denotes a trial that is stopped. Return the configs of
    the trials."""
    tried = []

    def pre_train(config, session, resume):
        tried.append(config)
        config.run.dir.mkdir(parents=True, exist_ok=True)
        loss = losses[config.optim.peak_lr]
        if loss is None:
            raise UserError("the loss of step 3 is not finite; samples: a, b")
        state = "stopped" if loss == "stop" else "finished"
        (config.run.dir / RECORD_FILE).write_text(json.dumps({"state": state, "step": 1, "total_steps": 1}))
        lines = [{"step": 0, "val_image_loss": 9.0, "val_text_loss": 9.0}]
        lines += [{"step": 50, "loss": 0.0}, {"step": 50, "val_image_loss": loss, "val_text_loss": 2.0}]
        (config.run.dir / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(learning_rate_search, "pre_train", pre_train)
    return tried


def test_a_learning_rate_is_chosen_by_the_loss_of_short_runs(tmp_path, monkeypatch, capsys):
    config, path = tuned_config(tmp_path, hours=2.0), tmp_path / "config.json"
    tried = trials(monkeypatch, {5e-4: 0.9, 1e-3: 0.7, 2e-3: "stop"})
    assert learning_rate_search.tune(config, path) is None and not path.exists()  # the same call resumes the search
    tried += trials(monkeypatch, {2e-3: None})
    found = learning_rate_search.tune(config, path)
    assert [each.optim.peak_lr for each in tried] == [5e-4, 1e-3, 2e-3]
    assert {(each.train.steps, each.train.hours, each.optim.warmup_epochs) for each in tried} == {(50, None, 0.1)}
    assert found.optim.peak_lr == 1e-3 and 1.9 < found.train.hours <= 2.0 and found.train.steps > 950
    out = capsys.readouterr().out
    assert load_config(path).optim == found.optim and "optim.peak_lr 0.0005: loss 1.9" in out
    assert "chosen: optim.peak_lr 0.001\n" in out  # neither the lowest nor the highest
    trials(monkeypatch, {})
    assert learning_rate_search.tune(found, path) == found  # the search is complete


@pytest.mark.parametrize(("hours", "minutes", "left"), [(2.0, 7.5, 1.5), (2.0, 30, 1.0), (None, 10, None)])
def test_the_time_of_all_trials_is_subtracted_from_the_hours_of_the_run(tmp_path, monkeypatch, hours, minutes, left):
    """At least half of the hours are kept, and the run has as many steps as fit into what is left. The time of a trial
    that was stopped counts too."""
    config, path, clock = tuned_config(tmp_path, hours=hours), tmp_path / "config.json", [0.0]
    monkeypatch.setattr(learning_rate_search, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for third in ("stop", 2.0):
        trials(monkeypatch, {5e-4: 3.0, 1e-3: 1.0, 2e-3: third})
        pre_train = learning_rate_search.pre_train
        monkeypatch.setattr(
            learning_rate_search,
            "pre_train",
            lambda *args, pre_train=pre_train, **options: (
                clock.__setitem__(0, clock[0] + 60 * minutes),
                pre_train(*args, **options),
            ),
        )
        found = learning_rate_search.tune(config, path)
    assert found.train.hours == left and found.train.steps == round(1000 * (left / hours if hours else 1))
    assert load_config(path).train == found.train


def test_a_trial_has_no_probe_figures_or_loggers(tmp_path, monkeypatch):
    """A trial has the model, the batch and the seed of the run, but no probe, figures or loggers, and only the
    evaluations at its beginning and end."""
    probe = {"train": [{"shards": "a.tar"}], "val": [{"shards": "b.tar"}], "every": 5}
    config = tuned_config(tmp_path, probe=probe, pictures=2, eval_every=10, save_every=10)
    tried = trials(monkeypatch, dict.fromkeys((5e-4, 1e-3, 2e-3), 1.0))
    learning_rate_search.tune(config, tmp_path / "config.json")
    for each in tried:
        own = each.train
        assert (each.run.loggers, own.probe, own.pictures, own.eval_every) == ([], None, 0, None)
        assert (own.save_every, own.global_batch, each.model, each.run.seed) == (50, 16, config.model, config.run.seed)
    assert config.run.loggers != [] and len(tried) == 3


def test_without_held_out_samples_the_last_training_losses_are_compared(tmp_path):
    """The mean over the last fifth of the logged losses, and over one loss if there are few."""
    config = tuned_config(tmp_path)
    for losses, mean in (([9.0] * 16 + [1.0, 2.0, 3.0, 4.0], 2.5), ([5.0, 4.0, 3.0], 3.0)):
        lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
        (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert learning_rate_search._loss(config) == mean


def test_a_learning_rate_search_without_a_usable_result_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.json"
    for hours, longer in ((None, "train.steps"), (1.0, "--hours")):
        message = rf"--tune: trial runs of 15 steps \(5% of 300\) are too short to compare; increase {longer}, or leave"
        with pytest.raises(UserError, match=message):
            learning_rate_search.tune(tuned_config(tmp_path, steps=300, hours=hours), path)
    trials(monkeypatch, dict.fromkeys((5e-4, 1e-3, 2e-3)))
    with pytest.raises(
        UserError, match=r"--tune: the loss was not finite with any of the learning rates 0\.0005, 0\.001, 0\.002;"
    ):
        learning_rate_search.tune(tuned_config(tmp_path), path)
    (tmp_path / "tuning.json").unlink()
    trials(monkeypatch, {5e-4: 3.0, 1e-3: 2.0, 2e-3: 1.0})
    learning_rate_search.tune(tuned_config(tmp_path), path)
    assert "chosen: optim.peak_lr 0.002, the lowest or highest of these rates" in capsys.readouterr().out
    (tmp_path / "tuning.json").unlink()
    monkeypatch.setattr(learning_rate_search.checkpoint, "saved_steps", lambda run: [run / "step-1"])
    with pytest.raises(UserError, match="has begun; leave out --tune"):
        learning_rate_search.tune(tuned_config(tmp_path), path)
    with pytest.raises(UserError, match=r"use either --tune or --set optim\.peak_lr"):
        pretrain(tmp_path, tmp_path / "out", overrides=["optim.peak_lr=1e-3"], tune=True)


def test_a_search_that_is_killed_before_it_writes_the_config_is_not_repeated(tmp_path, monkeypatch):
    """The table is written first. The next call writes the same config, and a later call does not change it."""
    config, path = tuned_config(tmp_path, hours=2.0), tmp_path / "config.json"
    trials(monkeypatch, {5e-4: 3.0, 1e-3: 2.0, 2e-3: 1.0})
    write = learning_rate_search._write
    monkeypatch.setattr(learning_rate_search, "_write", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        learning_rate_search.tune(config, path)
    assert (tmp_path / "tuning.json").exists() and not path.exists()
    monkeypatch.setattr(learning_rate_search, "_write", write)
    trials(monkeypatch, {})
    found = learning_rate_search.tune(config, path)
    assert found.optim.peak_lr == 2e-3 and load_config(path) == found
    path.unlink()
    assert learning_rate_search.tune(found, path) == found and not path.exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"tried": [], "seconds": 0}', '{"tried": {"a": 1.0}, "seconds": 0}',
                '{"tried": {"0.1": "x"}, "seconds": 0}', '{"tried": {}, "seconds": null}']
)  # fmt: skip
def test_a_damaged_table_of_a_search_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "tuning.json").write_text(content)
    with pytest.raises(UserError, match=r"tuning\.json: is damaged .*; remove it to repeat the search"):
        learning_rate_search.tune(tuned_config(tmp_path), tmp_path / "config.json")


def test_a_search_needs_a_number_of_steps(tmp_path):
    with pytest.raises(UserError, match=r"set train\.steps in place of train\.epochs"):
        learning_rate_search.tune(tuned_config(tmp_path, steps=None, epochs=9.0), tmp_path / "config.json")
    with pytest.raises(UserError, match=r"set train\.steps in place of train\.epochs"):
        pretrain(tmp_path, tmp_path / "out", overrides=["train.epochs=9"], tune=True)


def planned(monkeypatch, config):
    """Let `pretrain` choose this config, without samples."""
    plan = SimpleNamespace(config=config, lines=["the plan"], warning="")
    monkeypatch.setattr(stages, "find_shards", lambda *given: SimpleNamespace(notes=[]))
    monkeypatch.setattr(stages, "stage", lambda device: nullcontext())
    monkeypatch.setattr(stages, "inspect", lambda *given: (None, []))
    monkeypatch.setattr(stages, "choose", lambda *given: plan)


def test_a_search_for_an_earlier_config_is_not_used(tmp_path, monkeypatch):
    """The config is chosen again if it has been removed, for example because the images have changed."""
    planned(monkeypatch, tuned_config(tmp_path, hours=2.0))
    losses = {5e-4: 0.9, 1e-3: 0.7}
    for _ in range(2):
        tried = trials(monkeypatch, losses | {2e-3: "stop"})
        assert not pretrain(tmp_path / "images", tmp_path, tune=True).finished
        assert [each.optim.peak_lr for each in tried] == [5e-4, 1e-3, 2e-3]
        (tmp_path / "config.json").unlink()
    marker = tmp_path / "tuning/peak_lr-0.002/earlier"
    marker.touch()
    trials(monkeypatch, losses | {2e-3: "stop"})
    pretrain(tmp_path / "images", tmp_path, tune=True)
    assert not marker.exists()
    tried = trials(monkeypatch, {2e-3: "stop"})  # with the same config, only the stopped trial is resumed
    pretrain(tmp_path / "images", tmp_path, tune=True)
    assert [each.optim.peak_lr for each in tried] == [2e-3]


def test_a_run_that_is_too_short_for_a_search_leaves_no_config(tmp_path, monkeypatch):
    """A repeated call with more hours would otherwise use the config of the short run."""
    planned(monkeypatch, tuned_config(tmp_path, steps=100, hours=0.5))
    with pytest.raises(UserError, match=r"trial runs of 5 steps .* increase --hours"):
        pretrain(tmp_path / "images", tmp_path, tune=True)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_trial_of_the_learning_rate_search_is_a_separate_run(tmp_path, monkeypatch):
    monkeypatch.setattr(learning_rate_search, "FACTORS", (1.0, 2.0))
    monkeypatch.setattr(learning_rate_search, "FEWEST", 2)
    config = tuned_config(tmp_path, steps=40)
    found = learning_rate_search.tune(config, tmp_path / "config.json")
    done = json.loads((tmp_path / "tuning.json").read_text())
    assert [*done["tried"]] == ["0.001", "0.002"] and done["tried"]["0.001"] != done["tried"]["0.002"]
    assert found.optim.peak_lr == done["chosen"] and found.train.steps == 40
    assert {path.name for path in (tmp_path / "tuning").iterdir()} == {"peak_lr-0.001", "peak_lr-0.002"}
