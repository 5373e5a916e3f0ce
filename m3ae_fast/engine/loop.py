"""What happens around each step of a run, whatever it trains: agreement over ranks, log, checkpoints, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3ae_fast.config import LoopConfig, RunConfig
from m3ae_fast.data import BadSamples, Share
from m3ae_fast.data.order import hash64
from m3ae_fast.engine import checkpoint
from m3ae_fast.engine.feed import Fed
from m3ae_fast.engine.interface import Engine, State
from m3ae_fast.engine.loss_watch import LossWatch
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
    """Parts that stay, and `step`: optimiser steps taken so far. Subclasses say what is counted and evaluated."""

    run: RunConfig
    loop: LoopConfig
    sections: dict[str, Any]  # the config that checkpoints remember
    ranks: Ranks
    folder: RunFolder | None  # on the main rank alone, as the log
    log: RunLog | None
    share: Share
    schedule: Schedule
    engine: Engine
    train_loader: Iterable[Any]  # PackedBatches, or what else the engine takes
    watch: LossWatch
    bad: BadSamples
    start: int
    step: int

    def count(self, batches: list[PackedBatch]) -> tuple[float, ...]:
        """What to sum over ranks of a step's micro-batches, which are still on the CPU."""
        raise NotImplementedError

    def rates(self) -> dict[str, float]:
        """Rates since the last call, to be logged."""
        raise NotImplementedError

    def complete(self, state: State) -> State:
        """What a checkpoint holds, from what the engine knows; on the main rank."""
        return state

    def after_save(self, state: State) -> None:
        """What else is written with a checkpoint, on the main rank."""

    def remedy(self) -> str:
        """Settings that may help where a loss is not finite."""
        section = self.schedule.optim.SECTION
        return f"a lower {section}.peak_lr, {section}.clip_grad=1.0, or {self.loop.SECTION}.precision=fp32"

    def seed_step(self) -> None:
        """Make what the next step draws depend on the seed, the step and the rank alone."""
        torch.manual_seed(hash64(self.run.seed, self.step, self.ranks.rank) & 0xFFFFFFFF)

    def begin_agreement(self, stop: StopRequest, batches: list[PackedBatch]) -> Callable[[], list[float]]:
        """Begin to sum over ranks what they must agree on before a step: whether anybody wants to stop, and counts."""
        return self.ranks.start_sum((stop.asked, self.watch.failed(), *self.count(batches)))

    def agreed(self, fed: Fed) -> list[float] | None:
        """The counts of the next step over all ranks; None where a rank asks to stop or has failed."""
        asked, failed, *sums = fed.agreed()
        if asked or failed:
            return None
        for batch in fed.host:
            self.bad.report(batch.skipped)
        return sums

    def take_step(self, fed: Fed, counts: Any) -> tuple[list[Any], Tensor]:
        """One optimiser step. Returns the micro-batches' losses and the gradient norm."""
        if self.step == self.start:
            self._begin()
        self.seed_step()
        losses, grad_norm = self.engine.step(fed.device, counts, self.schedule.lr(self.step))
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
            values |= {"peak_memory_gb": peak_memory(self.ranks.device) / 1e9, "skipped": self.bad.bad}
            self.log.log(self.step, values)

    def save_if_due(self) -> None:
        if self.schedule.due(self.step, self.loop.save_every):
            self.stop_if_not_finite()
            self.save()

    def save(self) -> None:
        """Write a checkpoint. Every rank must call it."""
        state = self.engine.state()

        def write() -> None:
            assert self.folder and self.log and state is not None
            self.folder.keep()
            whole = self.complete(state)
            seen = self.step * self.loop.global_batch
            info = checkpoint.Info(self.step, seen, self.run.seed, self.sections, checkpoint.versions())
            path = checkpoint.save(self.run.dir, whole, info, self.loop.keep, section=self.schedule.optim.SECTION)
            self.log.say(f"saved {path}")
            self.after_save(whole)

        self.ranks.on_main(write)

    def finish(self, stop: StopRequest) -> None:
        """Where the run was stopped early, save what it has."""
        self.stop_if_not_finite()
        if self.step == self.schedule.total_steps:
            return
        if self.step > self.start:
            self.save()
        if self.log:
            reason = stop.reason or "asked by another rank"
            saved = "" if self.step > self.start else "; nothing to save"
            self.log.say(f"stopped at step {self.step} ({reason}){saved}; --resume auto goes on")

    def stop_if_not_finite(self) -> None:
        """Raises UserError on all ranks where a step of any rank had a loss or gradient norm that is not finite."""
        for found in self.ranks.gather(self.watch.first_bad()):
            if found:
                raise UserError(
                    f"{found}. The last good checkpoint is intact: look at these samples, or go on from it with "
                    f"{self.remedy()}"
                )

    def _begin(self) -> None:
        """Now that there is a step to take, put away what an earlier attempt left beyond it."""
        if self.log:
            self.log.begin()
            for path in checkpoint.set_aside_after(self.run.dir, self.start):
                self.log.say(f"the run goes on from step {self.start}: a later checkpoint is now {path}")


def restore(
    engine: Engine, path: Path, ranks: Ranks, sections: dict[str, Any], same: Iterable[tuple[str, str]]
) -> tuple[int, Callable[[str], Tensor]]:
    """Load a checkpoint into the engine.

    Args:
        engine: of the run that goes on.
        path: the checkpoint.
        ranks: every rank must call it.
        sections, same: see `checkpoint.check_fits`.

    Returns:
        The step to go on from, and a reader of further tensors, for every rank in the same order.

    Raises:
        UserError: the checkpoint is damaged or of another run.
    """
    info = ranks.told(lambda: checkpoint.read_info(path))
    checkpoint.check_fits(path, info, sections, same)
    read = ranks.on_main(lambda: checkpoint.open_state(path))

    def get(name: str) -> Tensor:
        return ranks.told(lambda: read(name))  # type: ignore[misc]

    engine.load_state(info.step, get)
    return info.step, get
