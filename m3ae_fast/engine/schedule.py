"""The steps of a run, the learning rate of each, and a number of steps that changes while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import LONGEST, LoopConfig, ScheduleConfig
from m3ae_fast.data import Share


def learning_rate(step: float, config: ScheduleConfig, batch: int, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of 0-based `step`: linear warm-up, then cosine (optax.warmup_cosine_decay_schedule)."""
    scale = config.lr_factor(batch)
    init, peak, end = (scale * lr for lr in (config.init_lr, config.peak_lr, config.end_lr))
    return warmup_cosine(step, warmup_steps, total_steps, init, peak, end)


def warmup_cosine(
    step: float, warmup_steps: int, total_steps: int, init: float = 0.0, peak: float = 1.0, end: float = 0.0
) -> float:
    """Return a schedule that rises linearly from `init` to `peak` in the warm-up and then decays to `end` along a
    cosine."""
    if step < warmup_steps:
        return init + (peak - init) * step / warmup_steps
    progress = min(step - warmup_steps, total_steps - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: float, warmup_steps: int, decayed: float, init: float = 0.0, peak: float = 1.0, end: float = 0.0
) -> float:
    """Return a schedule that rises linearly from `init` to `peak` in the warm-up, and then decays to `end` as 1 minus
    the root of `decayed`, the progress of the decay (arXiv 2405.18392)."""
    rate = init + (peak - init) * step / warmup_steps if step < warmup_steps else peak
    return end + (rate - end) * (1 - math.sqrt(decayed))


def split_batch(config: LoopConfig, world: int, rank: int = 0) -> Share:
    """Return a rank's part of each step, in as few micro-batches as `config.micro_batch` allows. Raises UserError if
    there are more ranks than samples of a step."""
    if config.global_batch < world:
        raise UserError(
            f"config: {config.SECTION}.global_batch {config.global_batch} has no sample for some of {world} ranks; "
            "raise it, or start fewer"
        )
    most = -(-config.global_batch // world)
    accumulation = -(-most // (config.micro_batch or most))
    return Share(config.global_batch, accumulation, rank, world)


class Change(NamedTuple):
    """A decision, after `step` steps, that the run has `total` steps, which are more."""

    step: int
    total: int


@dataclass(frozen=True)
class Schedule:
    """Steps of a run over a corpus of `samples`."""

    train: LoopConfig
    optim: ScheduleConfig
    samples: int  # per epoch
    changes: tuple[Change, ...] = ()  # of the number of steps, in the order in which they were decided

    @property
    def steps_per_epoch(self) -> int:
        return max(self.samples // self.train.global_batch, 1)

    @property
    def configured_steps(self) -> int:
        return self.train.steps or max(round((self.train.epochs or 0) * self.steps_per_epoch), 1)

    @property
    def total_steps(self) -> int:
        return self.changes[-1].total if self.changes else self.configured_steps

    @property
    def most_steps(self) -> int:
        """Return the steps that a change may set at most."""
        return max(LONGEST * self.steps_per_epoch, self.configured_steps)

    @property
    def warmup_steps(self) -> int:
        """Return the steps of the warm-up, before any change."""
        return min(round(self.optim.warmup_epochs * self.steps_per_epoch), self.configured_steps)

    def changed(self, step: int, total: int) -> Schedule:
        """Return the schedule of a run that has taken `step` steps and is to have `total` steps in all."""
        return replace(self, changes=(*self.changes, Change(step, total)))

    def position(self, step: int) -> float:
        """Return the step of the unchanged schedule that corresponds to `step`. A change stretches or compresses what
        is left of the schedule over the steps that are left, so the learning rate is continuous and reaches its end."""
        position, since, pace = 0.0, 0, 1.0
        for change in self.changes:
            if change.step > step:
                break
            position += (change.step - since) * pace
            since, pace = change.step, (self.configured_steps - position) / (change.total - change.step)
        return position + (step - since) * pace

    def _decays(self) -> Iterator[tuple[int, int, int, float]]:
        """Yield, from the start and from each change on: the step from which that holds, the first and the last step of
        the decay, and its progress before the first. A decay that has not begun is planned anew, for the end of all
        steps; one that has begun takes what is left of it over the steps that are left."""
        first, last, before = self._first_of_decay(self.configured_steps), self.configured_steps, 0.0
        yield 0, first, last, before
        for step, total in self.changes:
            if step > first:
                before += (1 - before) * (step - first) / (last - first)
                first = step
            else:
                first = max(step, self._first_of_decay(total))
            last = total
            yield step, first, last, before

    def _first_of_decay(self, total: int) -> int:
        """Return the steps that a run of `total` steps takes before its decay."""
        return total - max(round((self.optim.decay or 0.0) * total), 1)

    def with_decay_from(self, step: int) -> int:
        """Return the number of steps of a run whose decay begins after `step` steps."""
        total = math.ceil(step / (1 - (self.optim.decay or 0.0)))
        return total if self._first_of_decay(total) <= step else total - 1

    @property
    def decay_begin(self) -> int | None:
        """Return the steps taken when the decay begins, with all changes so far; None with a cosine."""
        if self.optim.decay is None:
            return None
        return [first for _, first, _, before in self._decays() if before == 0][-1]

    def decayed(self, step: int) -> float:
        """Return the progress of the decay before 0-based `step`, from 0 to 1."""
        _, first, last, before = [each for each in self._decays() if each[0] <= step][-1]
        return before + (1 - before) * min(max(step - first, 0) / (last - first), 1)

    def describe_rate(self) -> str:
        """Return the learning rate after the warm-up in words, which logs have, and how it follows from `peak_lr`."""
        optim, batch = self.optim, self.train.global_batch
        factor = optim.lr_factor(batch)
        scaled = "" if factor == 1 else f" = {optim.SECTION}.peak_lr {optim.peak_lr:g} x batch {batch:,} / 256"
        return f"learning rate {factor * optim.peak_lr:.3g}{scaled}"

    def lr(self, step: int) -> float:
        """Return the learning rate of 0-based `step`."""
        batch = self.train.global_batch
        if self.optim.decay is not None:
            scale = self.optim.lr_factor(batch)
            rates = (scale * lr for lr in (self.optim.init_lr, self.optim.peak_lr, self.optim.end_lr))
            return warmup_stable_decay(step, self.warmup_steps, self.decayed(step), *rates)
        return learning_rate(self.position(step), self.optim, batch, self.warmup_steps, self.configured_steps)

    def due(self, step: int, every: int | None) -> bool:
        """Return whether an action with period `every` (None: only at the end) is due after `step` steps."""
        return step == self.total_steps or (every is not None and step % every == 0)
