"""The training loop that the linear probe and fine-tuning have in common."""

from __future__ import annotations

import time
from abc import abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import duration
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config.evaluation import FineTuneConfig, LinearProbeConfig
from m3ae_fast.data.labels import Classes
from m3ae_fast.drawing.figures import draw_confusion, draw_training
from m3ae_fast.evaluation.job import LONG_S, SHORT_S, Columns, Job, SoFar
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.recipe import OFFICIAL, Official, chosen
from m3ae_fast.evaluation.significance import ERROR
from m3ae_fast.training.log import read_metrics
from m3ae_fast.training.loop import Loop, train

_TIMED, _SOON_S = 5, 2.0  # steps after the first that are timed, and seconds after which fewer will do
_RISE = 0.02  # of training accuracy, that is worth a word


class ClassLosses(NamedTuple):
    """0-d float32 tensors; `loss` is what to differentiate."""

    loss: Tensor
    accuracy: Tensor  # by the likeliest class of the mixed labels


@dataclass(kw_only=True)
class LabelledLoop(Loop):
    """Counts samples, and shows what was learnt."""

    job: Job
    settings: LinearProbeConfig | FineTuneConfig
    notes: list[str]  # on what a resumed run does otherwise
    classes: Classes

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen, self.waited, self.since = 0.0, 0.0, time.perf_counter()  # samples and seconds since then
        self.predictions: Predictions | None = None  # the last evaluation's
        self.evaluated_at, self.expected = 0, False  # step of that; whether the duration was said

    def say_first(self, text: str) -> None:
        """Say what the run is, and the notes on it."""
        self.log.say("\n".join([text, *(f"note: {note}" for note in self.notes)]))

    def count(self, batches: list[PackedBatch]) -> tuple[float, ...]:
        return sum(len(batch.keys) for batch in batches), sum(len(batch.skipped) for batch in batches)

    def counted(self, sums: list[float], waited: float) -> float:
        samples, skipped = sums
        self.bad.count(int(samples + skipped), int(skipped))
        self.seen += samples
        self.waited += waited
        return max(samples, 1.0) / self.ranks.world

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        rates = {"samples_per_s": self.seen / seconds, "data_wait": self.waited / seconds}
        self.seen, self.waited, self.since = 0.0, 0.0, time.perf_counter()
        return rates

    def log_step(self, losses: list[Any], grad_norm: Tensor) -> None:
        """Log the step just taken, where it is due, and the run's duration, once a few steps have shown it."""
        super().log_step(losses, grad_norm)
        taken, left = self.step - self.start, self.schedule.total_steps - self.step
        if taken == 1:
            self.first = time.perf_counter()
        timed, seconds = taken - 1, time.perf_counter() - self.first
        if self.expected or not left or not timed or (timed < _TIMED and seconds < _SOON_S):
            return
        self.expected = True
        self.log.say("\n".join(self.expectation(seconds / timed, left)))

    def expectation(self, pace: float, left: int) -> list[str]:
        """Return how long so many more steps take at `pace` seconds each and, if that is long on a CPU and the length
        follows from the number of samples, what would be shorter: a line each."""
        lines = [f"expected: {duration(pace * left)} for {left:,} more steps, and evaluations"]
        if self.ranks.device.type == "cpu" and pace * left > LONG_S and self.length_is_open():
            lines.append(f"note: that is long on this CPU; shorter: {self.shorter(SHORT_S / pace)}")
        return lines

    @abstractmethod
    def length_is_open(self) -> bool:
        """Return whether the length of the run follows from the number of samples: none is given."""

    @abstractmethod
    def shorter(self, steps: float) -> str:
        """Return what to do instead of a long run: of about so many steps, or something else."""

    def cautions(self) -> list[str]:
        """Return what speaks against taking the result as it is, a line each. Main rank only."""
        lines = []
        with suppress(UserError):  # no metrics are left
            lines = read_metrics(self.run.dir)
        section, steps = self.settings.SECTION, self.schedule.total_steps
        return cautions(section, f"{section}.epochs", steps, OFFICIAL[section], lines, self.share.global_batch)

    def evaluated(self, predictions: Predictions) -> dict[str, float]:
        """Keep predictions of all held-out samples, and return their accuracies, which are logged too."""
        self.predictions, self.evaluated_at = predictions, self.step
        values = predictions.accuracies()
        self.log.log(self.step, {f"val_{name}": value for name, value in values.items() if not name.endswith(ERROR)})
        return values

    @abstractmethod
    def save_classifier(self) -> None:
        """Write the trained classifier into the run's folder. Every rank must call it."""

    def complete(self, val_samples: int) -> dict[str, Any] | None:
        """Train, save the classifier, keep its predictions. Return the result; None where the run was stopped."""
        job, result = self.job, train(self)
        if result is None:
            job.ranks.on_main(lambda: job.say(job.write_partial(self.so_far(), "--resume auto continues")))
            return None
        self.save_classifier()
        assert self.predictions is not None
        job.keep(self.predictions.columns(self.classes))
        job.pictures.append(self.draw)
        found = job.ranks.broadcast(self.cautions)
        for caution in found:
            job.say(f"note: {caution}")
        return result | {
            "classes": len(self.classes),
            "steps": self.step,
            "train_samples": self.schedule.samples,
            "val_samples": val_samples,
            "skipped": self.bad.bad,
            "recipe": chosen(self.settings),
            "cautions": found,
        }

    def so_far(self) -> SoFar:
        """Return the last evaluation, of this attempt or of one before; main rank only."""
        lines: list[dict[str, Any]] = []
        with suppress(UserError):
            lines = [line for line in read_metrics(self.run.dir) if "val_top1" in line and line["step"] > 0]
        if self.predictions is not None:
            at, values = self.evaluated_at, self.predictions.accuracies()
            columns: Columns = self.predictions.columns(self.classes)
        elif lines:
            at, columns = lines[-1]["step"], {}
            values = {name.removeprefix("val_"): value for name, value in lines[-1].items() if name.startswith("val_")}
        else:
            return SoFar(f"step {self.step:,} of {self.schedule.total_steps:,}, none evaluated", {}, {})
        done = f"the evaluation after step {at:,} of {self.schedule.total_steps:,}"
        return SoFar(done, values | {"steps": at, "total_steps": self.schedule.total_steps}, columns)

    def draw(self) -> None:
        """Draw the run and its last evaluation, on the main rank."""
        folder = self.run.dir
        draw_training(folder / "training.png", read_metrics(folder), self.schedule.steps_per_epoch)
        found = self.predictions
        assert found is not None
        draw_confusion(folder / "confusion.png", found.labels_N, found.best_NK[:, 0], self.job.names)


def cautions(
    section: str, length: str, steps: int, official: Official, lines: list[dict[str, Any]], batch: int
) -> list[str]:
    """Return what speaks against taking the result of a training as it is, a line each. `length`: the setting that
    makes it longer; `lines`, `batch`: see `rising`."""
    found = []
    if steps < official.fewest_steps:
        given = f"{section}.epochs and .steps" if length.endswith("epochs") else length
        found.append(f"{steps:,} steps are few: a run without {given} takes {official.fewest_steps:,} or more")
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
