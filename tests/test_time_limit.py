"""A run with a time limit takes as many steps as fit, at any load of the machine. All clocks are simulated."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from m3ae_fast.base import pace
from m3ae_fast.base.pace import Pace
from m3ae_fast.config import LONGEST, Config, parse
from m3ae_fast.engine.schedule import Change, Schedule
from m3ae_fast.training.time_limit import FIRST, TimeLimit
from tests.helpers.trainer import TINY

HOUR = 3600.0


def schedule(steps, samples=16 * 10**6, **optim):
    config = parse(Config, TINY | {"train": TINY["train"] | {"steps": steps, "hours": 1.0}}, "test")
    return Schedule(config.train, config.optim.model_copy(update={"warmup_epochs": 5e-5, **optim}), samples)


def limited(seconds=HOUR, spent=0.0):
    return TimeLimit(seconds, Pace(first=FIRST), spent)


class Machine:
    """A clock that advances with the work done."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: self.now))

    def train(self, plan, step_time, evaluation=lambda now: 0.0, every=None, limit=None, start=0, until=None):
        """Train as `Trainer` does, to the end or until `until` steps are taken, and return the schedule and the number
        of steps taken. `step_time`, `evaluation`: functions from the seconds since the start to the duration of a step
        or an evaluation."""
        limit = limit or limited()
        began, step = self.now, start

        def evaluate():
            due = step == 0 or plan.due(step, every)
            with limit.pace.pause("losses", 1 / every if every else 0.0, due):
                self.now += evaluation(self.now - began) * due

        evaluate()
        while step < plan.total_steps and step != until:
            total = limit.fitting(step, plan)
            if total != plan.total_steps:
                plan = plan.changed(step, total)
            self.now += step_time(self.now - began)
            step += 1
            limit.pace.advance(recent=limit.recent)
            evaluate()
        self.took = self.now - began
        return plan, step


def jitter(seed, mean, spread=0.5):
    """Return step times that differ by a log-normal factor."""
    random = np.random.RandomState(seed)
    return lambda now: mean * math.exp(spread * random.randn() - spread**2 / 2)


