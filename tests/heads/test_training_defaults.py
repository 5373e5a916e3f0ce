"""Settings that are left at null get values that depend on the number of samples."""

import json

import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.evaluation import FINETUNE, LINEAR, evaluation_config
from m3ae_fast.heads.training_defaults import IMAGENET, OFFICIAL, LengthAndRate, chosen, with_defaults
from m3ae_fast.heads.training_warnings import rising

USES = {"linear": LINEAR, "finetune": FINETUNE}


def _config(task, **given):
    """Return the config of a task with settings that are given without their sections."""
    names = {name.partition(".")[2]: name for name in USES[task].names}
    overrides = [f"{names[key]}={json.dumps(value)}" for key, value in given.items()]
    return evaluation_config({"data": {"train": [{"shards": "a.tar"}]}}, overrides, task, USES[task])


def _completed(task, samples, saved=None, **given):
    """Return the hyper-parameters of a task for a number of samples."""
    return chosen(with_defaults(_config(task, **given), OFFICIAL[task], samples, saved or {}))


@pytest.mark.parametrize("samples", [IMAGENET, 1_280_000, 14_000_000])
def test_default_hyper_parameters_for_imagenet_are_the_official_ones(samples):
    assert OFFICIAL["linear"].scaled(samples) == LengthAndRate(2048, 90, 10.0, 0.1)
    assert OFFICIAL["finetune"].scaled(samples) == LengthAndRate(1024, 100, 5.0, 1e-3)
    probe, tuning = _completed("linear", samples), _completed("finetune", samples)
    expected = {"global_batch": 2048, "epochs": 90.0, "steps": None, "warmup_epochs": 10.0, "peak_lr": 0.1}
    assert probe == expected
    assert tuning == expected | {"global_batch": 1024, "epochs": 100.0, "warmup_epochs": 5.0, "peak_lr": 1e-3}


def test_given_hyper_parameters_are_kept():
    given = {"global_batch": 24, "epochs": 15.0, "steps": None, "warmup_epochs": 2.0, "peak_lr": 30.0}
    assert _completed("linear", 500, **given) == given
    assert _completed("linear", 1000, steps=90, global_batch=100) == {
        **given,
        "global_batch": 100,
        "steps": 90,
        "epochs": None,
        "warmup_epochs": 1,
        "peak_lr": 4.99,
    }


def test_a_resumed_run_keeps_its_derived_hyper_parameters():
    saved = {"global_batch": 2048, "epochs": None, "steps": 77, "warmup_epochs": 10.0, "peak_lr": 0.1}
    assert _completed("linear", 500, saved) == saved
    assert _completed("linear", 500, saved, steps=99) == saved | {"steps": 99}


def test_default_steps_have_a_minimum_and_change_gradually_with_the_number_of_samples():
    for official in OFFICIAL.values():
        last = None
        for samples in (1, 2, 10, 47, 300, 999, 5_000, 30_000, 90_000, 300_000, 900_000, 2_000_000):
            recipe = official.scaled(samples)
            steps = recipe.epochs * max(samples // recipe.global_batch, 1)
            assert steps >= official.fewest_steps and 2 <= recipe.global_batch <= max(2, 1.42 * samples)
            # 45,000 is the learning rate of the official run, 0.8, times its number of steps
            if official.rate_per_sample is not None:
                rate = recipe.peak_lr * recipe.global_batch / 256
                most = 45_000 * (IMAGENET / samples) ** 0.2
                expected = min(official.rate_per_sample * samples, most) / steps
                assert rate == pytest.approx(max(expected, 0.8), rel=0.01)
            assert last is None or steps <= 20 * last
            last = steps


def test_epochs_and_steps_are_mutually_exclusive():
    for task in USES:
        with pytest.raises(UserError, match="set epochs or steps, not both"):
            _config(task, epochs=2, steps=2)
        assert _config(task).train.epochs is None


def test_an_increase_of_the_accuracy_is_reported_only_if_it_is_significant():
    rise = [{"step": i, "accuracy": i / 100} for i in range(40)]
    assert rising(rise, 64) == pytest.approx(0.1)
    assert rising(rise, 1) == 0.0, "with ten samples in each quarter, the increase is not significant"
    assert rising([{"step": i, "accuracy": 0.5 + i / 10_000} for i in range(40)], 4096) == 0.0
    # with batches of 125 and of 500 samples, the increase is 1.5 and 3 standard errors
    little = [{"step": i, "accuracy": 0.53 if i >= 30 else 0.5} for i in range(40)]
    assert (rising(little, 125), rising(little, 500)) == (0.0, pytest.approx(0.03))
    assert rising([*rise[:3], {"step": 4, "val_top1": 1.0}], 64) == 0.0
    assert rising(rise[::-1], 64) == 0.0
