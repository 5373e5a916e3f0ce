"""The time limit of a run, and the number of steps that fit into it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from m3ae_fast.engine.schedule import Schedule

_WARM = 2  # number of first steps that are excluded, because they include allocations, compilation and worker start-up
_FEWEST = 8  # minimum number of measured steps before the first adjustment
_SUFFICIENT_TIME = 0.1  # fewer steps are sufficient if they took this fraction of the time limit
# Recent steps have a higher weight: the weight of a step decreases by a factor of e within the fraction _RECENT of the
# time left, or within the fraction _RECENT_LEAST of the time limit if that is longer.
_RECENT, _RECENT_LEAST = 0.1, 0.01
_TOLERANCE = 0.02  # no adjustment if the expected end differs from the time limit by at most this fraction of it
_PAUSE = 0.02  # minimum time between two adjustments, as a fraction of the time limit
# If no time is left, the learning rate is still decayed. The number of steps for this is the fraction _RUN_DOWN of the
# steps taken, but no more than fit into the fraction _RUN_DOWN_TIME of the time limit.
_RUN_DOWN, _RUN_DOWN_TIME = 0.02, 0.03


class TimeLimit:
    """The time limit of a run. It measures the run's steps and evaluations, and computes from them how many steps fit
    into the limit."""

    def __init__(self, seconds: float, spent: float = 0.0) -> None:
        """Start the clock. `spent`: the part of `seconds` that was used before the run was resumed."""
        self.seconds = seconds
        self._last = time.monotonic()
        self._began = self._last - spent
        self._taken = 0
        self._steps = self._duration = 0.0  # weighted number and duration of recent steps
        self._counted = 0.0  # seconds of measured steps
        self._adjusted = -math.inf  # time of the last adjustment
        # by name: seconds per evaluation, and evaluations per step
        self._evaluations: dict[str, tuple[float, float]] = {}

    @property
    def spent(self) -> float:
        """Return the seconds of the limit that have been used."""
        return time.monotonic() - self._began

    def step_taken(self) -> None:
        """Count the time since the previous step, without evaluations."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        if self._taken <= _WARM:
            self._steps = self._duration = self._counted = 0.0
        self._taken += 1
        recent = max(_RECENT * (self.seconds - self.spent), _RECENT_LEAST * self.seconds)
        weight = math.exp(-took / recent)
        self._steps = weight * self._steps + 1
        self._duration = weight * self._duration + took
        self._counted += took

    @contextmanager
    def evaluation(self, name: str, every: int | None, due: bool) -> Iterator[None]:
        """Enter a context that measures an evaluation if it is `due`. `every`: number of steps between evaluations;
        None: evaluation only at the end of the run."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self._last += took
        if due:
            self._evaluations[name] = took, 1 / every if every else 0.0

    def fitting(self, step: int, schedule: Schedule) -> int:
        """Return the total number of steps for a run that is at `step`: the number in the schedule, or another number
        if the run would otherwise end too late or too early."""
        total, left = schedule.total_steps, self.seconds - self.spent
        measured = self._taken >= _WARM + _FEWEST or self._counted >= _SUFFICIENT_TIME * self.seconds
        early = self.spent - self._adjusted < _PAUSE * self.seconds
        # The first steps are used only if there may be no time to wait for a measured step.
        missing = _WARM + 1 - self._taken
        waits = missing > 0 and missing * self._duration < left
        if not self._taken or (left > 0 and (early or waits or not measured)):
            return total
        per_step, last = self._duration / self._steps, 0.0
        for seconds, frequency in self._evaluations.values():
            per_step += seconds * frequency
            last += seconds
        late = (total - step) * per_step + last - left
        if abs(late) <= _TOLERANCE * self.seconds:
            return total
        least = max(min(_RUN_DOWN * step, _RUN_DOWN_TIME * self.seconds / per_step), 1)
        fitting = min(step + round(max((left - last) / per_step, least)), schedule.most_steps)
        if fitting == total or (fitting > total) == (late > 0):
            return total
        self._adjusted = self.spent
        return fitting