@pytest.mark.parametrize("planned", [30, 900, 36_000])
@pytest.mark.parametrize("mean", [0.4, 4.0, 40.0, 400.0])
def test_a_run_on_an_idle_machine_ends_within_its_time_limit(monkeypatch, planned, mean):
    """The first estimate of the number of steps may be wrong by a large factor."""
    machine = Machine(monkeypatch)
    plan, step = machine.train(
        schedule(planned), jitter(0, mean, 0.1), lambda now: min(10 * mean, 100.0), every=max(planned // 5, 1)
    )
    assert step == plan.total_steps
    assert abs(machine.took - HOUR) < 0.15 * HOUR


def test_a_correct_estimate_of_the_steps_is_not_changed(monkeypatch):
    machine = Machine(monkeypatch)
    plan, step = machine.train(schedule(3600), lambda now: 1.0)
    assert plan.changes == () and step == 3600


@pytest.mark.parametrize("first", [300.0, 1000.0])
def test_slow_first_steps_are_excluded_from_the_estimate(monkeypatch, first):
    """The first two steps include compilation. The time that they take leaves room for fewer steps, but the other steps
    are not assumed to be as slow."""
    machine, firsts = Machine(monkeypatch), iter([first, 100.0])
    plan, step = machine.train(schedule(3600), lambda now: next(firsts, 1.0))
    assert step == plan.total_steps and machine.took == pytest.approx(HOUR, rel=0.02)
    assert all(abs(total - (3500 - first)) < 100 for _, total in plan.changes) and 1 <= len(plan.changes) <= 3


WILD = jitter(1, 1.0, 1.5)
BUSY = {
    "half as fast from the middle on": lambda now: 2.0 if now > 1800 else 1.0,
    "half as fast until the middle": lambda now: 2.0 if now < 1800 else 1.0,
    "half as fast near the end": lambda now: 2.0 if now > 3400 else 1.0,
    "a tenth as fast near the end": lambda now: 10.0 if now > 3240 else 1.0,
    "busy every other minute": lambda now: 3.0 if now // 60 % 2 else 1.0,
    "busy every other quarter": lambda now: 3.0 if now // 900 % 2 else 1.0,
    "ever slower": lambda now: 1.0 + now / 360,
    "wild": lambda now: WILD(now),
    "halted for five minutes": lambda now: 300.0 if 2000 < now < 2010 else 1.0,
}


@pytest.mark.parametrize("step_time", BUSY.values(), ids=BUSY)
@pytest.mark.parametrize("evaluated", [0.0, 1.0])
def test_a_run_on_a_busy_machine_exceeds_its_time_limit_only_slightly(monkeypatch, step_time, evaluated):
    """Evaluations slow down together with steps."""
    machine = Machine(monkeypatch)
    monkeypatch.setattr(f"{__name__}.WILD", jitter(1, 1.0, 1.5))  # the same numbers in any order of the tests
    plan, step = machine.train(schedule(3600), step_time, lambda now: 15 * evaluated * step_time(now), every=180)
    assert step == plan.total_steps
    assert 0.85 * HOUR < machine.took < 1.3 * HOUR
    assert len(plan.changes) < 200


def test_the_learning_rate_decays_before_a_run_reaches_its_time_limit(monkeypatch):
    machine = Machine(monkeypatch)
    plan, step = machine.train(schedule(3600), lambda now: 10.0 if now > 3500 else 1.0)
    rates = [plan.lr(each) for each in range(step)]
    assert rates[-1] < 0.02 * max(rates) and machine.took < 1.05 * HOUR
    resumed = limited(spent=2 * HOUR)
    plan, step = machine.train(schedule(3600), lambda now: 1.0, limit=resumed, start=1800)
    assert 1800 < step <= 1800 + 0.02 * 1800 + 2 and plan.lr(step - 1) < 0.1 * plan.lr(1800)


@pytest.mark.parametrize("step_time", BUSY.values(), ids=BUSY)
def test_a_stable_learning_rate_decays_at_the_end_of_the_time_limit(monkeypatch, step_time):
    """The decay is as long as planned unless step times change much, and the learning rate reaches its final value."""
    machine = Machine(monkeypatch)
    plan, step = machine.train(schedule(900, schedule="wsd"), step_time)
    rates = [plan.lr(each) for each in range(plan.warmup_steps, step + 1)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.01 * rates[0] and rates[-2] < 0.2 * rates[0]
    assert 0.08 * step < step - plan.decay_begin < 0.6 * step


def test_the_time_limit_includes_earlier_attempts(monkeypatch):
    machine = Machine(monkeypatch)
    first = limited()
    plan, step = machine.train(schedule(900), lambda now: 1.0, limit=first, until=1000)
    assert first.spent == 1000
    plan, step = machine.train(plan, lambda now: 1.0, limit=limited(spent=first.spent), start=step)
    assert step == pytest.approx(3600, rel=0.03) and machine.took == pytest.approx(2600, rel=0.03)


def test_the_time_limit_includes_the_last_evaluation(monkeypatch):
    """The last evaluation takes a tenth of the time, and so does the first one."""
    machine = Machine(monkeypatch)
    machine.train(schedule(3600), lambda now: 1.0, lambda now: 360.0)
    assert machine.took == pytest.approx(HOUR, rel=0.03)


def test_the_number_of_epochs_within_a_time_limit_has_a_maximum(monkeypatch):
    machine = Machine(monkeypatch)
    plan, step = machine.train(schedule(20, samples=160), lambda now: 0.1)
    assert step == plan.most_steps == LONGEST * 10
    longer = schedule(LONGEST * 10 + 5, samples=160)  # set by the user
    assert longer.most_steps == longer.total_steps == LONGEST * 10 + 5


def test_the_learning_rate_stays_continuous_and_reaches_its_end_if_the_number_of_steps_changes():
    whole = schedule(1000, warmup_epochs=1e-4, end_lr=1e-5)
    changed = whole.changed(300, 2400).changed(900, 1200)
    assert changed.changes == (Change(300, 2400), Change(900, 1200)) and changed.total_steps == 1200
    rates = [changed.lr(step) for step in range(1201)]
    assert rates[:301] == [whole.lr(step) for step in range(301)]
    assert rates[-1] == pytest.approx(whole.lr(1000))
    steepest = max(abs(whole.lr(step + 1) - whole.lr(step)) for step in range(100, 1000))
    after = np.abs(np.diff(rates[300:]))
    # the decay is stretched first and compressed later
    assert max(after[:600]) < steepest and max(after) < 3 * steepest
    assert changed.warmup_steps == whole.warmup_steps and changed.due(1200, None) and not changed.due(1000, None)


def test_the_warm_up_is_stretched_with_the_number_of_steps():
    whole = schedule(1000, warmup_epochs=1e-4)
    assert whole.warmup_steps == 100
    longer = whole.changed(50, 9550)  # 10 steps for each of the 950 remaining steps
    assert max(range(9550), key=longer.lr) == 550 and longer.lr(550) == pytest.approx(whole.lr(100))


def test_learning_rates_are_bitwise_unchanged_if_the_number_of_steps_does_not_change():
    whole = schedule(977, warmup_epochs=1e-4)
    assert [whole.position(step) for step in range(1000)] == list(range(1000))
