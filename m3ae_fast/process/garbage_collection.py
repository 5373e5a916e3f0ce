"""Python's garbage collector under control: it would stop one rank at any time, and all others with it."""

from __future__ import annotations

import gc

EVERY = 1000  # steps


class GarbageCollection:
    """Collects every so many steps, on all ranks in the same step; use as a context manager around the loop.

    What exists at the first step (modules, code, the model) is frozen: no collection looks at it again. torchtitan
    does the same.
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
        """Collect only the youngest objects, but now and then all: cycles of tensors must be freed too."""
        if step % EVERY == 0:
            gc.collect()
        elif step % (EVERY // 10) == 0:
            gc.collect(1)
