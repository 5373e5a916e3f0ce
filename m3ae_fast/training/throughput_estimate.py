"""Estimate of the duration of a run on this machine, from its pace: the time per sample and per update in a few
measured steps."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader

from m3ae_fast.base.pace import duration
from m3ae_fast.base.progress import working
from m3ae_fast.base.wording import counted
from m3ae_fast.config import Config
from m3ae_fast.engine.interface import Engine
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.process.session import Session
from m3ae_fast.process.stoppable_loop import Stopped
from m3ae_fast.training.device_clock import DeviceClock
from m3ae_fast.training.run import set_up
from m3ae_fast.training.trainer import Trainer

T = TypeVar("T")

# samples per step of the first trial, whose measured pace determines the batch size of the second trial
FIRST_BATCH = 8
_WARM = 2  # number of first steps that are excluded, because they include allocations and compilation
_FEWEST = 4  # minimum number of measured steps, unless a single step takes longer than the given time
# The rate is stable when the standard error of the mean step time, computed from the means of consecutive parts, is
# below this fraction of the mean.
_STABLE = 0.02
_PARTS, _OF_PART = 4, 4  # number of parts, and minimum number of steps per part
_CHECK_EVERY = 8  # number of steps between checks for stability; it grows with the number of steps
# fraction of the given time that is always used, even if the rate is stable, because the load of the machine varies
_LEAST = 1 / 4
# The time to evaluate a sample, as a fraction of the time that a training step without its update takes per sample. A
# step counts as three forward passes, because a backward pass takes about as long as two; an evaluation counts as two
# forward passes, although the second one, for the features, needs only the encoder.
_EVALUATED = 2 / 3


@dataclass(frozen=True)
class ThroughputEstimate:
    """The time per sample and the time per update, measured over a few steps, from which the duration of a run is
    estimated."""

    sample: float  # seconds per sample, without the update
    batch: int  # samples per measured step
    steps: int  # number of measured steps
    error: float = math.inf  # standard error of `sample`, as a fraction of it; infinite if there were too few steps
    update: float = 0.0  # seconds per update of the weights, which do not depend on the number of samples
    data_wait: float = 0.0  # fraction of the time that the steps waited for data, on the rank that waits longest

    def step(self, batch: int) -> float:
        """Return the seconds of a step with `batch` samples."""
        return self.update + batch * self.sample

    def rate(self, batch: int) -> str:
        """Return the throughput with `batch` samples per step, with its standard error if that is known."""
        rate = batch / self.step(batch)
        digits = 0 if rate >= 10 else 2
        without_update = batch * self.sample / self.step(batch)  # fraction of the step to which `error` applies
        error = f" ± {rate * without_update * self.error:,.{digits}f}" if math.isfinite(self.error) else ""
        return f"{rate:,.{digits}f}{error} samples/s, measured over {counted(self.steps, 'step')}"

    def seconds(self, config: Config, schedule: Schedule) -> float:
        """Return the duration of the whole run in seconds: its steps and its evaluations on held-out samples."""
        evaluations = 1 + schedule.total_steps // (config.train.eval_every or schedule.total_steps)
        steps = schedule.total_steps * self.step(config.train.global_batch)
        return steps + (evaluations * self.evaluation(config.train.eval_samples) if config.data.val else 0)

    def evaluation(self, samples: int) -> float:
        """Return the duration of an evaluation on `samples` held-out samples, in seconds."""
        return samples * _EVALUATED * self.sample

    def sentence(self, config: Config, schedule: Schedule) -> str:
        """Return a sentence on the estimated duration of the run and on the measurement."""
        step = self.step(config.train.global_batch)
        same = self.batch == config.train.global_batch
        scaled = "" if same else f" of {self.batch} samples, scaled to the full batch"
        whole, steps = duration(self.seconds(config, schedule)), schedule.total_steps
        adjusted = "; train.hours adjusts the number of steps" if config.train.hours else ""
        measured = f"measured over {counted(self.steps, 'step')}{scaled}"
        return f"{whole} on this machine: {counted(steps, 'step')} of {step:.3g} s, {measured}{adjusted}"


def measure(config: Config, session: Session, seconds: float) -> ThroughputEstimate:
    """Return the pace of a run. It is measured by taking steps without output until their rate is stable or the time
    is over. Every rank must call this function.

    A small batch is measured first, for at most about a quarter of `seconds`. Then, a batch as large as the time
    allows, up to train.global_batch, is measured for at most about `seconds`, unless it would be less than twice as
    large as the first one. The precision of `config` must be resolved. The time for opening the data is not included.
    Raises the same UserErrors as the start of the run, and Stopped if a rank is asked to stop.
    """
    whole = config.train.global_batch
    pace = measure_batch(config, session, max(min(FIRST_BATCH, whole), session.ranks.world), seconds / 4)
    fitting = min(whole, int((seconds / (_WARM + _FEWEST) - pace.update) / pace.sample))
    return pace if fitting < 2 * pace.batch else measure_batch(config, session, fitting, seconds)


def measure_batch(config: Config, session: Session, batch: int, seconds: float) -> ThroughputEstimate:
    """Return the pace of steps with `batch` samples, measured for about `seconds`. Every rank must call this function.
    Raises the same errors as `measure`."""
    with (
        working(f"measuring steps of {counted(batch, 'sample')}", show=session.ranks.is_main),
        tempfile.TemporaryDirectory() as folder,
    ):
        nowhere = config.run.model_copy(update={"dir": Path(folder) / "run", "loggers": []})
        changes: dict[str, Any] = {
            "global_batch": batch,
            "steps": 1 << 30,
            "epochs": None,
            "hours": None,
        }
        short = config.model_copy(update={"run": nowhere, "train": config.train.model_copy(update=changes)})
        trainer = set_up(short, "no", session, None)
        with closing(step_times(trainer)) as times:
            steps, taken, began, ahead = [], [], time.perf_counter(), batches_ahead(trainer)
            for each in times:
                steps.append(each)
                taken.append(each.whole)
                spent, enough = time.perf_counter() - began, _WARM + (_FEWEST if each.whole < seconds else 1)
                stable = spent > _LEAST * seconds and _stable(taken, ahead)
                if session.ranks.from_main(stable or (spent > seconds and len(taken) >= enough)):
                    break
        settled = _settled(steps)
        # The time of an update, which is long with Muon, does not depend on the batch size, so it must not be scaled to
        # other batch sizes.
        others = [step.whole - step.update for step in settled]
        update = fmean(step.update for step in settled)
        mean, error, update = session.ranks.from_main((fmean(others), _error(others), update))
        waited = sum(step.waited for step in settled) / sum(step.whole for step in settled)
        data_wait = max(session.ranks.gather(waited))
        pace = ThroughputEstimate(mean / batch, batch, len(settled), error, update, data_wait)
    del trainer
    gc.collect()  # frees the weights and loaders of the trainer
    return pace


def batches_ahead(trainer: Trainer) -> int:
    """Return the number of steps whose batches are loaded before the first step."""
    loader = trainer.train_loader
    assert isinstance(loader, DataLoader)
    return loader.num_workers * (loader.prefetch_factor or 0) // trainer.share.accumulation


def _settled(steps: Sequence[T]) -> Sequence[T]:
    """Return the steps that count: the later half of the steps after the warm-up. By then, the batches loaded in
    advance have been used up."""
    return steps[_WARM:][len(steps[_WARM:]) // 2 :]


def _stable(times: Sequence[float], ahead: int) -> bool:
    """Return whether enough steps were taken for a stable rate. The first `ahead` steps, whose batches were loaded in
    advance, do not count."""
    often = max(_CHECK_EVERY, 1 << max(len(times).bit_length() - 4, 0))
    if len(times) % often or len(times) < _WARM + 2 * ahead:
        return False
    settled = _settled(times)
    return len(settled) >= _PARTS * _OF_PART and _error(settled) < _STABLE


def _error(times: Sequence[float]) -> float:
    """Return the relative standard error of the mean of step times; infinite if there are fewer steps than parts.
    Consecutive steps are not independent, but the means of long parts are nearly independent."""
    each = len(times) // _PARTS
    if not each:
        return math.inf
    means = [fmean(times[part * each : (part + 1) * each]) for part in range(_PARTS)]
    return stdev(means) / math.sqrt(_PARTS) / fmean(means)


class StepTime(NamedTuple):
    """The duration of a step in seconds."""

    whole: float  # including the wait for data and an update
    update: float  # on a GPU, that of the previous step, because an update runs after the call of its step has returned
    waited: float  # wait for data


def step_times(trainer: Trainer) -> Generator[StepTime, None, None]:
    """Take steps, and yield their durations. Raises Stopped if a rank is asked to stop."""
    updates = _UpdateTimer(trainer.engine, trainer.ranks.device)
    began = time.perf_counter()
    for inputs, counts in trainer.inputs():
        _, grad_norm = trainer.take_step(inputs, counts)
        updates.end()
        float(grad_norm)  # waits until the GPU has computed the gradients
        now = time.perf_counter()
        yield StepTime(now - began, updates.last(), inputs.waited)
        began = now
    raise Stopped


class _UpdateTimer:
    """Measurement of the duration of an engine's updates: the time from `before_update` to the end of a step."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._before, engine.before_update = engine.before_update, self._begin
        self._began: Any = None
        self._updates: list[tuple[Any, Any]] = []

    def _begin(self) -> None:
        self._before()
        self._began = self._clock.now()

    def end(self) -> None:
        """Record the end of an update. It must be called after each step."""
        self._updates = [*self._updates[-1:], (self._began, self._clock.now())]

    def last(self) -> float:
        """Return the duration in seconds of the last update that has finished. Call this after the gradients of a step
        have been computed. On a GPU, this is the update of the previous step; before the second step, the result is
        0."""
        complete = self._updates[:-1] if self._clock.on_gpu else self._updates[-1:]
        return sum(self._clock.seconds(began, ended) for began, ended in complete)
