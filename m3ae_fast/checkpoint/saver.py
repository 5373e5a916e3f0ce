"""Saves checkpoints during training, and marks each as good or failed once its weights have been tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.memory import out_of_memory
from m3ae_fast.checkpoint.host_copy import Staging
from m3ae_fast.engine.fragments import Fragments, whole
from m3ae_fast.engine.interface import Engine
from m3ae_fast.process.background import Background
from m3ae_fast.process.ranks import Ranks


@dataclass(kw_only=True)
class Saver:
    """Asynchronous writer of checkpoints. It copies the state during the next step's forward and backward passes, and
    writes it in a thread, one checkpoint at a time. As a context manager, it waits for the last checkpoint at the end.

    A checkpoint is good once a loss computed from its weights is finite: the loss of the next step, or of an evaluation
    after the same step.
    """

    run_dir: Path
    keep: int  # number of checkpoints to keep
    engine: Engine
    ranks: Ranks
    constants: dict[str, Tensor]  # tensors saved in addition to the engine's state, by name
    suggested_fix: str  # settings to change if a tensor is not finite
    log: Callable[[str], None]
    # ensures that run_dir still belongs to this run; returns a note if the folder or its lock has changed, otherwise ""
    keep_folder: Callable[[], str]
    after_save: Callable[[int, Path], None]  # called on the main rank with each saved step and its checkpoint

    def __post_init__(self) -> None:
        self._thread = Background()
        self._agreement = self.ranks.agreement(self._thread.leaving)
        self._staging = Staging()
        self.engine.before_update = self._staging.wait
        self.unjudged: int | None = None  # step of the last checkpoint if it is not marked yet
        self._finite_evaluation: int | None = None  # last step after which the loss of an evaluation was finite

    def save(self, info: checkpoint.Info) -> None:
        """Start copying and writing this rank's part of a checkpoint. Every rank must call it. Raises UserError if the
        previous save failed; an exception due to a bug is raised only on the rank on which it occurred."""
        self.wait()  # the previous save may still read the copy of the state, which is overwritten below
        step, good, main = info.step, self._finite_evaluation == info.step, self.ranks.is_main
        constants = {name: whole(tensor) for name, tensor in self.constants.items()} if main else {}
        self._staging.begin(self.ranks.device)

        def write() -> None:
            part = self._agreement.together(lambda: self._copy(step, constants))
            if event := self._agreement.decide("", lambda _: self.keep_folder()):
                self.log(f"note: {event}")
            path = checkpoint.save(self.run_dir, part, info, self.keep, self.suggested_fix, self._agreement)
            if not main:
                return
            self.log(f"saved {path}")
            if good:
                self._mark_good(step, "the losses of an evaluation are finite")
            self.after_save(step, path)

        self._thread.start(write)
        self.unjudged = None if good else step

    def wait(self) -> None:
        """Wait until all ranks have completed the current save. Every rank must call it. Raises the same errors as
        `save`."""
        while any(self.ranks.sum([self._thread.busy])):  # raises an error at once if another rank has been killed
            self._thread.wait_briefly()
        self.ranks.together(self._thread.wait)

    @property
    def busy(self) -> bool:
        """Return whether this rank is still writing."""
        return self._thread.busy

    def failed(self) -> bool:
        """Return whether a save has failed on this rank; `wait` raises the error."""
        return self._thread.failed()

    def awaits(self, step: int) -> bool:
        """Return whether the last checkpoint is not marked yet and would be good if the losses of this step were
        finite."""
        return self.unjudged is not None and step > self.unjudged

    def step_was_finite(self, step: int) -> None:
        """Mark the last written checkpoint as good if it is older than `step`. To be called if the losses of `step`
        were finite on all ranks; every rank must call it."""
        if not self.awaits(step):
            return
        if self.ranks.is_main and self.unjudged is not None:
            self._mark_good(self.unjudged, "the next step's loss is finite")
        self.unjudged = None

    def evaluation_was_finite(self, step: int) -> None:
        """Record that a checkpoint of `step` must be marked as good once it is written. Every rank must call it."""
        self._finite_evaluation = step

    def step_was_not_finite(self, step: int) -> str:
        """Mark the checkpoint right before `step` as failed, once it is complete, unless it is good. Return a message
        about it for the user. Every rank must call this method. Raises the same errors as `save`."""
        self.wait()
        return self.ranks.broadcast(lambda: judge(self.run_dir, step))

    def _copy(self, step: int, constants: Fragments) -> Fragments:
        """Return a copy of this rank's part of the state. Raises UserError if there is not enough memory for it."""
        try:
            return self._staging.copy(lambda: self.engine.fragments() | constants)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"the checkpoint of step {step} was not written, because rank {self.ranks.rank} does not have enough "
                f"memory to copy its part ({error or type(error).__name__}); the earlier checkpoints are intact"
            ) from None

    def _mark_good(self, step: int, why: str) -> None:
        """Mark a written checkpoint as good. Main rank only."""
        checkpoint.mark(self.run_dir, step, checkpoint.GOOD, why)
        checkpoint.prune(self.run_dir, self.keep)

    def __enter__(self) -> Saver:
        self._thread.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.__exit__(kind, error, trace)


def judge(run_dir: Path, bad_step: int) -> str:
    """Mark the checkpoint right before `bad_step`, whose loss or gradient norm is not finite, as failed, unless the
    checkpoint is marked as good. Return a message about it that names the last good checkpoint."""
    before = checkpoint.step_folder(run_dir, bad_step - 1)
    marked = ""
    if before.is_dir() and not checkpoint.is_good(before):
        why = f"the loss or gradient norm of step {bad_step}, the first step with these weights, is not finite"
        checkpoint.mark(run_dir, bad_step - 1, checkpoint.FAILED, why)
        marked = f"{before} is now marked as failed, and --resume auto will skip it; "
    good = [path for path in checkpoint.saved_steps(run_dir) if checkpoint.is_good(path)]
    return marked + (f"the last good checkpoint is {good[-1]}" if good else "no checkpoint is known to be good")
