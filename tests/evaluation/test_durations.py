"""A task's duration is estimated before the task begins, with faster alternatives."""

from types import SimpleNamespace

import pytest
import torch

from m3ae_fast.base.pace import Pace
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation.finetune import FineTuningTask
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.labelled_task import LabelledTask
from m3ae_fast.evaluation.linear import ProbingTask
from m3ae_fast.heads.training_defaults import OFFICIAL, with_defaults


def _config(**sections):
    return EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}, **sections})


def test_the_duration_of_a_training_is_printed_once_after_a_few_steps():
    """The first two steps also wait for the loader to start. A resumed training counts only its own steps."""
    seconds, reported = [100.0], []
    schedule, log = SimpleNamespace(total_steps=50), SimpleNamespace(print=lambda text: None)
    task = SimpleNamespace(expected=False, expectation=lambda _, *pace: reported.append(pace) or [])
    pace = Pace(first=2, now=lambda: seconds[0])
    for step in range(21, 30):
        seconds[0] += 60 if step < 23 else 0.25
        pace.advance()
        LabelledTask._log_duration(task, SimpleNamespace(step=step, schedule=schedule, log=log, pace=pace))
    assert reported == [(0.25, 23)]


def _expectation(kind, pace, left, device="cpu", samples=1482, **sections):
    """Return the lines for a task with `left` remaining steps at `pace` seconds per step."""
    config = _config(**sections)
    complete = with_defaults(config, OFFICIAL[TASK_OF[kind]], samples, {})
    ranks = SimpleNamespace(device=torch.device(device))
    task = object.__new__(kind)
    task.start = SimpleNamespace(length_is_open=config.train.epochs is None and config.train.steps is None)
    schedule = Schedule(complete.train, complete.optim, samples)
    return task.expectation(SimpleNamespace(ranks=ranks, schedule=schedule), pace, left)


TASK_OF = {FineTuningTask: "finetune", ProbingTask: "linear"}
LONG = "note: this is a long time for a CPU; to reduce it: "


def test_the_duration_of_a_long_run_on_a_cpu_is_printed_with_a_shorter_alternative():
    first, note = _expectation(FineTuningTask, 1.0, 4001)
    assert first == "expected duration: 1:06:41 for 4,001 more steps, plus evaluations"
    assert note == (
        f"{LONG}--set train.epochs=26 (598 steps, with a lower accuracy), or the task logistic, which encodes "
        "each image once"
    )
    large = _expectation(FineTuningTask, 9.0, 78_000, samples=50_000)[1]
    assert large.startswith(f"{LONG}--set train.epochs=1 (781 steps")
    assert _expectation(ProbingTask, 1.0, 1001)[1] == f"{LONG}the task logistic, which encodes each image once"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FineTuningTask, {"device": "cuda"}),
        (FineTuningTask, {"train": {"epochs": 174}}),
        (FineTuningTask, {"train": {"steps": 4002}}),
        (ProbingTask, {"train": {"epochs": 90}}),
    ],
)
def test_with_a_given_length_or_a_gpu_only_the_duration_is_printed(kind, options):
    assert len(_expectation(kind, 1.0, 4001, **options)) == 1


def test_default_epochs_of_finetuning_equal_those_of_the_duration_message():
    assert OFFICIAL["finetune"].scaled(1482).epochs == 174 and OFFICIAL["finetune"].scaled(1_281_167).epochs == 100


@pytest.mark.parametrize(
    ("device", "pace", "is_noted"), [("cpu", 36.0, True), ("cpu", 1.0, False), ("cuda", 36.0, False)]
)
def test_a_shorter_alternative_to_a_long_task_on_a_cpu_is_printed_once(monkeypatch, device, pace, is_noted):
    notes, seconds = [], [0.0]
    monkeypatch.setattr("m3ae_fast.base.pace.time", SimpleNamespace(monotonic=lambda: seconds[0]))
    job = SimpleNamespace(ranks=SimpleNamespace(device=torch.device(device)), print=notes.append)
    whole = Job.pace(job, 100, shorter=lambda part: f"--set robustness.samples={int(1000 * part)}")
    for _ in range(5):
        seconds[0] += pace
        whole.advance()
    note = "note: the task takes about 0:58:48 on this CPU; to reduce the time: --set robustness.samples=170"
    assert notes == ([note] if is_noted else [])
