"""A task's duration is estimated before the task begins, with faster alternatives."""

from types import SimpleNamespace

import pytest
import torch

from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation import expected_duration, labelled_task
from m3ae_fast.evaluation.default_hyperparameters import OFFICIAL, with_defaults
from m3ae_fast.evaluation.finetune import FineTuningTask
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.labelled_task import LabelledTask
from m3ae_fast.evaluation.linear import ProbingTask
from m3ae_fast.evaluation.probes import Setting, attentive_recipe
from m3ae_fast.evaluation.stacked_optimizers import AdamW
from m3ae_fast.process.ranks import join_ranks
from tests.evaluation.test_hyperparameter_choice import _Heartbeats


def _config(**sections):
    return EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}, **sections})


def _setting(ranks, **sections):
    return Setting(_config(**sections), 3, 2, 0, ranks, _Heartbeats())


@pytest.fixture
def clock(monkeypatch):
    """Simulate a clock that advances only with the steps of a probe, each of which takes 0.01 seconds."""
    seconds, real = [0.0], AdamW.step

    def slow(optimizer):
        seconds[0] += 0.01
        return real(optimizer)

    monkeypatch.setattr(AdamW, "step", slow)
    monkeypatch.setattr(expected_duration, "perf_counter", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize("samples", [30, 1000])
def test_the_estimated_duration_of_a_probe_is_that_of_its_steps(clock, samples):
    with join_ranks() as ranks:
        setting, tokens = _setting(ranks), (3, 4)
        steps = attentive_recipe(samples, setting).steps
        found = expected_duration.seconds(samples, [tokens], setting)
        assert found == pytest.approx(2 * 0.01 * steps), "five rates are tried at once, and then one is taken"
        given = _setting(ranks, attentive={"peak_lr": 1e-3, "steps": 50})
        for shapes in ([tokens], [tokens, (4,)]):
            found = expected_duration.seconds(samples, shapes, given)
            assert found == pytest.approx(len(shapes) * 0.01 * 50)


def test_one_slow_step_is_enough_to_estimate_the_duration(clock, monkeypatch):
    real = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda *given: clock.__setitem__(0, clock[0] + 2) or real(*given))
    with join_ranks() as ranks:
        given = _setting(ranks, attentive={"peak_lr": 1e-3, "steps": 50})
        assert expected_duration.seconds(100, [(3, 4)], given) == pytest.approx(2.01 * 50) and clock[0] < 3


def test_the_training_speed_is_measured_after_the_first_step(monkeypatch):
    """The first step also waits for the loader to start. A resumed training counts only its own steps."""
    seconds, reported = [100.0], []
    monkeypatch.setattr(labelled_task.time, "perf_counter", lambda: seconds[0])
    schedule, log = SimpleNamespace(total_steps=50), SimpleNamespace(print=lambda text: None)
    task = SimpleNamespace(expected=False, first=0.0, expectation=lambda _, *pace: reported.append(pace) or [])
    for step in range(20, 30):
        trainer = SimpleNamespace(step=step, start=20, schedule=schedule, log=log)
        LabelledTask._log_duration(task, trainer)
        seconds[0] += 60 if step == 20 else 0.25
    assert reported == [(0.25, 24)]


def _expectation(kind, pace, left, device="cpu", samples=1482, **sections):
    """Return the lines for a task with `left` remaining steps at `pace` seconds per step."""
    config = _config(**sections)
    section = with_defaults(getattr(config, SECTIONS[kind]), samples, {})
    ranks = SimpleNamespace(device=torch.device(device))
    task = object.__new__(kind)
    task.job = SimpleNamespace(config=config)
    return task.expectation(SimpleNamespace(ranks=ranks, schedule=Schedule(section, section, samples)), pace, left)


SECTIONS = {FineTuningTask: "finetune", ProbingTask: "linear"}
LONG = "note: this is a long time for a CPU; to reduce it: "


def test_the_duration_of_a_long_run_on_a_cpu_is_printed_with_a_shorter_alternative():
    first, note = _expectation(FineTuningTask, 1.0, 4001)
    assert first == "expected duration: 1:06:41 for 4,001 more steps, plus evaluations"
    assert note == (
        f"{LONG}--set finetune.epochs=26 (598 steps, with a lower accuracy), or the task logistic, which encodes "
        "each image once"
    )
    large = _expectation(FineTuningTask, 9.0, 78_000, samples=50_000)[1]
    assert large.startswith(f"{LONG}--set finetune.epochs=1 (781 steps")
    assert _expectation(ProbingTask, 1.0, 1001)[1] == f"{LONG}the task logistic, which encodes each image once"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FineTuningTask, {"device": "cuda"}),
        (FineTuningTask, {"finetune": {"epochs": 174}}),
        (FineTuningTask, {"finetune": {"steps": 4002}}),
        (ProbingTask, {"linear": {"epochs": 90}}),
    ],
)
def test_with_a_given_length_or_a_gpu_only_the_duration_is_printed(kind, options):
    assert len(_expectation(kind, 1.0, 4001, **options)) == 1


def test_default_epochs_of_finetuning_equal_those_of_the_duration_message():
    assert OFFICIAL["finetune"].scaled(1482).epochs == 174 and OFFICIAL["finetune"].scaled(1_281_167).epochs == 100


@pytest.mark.parametrize(
    ("device", "pace", "is_noted"), [("cpu", 36.0, True), ("cpu", 1.0, False), ("cuda", 36.0, False)]
)
def test_a_shorter_alternative_to_a_long_task_on_a_cpu_is_printed_once(device, pace, is_noted):
    notes = []
    job = SimpleNamespace(ranks=SimpleNamespace(device=torch.device(device)), print=notes.append)
    left = Job.time_left(job, 100, shorter=lambda part: f"--set robustness.samples={int(1000 * part)}")
    left.during(1, pace)
    left.during(2, pace)
    note = "note: the task takes about 0:59:24 on this CPU; to reduce the time: --set robustness.samples=168"
    assert notes == ([note] if is_noted else [])


def test_the_duration_of_a_long_training_is_printed_before_encoding():
    notes = []
    job = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cpu")), print=notes.append)
    Job.time_left(job, 100, 3600, shorter=lambda _: "--seeds 1").during(50, 1.0)
    assert notes == ["note: the task takes about 1:00:00 on this CPU; to reduce the time: --seeds 1"]
    quick = Job.time_left(job, 100, 600, shorter=lambda _: "--seeds 1")
    assert len(notes) == 1
    quick._now = lambda now=quick._now: now() + 1000  # the first of two parts took that long
    quick.after(50)
    assert notes[1:] == ["note: the task takes about 0:26:40 on this CPU; to reduce the time: --seeds 1"]
