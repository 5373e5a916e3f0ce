"""The number of steps of a run, which may change during the run, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from m3ae_fast.config import LONGEST, OptimConfig, TrainConfig


def warmup_cosine(
    step: float, warmup_steps: int, total_steps: int, init: float = 0.0, peak: float = 1.0, end: float = 0.0
) -> float:
    """Return the value at `step` of a schedule that rises linearly from `init` to `peak` during the warm-up and then
    decays to `end` along a cosine (optax.warmup_cosine_decay_schedule)."""
    if step < warmup_steps:
        return init + (peak - init) * step / warmup_steps
    progress = min(step - warmup_steps, total_steps - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(step: float, warmup_steps: int, decayed: float, peak: float = 1.0, end: float = 0.0) -> float:
    """Return the value at `step` of a schedule that rises linearly from 0 to `peak` during the warm-up, stays at
    `peak`, and finally decays to `end` with the factor 1 - sqrt(`decayed`) (arXiv 2405.18392). `decayed`: progress of
    the decay at this step, from 0 to 1."""
    rate = peak * step / warmup_steps if step < warmup_steps else peak
    return end + (rate - end) * (1 - math.sqrt(decayed))


class Change(NamedTuple):
    """A change of the run's number of steps to `total`, decided after `step` steps."""

    step: int
    total: int


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run: its number of steps, and the learning rate of each step."""

    train: TrainConfig
    optim: OptimConfig
    samples: int  # number of samples per epoch
    changes: tuple[Change, ...] = ()  # changes of the number of steps, in the order in which they were decided
    scaled: bool = True  # whether the learning rates are for a batch of 256, and proportional to the batch size

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of full batches in an epoch, but at least 1."""
        return max(self.samples // self.train.global_batch, 1)

    @property
    def configured_steps(self) -> int:
        """Return the number of steps of the unchanged schedule: `steps` of the config, or its `epochs`."""
        return self.train.steps or max(round((self.train.epochs or 0) * self.steps_per_epoch), 1)

    @property
    def total_steps(self) -> int:
        """Return the number of steps of the run, with all changes so far."""
        return self.changes[-1].total if self.changes else self.configured_steps

    @property
    def most_steps(self) -> int:
        """Return the maximum number of steps that a change may set."""
        return max(LONGEST * self.steps_per_epoch, self.configured_steps)

    @property
    def warmup_steps(self) -> int:
        """Return the number of warm-up steps of the unchanged schedule."""
        return min(round(self.optim.warmup_epochs * self.steps_per_epoch), self.configured_steps)

    def changed(self, step: int, total: int) -> Schedule:
        """Return this schedule with the number of steps changed to `total` after `step` steps."""
        return replace(self, changes=(*self.changes, Change(step, total)))

    def position(self, step: int) -> float:
        """Return the step of the unchanged schedule that corresponds to `step`. A change stretches or compresses the
        rest of the schedule to the remaining steps, so the learning rate is continuous and reaches its final value."""
        position, since, pace = 0.0, 0, 1.0
        for change in self.changes:
            if change.step > step:
                break
            position += (change.step - since) * pace
            since, pace = change.step, (self.configured_steps - position) / (change.total - change.step)
        return position + (step - since) * pace

    def _decays(self) -> Iterator[tuple[int, int, int, float]]:
        """Yield the plan of the decay at the start and after each change: the step from which the plan applies, the
        numbers of steps after which the decay begins and ends, and its progress at this beginning. A decay that has
        not begun when the number of steps changes is moved to the new end. The rest of a decay that has begun is spread
        over the remaining steps."""
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
        """Return the number of steps before the decay in a run of `total` steps."""
        return total - max(round((self.optim.decay or 0.0) * total), 1)

    @property
    def decay_begin(self) -> int | None:
        """Return the number of steps before the decay, with all changes so far; None for a cosine schedule."""
        if self.optim.decay is None:
            return None
        return [first for _, first, _, before in self._decays() if before == 0][-1]

    def decayed(self, step: int) -> float:
        """Return the progress of the decay, from 0 to 1, before `step`, which is counted from 0."""
        _, first, last, before = [each for each in self._decays() if each[0] <= step][-1]
        return before + (1 - before) * min(max(step - first, 0) / (last - first), 1)

    def describe_rate(self) -> str:
        """Return a description for the log: the learning rate after the warm-up, and how it is derived from
        `peak_lr`."""
        factor, peak = self.lr_factor, self.optim.peak_lr
        scaled = "" if factor == 1 else f" = optim.peak_lr {peak:g} x batch {self.train.global_batch:,} / 256"
        return f"learning rate {factor * peak:.3g}{scaled}"

    @property
    def lr_factor(self) -> float:
        """Return the factor by which the learning rates are multiplied."""
        return self.train.global_batch / 256 if self.scaled else 1.0

    def lr(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0, with all changes so far."""
        peak, end = (self.lr_factor * lr for lr in (self.optim.peak_lr, self.optim.end_lr))
        if self.optim.decay is not None:
            return warmup_stable_decay(step, self.warmup_steps, self.decayed(step), peak, end)
        return warmup_cosine(self.position(step), self.warmup_steps, self.configured_steps, peak=peak, end=end)

    def due(self, step: int, every: int | None) -> bool:
        """Return whether an action with period `every` (None: only at the end) is due after `step` steps."""
        return step == self.total_steps or (every is not None and step % every == 0)
