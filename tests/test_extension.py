"""If a run with a stable learning rate and a time limit is extended, it has a stable phase again. Its decay then takes
the configured fraction of the new number of steps. All clocks of time limits are simulated."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from m3ae_fast import checkpoint, pretrain
from m3ae_fast.config import Config, parse
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.pretraining.stages import how_to_train_longer
from m3ae_fast.training.extension import is_extended, resumed_schedule
from m3ae_fast.training.pretraining_task import how_to_continue
from m3ae_fast.training.trainer import Trainer
from tests.helpers.shards import members, write_tar
from tests.helpers.stable_schedule import decay
from tests.helpers.trainer import SHORT, TINY
from tests.test_time_limit import HOUR, Machine, limited

SAMPLES = 16 * 10**6
MOST = 800 * 10**6  # maximum number of steps of a run with a time limit: 800 epochs
PROBE = {"train": [{"shards": "a.tar"}], "val": [{"shards": "b.tar"}], "every": 5}


def configured(schedule="wsd", **train):
    """Return the config of a run of an hour, whose decay takes a fifth of the steps if the schedule is wsd."""
    optim = TINY["optim"] | {"schedule": schedule, "decay_fraction": 0.2}
    train = TINY["train"] | {"steps": 500, "hours": 1.0, "probe": PROBE} | train
    return parse(Config, TINY | {"optim": optim, "train": train}, "test")


def saved(config, plan, step, spent):
    """Return the content of a checkpoint after `step` steps."""
    begin, sections = plan.decay_begin, config.model_dump(mode="json")
    return checkpoint.Info(
        step, 0, 42, sections, {}, changes=[*plan.changes], decays=begin is not None and step > begin, spent=spent
    )


def stopped_at(monkeypatch, config, step):
    """Train for `step` steps of 3.6 seconds, of which 1,000 fit into an hour, and return the checkpoint."""
    machine, limit = Machine(monkeypatch), limited()
    plan, _ = machine.train(Schedule(config.train, config.optim, SAMPLES), lambda now: 3.6, limit=limit, until=step)
    return machine, saved(config, plan, step, limit.spent)


def finish(machine, config, info, step_time):
    """Train to the end, and return the schedule."""
    limit = limited(3600 * config.train.hours, info.spent)
    plan = resumed_schedule(config, SAMPLES, info)
    plan, step = machine.train(plan, lambda now: step_time, limit=limit, start=info.step)
    assert step == plan.total_steps
    return plan


def require_stable_phase(plan, start):
    """Require that the learning rate is at its peak from step `start` until the last fifth of the steps, and that it
    then reaches its final value."""
    begin = plan.decay_begin
    assert plan.total_steps - begin == pytest.approx(0.2 * plan.total_steps, abs=1)
    assert {plan.lr(step) for step in range(start, begin + 1)} == {plan.lr(start)}
    assert plan.lr(begin + 1) < plan.lr(begin) and plan.lr(plan.total_steps) == pytest.approx(0)


@pytest.mark.parametrize("hours", [1.3, 2.0, 10.0])
@pytest.mark.parametrize(("step_time", "pace"), [(3.6, 1), (7.2, 0.5), (1.8, 2)])
def test_a_run_with_a_longer_time_limit_has_a_stable_phase_again(monkeypatch, hours, step_time, pace):
    """The run is stopped after 800 steps, when its decay would begin. When it is resumed, the machine may be slower or
    faster."""
    machine, info = stopped_at(monkeypatch, configured(), 800)
    assert info.changes[-1][1] == 1000
    plan = finish(machine, configured(hours=hours), info, step_time)
    assert plan.total_steps == pytest.approx(800 + pace * (1000 * hours - 800), rel=0.03)
    require_stable_phase(plan, 800)


@pytest.mark.parametrize(("spent", "total"), [(1e-300, MOST), (0.8 * HOUR, 2000), (9 * HOUR, 1000)])
def test_an_extended_run_is_never_shorter_than_before_nor_longer_than_permitted(spent, total):
    first = configured()
    info = saved(first, Schedule(first.train, first.optim, SAMPLES).changed(100, 1000), 800, spent)
    assert resumed_schedule(configured(hours=2.0), SAMPLES, info).total_steps == total


@pytest.mark.parametrize("key", ("steps", "epochs", "hours"))
@pytest.mark.parametrize(
    ("now", "decay", "longer"), [(12, 0.2, True), (10, 0.2, False), (8, 0.2, False), (12, None, False)]
)
def test_only_an_extended_run_resumes_from_before_its_decay(key, now, decay, longer):
    was, present = ({"steps": None, "epochs": None, "hours": None, key: value} for value in (10, now))
    config = SimpleNamespace(optim=SimpleNamespace(decay=decay), train=SimpleNamespace(**present))
    assert is_extended(config, SimpleNamespace(config={"train": was})) == longer


def test_a_run_that_is_only_resumed_keeps_its_schedule(monkeypatch):
    """A shorter run, and an extended run that has no checkpoint before its decay, keep their schedules too."""
    _, info = stopped_at(monkeypatch, configured(), 800)
    changes = (*map(tuple, info.changes),)
    for step, hours in ((800, 1.0), (800, 0.9), (900, 1.0), (900, 2.0)):
        later = replace(info, step=step, decays=step > 800)
        assert resumed_schedule(configured(hours=hours), SAMPLES, later).changes == changes
    assert resumed_schedule(configured(), SAMPLES, None).changes == ()
    assert resumed_schedule(configured(hours=None), SAMPLES, info).changes == ()


def test_a_cosine_schedule_keeps_its_changes_if_its_time_limit_is_extended(monkeypatch):
    machine, info = stopped_at(monkeypatch, configured("cosine"), 800)
    assert resumed_schedule(configured("cosine", hours=2.0), SAMPLES, info).changes == (*map(tuple, info.changes),)
    plan = finish(machine, configured("cosine", hours=2.0), info, 3.6)
    assert plan.total_steps == pytest.approx(2000, rel=0.03) and plan.lr(plan.total_steps) == pytest.approx(0)


@pytest.mark.parametrize(
    ("schedule", "hours", "total", "advice"),
    [
        ("wsd", 1.0, 1000, "raise train.hours to continue"),
        ("wsd", 1.0, MOST, "set train.hours=null and raise train.epochs or train.steps to continue"),
        ("cosine", 1.0, 1000, "set train.hours=null and raise train.epochs or train.steps to continue"),
        ("wsd", None, 1000, "raise train.epochs or train.steps to continue"),
    ],
)
def test_a_complete_run_tells_how_to_extend_it(schedule, hours, total, advice):
    """More time does not extend a run that has taken the maximum number of steps."""
    config = configured(schedule, hours=hours)
    plan = Schedule(config.train, config.optim, SAMPLES).changed(100, total)
    assert how_to_continue(SimpleNamespace(schedule=plan), config) == advice


@pytest.mark.parametrize(
    ("length", "advice"),
    [
        ({"hours": 0.31}, "increase the total number of hours, now 0.31: --set train.hours=N"),
        ({"steps": 5000, "hours": None}, "increase the total number of steps, now 5000: --set train.steps=N"),
        (
            {"steps": None, "epochs": 7.5, "hours": None},
            "increase the total number of epochs, now 7.5: --set train.epochs=N",
        ),
    ],
)
def test_a_repeated_pretrain_command_tells_how_to_train_longer(length, advice):
    """When a run with a cosine schedule is finished, its learning rate has fallen. The advice therefore adds that the
    length must be changed before the run is finished."""
    assert how_to_train_longer(configured(**length)) == f"to train longer, {advice}"
    limited = how_to_train_longer(configured("cosine", **length))
    assert limited.startswith(f"to train longer, {advice}; do this before the run is finished, ")
    assert limited.endswith("only if it began with --set optim.schedule=wsd")


@pytest.mark.slow
def test_a_run_of_pretrain_ends_with_a_decay_and_can_be_extended_as_the_repeated_command_says(
    tmp_path, monkeypatch, capsys
):
    """Each step takes ten seconds; 24 and then 36 steps fit into the time limit."""
    machine, take_step = Machine(monkeypatch), Trainer.take_step

    def slow_step(*given):
        machine.now += 10
        return take_step(*given)

    monkeypatch.setattr(Trainer, "take_step", slow_step)
    shards, run = write_tar(tmp_path / "a.tar", members(range(40), "image")), tmp_path / "run"
    overrides = [*SHORT, "train.steps=60", "train.hours=0.0666667", "train.log_every=1", "train.pictures=0"]
    overrides += ["optim.schedule=wsd", "optim.warmup_epochs=0", "data.workers=0"]
    assert pretrain(shards, run, overrides=overrides).finished
    assert decay(run) == (19, 24)
    capsys.readouterr()
    outcome = pretrain(shards, run, hours=9.0, overrides=[*overrides, "train.hours=0.1"])
    assert outcome.finished and decay(run) == (29, 36)
    out = capsys.readouterr().out
    assert "config.json already exists: its settings are kept" in out and "steps 19 to 36" in out
    assert checkpoint.read_info(checkpoint.locate(run)).step == 36
