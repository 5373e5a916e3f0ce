"""Choice of the largest model that the data and the available time allow, and of its number of steps. It is based on
the pace of each size (see `ThroughputEstimate`), which is measured on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from m3ae_fast.base.hardware import missing_memory, resolve_precision
from m3ae_fast.base.pace import duration
from m3ae_fast.config import LONGEST, Config
from m3ae_fast.engine.memory_estimate import memory_needed
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.heads.pool_choice import MOST_SAMPLES
from m3ae_fast.pretraining import automatic_settings
from m3ae_fast.pretraining.automatic_settings import DatasetStatistics, Inputs
from m3ae_fast.pretraining.model_sizes import MODEL_SIZES, ModelSize
from m3ae_fast.process.session import Session
from m3ae_fast.training.teacher import open_teacher
from m3ae_fast.training.throughput_estimate import ThroughputEstimate, measure

# maximum time for measuring a model size: as a fraction of the available time, and in seconds
_TRIAL, _LONGEST_TRIAL = 0.02, 30.0
_LEAST = 0.5  # minimum fraction of the available time that is used for training
_OVER = 1.05  # a plan is reported as too long if it takes more than the available time times this factor
_EVALUATING = 0.05  # maximum fraction of the training time for evaluations between the first and the last step
# seconds to start the loaders of an evaluation, to start a task, and to write the report and the export
_START, _TASK, _REPORT = 1.5, 2.0, 5.0
# Seconds that logistic regressions with all penalties take for each training sample, class and feature, on two CPU
# cores and on a GPU. One core took 2e-7 s with 4,500 samples, 10 classes and 128 or 512 features.
_REGRESSION = {"cpu": 1e-7, "cuda": 1e-9}
# Typical numbers of features: of a network in all poolings together, from which one pooling is chosen; of a network in
# the chosen pooling; of the baselines without a network; and of the run and HOG together.
_POOLINGS, _CHOSEN, _WITHOUT, _TOGETHER = 4000, 2000, 1500, 3000
# Number of passes over the images: for the run, for random weights, and for features without a network. Number of these
# passes that belong to the baselines, which are evaluated together with the run. Number of tasks: k-NN and logistic
# regression.
_MODELS, _BASELINES, _TASKS = 3, 2, 2


@dataclass(frozen=True)
class Plan:
    """The chosen config with explanations for the user."""

    config: Config
    lines: list[str]
    warning: str = ""  # warning that the available time is too short to learn much


class Budget:
    """The division of the available time between the parts of a call of `pretrain`."""

    def __init__(
        self,
        statistics: DatasetStatistics,
        probed: bool,
        hours: float,
        began: float,
        models: int = _MODELS,
        device: str = "cpu",
    ) -> None:
        """Create the budget.

        Args:
            statistics: statistics of the samples.
            probed: whether the features are probed during and after training.
            hours: hours for the whole call.
            began: value of `time.monotonic` at the beginning of the call.
            models: number of models that are evaluated after training.
            device: type of the device, "cpu" or "cuda".
        """
        self._models, self._device = models, device
        self.statistics, self._probed, self.seconds, self._began = statistics, probed, 3600 * hours, began

    def spent(self) -> float:
        """Return the seconds since the call began."""
        return time.monotonic() - self._began

    def after(self, pace: ThroughputEstimate) -> float:
        """Return the estimated seconds for everything after training."""
        if not self._probed:
            return _REPORT
        calls = (self._models - _BASELINES) * (_TASKS * _TASK + _START)
        encoding = self._features(pace) - _START
        return calls + self._models * encoding + self.regressions() + _REPORT

    def regressions(self) -> float:
        """Return the estimated seconds of all logistic regressions: those that choose the pooling of each model, those
        that evaluate the models, and those on features without a network, alone or with the features of the run."""
        samples, networks = self.statistics.samples, self._models - 1
        fitted = networks * (min(samples, MOST_SAMPLES) * _POOLINGS + samples * _CHOSEN)
        fitted += samples * (_WITHOUT + _TOGETHER)
        return _REGRESSION[self._device] * self.statistics.classes * fitted

    def training(self, pace: ThroughputEstimate) -> float:
        """Return the seconds that are left for training and its evaluations."""
        return max(self.seconds - self.spent() - self.after(pace), _LEAST * self.seconds)

    def ends(self, pace: ThroughputEstimate) -> float:
        """Return the estimated seconds for the evaluations before the first step and after the last."""
        probe = self._features(pace) if self._probed else 0.0
        return 2 * (self._losses(pace) + probe)

    def evaluations(self, pace: ThroughputEstimate) -> tuple[int, float]:
        """Return the number of evaluations between the first step and the last, and the estimated seconds for them."""
        probe = self._features(pace) if self._probed and self.statistics.samples <= automatic_settings.PROBED else 0.0
        each = self._losses(pace) + probe
        count = min(automatic_settings.EVALUATIONS, int(_EVALUATING * self.training(pace) / each)) if each else 0
        return count, count * each

    def steps_time(self, pace: ThroughputEstimate) -> float:
        """Return the seconds that are available for training steps."""
        left = self.training(pace) - self.ends(pace) - self.evaluations(pace)[1]
        return max(left, _LEAST * self.training(pace))

    def _losses(self, pace: ThroughputEstimate) -> float:
        held_out = self.statistics.held_out
        return _START + pace.evaluation(min(held_out, automatic_settings.EVALUATED)) if held_out else 0.0

    def _features(self, pace: ThroughputEstimate) -> float:
        """Return the estimated seconds to compute the features of all samples. A forward pass over all patches takes
        about as long as the forward and backward pass of a training step, in which only the visible patches are
        encoded."""
        return _START + (self.statistics.samples + self.statistics.held_out) * pace.sample


def evaluated_models(overrides: Sequence[str]) -> int:
    """Return the number of models that are evaluated after training. They include the given weights from which the run
    starts and its teacher, if there are any."""
    has_teacher = automatic_settings.set_to(overrides, "loss.teacher", None) is not None
    return _MODELS + automatic_settings.continues(overrides) + has_teacher


def choose(inputs: Inputs, hours: float, session: Session, began: float) -> Plan:
    """Return the plan of a run that fits into the available time.

    Args:
        inputs: the samples, paths and overrides of the run.
        hours: hours for the whole call.
        session: session of the ranks.
        began: value of `time.monotonic` at the beginning of the call.

    Raises:
        UserError: an override is invalid, or the run could not start with the chosen config.
        Stopped: a stop is requested.
    """
    statistics, overrides = inputs.statistics, inputs.overrides

    def config_of(
        size: ModelSize,
        batch: int,
        steps: int,
        time_limit: float | None = None,
        evaluations: int = automatic_settings.EVALUATIONS,
    ) -> Config:
        return automatic_settings.settings(inputs, size, batch, steps, hours=time_limit, evaluations=evaluations)

    allowed = automatic_settings.possible(
        automatic_settings.model_sizes(statistics, overrides),
        lambda size: config_of(size, automatic_settings.SMALLEST_BATCH, 1),
    )

    def measured(size: ModelSize) -> ThroughputEstimate:
        config = config_of(size, automatic_settings.batch_of(statistics.samples), 1)
        resolved = config.model_copy(update={"train": resolve_precision(config.train, session.ranks.device)})
        return measure(resolved, session, min(_TRIAL * budget.seconds, _LONGEST_TRIAL))

    probed = config_of(allowed[0], automatic_settings.SMALLEST_BATCH, 1).train.probe is not None
    continues = automatic_settings.continues(overrides)
    budget = Budget(statistics, probed, hours, began, evaluated_models(overrides), session.ranks.device.type)

    def fitted_batch(pace: ThroughputEstimate) -> int:
        fitted = automatic_settings.fitted_batch(budget.steps_time(pace), pace.step, statistics.samples)
        return automatic_settings.given(overrides, "train.global_batch") or fitted

    def lacking(size: ModelSize) -> str:
        smallest = automatic_settings.SMALLEST_BATCH
        config = config_of(size, smallest, 1)
        teacher = open_teacher(config)
        own = teacher.bytes + teacher.pass_bytes(smallest) if teacher else 0.0
        return missing_memory(memory_needed(config, 1, smallest) + own, session.ranks.device)

    size, pace, why = _largest_fitting(allowed, lacking, measured, fitted_batch, budget)
    if not why:
        why = "the size of the given weights" if continues else _why_not_larger(statistics)
    batch, seconds, (evaluations, _) = fitted_batch(pace), budget.steps_time(pace), budget.evaluations(pace)
    samples = automatic_settings.samples_per_epoch(statistics, overrides)
    steps = automatic_settings.steps_in(seconds, pace.step(batch), batch, samples)
    time_limit = max(round(budget.training(pace) / 3600, 5), 1e-5)
    config = config_of(size, batch, steps, time_limit, evaluations)
    return Plan(config, _lines(config, budget, size, why, pace), _warning(config, budget, pace))


def _largest_fitting(
    allowed: Sequence[ModelSize],
    lacking: Callable[[ModelSize], str],
    measured: Callable[[ModelSize], ThroughputEstimate],
    fitted_batch: Callable[[ThroughputEstimate], int],
    budget: Budget,
) -> tuple[ModelSize, ThroughputEstimate, str]:
    """Return the largest model size that fits into memory and can be trained long enough in the available time; its
    measured pace; and the reason why the next larger size is not chosen ("" if there is no larger size).

    Args:
        allowed: sizes to choose from, smallest first. The first is chosen if no other fits.
        lacking: function that returns a description of the memory that is missing for a size; "" if it fits.
        measured: function that measures the pace of a size.
        fitted_batch: function that returns the number of samples per step for a pace.
        budget: the division of the available time.
    """
    statistics = budget.statistics
    size, pace = allowed[0], measured(allowed[0])
    for larger in allowed[1:]:
        if missing := lacking(larger):
            return size, pace, f'"{larger.name}" does not fit into memory: {missing}'
        other = measured(larger)
        batch = fitted_batch(other)
        seen = budget.steps_time(other) / other.step(batch) * batch
        if not automatic_settings.reaches(seen, statistics.samples):
            return size, pace, _too_slow(larger, seen, statistics)
        size, pace = larger, other
    return size, pace, ""


def _why_not_larger(statistics: DatasetStatistics) -> str:
    """Return the reason why no larger model size is considered for this number of samples."""
    above = [size for size in MODEL_SIZES if size.samples > statistics.samples]
    if not above:
        return "there is no larger size"
    return f'"{above[0].name}" requires {above[0].samples:,.0f} samples or more'


def _too_slow(size: ModelSize, seen: float, statistics: DatasetStatistics) -> str:
    """Return the reason, as text for the user, why a model size is too slow for the available time. `seen`: number of
    samples, counted in every epoch, on which it would be trained."""
    epochs = seen / statistics.samples
    return (
        f'"{size.name}" is too slow: in the available time, it would see {seen:,.0f} images '
        f"({epochs:,.{0 if epochs >= 10 else 1}f} epochs), but must see at least "
        f"{automatic_settings.SEEN:,} images and {automatic_settings.EPOCHS} epochs to be chosen"
    )


def _lines(config: Config, budget: Budget, size: ModelSize, why: str, pace: ThroughputEstimate) -> list[str]:
    m, statistics = config.model, budget.statistics
    kind = "captions are not used" if statistics.has_captions else "no captions"
    if statistics.vocab_size and m.vocab_size:
        kind = f"captions of up to {m.text_length} tokens (vocabulary: {m.vocab_size:,})"
    elif not m.vocab_size:
        kind += ": image-only"
    flips = (
        "flips: half of the images are flipped; if this changes their meaning (text, arrows), use --set data.flip=false"
    )
    return [
        f"data: {statistics.samples:,} samples and {statistics.held_out:,} held out; {kind}; "
        + (f"{statistics.classes} classes" if statistics.classes else "no classes"),
        f'model: "{m.size or size.name}", width {m.emb_dim}, depth {m.depth}, images of {m.image_size} px (median '
        f"short side of the files: {statistics.short_side} px) in patches of {m.patch_size} px; {why}",
        *_length(config, budget, pace),
        *[flips][: config.data.flip],
    ]


def _schedule(config: Config, statistics: DatasetStatistics) -> Schedule:
    """Return the schedule with which the run will start."""
    return Schedule(config.train, config.optim, statistics.samples * config.data.repeats)


def _length(config: Config, budget: Budget, pace: ThroughputEstimate) -> list[str]:
    """Return lines about the length of the run and the expected end."""
    schedule, batch = _schedule(config, budget.statistics), config.train.global_batch
    steps = schedule.total_steps
    epochs = steps / schedule.steps_per_epoch
    capped = epochs == LONGEST
    training = steps * pace.step(batch) + budget.ends(pace) + _between(config, schedule, budget, pace)
    after = budget.after(pace)
    end = datetime.now() + timedelta(seconds=training + after)
    adjusted = config.train.hours is not None and not capped
    limit = f"--hours {budget.seconds / 3600:g}"
    over = budget.spent() + training + after > _OVER * budget.seconds
    return [
        f"length: {steps:,} steps of {batch} samples, {epochs:,.{0 if epochs >= 10 else 1}f} epochs"
        + (f"; the maximum is {LONGEST} epochs" if capped else "")
        + ("; the number of steps is adjusted to the available time during training" if adjusted else ""),
        f"time: {duration(training)} for training at {pace.rate(batch)}, {duration(after)} for later stages; done at "
        f"about {end:%a %H:%M}" + (f", later than {limit} allows" if over else f" ({limit})"),
    ]


def _between(config: Config, schedule: Schedule, budget: Budget, pace: ThroughputEstimate) -> float:
    """Return the estimated seconds for the evaluations between the first step and the last, given the intervals in the
    config."""
    count, seconds = budget.evaluations(pace)
    every = config.train.eval_every
    return (schedule.total_steps - 1) // every * seconds / count if every and count else 0.0


def _warning(config: Config, budget: Budget, pace: ThroughputEstimate) -> str:
    """Return a warning if the run is too short to learn much, including the number of hours that would be enough.
    Return "" otherwise, or if the user has set the length."""
    schedule, batch = _schedule(config, budget.statistics), config.train.global_batch
    steps, enough = schedule.total_steps, max(automatic_settings.LEARNING_STEPS, schedule.steps_per_epoch)
    if config.train.hours is None or steps >= enough:
        return ""
    steps_time = enough * pace.step(batch) / (1 - _EVALUATING)
    needed = budget.spent() + steps_time + budget.ends(pace) + budget.after(pace)
    start = "the initial weights" if config.model.init_from else "random weights"
    return (
        f"{steps:,} steps, {steps / schedule.steps_per_epoch:.2g} epochs: the features will hardly differ from those "
        f"of {start}; set --hours to at least {_rounded_up(needed / 3600):g}"
    )


def _rounded_up(value: float) -> float:
    """Return the value rounded up to two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit) * unit, 10)
