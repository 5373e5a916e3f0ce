"""The time that a run has, and the number of steps that fit into it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from m3ae_fast.engine.schedule import Schedule

_WARM = 2  # steps that are not counted: memory is allocated, kernels are compiled, loader workers start
_FEWEST = 8  # steps that are counted before the first adjustment, or as many as take
_SETTLED = 0.1  # of the time
# the weight of a step's duration falls by a factor of e in this part of the time left, but in no less than this part of
# all the time
_RECENT, _RECENT_LEAST = 0.1, 0.01
_TOLERANCE = 0.02  # of the time: an end that is expected as near to the limit stays
_PAUSE = 0.02  # of the time, between two adjustments
# where no time is left, the learning rate still falls to its end: over this part of the steps taken, in this part of
# the time at most
_RUN_DOWN, _RUN_DOWN_TIME = 0.02, 0.03


class TimeLimit:
    """Measures the steps and evaluations of a run, and tells how many steps it should have to end in its time."""

    def __init__(self, seconds: float, spent: float = 0.0) -> None:
        """Start the clock. `spent`: seconds of `seconds` that are used up, by earlier attempts."""
        self.seconds = seconds
        self._last = time.monotonic()
        self._began = self._last - spent
        self._taken = 0
        self._steps = self._duration = 0.0  # recent steps and how long they took, both with weights
        self._counted = 0.0  # seconds
        self._adjusted = -math.inf  # when
        self._evaluations: dict[str, tuple[float, float]] = {}  # by name: seconds, and how many there are per step

    @property
    def spent(self) -> float:
        """Return the seconds of the limit that are used up."""
        return time.monotonic() - self._began

    def step_taken(self) -> None:
        """Count the time since the step before, without evaluations."""
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
        """Measure the block as an evaluation that is due every so many steps (None: only at the end), if it is due."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self._last += took
        if due:
            self._evaluations[name] = took, 1 / every if every else 0.0

    def fitting(self, step: int, schedule: Schedule) -> int:
        """Return the number of steps that a run should have which has taken `step`: the schedule's own, unless the run
        would end too late or too early with it."""
        total, left = schedule.total_steps, self.seconds - self.spent
        settled = self._taken >= _WARM + _FEWEST or self._counted >= _SETTLED * self.seconds
        early = self.spent - self._adjusted < _PAUSE * self.seconds
        if not self._taken or (left > 0 and (early or not settled)):
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
