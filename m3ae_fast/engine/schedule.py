"""The steps of a run, and the learning rate of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from m3ae_fast.config import LoopConfig, ScheduleConfig
from m3ae_fast.data import Share
from m3ae_fast.errors import UserError


def learning_rate(step: int, config: ScheduleConfig, batch: int, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of 0-based `step`: linear warm-up, then cosine (optax.warmup_cosine_decay_schedule)."""
    scale = config.lr_factor(batch)
    init, peak, end = (scale * lr for lr in (config.init_lr, config.peak_lr, config.end_lr))
    return warmup_cosine(step, warmup_steps, total_steps, init, peak, end)


def warmup_cosine(
    step: int, warmup_steps: int, total_steps: int, init: float = 0.0, peak: float = 1.0, end: float = 0.0
) -> float:
    """Return what rises linearly from `init` to `peak` in the warm-up, and falls to `end` as a cosine."""
    if step < warmup_steps:
        return init + (peak - init) * step / warmup_steps
    progress = min(step - warmup_steps, total_steps - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def split_batch(config: LoopConfig, world: int, rank: int = 0) -> Share:
    """Return a rank's part of each step, in as few micro-batches as `config.micro_batch` allows. Raises UserError where
    there are more ranks than samples of a step."""
    if config.global_batch < world:
        raise UserError(
            f"config: {config.SECTION}.global_batch {config.global_batch} has no sample for some of {world} ranks; "
            "raise it, or start fewer"
        )
    most = -(-config.global_batch // world)
    accumulation = -(-most // (config.micro_batch or most))
    return Share(config.global_batch, accumulation, rank, world)


@dataclass(frozen=True)
class Schedule:
    """Steps of a run over a corpus of `samples`."""

    train: LoopConfig
    optim: ScheduleConfig
    samples: int  # per epoch

    @property
    def steps_per_epoch(self) -> int:
        return max(self.samples // self.train.global_batch, 1)

    @property
    def total_steps(self) -> int:
        return self.train.steps or max(round((self.train.epochs or 0) * self.steps_per_epoch), 1)

    @property
    def warmup_steps(self) -> int:
        return min(round(self.optim.warmup_epochs * self.steps_per_epoch), self.total_steps)

    def describe_rate(self) -> str:
        """Return the learning rate after the warm-up in words, which logs have, and how it follows from `peak_lr`."""
        optim, batch = self.optim, self.train.global_batch
        factor = optim.lr_factor(batch)
        scaled = "" if factor == 1 else f" = {optim.SECTION}.peak_lr {optim.peak_lr:g} x batch {batch:,} / 256"
        return f"learning rate {factor * optim.peak_lr:.3g}{scaled}"

    def lr(self, step: int) -> float:
        """Return the learning rate of 0-based `step`."""
        return learning_rate(step, self.optim, self.train.global_batch, self.warmup_steps, self.total_steps)

    def due(self, step: int, every: int | None) -> bool:
        """Return whether an action with period `every` (None: only at the end) is due after `step` steps."""
        return step == self.total_steps or (every is not None and step % every == 0)
