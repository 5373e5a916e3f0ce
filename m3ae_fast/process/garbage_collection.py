"""Scheduled garbage collection. Without a schedule, a collection may delay one rank at any time, and with it all other
ranks."""

from __future__ import annotations

import gc

EVERY = 1000  # number of steps between collections of all objects


class GarbageCollection:
    """A context manager for the training loop that collects garbage at fixed intervals, on all ranks in the same step.

    Objects that exist at the first step (modules, code, the model) are frozen, so that later collections skip them.
    torchtitan does the same.
    """

    def __enter__(self) -> GarbageCollection:
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._was_on:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect young objects every EVERY // 10 steps. Collect all objects every EVERY steps, to free old reference
        cycles that contain tensors."""
        if step % EVERY == 0:
            gc.collect()
        elif step % (EVERY // 10) == 0:
            gc.collect(1)
