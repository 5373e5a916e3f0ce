"""How long a run takes on this machine, measured by some of its steps."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from m3ae_fast.config import Config
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.process.program import Session
from m3ae_fast.process.stopping import Stopped
from m3ae_fast.progress import duration
from m3ae_fast.run.run import Run

FIRST_BATCH = 8  # samples of the first trial, which says how many the second one may have
_WARM = 2  # steps that are not counted: memory is touched, kernels are made
_FEWEST, _MOST = 4, 50  # steps that are, unless one takes as long as all should
_EVALUATED = 2 / 3  # of a step's time for an evaluated sample: two forward passes, none backward


@dataclass(frozen=True)
class Pace:
    """Tells how long a run takes, by the time for a sample that some steps took."""

    sample: float  # seconds, as a part of its step
    batch: int  # samples of the steps that were timed
    steps: int  # that were timed

    def seconds(self, config: Config, schedule: Schedule) -> float:
        """Return how long the whole run takes: steps and evaluations on held-out samples."""
        evaluations = 1 + schedule.total_steps // (config.train.eval_every or schedule.total_steps)
        evaluated = evaluations * config.train.eval_samples * _EVALUATED if config.data.val else 0
        return (schedule.total_steps * config.train.global_batch + evaluated) * self.sample

    def sentence(self, config: Config, schedule: Schedule) -> str:
        """Return how long the run takes, and how that is known."""
        step = self.sample * config.train.global_batch
        scaled = "" if self.batch == config.train.global_batch else f" of {self.batch} samples, scaled"
        whole, steps = duration(self.seconds(config, schedule)), schedule.total_steps
        return f"{whole} on this machine: {steps:,} steps of {step:.3g} s, measured by {self.steps}{scaled}"


def measure(config: Config, session: Session, seconds: float) -> Pace:
    """Take steps of a run that leaves nothing behind, for about `seconds`. Every rank must call it.

    A small batch comes first; then as large a one as the time allows, up to the config's, whose precision is settled.
    Opening the data comes before. Raises UserError as the run would at its start, Stopped where a rank is to stop.
    """
    whole = config.train.global_batch
    pace = _trial(config, session, max(min(FIRST_BATCH, whole), session.ranks.world), seconds / 4)
    fitting = min(whole, int(seconds / (_WARM + _FEWEST) / pace.sample))
    return pace if fitting < 2 * pace.batch else _trial(config, session, fitting, seconds)


def _trial(config: Config, session: Session, batch: int, seconds: float) -> Pace:
    """Measure steps of `batch` samples."""
    with tempfile.TemporaryDirectory() as folder:
        nowhere = config.run.model_copy(update={"dir": Path(folder) / "run", "loggers": []})
        changes = {"global_batch": batch, "steps": 1 << 30, "epochs": None}
        short = config.model_copy(update={"run": nowhere, "train": config.train.model_copy(update=changes)})
        run = Run.set_up(short, "no", session, None)
        with closing(_times(run)) as times:
            taken, began = [], time.perf_counter()
            for each in times:
                taken.append(each)
                spent, enough = time.perf_counter() - began, _WARM + (_FEWEST if each < seconds else 1)
                if session.ranks.from_main(len(taken) == _MOST or (spent > seconds and len(taken) >= enough)):
                    break
        counted = taken[_WARM:][len(taken[_WARM:]) // 2 :]  # the later half: what was loaded ahead is used up
        pace = Pace(session.ranks.from_main(sum(counted) / len(counted) / batch), batch, len(counted))
    del run
    gc.collect()  # its weights and loaders go now
    return pace


def _times(run: Run) -> Generator[float, None, None]:
    """Take steps, and yield the seconds of each, its wait for data included."""
    began = time.perf_counter()
    for inputs in run.inputs():
        counts = run.step_counts(inputs)
        if counts is None:
            raise Stopped
        batches = [run.with_targets(batch) for batch in inputs.device]
        _, grad_norm = run.engine.step(batches, counts, run.schedule.lr(run.step))
        float(grad_norm)  # waits for the GPU
        run.step += 1
        now = time.perf_counter()
        yield now - began
        began = now
