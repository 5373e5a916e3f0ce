"""What the linear probe and fine-tuning have in common as tasks of the trainer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from m3ae_fast.base.bad_samples import BadSamples
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import duration
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.checkpoint.resuming import Resume, Rules, require_same
from m3ae_fast.config.evaluation import FineTuneConfig, LinearProbeConfig
from m3ae_fast.data import Corpus, Data, Layout, Share
from m3ae_fast.data.dataset import Transform
from m3ae_fast.data.fingerprint import fingerprint
from m3ae_fast.data.labels import Classes
from m3ae_fast.drawing.figures import draw_training
from m3ae_fast.engine.interface import Engine
from m3ae_fast.engine.schedule import Schedule, split_batch
from m3ae_fast.evaluation.default_hyperparameters import OFFICIAL, C, Official, chosen, settled
from m3ae_fast.evaluation.job import LONG_S, SHORT_S, Columns, Job, SoFar
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.significance import ERROR
from m3ae_fast.training.metrics_log import read_metrics
from m3ae_fast.training.throughput import SampleCounts, SampleRate
from m3ae_fast.training.trainer import Trainer

_TIMED, _SOON_S = 5, 2.0  # steps after the first that are timed, and seconds after which fewer will do
_RISE = 0.02  # of training accuracy, that is worth a word


class ClassLosses(NamedTuple):
    """0-d float32 tensors; `loss` is what to differentiate."""

    loss: Tensor
    accuracy: Tensor  # by the likeliest class of the mixed labels


@dataclass(kw_only=True)
class LabelledTask(ABC):
    """Counts samples, evaluates the accuracy, and keeps the predictions of the last evaluation."""

    job: Job
    settings: LinearProbeConfig | FineTuneConfig
    classes: Classes
    notes: list[str] = field(default_factory=list)  # differences from the run that is resumed

    def __post_init__(self) -> None:
        self.predictions: Predictions | None = None  # the last evaluation's
        self.evaluated_at, self.expected = 0, False  # step of that; whether the duration was logged
        self.first = 0.0  # when the first step ended

    def count(self, batches: list[PackedBatch]) -> SampleCounts:
        return SampleCounts.of(batches)

    def describe(self, trainer: Trainer) -> list[str]:
        return [self.first_line(trainer), *(f"note: {note}" for note in self.notes)]

    def evaluate(self, trainer: Trainer) -> None:
        """Log how long the run takes, once a few steps have shown it; evaluate if that is due, between the first step
        and the last."""
        self._log_duration(trainer)
        if 0 < trainer.step < trainer.schedule.total_steps and self.is_due(trainer):
            self.conclude(trainer)

    @abstractmethod
    def first_line(self, trainer: Trainer) -> str:
        """Return a line that describes the run."""

    @abstractmethod
    def is_due(self, trainer: Trainer) -> bool:
        """Return whether an evaluation is due between the first step and the last. Every rank must call it."""

    @abstractmethod
    def conclude(self, trainer: Trainer) -> dict[str, Any] | None:
        """Return, and log, accuracies on all held-out samples; None if a rank is asked to stop."""

    @abstractmethod
    def length_is_open(self) -> bool:
        """Return whether the length of the run follows from the number of samples: none is given."""

    @abstractmethod
    def shorter(self, trainer: Trainer, steps: float) -> str:
        """Return options for a shorter run: about this many steps, or another way to the result."""

    @abstractmethod
    def save_classifier(self, trainer: Trainer) -> None:
        """Write the trained classifier into the run's folder. Every rank must call it."""

    def cautions(self, trainer: Trainer) -> list[str]:
        """Return the warnings about the reliability of the result, one line each. Main rank only."""
        lines = []
        with suppress(UserError):  # no metrics are left
            lines = read_metrics(trainer.run.dir)
        section, steps, batch = self.settings.SECTION, trainer.schedule.total_steps, trainer.share.global_batch
        return cautions(section, f"{section}.epochs", steps, OFFICIAL[section], lines, batch)

    def evaluated(self, trainer: Trainer, predictions: Predictions) -> dict[str, float]:
        """Keep predictions of all held-out samples, and return their accuracies, which are logged too."""
        self.predictions, self.evaluated_at = predictions, trainer.step
        values = predictions.accuracies()
        logged = {f"val_{name}": value for name, value in values.items() if not name.endswith(ERROR)}
        trainer.log.log(trainer.step, logged)
        return values

    def complete(self, trainer: Trainer, val_samples: int) -> dict[str, Any] | None:
        """Train, save the classifier, keep its predictions. Return the result; None if the run was stopped."""
        job, result = self.job, trainer.train()
        if result is None:
            rerun = "--resume auto continues"
            job.ranks.on_main(lambda: job.say(job.write_partial(self.so_far(trainer), rerun)))
            return None
        self.save_classifier(trainer)
        assert self.predictions is not None
        job.keep(self.predictions.columns(self.classes))
        job.pictures.append(lambda: self.draw(trainer))
        found = job.ranks.broadcast(lambda: self.cautions(trainer))
        for caution in found:
            job.say(f"note: {caution}")
        return result | {
            "classes": len(self.classes),
            "steps": trainer.step,
            "train_samples": trainer.schedule.samples,
            "val_samples": val_samples,
            "skipped": trainer.bad.bad,
            "recipe": chosen(self.settings),
            "cautions": found,
        }

    def so_far(self, trainer: Trainer) -> SoFar:
        """Return the last evaluation, of this attempt or of one before; main rank only."""
        total = trainer.schedule.total_steps
        lines: list[dict[str, Any]] = []
        with suppress(UserError):
            lines = [line for line in read_metrics(trainer.run.dir) if "val_top1" in line and line["step"] > 0]
        if self.predictions is not None:
            at, values = self.evaluated_at, self.predictions.accuracies()
            columns: Columns = self.predictions.columns(self.classes)
        elif lines:
            at, columns = lines[-1]["step"], {}
            values = {name.removeprefix("val_"): value for name, value in lines[-1].items() if name.startswith("val_")}
        else:
            return SoFar(f"step {trainer.step:,} of {total:,}, none evaluated", {}, {})
        done = f"the evaluation after step {at:,} of {total:,}"
        return SoFar(done, values | {"steps": at, "total_steps": total}, columns)

    def draw(self, trainer: Trainer) -> None:
        """Draw the run, on the main rank."""
        folder = trainer.run.dir
        draw_training(folder / "training.png", read_metrics(folder), trainer.schedule.steps_per_epoch)

    def _log_duration(self, trainer: Trainer) -> None:
        taken, left = trainer.step - trainer.start, trainer.schedule.total_steps - trainer.step
        if taken == 1:
            self.first = time.perf_counter()
        timed, seconds = taken - 1, time.perf_counter() - self.first
        if self.expected or not left or timed < 1 or (timed < _TIMED and seconds < _SOON_S):
            return
        self.expected = True
        trainer.log.say("\n".join(self.expectation(trainer, seconds / timed, left)))

    def expectation(self, trainer: Trainer, pace: float, left: int) -> list[str]:
        """Return how long so many more steps take at `pace` seconds each and, if that is long on a CPU and the length
        follows from the number of samples, what would be shorter: a line each."""
        lines = [f"expected: {duration(pace * left)} for {left:,} more steps, and evaluations"]
        if trainer.ranks.device.type == "cpu" and pace * left > LONG_S and self.length_is_open():
            lines.append(f"note: that is long on this CPU; shorter: {self.shorter(trainer, SHORT_S / pace)}")
        return lines


