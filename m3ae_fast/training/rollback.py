"""Rollbacks: after a step with a loss spike or with a value that is not finite, a run returns to its last good
checkpoint and leaves out the batch of that step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

from m3ae_fast import checkpoint
from m3ae_fast.config import Config
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.training.loss_watch import Diverged
from m3ae_fast.training.time_limit import TimeLimit
from m3ae_fast.training.trainer import Trainer


def train_with_rollbacks(
    config: Config,
    ranks: Ranks,
    resume: str,
    build: Callable[[str, tuple[int, ...] | None], Trainer],
    trace_dir: Path | None,
) -> None:
    """Train, and return to the last good checkpoint at most `train.rollbacks` times. Every rank must call this
    function.

    Args:
        config: config of the run.
        ranks: the ranks of the run.
        resume: the checkpoint to start from, as for `pre_train`.
        build: function that returns a trainer, given the checkpoint to start from and the batches to leave out (None:
            the batches stored in the checkpoint).
        trace_dir: folder for a profiler trace of some steps; None: no trace.

    Raises:
        UserError: as raised by `Trainer.train`. Diverged is raised only if no rollback is left.
    """
    trainer = build(resume, None)
    while True:
        try:
            trainer.train(trace_dir)
            return
        except Diverged as error:
            if len(trainer.left_out) >= config.train.rollbacks:
                raise
            left_out = (*trainer.left_out, error.batch)
            trainer.log.print(f"{error.what}; batch {error.batch} is skipped: the run returns to a good checkpoint")
        spent = trainer.limit.spent if trainer.limit else 0.0
        del trainer
        gc.collect()  # frees its weights and loaders
        trainer = build(ranks.broadcast(partial(_return_to, config.run.dir, resume)), left_out)
        if trainer.limit:  # repeated steps count towards the time limit
            trainer.limit = TimeLimit(trainer.limit.seconds, spent)


def _return_to(run_dir: Path, resume: str) -> str:
    """Return the value of `resume` with which to continue after a step with a non-finite loss or gradient norm, or with
    a loss spike. If there is a good checkpoint, the value is "auto", which selects the last one. Otherwise, it is the
    value with which the run was started. Called on the main rank only."""
    if any(not (path / checkpoint.FAILED).exists() for path in checkpoint.saved_steps(run_dir)):
        return "auto"
    checkpoint.set_aside_after(run_dir, 0)
    return resume
