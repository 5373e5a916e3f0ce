"""A learning rate that is constant and then decays: its formula, changes of the number of steps, and runs that are
extended or branch off."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast.checkpoint import resuming
from m3ae_fast.config import Config, parse
from m3ae_fast.engine.schedule import Schedule
from tests.helpers.checkpoints import save
from tests.helpers.trainer import TINY


def schedule(steps: int, decay: float = 0.2, warmup: float = 0.0, **optim) -> Schedule:
    data = json.loads(json.dumps(TINY))
    data["train"] |= {"steps": steps, "global_batch": 256}
    data["optim"] |= {"schedule": "wsd", "decay_fraction": decay, "warmup_epochs": warmup, "peak_lr": 1.0} | optim
    config = parse(Config, data, "test")
    return Schedule(config.train, config.optim, samples=256)


def test_the_stable_schedule_warms_up_stays_constant_and_decays_by_a_square_root():
    plan = schedule(100, warmup=10.0, end_lr=0.01)
    assert plan.decay_begin == 80
    assert [plan.lr(step) for step in (0, 5, 10, 50, 80)] == pytest.approx([0, 0.5, 1, 1, 1])
    for step in (81, 85, 99):
        assert plan.lr(step) == pytest.approx(0.01 + 0.99 * (1 - math.sqrt((step - 80) / 20)))
    assert plan.lr(100) == plan.lr(500) == pytest.approx(0.01)


def test_learning_rates_are_scaled_with_the_batch_size():
    plan = schedule(100, warmup=10.0, end_lr=0.01)
    larger = replace(plan, train=plan.train.model_copy(update={"global_batch": 1024}), samples=1024)
    for step in (0, 5, 10, 85, 100):
        assert larger.lr(step) == pytest.approx(4 * plan.lr(step))


def test_the_start_of_the_decay_moves_with_the_end_until_the_decay_has_begun():
    plan = schedule(100)
    longer = plan.changed(50, 200)
    assert longer.decay_begin == 160 and longer.lr(159) == 1 and longer.lr(60) == 1
    assert [longer.lr(step) for step in range(160, 200)] == [schedule(200).lr(step) for step in range(160, 200)]
    shorter = plan.changed(90 - 30, 65)  # a decay of its usual length would have begun earlier
    assert shorter.decay_begin == 60 and shorter.lr(60) == 1 and shorter.lr(65) == pytest.approx(0)


def test_a_decay_that_has_begun_uses_the_remaining_steps():
    """The learning rate does not jump when the number of steps changes during the decay, and it reaches its final
    value."""
    plan = schedule(100).changed(90, 95).changed(92, 110)
    rates = [plan.lr(step) for step in range(80, 111)]
    assert plan.decay_begin == 80 and rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0)
    assert plan.lr(90) == pytest.approx(schedule(100).lr(90)) and max(a - b for a, b in pairwise(rates)) < 0.25
    assert plan.decayed(92) == pytest.approx(0.5 + 0.5 * 2 / 5)


@pytest.mark.parametrize("decay", [1e-6, 1.0])
def test_the_decay_has_at_least_one_step(decay):
    plan = schedule(3, decay)
    assert plan.decay_begin == (2 if decay < 1 else 0) and plan.lr(3) == 0 and plan.lr(plan.decay_begin) == 1


def test_a_cosine_schedule_has_no_separate_decay():
    plan = schedule(100, schedule="cosine")
    assert plan.decay_begin is None and plan.lr(50) == pytest.approx(0.5)


def test_an_extended_run_returns_to_a_checkpoint_that_is_not_marked_as_failed(tmp_path):
    for step, decays in ((2, False), (4, False), (6, True)):
        info = checkpoint.Info(step, 0, 42, {}, {}, decays=decays)
        save(tmp_path, {"model/w": torch.ones(3)}, info, keep=9)
    found = {extended: resuming.find(tmp_path, "auto", lambda _, extended=extended: extended) for extended in (0, 1)}
    assert [checkpoint.step_of(path) for path in found.values()] == [6, 4]
    checkpoint.mark(tmp_path, 4, checkpoint.FAILED, "step 5 was not finite")
    assert checkpoint.step_of(resuming.find(tmp_path, "auto", lambda _: True)) == 2
    saved = checkpoint.saved_steps(tmp_path)
    # damaged, so it is not known whether its learning rate has decayed
    (saved[-1] / checkpoint.INFO_FILE).write_text("{}")
    assert checkpoint.before_decay(saved) == saved[-1]


WSD = ["--set", "optim.schedule=wsd", "--set", "optim.decay_fraction=0.5", "--set", "optim.warmup_epochs=0"]


@pytest.mark.slow
def test_an_extended_run_equals_a_run_of_the_new_length(trainer):
    """The run continues from the last checkpoint before the decay. This checkpoint is always kept, even if train.keep
    is 1."""
    options = [*WSD, "--set", "train.save_every=1", "--set", "train.keep=1"]
    trainer("whole", *options, "--set", "train.steps=8")
    out = trainer("run", *options, "--set", "train.steps=6")
    assert "with a decay after 3 steps" in out and "Open: optim.schedule=wsd" in out
    assert trainer.checkpoints("run")[:1] == ["step-00000003"]
    # the length is the same, so the run is complete
    trainer("run", *options, "--set", "train.steps=6", "--resume", "auto")
    trainer("run", *options, "--set", "train.steps=8", "--resume", "auto")
    assert trainer.losses("run") == trainer.losses("whole")
    assert trainer.checkpoints("run")[-1] == "step-00000008" and "step-00000004" in trainer.checkpoints("run")


@pytest.mark.slow
def test_a_decay_branches_off_a_stable_run(trainer):
    trainer("whole", *WSD, "--set", "train.steps=8")
    trainer("stable", *WSD, "--set", "train.steps=12", "--set", "train.save_every=4", "--set", "train.keep=9")
    path = trainer.folder / "stable/checkpoints/step-00000004"
    trainer("branch", *WSD, "--set", "train.steps=8", "--resume", str(path))
    assert trainer.losses("branch") == trainer.losses("whole")[4:]