class Start(NamedTuple):
    """What a training on labelled samples begins with."""

    found: Resume  # the checkpoint to resume from, if there is one
    train: Corpus
    val: Corpus
    classes: Classes
    settings: Any  # LinearProbeConfig or FineTuneConfig, settled
    share: Share
    schedule: Schedule


def open_training(job: Job, config: C) -> Start:
    """Open the checkpoint and the labelled samples, and settle the config. Raises UserError if one of them is missing
    or cannot be used."""
    found = Resume(job.config.run.dir, job.options.resume, job.ranks)
    train, val, classes = job.open_labelled()
    if train.has_captions:
        job.model.require_tokenizer()
    settings = settled(config, train.samples, found.section(config.SECTION))
    share = split_batch(settings, job.ranks.world, job.ranks.rank)
    return Start(found, train, val, classes, settings, share, Schedule(settings, settings, train.samples))


def make_trainer(
    job: Job,
    start: Start,
    task: LabelledTask,
    engine: Engine,
    layout: Layout,
    sections: dict[str, Any],
    rules: Rules,
    suggested_fix: str,
    transform: Transform | None = None,
) -> Trainer:
    """Load the checkpoint into the engine, and return the trainer. Raises UserError if the checkpoint is that of
    another run.

    Args:
        task: gets the notes on differences from the run that is resumed.
        layout: of the order of samples.
        sections: of the config in checkpoints, besides those of every run.
        rules: which settings a resumed run must not change.
        suggested_fix: for losses that are not finite.
        transform: of each training image.
    """
    found, train, val, _, settings, share, schedule = start
    run, data = job.config.run, job.config.data
    sections = {
        "run": run.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        settings.SECTION: settings.model_dump(mode="json"),
        **sections,
    }
    stream = fingerprint(Data(train, val, job.model.tokenizer), layout)
    require_same(job.ranks, stream, val)
    task.notes += found.restore(engine, sections, stream, rules)
    return Trainer(
        task=task,
        session=job.session,
        folder=job.folder,
        run=run,
        settings=settings,
        sections=sections,
        share=share,
        schedule=schedule,
        engine=engine,
        train_loader=job.batches(train, share, range(found.step, schedule.total_steps), layout, transform),
        throughput=SampleRate(),
        bad=BadSamples(data.max_bad_fraction, train.samples),
        stream=stream,
        start=found.step,
        suggested_fix=suggested_fix,
    )


def cautions(
    section: str, length: str, steps: int, official: Official, lines: list[dict[str, Any]], batch: int
) -> list[str]:
    """Return warnings about the reliability of the result of a training, one line each. `length`: the setting that
    makes it longer; `lines`, `batch`: see `rising`."""
    found = []
    if steps < official.fewest_steps:
        given = f"{section}.epochs and .steps" if length.endswith("epochs") else length
        found.append(f"only {steps:,} steps: without {given}, the run would take at least {official.fewest_steps:,}")
    if rise := rising(lines, batch):
        found.append(f"training accuracy was still rising, by {rise:.1%}; raise {length}")
    return found


def rising(lines: list[dict[str, Any]], batch: int) -> float:
    """Return by how much the training accuracy of a run's last quarter is above that of the quarter before; 0 where
    that is little, or within two standard errors. `lines`: of its metrics, each of one step of `batch` samples."""
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line]
    quarter = len(accuracies) // 4
    if not quarter:
        return 0.0
    before, last = (sum(part) / quarter for part in (accuracies[-2 * quarter : -quarter], accuracies[-quarter:]))
    middle = (before + last) / 2
    error = (2 * middle * (1 - middle) / (quarter * batch)) ** 0.5
    return last - before if last - before > max(_RISE, 2 * error) else 0.0
