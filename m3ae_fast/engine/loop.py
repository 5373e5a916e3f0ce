"""What happens around each step of a run, whatever it trains: agreement over ranks, log, checkpoints, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3ae_fast.config import LoopConfig, RunConfig
from m3ae_fast.data import BadSamples, Share
from m3ae_fast.data.order import hash64
from m3ae_fast.engine import checkpoint, resuming
from m3ae_fast.engine.background import Background
from m3ae_fast.engine.cautions import MemoryGrowth
from m3ae_fast.engine.feed import Fed
from m3ae_fast.engine.interface import Engine, State
from m3ae_fast.engine.loss_watch import LossWatch
from m3ae_fast.engine.pulse import Pulse
from m3ae_fast.engine.ranks import Ranks
from m3ae_fast.engine.run_folder import RunFolder
from m3ae_fast.engine.run_log import RunLog
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.engine.signals import StopRequest
from m3ae_fast.errors import UserError
from m3ae_fast.hardware import peak_memory
from m3ae_fast.model.batch import PackedBatch


@dataclass(kw_only=True)
class Loop:
    """The fixed parts of a run, and `step`: optimiser steps so far. Subclasses define what is counted and evaluated."""

    run: RunConfig
    loop: LoopConfig
    sections: dict[str, Any]  # the config that checkpoints remember
    ranks: Ranks
    pulse: Pulse
    folder: RunFolder | None  # on the main rank only, as the log
    log: RunLog | None
    share: Share
    schedule: Schedule
    engine: Engine
    train_loader: Iterable[Any]  # PackedBatches, or what else the engine takes
    watch: LossWatch
    bad: BadSamples
    stream: dict[str, str]  # fingerprint of the data
    start: int
    step: int
    unproven: int | None = None  # step of the checkpoint whose verdict, good or failed, is still open
    proven: int | None = None  # step of which an evaluation was finite
    growth: MemoryGrowth = field(default_factory=MemoryGrowth)
    saving: Background = field(default_factory=Background)  # of checkpoints, on the main rank

    def count(self, batches: list[PackedBatch]) -> tuple[float, ...]:
        """What to sum over ranks of a step's micro-batches, which are still on the CPU."""
        raise NotImplementedError

    def rates(self) -> dict[str, float]:
        """Rates since the last call, to be logged."""
        raise NotImplementedError

    def complete(self, state: State) -> State:
        """What a checkpoint holds, from what the engine knows; on the main rank."""
        return state

    def after_save(self, step: int, state: State) -> None:
        """What else is written with a checkpoint, on the main rank."""

    def with_targets(self, batch: PackedBatch) -> PackedBatch:
        """A batch on the device, with the targets that it still lacks."""
        return batch

    def remedy(self) -> str:
        """Settings that may help where a loss or a weight is not finite."""
        section = self.schedule.optim.SECTION
        return f"a lower {section}.peak_lr, {section}.clip_grad=1.0, or {self.loop.SECTION}.precision=fp32"

    def seed_step(self) -> None:
        """Make what the next step draws depend on the seed, the step and the rank alone."""
        torch.manual_seed(hash64(self.run.seed, self.step, self.ranks.rank) & 0xFFFFFFFF)

    def batches(self) -> Iterator[PackedBatch]:
        """This rank's micro-batches, one after the other."""
        return self.pulse.watch(self.train_loader, "training")

    def begin_agreement(self, stop: StopRequest, batches: list[PackedBatch]) -> Callable[[], list[float]]:
        """Begin to sum over ranks what they must agree on before a step: whether anybody wants to stop, and counts."""
        failed = self.watch.failed() or self.saving.failed()
        proven = self.unproven is not None and self.watch.finite_through > self.unproven and not self.saving.busy
        return self.ranks.start_sum((stop.asked, failed, proven, *self.count(batches)))

    def agreed(self, fed: Fed) -> list[float] | None:
        """The counts of the next step over all ranks; None where a rank asks to stop or has failed."""
        asked, failed, proven, *sums = fed.agreed()
        if proven == self.ranks.world:
            self._has_proven()
        if asked or failed:
            return None
        for batch in fed.host:
            self.bad.report(batch.skipped)
        return sums

    def take_step(self, fed: Fed, counts: Any) -> tuple[list[Any], Tensor]:
        """One optimiser step. Returns the micro-batches' losses and the gradient norm."""
        self.pulse.mark(f"step {self.step + 1}")
        if self.step == self.start:
            self._begin()
        self.seed_step()
        batches = [self.with_targets(batch) for batch in fed.device]
        losses, grad_norm = self.engine.step(batches, counts, self.schedule.lr(self.step))
        self.step += 1
        self.watch.add(self.step, [key for batch in fed.host for key in batch.keys], losses, grad_norm)
        if self.log:
            self.log.advance(self.step)
        return losses, grad_norm

    def log_step(self, losses: list[Any], grad_norm: Tensor) -> None:
        """Log the step just taken, where it is due."""
        if self.step != 1 and not self.schedule.due(self.step, self.loop.log_every):
            return
        sums = self.ranks.sum([sum(values).item() for values in zip(*losses)])
        if self.log:
            values = {name: value / self.ranks.world for name, value in zip(losses[0]._fields, sums)}
            values |= {"lr": self.schedule.lr(self.step - 1), "grad_norm": float(grad_norm)}
            values |= {"epoch": self.step / self.schedule.steps_per_epoch, **self.rates()}
            memory = peak_memory(self.ranks.device) / 1e9
            self.log.log(self.step, values | {"peak_memory_gb": memory, "skipped": self.bad.bad})
            if grown := self.growth.look(self.step - self.start, memory):
                self.log.say(f"note: {grown}")

    def to_evaluate(self, every: int | None, *names: str) -> bool:
        """Whether to evaluate now what is logged under one of `names`: every so many steps, before the first and after
        the last. Where a run goes on, only what a stop had cut short. Every rank must call it."""
        if self.step and not self.schedule.due(self.step, every):
            return False
        if self.step == 0 or self.step > self.start:
            return True
        return not self.ranks.told(lambda: self.log is not None and self.log.has(self.step, names))

    def cut_short(self) -> None:
        """Tell that a stop has ended an evaluation, which the next start makes up for."""
        if self.log:
            self.log.say(f"the evaluation after step {self.step} was cut short; --resume auto makes up for it")

    def save_if_due(self) -> None:
        if self.schedule.due(self.step, self.loop.save_every):
            self.stop_if_not_finite()
            self.save()

    def save(self) -> None:
        """Gather a checkpoint, then write it in the background. Every rank must call it.

        Raises:
            UserError: the save before this one has failed.
        """
        self.pulse.mark(f"saving step {self.step}")
        self.ranks.on_main(self.saving.wait)  # before there is a second state in memory
        step, state, proven = self.step, self.engine.state(), self.proven == self.step
        seen = step * self.loop.global_batch
        info = checkpoint.Info(step, seen, self.run.seed, self.sections, checkpoint.versions(), self.stream)

        def write() -> None:
            assert self.folder and self.log and state is not None
            if told := self.folder.keep():
                self.log.say(f"note: {told}")
            whole = self.complete(state)
            path = checkpoint.save(self.run.dir, whole, info, self.loop.keep, self.remedy())
            self.log.say(f"saved {path}")
            if proven:
                self._mark_good(step, "the losses of an evaluation are finite")
            self.after_save(step, whole)

        if self.ranks.is_main:
            self.saving.start(write)
        self.unproven = None if proven else step

    def _mark_good(self, step: int, why: str) -> None:
        """On the main rank, of a checkpoint that has been written."""
        checkpoint.mark(self.run.dir, step, checkpoint.GOOD, why)
        checkpoint.prune(self.run.dir, self.loop.keep)

    def _has_proven(self) -> None:
        """The step after the last checkpoint had a finite loss on all ranks."""
        if self.log and self.unproven is not None:
            self._mark_good(self.unproven, "the next step's loss is finite")
        self.unproven = None

    def finish(self, stop: StopRequest) -> None:
        """Wait for the last save; where the run was stopped early, save what it has.

        Raises:
            UserError: on all ranks where a save has failed.
        """
        self.ranks.on_main(self.saving.wait)
        self.stop_if_not_finite()
        if self.log and self.bad.bad:
            self.log.say(f"note: {self.bad.bad:,} of {self.bad.seen:,} samples could not be used")
        if self.step == self.schedule.total_steps:
            return
        if self.step > self.start and not self.schedule.due(self.step, self.loop.save_every):
            self.save()
            self.ranks.on_main(self.saving.wait)
        if self.log:
            reason = stop.reason or "asked by another rank"
            saved = "" if self.step > self.start else "; nothing to save"
            self.log.say(f"stopped at step {self.step} ({reason}){saved}; --resume auto continues")

    def stop_if_not_finite(self) -> None:
        """Raises UserError on all ranks where a step of any rank had a loss or gradient norm that is not finite."""
        watch = self.watch
        found = self.ranks.gather((watch.first_bad(), watch.bad_step, watch.finite_through))
        bad = [(step, text) for text, step, _ in found if step is not None]
        if self.unproven is not None and min(through for *_, through in found) > self.unproven:
            self.ranks.on_main(self.saving.wait)
            self._has_proven()
        if bad:
            step, text = min(bad)
            advice = self.ranks.told(lambda: resuming.judge(self.run.dir, step))
            raise UserError(f"{text}. {advice}: look at these samples, or continue with {self.remedy()}")

    def _begin(self) -> None:
        """Now that there is a step to take, put away what an earlier attempt left beyond it."""
        if self.log:
            self.log.begin()
            for path in checkpoint.set_aside_after(self.run.dir, self.start):
                self.log.say(f"the run continues from step {self.start}: a later checkpoint is now {path}")


def restore(engine: Engine, path: Path, ranks: Ranks, sections: dict[str, Any], same: Iterable[tuple[str, str]]) -> int:
    """Load a checkpoint into the engine. Every rank must call it. Returns the step to continue from.

    Args:
        engine: of the run that goes on.
        path: the checkpoint.
        ranks: who reads.
        sections, same: see `resuming.check_same`.

    Raises:
        UserError: the checkpoint is damaged or of another run.
    """
    resuming.check_same(path, ranks.told(lambda: checkpoint.read_info(path)), sections, same)
    step, read = resuming.open_checkpoint(path, engine.model, ranks, engine.kinds)
    engine.load_state(step, read)
    return step
