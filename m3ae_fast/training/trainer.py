"""The training loop for all tasks: steps, logging, evaluation, checkpoints and shutdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from m3ae_fast import checkpoint
from m3ae_fast.base.bad_samples import NAMED, BadSamples, Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.pace import Pace
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.checkpoint.saver import Saver
from m3ae_fast.config.section_protocols import TrainingSections
from m3ae_fast.data import Share
from m3ae_fast.engine.feed import StepInput, feed
from m3ae_fast.engine.interface import Engine
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.process.failure_messages import explain
from m3ae_fast.process.garbage_collection import GarbageCollection
from m3ae_fast.process.how_to_resume import how_to_resume
from m3ae_fast.process.session import Session
from m3ae_fast.process.stop_request import BY_ANOTHER
from m3ae_fast.training.loss_watch import LossWatch
from m3ae_fast.training.metrics_line import MetricsLine
from m3ae_fast.training.metrics_log import RunLog, SilentLog
from m3ae_fast.training.profiler import profiler
from m3ae_fast.training.run_lock import RunFolder
from m3ae_fast.training.run_state import Recorder
from m3ae_fast.training.throughput import Counts, ForwardTime, Rates
from m3ae_fast.training.time_limit import FIRST, TimeLimit
from m3ae_fast.training.user_warnings import MemoryGrowth


class Task(Protocol):
    """A training task, such as pre-training, fine-tuning or a linear probe. All ranks call all methods in the same
    order, except `after_save`."""

    @property
    def not_computed(self) -> tuple[str, ...]:
        """Return the prefixes of the losses that the run does not compute."""

    @property
    def attention(self) -> dict[str, str]:
        """Return the names of the chosen attention kernels by part of the network, for checkpoints."""

    def count(self, batches: list[PackedBatch]) -> Counts:
        """Return the counts of a step's micro-batches, which are on the CPU. The counts are summed over ranks."""

    def with_targets(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch on the device with the image targets that are computed there, if there are any."""

    def evaluate(self, trainer: Trainer) -> None:
        """Evaluate on held-out samples if that is due. Called before the first step and after each step."""

    def describe(self, trainer: Trainer) -> list[str]:
        """Return the first log lines; those of the main rank are printed."""

    def conclude(self, trainer: Trainer) -> dict[str, Any] | None:
        """Return the result of a run after its last step; None if a rank is asked to stop in the meantime."""

    def after_save(self, log: RunLog, step: int, path: Path) -> None:
        """Draw the figures of a saved step from its checkpoint at `path`. Called on the main rank only."""


class Sums(NamedTuple):
    """Values that are summed over ranks before each step."""

    stopped: float  # number of ranks that are asked to stop
    failed: float  # number of ranks with a non-finite step or a failed save
    confirmed: float  # number of ranks on which the last save is complete and the next step had finite losses
    total_steps: float  # number of steps of the run, decided by the main rank
    counts: Counts


@dataclass(kw_only=True)
class Trainer:
    """The trainer of a task. Every rank has a trainer."""

    task: Task
    session: Session
    folder: RunFolder | None  # locked run folder, on the main rank only
    config: TrainingSections
    sections: dict[str, Any]  # sections of the config for checkpoints
    share: Share
    schedule: Schedule
    engine: Engine
    train_loader: Iterable[Any]  # PackedBatches, or other inputs of the engine
    throughput: Rates
    bad: BadSamples
    stream: dict[str, str]  # fingerprint of the training data
    start: int  # number of steps in the checkpoint from which the run resumes
    suggested_fix: str  # settings to change if a loss or weight is not finite
    # tensors saved in checkpoints in addition to the engine's state
    constants: dict[str, Tensor] = field(default_factory=dict)
    limit: TimeLimit | None = None  # time limit, used on the main rank; None: there is no limit

    def __post_init__(self) -> None:
        self.ranks, self.stop, self.heartbeats = self.session
        run = self.config.run
        self.step = self.start  # optimiser steps so far
        self.pace = self.limit.pace if self.limit else Pace(first=FIRST)  # pace of the steps
        self.log: RunLog = SilentLog()
        if self.ranks.is_main:
            self.log = RunLog(run.dir, self.start, self.schedule.total_steps, run.loggers, self.sections)
        self.record = Recorder(run.dir, self.schedule.total_steps)
        self.watch = LossWatch()
        self.growth = MemoryGrowth()
        self.saver = Saver(
            run_dir=run.dir,
            keep=self.config.train.keep,
            engine=self.engine,
            ranks=self.ranks,
            constants=self.constants,
            suggested_fix=self.suggested_fix,
            log=self.log.print,
            keep_folder=self.folder.keep if self.folder else lambda: "",
            after_save=partial(self.task.after_save, self.log),
        )

    def train(self, trace_dir: Path | None = None) -> dict[str, Any] | None:
        """Take the steps of the run, up to the last step or until a rank is asked to stop.

        Args:
            trace_dir: folder for a profiler trace of some steps; None: no trace.

        Returns:
            The result of a run that has taken its last step, otherwise None.

        Raises:
            UserError: a loss is not finite, too many samples cannot be used, or a checkpoint cannot be written.
        """
        self.stop.listen()
        with self._ending(), self.log, self.saver, profiler(trace_dir) as trace, GarbageCollection() as garbage:
            self.log.print("\n".join(self.task.describe(self)))
            self.task.evaluate(self)
            for inputs, counts in self.inputs():
                if self.step == self.start:
                    self._begin()
                losses, grad_norm = self.take_step(inputs, counts)
                self.watch.add(self.step, [key for batch in inputs.host for key in batch.keys], losses, grad_norm)
                self.pace.advance(recent=self.limit.recent if self.limit else inf)
                self.log.advance(self.step, self.pace.left(self.schedule.total_steps - self.step))
                self.log_step(losses, grad_norm)
                self.task.evaluate(self)
                if self._saves():
                    self.stop_if_diverged()
                    self._save()
                garbage.after_step(self.step)
                if trace:
                    trace.step()
            self._finish()
            return self.task.conclude(self) if self.step >= self.schedule.total_steps else None

    # A step

    def inputs(self) -> Iterator[tuple[StepInput[Sums], Counts]]:
        """Yield this rank's micro-batches of each step, on the device, with the counts over all ranks. The iterator
        ends after the last step, or earlier if a rank is asked to stop or has failed. The next micro-batches are
        loaded, and their counts are summed, while the GPU computes. Raises UserError if too many samples are
        invalid."""
        batches = self.heartbeats.watch(self.train_loader, "training")
        for inputs in feed(batches, self.share.accumulation, self.ranks.device, self._start_sums):
            sums = inputs.sums()
            if sums.confirmed == self.ranks.world:
                self.saver.step_was_finite(self.watch.finite_through)
            if sums.stopped or sums.failed or self.step >= self.schedule.total_steps:
                return
            self._change(int(sums.total_steps))
            counts = sums.counts
            if counts.skipped and self.bad.names_more:
                self._name_bad([item for batch in inputs.host for item in batch.skipped])
            self.bad.count(int(counts.samples + counts.skipped), int(counts.skipped))
            self.throughput.add(counts, inputs.waited)
            yield inputs, counts

    def take_step(self, inputs: StepInput[Sums], counts: Counts) -> tuple[list[Any], Tensor]:
        """Take one optimiser step (forward, backward and update). Return the losses of the micro-batches and the
        global gradient norm before clipping, a 0-d tensor. `counts`: the counts of the step over all ranks."""
        self.heartbeats.mark(f"step {self.step + 1}")
        batches = [self.task.with_targets(batch) for batch in inputs.device]
        losses, grad_norm = self.engine.step(
            batches, counts.denominators(self.ranks.world), self.schedule.lr(self.step)
        )
        self.step += 1
        return losses, grad_norm

    def _start_sums(self, batches: list[PackedBatch]) -> Callable[[], Sums]:
        """Start the all-reduce of `Sums` that precedes a step, and return a function that waits for the result."""
        failed = self.watch.failed() or self.saver.failed()
        confirmed = self.saver.awaits(self.watch.finite_through) and not self.saver.busy
        total = self._decide() if self.ranks.is_main else 0
        own = self.task.count(batches)
        wait = self.ranks.start_sum((self.stop.requested, failed, confirmed, total, *own))

        def sums() -> Sums:
            stopped, failed, confirmed, total, *counts = wait()
            return Sums(stopped, failed, confirmed, total, type(own)(*counts))

        return sums

    def _decide(self) -> int:
        """Return the number of steps of the run, adjusted to its time limit if there is one."""
        total = self.schedule.total_steps
        if self.step >= total:  # the loader of a run with a time limit does not end
            return total
        total = self.limit.fitting(self.step, self.schedule) if self.limit else total
        return max(total, self.step + 1)

    def _change(self, total: int) -> None:
        """Apply the number of steps that the main rank has decided on. If the decay begins now, save a checkpoint from
        which the run can be extended. Every rank must call this method."""
        if total == self.schedule.total_steps:
            return
        saved = self.step == self.start or self._saves()
        self.schedule = self.schedule.changed(self.step, total)
        self.record.change(self.step, total)
        self.log.change(total)
        self.log.log(self.step, {"total_steps": total})
        if self._saves() and not saved:
            self.stop_if_diverged()
            self._save()

    def _name_bad(self, skipped: list[Skipped]) -> None:
        """Log the invalid samples of all ranks. Every rank must call this method."""
        for items in self.ranks.gather(skipped[:NAMED]):
            self.bad.report(items, log=self.ranks.is_main)

    def log_step(self, losses: list[Any], grad_norm: Tensor) -> None:
        """Log the current step if that is due: the first step, every `log_every` steps, and the last step. `losses`,
        `grad_norm`: results of `take_step`."""
        if self.step != 1 and not self.schedule.due(self.step, self.config.train.log_every):
            return
        lr, epoch = self.schedule.lr(self.step - 1), self.step / self.schedule.steps_per_epoch
        values, where = self.line.after(self.step, losses, grad_norm, lr, epoch, self.bad.bad)
        self.log.log(self.step, values, where)
        if grown := self.growth.check(self.step - self.start, values["peak_memory_gb"]):
            self.log.print(f"note: {grown}")

    # Methods that tasks call

    def to_evaluate(self, every: int | None, *names: str) -> bool:
        """Return whether an evaluation that is logged under one of `names` is due: every `every` steps, before the
        first step and after the last. A resumed run repeats only evaluations that were interrupted. Every rank must
        call this method."""
        if self.step and not self.schedule.due(self.step, every):
            return False
        if self.step == 0 or self.step > self.start:
            return True
        return not self.ranks.broadcast(lambda: self.log.has(self.step, names))

    @contextmanager
    def evaluation(self, name: str, every: int | None) -> Iterator[None]:
        """Enter a context that measures the duration of an evaluation, as a pause of the pace. `every`: number of steps
        between evaluations; None: evaluation only at the end of the run."""
        due = self.step == 0 or self.schedule.due(self.step, every)
        with self.pace.pause(name, 1 / every if every else 0.0, due):
            yield

    def cut_short(self) -> None:
        """Log that a stop request has interrupted an evaluation, which is repeated when the run resumes."""
        self.log.print(f"the evaluation after step {self.step} was interrupted; {how_to_resume()} repeats it")

    def stop_if_diverged(self) -> None:
        """Raise UserError on all ranks if a step of any rank had a loss or gradient norm that is not finite."""
        watch = self.watch
        found = self.ranks.gather((watch.first_bad(), watch.bad_step, watch.finite_through))
        finite_through = min(through for *_, through in found)
        if self.saver.awaits(finite_through):
            self.saver.wait()
            self.saver.step_was_finite(finite_through)
        if bad := [(step, text) for text, step, _ in found if step is not None]:
            step, text = min(bad)
            advice = self.saver.step_was_not_finite(step)
            raise UserError(f"{text}. {advice}; look at these samples, or continue with {self.suggested_fix}")

    # The beginning and the end

    def _ending(self) -> AbstractContextManager[None]:
        """Return a context manager that records how the run ends."""
        return self.record.ending(lambda: self.step, lambda: self.stop.reason or BY_ANOTHER, explain)

    def _begin(self) -> None:
        """Start the measurements, the log and the record. If the run is resumed, remove the log lines of steps after
        that of the checkpoint, and rename later checkpoints. Called before the first step."""
        self.line = MetricsLine(
            ranks=self.ranks,
            throughput=self.throughput,
            forward=ForwardTime(self.engine.model, self.ranks.device),
            not_computed=self.task.not_computed,
            logged=self.start,
        )

        self.pace.skip()

        def begin() -> None:
            self.log.begin()
            self.record.begin(self.start)
            for path in checkpoint.set_aside_after(self.config.run.dir, self.start):
                self.log.print(f"the run continues from step {self.start}; a later checkpoint was renamed to {path}")

        self.ranks.on_main(begin)

    def _saves(self) -> bool:
        """Return whether a checkpoint is due: every `save_every` steps, and before the learning rate decays, so that
        the run can be extended."""
        return self.schedule.due(self.step, self.config.train.save_every) or self.step == self.schedule.decay_begin

    def _save(self) -> None:
        """Start saving a checkpoint. Every rank must call this method. Raises the same errors as `Saver.save`."""
        self.heartbeats.mark(f"saving step {self.step}")
        samples = self.step * self.config.train.global_batch
        about = (self.step, samples, self.config.run.seed, self.sections, checkpoint.versions())
        spent = self.limit.spent if self.limit else 0.0
        changes: list[tuple[int, int]] = list(self.schedule.changes)
        begin = self.schedule.decay_begin
        decays = begin is not None and self.step > begin
        self.saver.save(checkpoint.Info(*about, self.stream, {}, self.task.attention, changes, decays, spent))

    def _finish(self) -> None:
        """Wait for the last save. If the run was stopped early, save its state first. Raises UserError on all ranks if
        a loss or gradient norm is not finite, if a save has failed, or if no sample could be used."""
        self.saver.wait()
        self.stop_if_diverged()
        if self.bad.bad:
            self.log.print(f"note: {self.bad.bad:,} of {self.bad.seen:,} samples could not be used")
        self.bad.finish()
        if self.step >= self.schedule.total_steps:
            if self.step == self.start:
                self.ranks.on_main(self._complete)
            return
        if self.step > self.start and not self._saves():
            self._save()
            self.saver.wait()
        reason = self.stop.reason or BY_ANOTHER
        saved = "" if self.step > self.start else "; nothing to save"
        self.log.print(f"stopped at step {self.step} ({reason}){saved}; {how_to_resume()} continues")

    def _complete(self) -> None:
        """Draw the figures of a run that an earlier call has trained to its last step, and start its record again. Do
        nothing if the record states that the run is finished. The record does not state this if the earlier call was
        killed after the last checkpoint."""
        if self.record.is_finished():
            return
        self.task.after_save(self.log, self.step, checkpoint.locate(self.config.run.dir))
        self.record.begin(self.step)
