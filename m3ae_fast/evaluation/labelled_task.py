"""Code shared by the linear probe and fine-tuning, which are both trained by the `Trainer`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from m3ae_fast.base.bad_samples import BadSamples
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.base.pace import duration
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.checkpoint.resuming import Resume, Rules, require_same
from m3ae_fast.data import Corpus, Data, Layout, Share, split_batch
from m3ae_fast.data.dataset import Transform
from m3ae_fast.data.fingerprint import fingerprint
from m3ae_fast.drawing.figures import draw_training
from m3ae_fast.engine.interface import Engine
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation.baseline_results import LOGISTIC, MODEL, WARNINGS, accuracy_entries
from m3ae_fast.evaluation.job import LONG_S, SHORT_S, Job
from m3ae_fast.evaluation.task_features import encode_baselines
from m3ae_fast.evaluation.tasks import WithResume
from m3ae_fast.heads import logistic_regression
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.standard_error import ERROR
from m3ae_fast.heads.training_defaults import OFFICIAL, chosen, with_defaults
from m3ae_fast.heads.training_warnings import training_warnings
from m3ae_fast.training.metrics_log import RunLog
from m3ae_fast.training.throughput import SampleCounts, SampleRate
from m3ae_fast.training.trainer import Trainer

# The duration of the run is estimated after this number of steps, or after this number of seconds if steps are slow.
_TIMED, _SOON_S = 5, 2.0


class ClassLosses(NamedTuple):
    """Loss and accuracy of a batch, as 0-d float32 tensors. Only `loss` is differentiated."""

    loss: Tensor
    accuracy: Tensor  # for mixed labels, the accuracy with respect to the class with the highest weight


class Start(NamedTuple):
    """The opened checkpoint and data for training on labelled samples."""

    found: Resume  # the checkpoint to resume from, if there is one
    train: Corpus
    val: Corpus
    length_is_open: bool  # whether the length of the run is derived from the number of samples
    share: Share
    schedule: Schedule


def open_training(job: Job[WithResume]) -> Start:
    """Open and return the checkpoint to resume from, if any, and the labelled samples. The job's config is completed
    with default hyper-parameters. Raises UserError if the checkpoint or the samples cannot be used."""
    found = Resume(job.config.run.dir, job.options.resume, job.ranks)
    train, val, _ = job.open_labelled()
    if train.has_captions:
        job.model.require_tokenizer()
    official, given = OFFICIAL[job.options.name()], job.config.train
    saved = found.section("optim") | found.section("train")
    job.config = config = with_defaults(job.config, official, train.samples, saved)
    share = split_batch(config.train, job.ranks.world, job.ranks.rank)
    schedule = Schedule(config.train, config.optim, train.samples, scaled=official.rate_is_scaled)
    length_is_open = given.epochs is None and given.steps is None
    return Start(found, train, val, length_is_open, share, schedule)


@dataclass(kw_only=True)
class LabelledTask(ABC):
    """A classification task that the trainer runs. It stores the predictions of its last evaluation."""

    job: Job
    start: Start
    notes: list[str] = field(default_factory=list)  # differences from the run that is resumed

    def __post_init__(self) -> None:
        self.not_computed: tuple[str, ...] = ()
        self.attention: dict[str, str] = {}  # kernels are not compared, and none is stored
        self.predictions: Predictions | None = None  # predictions of the last evaluation
        self.expected = False  # whether the expected duration has been logged

    def trainer(
        self,
        engine: Engine,
        layout: Layout,
        sections: dict[str, Any],
        rules: Rules,
        suggested_fix: str,
        transform: Transform | None = None,
    ) -> Trainer:
        """Load the checkpoint, if any, into the engine, and return the trainer. Notes on differences from the resumed
        run are added to the task.

        Args:
            engine: the engine of the task.
            layout: layout of the sample order.
            sections: config sections to store in checkpoints, in addition to the settings that the task uses.
            rules: rules for settings that differ between a resumed run and its checkpoint.
            suggested_fix: suggested changes of settings if a loss is not finite.
            transform: transform that is applied to each training image.

        Raises:
            UserError: the checkpoint belongs to another run.
        """
        job, (found, train, val, _, share, schedule) = self.job, self.start
        sections = job.options.uses.values(job.config) | sections
        stream = fingerprint(Data(train, val, job.model.tokenizer), layout)
        require_same(job.ranks, stream, val)
        self.notes += found.restore(engine, sections, stream, rules)
        return Trainer(
            task=self,
            session=job.session,
            folder=job.folder,
            config=job.config,
            sections=sections,
            share=share,
            schedule=schedule,
            engine=engine,
            train_loader=job.batches(train, share, range(found.step, schedule.total_steps), layout, transform),
            throughput=SampleRate(),
            bad=BadSamples(job.config.data.max_bad_fraction, train.samples),
            stream=stream,
            start=found.step,
            suggested_fix=suggested_fix,
        )

    def with_targets(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch unchanged, because its targets are the labels."""
        return batch

    def after_save(self, log: RunLog, step: int, path: Path) -> None:  # noqa: B027  # not abstract
        """Do nothing; the curves are drawn at the end."""

    def count(self, batches: list[PackedBatch]) -> SampleCounts:
        """Return the counts of a step's micro-batches."""
        return SampleCounts.of(batches)

    def describe(self, trainer: Trainer) -> list[str]:
        """Return the first log lines: the description of the run, and the notes."""
        return [self.first_line(trainer), *(f"note: {note}" for note in self.notes)]

    def evaluate(self, trainer: Trainer) -> None:
        """Log the expected duration of the run once a few steps have been timed, and evaluate if an evaluation is due.
        This method does not evaluate after the last step, because the trainer then calls `conclude` itself."""
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
        """Evaluate on all held-out samples, and log and return the accuracies; return None if a rank is asked to
        stop."""

    @abstractmethod
    def shorter(self, trainer: Trainer, steps: float) -> str:
        """Return a suggestion for the user: options that shorten the run to about this number of steps, or a faster
        task."""

    @abstractmethod
    def save_classifier(self, trainer: Trainer) -> None:
        """Write the trained classifier to the run folder. Every rank must call it."""

    def warnings(self, trainer: Trainer) -> list[str]:
        """Return the warnings about the reliability of the result, one line each. Main rank only."""
        lines = []
        with suppress(UserError):  # raised if the user has removed the file of metrics
            lines = read_metrics(trainer.config.run.dir)
        official = OFFICIAL[self.job.options.name()]
        return training_warnings(
            "train", "train.epochs", trainer.schedule.total_steps, official, lines, trainer.share.global_batch
        )

    def evaluated(self, trainer: Trainer, predictions: Predictions) -> dict[str, float]:
        """Store the predictions of all held-out samples, and log and return their accuracies."""
        self.predictions = predictions
        values = predictions.accuracies()
        logged = {f"val_{name}": value for name, value in values.items() if not name.endswith(ERROR)}
        trainer.log.log(trainer.step, logged)
        return values

    def complete(self, trainer: Trainer, val_samples: int) -> dict[str, Any] | None:
        """Train the classifier, write it and its predictions, evaluate the baselines, and return the result; return
        None if the run was stopped."""
        job, result = self.job, trainer.train()
        if result is None:
            return None
        self.save_classifier(trainer)
        assert self.predictions is not None
        job.keep(self.predictions.columns(job.classes))
        job.pictures.append(lambda: self.draw(trainer))
        found = job.ranks.broadcast(lambda: self.warnings(trainer))
        predictions = {MODEL: [self.predictions]}
        for name, banks in encode_baselines(job, self.start.train, self.start.val, job.stop).items():
            predictions[name] = [logistic_regression.predict(*banks, len(job.classes), job.heartbeats)]
        return (
            result
            | accuracy_entries(predictions, LOGISTIC)
            | {
                "classes": len(job.classes),
                "steps": trainer.step,
                "train_samples": trainer.schedule.samples,
                "val_samples": val_samples,
                "skipped": trainer.bad.bad,
                "recipe": chosen(job.config),
                WARNINGS: found,
            }
        )

    def draw(self, trainer: Trainer) -> None:
        """Plot the curves of the run to training.png. Main rank only."""
        folder = trainer.config.run.dir
        draw_training(folder / "training.png", read_metrics(folder), trainer.schedule.steps_per_epoch)

    def _log_duration(self, trainer: Trainer) -> None:
        pace, left = trainer.pace, trainer.schedule.total_steps - trainer.step
        if self.expected or not left or pace.missing or (pace.parts < _TIMED and pace.seconds < _SOON_S):
            return
        self.expected = True
        trainer.log.print("\n".join(self.expectation(trainer, pace.per_unit, left)))

    def expectation(self, trainer: Trainer, pace: float, left: int) -> list[str]:
        """Return a line with the expected duration of the `left` remaining steps at `pace` seconds per step. On a CPU,
        a line that suggests options for a shorter run is added if the run is long and its length was derived from the
        number of samples."""
        lines = [f"expected duration: {duration(pace * left)} for {left:,} more steps, plus evaluations"]
        if trainer.ranks.device.type == "cpu" and pace * left > LONG_S and self.start.length_is_open:
            lines.append(f"note: this is a long time for a CPU; to reduce it: {self.shorter(trainer, SHORT_S / pace)}")
        return lines
