"""Base class of training runs: sums over ranks, logging, checkpoints, shutdown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3ae_fast import checkpoint
from m3ae_fast.base.bad_samples import NAMED, BadSamples, Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import peak_memory
from m3ae_fast.base.memory import out_of_memory
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.checkpoint import resuming
from m3ae_fast.checkpoint.staging import Staging
from m3ae_fast.config import LoopConfig, RunConfig
from m3ae_fast.data import Share
from m3ae_fast.data.order import hash64
from m3ae_fast.engine.feed import StepInput, feed
from m3ae_fast.engine.fragments import Fragments, whole
from m3ae_fast.engine.interface import Engine
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.process.agreement import Agreement
from m3ae_fast.process.background import Background
from m3ae_fast.process.garbage import GarbageCollection
from m3ae_fast.process.program import Session
from m3ae_fast.process.signals import BY_ANOTHER
from m3ae_fast.training.diagnostics import clipping, either
from m3ae_fast.training.log import RunLog, SilentLog
from m3ae_fast.training.loss_watch import LossWatch
from m3ae_fast.training.notices import MemoryGrowth
from m3ae_fast.training.profiler import profiler
from m3ae_fast.training.record import Recorder
from m3ae_fast.training.run_folder import RunFolder
from m3ae_fast.training.throughput import ForwardTime
from m3ae_fast.training.time_limit import TimeLimit


@dataclass(kw_only=True)
class Loop(ABC):
    """Base class of runs: rank synchronisation, logging, checkpoints, shutdown.

    `train` takes its steps; subclasses say what is counted and evaluated.
    """

    session: Session
    folder: RunFolder | None  # on the main rank only
    run: RunConfig
    settings: LoopConfig
    sections: dict[str, Any]  # the config that checkpoints remember
    share: Share
    schedule: Schedule
    engine: Engine
    train_loader: Iterable[Any]  # PackedBatches, or what else the engine takes
    bad: BadSamples
    stream: dict[str, str]  # fingerprint of the data
    start: int  # steps that the checkpoint to continue from has taken
    attention: dict[str, str] = field(default_factory=dict)  # kernels that checkpoints remember, by part of the network
    limit: TimeLimit | None = None  # the main rank's decides

    def __post_init__(self) -> None:
        self.ranks, self.stop, self.pulse, _ = self.session
        self.step = self.logged = self.start  # optimiser steps so far, and when they were last logged
        self.log: RunLog = SilentLog()
        if self.ranks.is_main:
            self.log = RunLog(self.run.dir, self.start, self.schedule.total_steps, self.run.loggers, self.sections)
        self.record = Recorder(self.run.dir, self.schedule.total_steps)
        self.watch = LossWatch()
        self.unjudged: int | None = None  # step of the last checkpoint not yet marked good or failed
        self.finite_evaluation: int | None = None  # step of which an evaluation was finite
        self.growth = MemoryGrowth()
        self.saving = Background()  # of checkpoints
        self.agreement = Agreement(self.ranks.rank, self.ranks.world, self.ranks.lasting, self.saving.leaving)
        self.staging = Staging()  # of what is being saved
        self.engine.before_update = self.staging.wait

    def ending(self) -> AbstractContextManager[None]:
        """Return what records how the block ends."""
        return self.record.ending(lambda: self.step, lambda: self.stop.reason or BY_ANOTHER)

    @abstractmethod
    def announce(self) -> None:
        """Say what the run is. Every rank must call it."""

    @abstractmethod
    def evaluate_if_due(self) -> None:
        """Evaluate on held-out samples, where it is time to. Every rank must call it."""

    def conclude(self) -> dict[str, Any] | None:
        """Return the result of a run that has taken its last step; None where a rank asks to stop meanwhile."""
        return {}

    @abstractmethod
    def count(self, batches: list[PackedBatch]) -> tuple[float, ...]:
        """Return what to all-reduce of a step's micro-batches, which are still on the CPU."""

    @property
    def absent(self) -> tuple[str, ...]:
        """Return how the names of losses begin that this run does not have."""
        return ()

    @abstractmethod
    def counted(self, sums: list[float], waited: float) -> Any:
        """Record the sums over ranks of what `count` returns, and the seconds that this rank waited for its data.
        Return what the losses of the step are means over, per rank: the engine's `counts`. Raises UserError where too
        many samples cannot be used."""

    @abstractmethod
    def rates(self) -> dict[str, float]:
        """Return rates since the last call, to be logged: `data_wait` is this rank's, and logged of who waits most."""

    def constants(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores beside the engine's state, by its name there."""
        return {}

    def after_save(self, step: int, path: Path) -> None:
        """Write what else belongs to the checkpoint at `path`, where there is more. Main rank only."""
        return None

    def with_targets(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch on the device, with the targets that it still lacks."""
        return batch

    def remedy(self) -> str:
        """Return settings to suggest when a loss or weight is not finite."""
        section, precision = self.schedule.optim.SECTION, getattr(self.settings, "precision", "fp32")
        advice = [f"a lower {section}.peak_lr", *clipping(section, getattr(self.schedule.optim, "clip_grad", None))]
        if precision != "fp32":
            advice.append(f"{self.settings.SECTION}.precision=fp32")
        return either(advice)

    def seed_step(self) -> None:
        """Make what the next step draws depend on the seed, the step and the rank alone."""
        torch.manual_seed(hash64(self.run.seed, self.step, self.ranks.rank) & 0xFFFFFFFF)

    def inputs(self) -> Iterator[StepInput]:
        """Yield this rank's steps, whose counts are being summed over ranks already."""
        batches = self.pulse.watch(self.train_loader, "training")
        return feed(batches, self.share.accumulation, self.ranks.device, self._start_sums)

    def _start_sums(self, batches: list[PackedBatch]) -> Callable[[], list[float]]:
        """Start the all-reduce of stop requests and sample counts that precedes a step."""
        failed = self.watch.failed() or self.saving.failed()
        good = self.unjudged is not None and self.watch.finite_through > self.unjudged and not self.saving.busy
        skipped = sum(len(batch.skipped) for batch in batches)
        total = self.limit.fitting(self.step, self.schedule) if self.limit and self.ranks.is_main else 0
        return self.ranks.start_sum((self.stop.asked, failed, good, skipped, total, *self.count(batches)))

    def step_counts(self, inputs: StepInput) -> Any | None:
        """Return what the next step's losses are means over, None where a rank is to stop. Errors as in `counted`."""
        asked, failed, good, skipped, total, *sums = inputs.sums()
        if good == self.ranks.world:
            self._mark_last_good()
        if asked or failed or self._ended(int(total)):
            return None
        if skipped and self.bad.names_more:
            self._name_bad([item for batch in inputs.host for item in batch.skipped])
        return self.counted(sums, inputs.waited)

    def _ended(self, total: int) -> bool:
        """Take the number of steps on which the main rank has decided, and return whether they are taken: the loader of
        a run with a time limit goes on after them."""
        if self.limit is None or self.step >= self.schedule.total_steps:
            return self.limit is not None
        if total != self.schedule.total_steps:
            self.schedule = self.schedule.changed(self.step, total)
            self.record.change(self.step, total)
            self.log.change(total)
            self.log.log(self.step, {"total_steps": total})
        return False

    def evaluation(self, name: str, every: int | None) -> AbstractContextManager[None]:
        """Return what encloses an evaluation that is due every so many steps, for the time limit."""
        due = self.step == 0 or self.schedule.due(self.step, every)
        return self.limit.evaluation(name, every, due) if self.limit else nullcontext()

    def _name_bad(self, skipped: list[Skipped]) -> None:
        """Name the bad samples of all ranks in one log. Every rank must call it."""
        for items in self.ranks.gather(skipped[:NAMED]):
            self.bad.report(items, say=self.ranks.is_main)

    def take_step(self, inputs: StepInput, counts: Any) -> tuple[list[Any], Tensor]:
        """Take one optimiser step. Return the micro-batches' losses and the gradient norm."""
        self.pulse.mark(f"step {self.step + 1}")
        if self.step == self.start:
            self._begin()
        self.seed_step()
        batches = [self.with_targets(batch) for batch in inputs.device]
        losses, grad_norm = self.engine.step(batches, counts, self.schedule.lr(self.step))
        self.step += 1
        self.watch.add(self.step, [key for batch in inputs.host for key in batch.keys], losses, grad_norm)
        self.log.advance(self.step)
        if self.limit:
            self.limit.step_taken()
        return losses, grad_norm

    def log_step(self, losses: list[Any], grad_norm: Tensor) -> None:
        """Log the step just taken, where it is due."""
        if self.step != 1 and not self.schedule.due(self.step, self.settings.log_every):
            return
        world, rates = self.ranks.world, self.rates()
        own = [sum(values).item() for values in zip(*losses)]  # which waits for a GPU
        forward = self.forward.per_step(self.step - self.logged)
        self.logged = self.step
        by_rank = [0.0] * 2 * world
        by_rank[self.ranks.rank :: world] = rates["data_wait"], forward
        sums = self.ranks.sum([*own, *by_rank])
        if not self.ranks.is_main:
            return
        means = zip(losses[0]._fields, sums)
        values = {name: value / world for name, value in means if not name.startswith(self.absent)}
        values |= {"lr": self.schedule.lr(self.step - 1), "grad_norm": float(grad_norm)}
        values |= {"epoch": self.step / self.schedule.steps_per_epoch, **rates}
        where: dict[str, str] = {}
        for name, each in (("data_wait", sums[-2 * world : -world]), ("forward_s", sums[-world:])):
            values[name] = max(each)
            where |= {name: self.ranks.hosts[each.index(values[name])]} if len(set(self.ranks.hosts)) > 1 else {}
        memory = peak_memory(self.ranks.device) / 1e9
        self.log.log(self.step, values | {"peak_memory_gb": memory, "skipped": self.bad.bad}, where)
        if grown := self.growth.look(self.step - self.start, memory):
            self.log.say(f"note: {grown}")

    def to_evaluate(self, every: int | None, *names: str) -> bool:
        """Return whether an evaluation logged under one of `names` is due: every so many steps, before the first and
        after the last. A run that goes on repeats only what a stop cut short. Every rank must call it."""
        if self.step and not self.schedule.due(self.step, every):
            return False
        if self.step == 0 or self.step > self.start:
            return True
        return not self.ranks.broadcast(lambda: self.log.has(self.step, names))

    def cut_short(self) -> None:
        """Log that a stop interrupted an evaluation; the next start repeats it."""
        self.log.say(f"the evaluation after step {self.step} was cut short; --resume auto makes up for it")

    def _saves(self) -> bool:
        """Return whether a checkpoint is due: in its period, and before the learning rate falls, so that the run can be
        extended from there."""
        return self.schedule.due(self.step, self.settings.save_every) or self.step == self.schedule.decay_begin

    def save_if_due(self) -> None:
        if self._saves():
            self.stop_if_not_finite()
            self.save()

    def save(self) -> None:
        """Copy this rank's part of a checkpoint and write it, in the background. Every rank must call it. Raises
        UserError if the save before this one has failed; a bug of it is raised on the rank that met it."""
        self.pulse.mark(f"saving step {self.step}")
        self.ranks.together(self.saving.wait)  # before its copy is overwritten
        step, good, main = self.step, self.finite_evaluation == self.step, self.ranks.is_main
        constants = {name: whole(tensor) for name, tensor in self.constants().items()} if main else {}
        self.staging.begin(self.ranks.device)
        about = (step, step * self.settings.global_batch, self.run.seed, self.sections, checkpoint.versions())
        spent = self.limit.spent if self.limit else 0.0
        changes: list[tuple[int, int]] = list(self.schedule.changes)
        begin = self.schedule.decay_begin
        decays = begin is not None and step > begin
        info = checkpoint.Info(*about, self.stream, {}, self.attention, changes, decays, spent)

        def write() -> None:
            part = self.agreement.together(lambda: self._copy(step, constants))
            if event := self.agreement.decide("", lambda _: self.folder.keep() if self.folder else ""):
                self.log.say(f"note: {event}")
            path = checkpoint.save(self.run.dir, part, info, self.settings.keep, self.remedy(), self.agreement)
            if not main:
                return
            self.log.say(f"saved {path}")
            if good:
                self._mark_good(step, "the losses of an evaluation are finite")
            self.after_save(step, path)

        self.saving.start(write)
        self.unjudged = None if good else step

    def _copy(self, step: int, constants: Fragments) -> Fragments:
        """Return a copy of this rank's part of the state. Raises UserError if there is no memory for it."""
        try:
            return self.staging.copy(lambda: self.engine.fragments() | constants)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"the checkpoint of step {step} is not written, since rank {self.ranks.rank} has no memory left for "
                f"the copy of its part ({error or type(error).__name__}); the earlier ones are intact"
            ) from None

    def _mark_good(self, step: int, why: str) -> None:
        """Mark a checkpoint that has been written as good. Main rank only."""
        checkpoint.mark(self.run.dir, step, checkpoint.GOOD, why)
        checkpoint.prune(self.run.dir, self.settings.keep)

    def _mark_last_good(self) -> None:
        """Mark the last checkpoint as good: the step after it had a finite loss on all ranks."""
        if self.ranks.is_main and self.unjudged is not None:
            self._mark_good(self.unjudged, "the next step's loss is finite")
        self.unjudged = None

    def finish(self) -> None:
        """Wait for the last save; where the run was stopped early, save what it has. Raises UserError on all ranks
        where a save has failed."""
        self.ranks.together(self.saving.wait)
        self.stop_if_not_finite()
        if self.bad.bad:
            self.log.say(f"note: {self.bad.bad:,} of {self.bad.seen:,} samples could not be used")
        if self.step >= self.schedule.total_steps:
            return
        if self.step > self.start and not self._saves():
            self.save()
            self.ranks.together(self.saving.wait)
        reason = self.stop.reason or BY_ANOTHER
        saved = "" if self.step > self.start else "; nothing to save"
        self.log.say(f"stopped at step {self.step} ({reason}){saved}; --resume auto continues")

    def stop_if_not_finite(self) -> None:
        """Raise UserError on all ranks if a step of any rank had a loss or gradient norm that is not finite."""
        watch = self.watch
        found = self.ranks.gather((watch.first_bad(), watch.bad_step, watch.finite_through))
        bad = [(step, text) for text, step, _ in found if step is not None]
        if self.unjudged is not None and min(through for *_, through in found) > self.unjudged:
            self.ranks.together(self.saving.wait)
            self._mark_last_good()
        if bad:
            step, text = min(bad)
            advice = self.ranks.broadcast(lambda: resuming.judge(self.run.dir, step))
            raise UserError(f"{text}. {advice}: look at these samples, or continue with {self.remedy()}")

    def _begin(self) -> None:
        """Put away what an earlier attempt left beyond this step, now that there is a step to take, and time it."""
        self.forward = ForwardTime(self.engine.model, self.ranks.device)

        def begin() -> None:
            self.log.begin()
            self.record.begin(self.start)
            for path in checkpoint.set_aside_after(self.run.dir, self.start):
                self.log.say(f"the run continues from step {self.start}: a later checkpoint is now {path}")

        self.ranks.on_main(begin)


def train(loop: Loop, trace_dir: Path | None = None) -> dict[str, Any] | None:
    """Take a run's steps, to the last or until a rank is asked to stop: of pre-training, a linear probe or fine-tuning.

    Args:
        loop: ready for its first step. Every rank has one.
        trace_dir: where to write a profiler trace of some steps; None: nowhere.

    Returns:
        The result of a run that has taken its last step, else None.

    Raises:
        UserError: a loss is not finite, too many samples cannot be used, or a checkpoint cannot be written.
    """
    loop.stop.listen()
    with loop.ending(), loop.log, loop.saving, profiler(trace_dir) as trace, GarbageCollection() as garbage:
        loop.announce()
        loop.evaluate_if_due()
        for inputs in loop.inputs():  # micro-batches on the device; the next ones are loaded meanwhile
            counts = loop.step_counts(inputs)  # over all ranks: what the losses are means over
            if counts is None:  # a rank is asked to stop, or has failed
                break
            losses, grad_norm = loop.take_step(inputs, counts)  # forward, backward, update
            loop.log_step(losses, grad_norm)
            loop.evaluate_if_due()
            loop.save_if_due()
            garbage.after_step(loop.step)
            if trace:
                trace.step()
        loop.finish()
        return loop.conclude() if loop.step >= loop.schedule.total_steps else None
