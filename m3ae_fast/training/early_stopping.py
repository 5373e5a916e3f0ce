"""Early stopping: ends a run with a decay of the learning rate when its k-NN accuracy reaches a target or no longer
improves."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Literal

from m3ae_fast.base.errors import UserError
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.training.metrics_log import read_metrics

ACCURACY = "val_knn_top1"  # name of the accuracy in the log

PLATEAU: Literal["plateau"] = "plateau"
PATIENCE = 3  # a plateau is this number of consecutive evaluations without a new best accuracy


class EarlyStopping:
    """Rule that decides from the accuracies when the decay of the learning rate begins. A resumed run with the same
    accuracies makes the same decision."""

    def __init__(self, stop_at: float | Literal["plateau"]) -> None:
        """Create the rule. `stop_at`: accuracy that ends the run, from 0 to 1, or PLATEAU."""
        self._stop_at = stop_at
        self._best, self._since = -math.inf, 0  # the highest accuracy, and the number of evaluations after it
        self.step: int | None = None  # step after which the decay begins; None until that is decided

    def replay(self, run: Path, last: int) -> None:
        """Add the accuracies in a run folder's log, up to and including those after step `last`."""
        with contextlib.suppress(UserError):  # the log is empty
            for line in read_metrics(run):
                if ACCURACY in line and line["step"] <= last:
                    self.add(line["step"], line[ACCURACY])

    def add(self, step: int, accuracy: float) -> str:
        """Add the accuracy after a step. The accuracy of the initial weights is ignored. If the accuracy causes the run
        to end early, return the reason; otherwise return ""."""
        if self.step is not None or step == 0:
            return ""
        grows = accuracy > self._best
        self._best, self._since = max(self._best, accuracy), 0 if grows else self._since + 1
        why = ""
        if self._stop_at == PLATEAU:
            if self._since >= PATIENCE:
                why = f"the k-NN accuracy has not exceeded {self._best:.4g} in {PATIENCE} evaluations"
        elif accuracy >= self._stop_at:
            why = f"the k-NN accuracy of {accuracy:.4g} reaches train.stop_at={self._stop_at:g}"
        if why:
            self.step = step
        return why

    def total_steps(self, step: int, schedule: Schedule, planned: int) -> int:
        """Return the total number of steps of a run that is at `step`: `planned`, or fewer if the decay begins now."""
        begin = schedule.decay_begin
        if self.step is None or begin is None:
            return planned
        return min(planned, schedule.total_steps if step > begin else schedule.with_decay_from(step))
