"""The time limit of a run, and the number of steps that fit into it."""

from __future__ import annotations

import math

from m3ae_fast.base.pace import Pace
from m3ae_fast.engine.schedule import Schedule

FIRST = 2  # number of first steps that `Pace` excludes, because they include allocations and compilation
_FEWEST = 8  # minimum number of measured steps before the first adjustment
_SUFFICIENT_TIME = 0.1  # fewer steps are sufficient if they took this fraction of the time limit
# Recent steps have a higher weight: the weight of a step decreases by a factor of e within the fraction _RECENT of the
# time left, or within the fraction _RECENT_LEAST of the time limit if that is longer.
_RECENT, _RECENT_LEAST = 0.1, 0.01
_TOLERANCE = 0.02  # no adjustment if the expected end differs from the time limit by at most this fraction of it
_PAUSE = 0.02  # minimum time between two adjustments, as a fraction of the time limit
# If no time is left, the learning rate is still decayed. The number of steps of this decay is the fraction _RUN_DOWN of
# the steps taken, but no more than fit into the fraction _RUN_DOWN_TIME of the time limit.
_RUN_DOWN, _RUN_DOWN_TIME = 0.02, 0.03


class TimeLimit:
    """The time limit of a run. It computes from the pace of the steps how many of them fit into the limit."""

    def __init__(self, seconds: float, pace: Pace, spent: float = 0.0) -> None:
        """Start to count the time, with the clock of the pace.

        Args:
            seconds: the limit.
            pace: pace of the steps, for which evaluations are pauses.
            spent: the part of `seconds` that was used before the run was resumed.
        """
        self.seconds, self.pace = seconds, pace
        self._began = pace.now() - spent
        self._adjusted = -math.inf  # time of the last adjustment

    @property
    def spent(self) -> float:
        """Return the seconds of the limit that have been used."""
        return self.pace.now() - self._began

    @property
    def recent(self) -> float:
        """Return the seconds of work within which the weight of earlier steps decreases by a factor of e."""
        return max(_RECENT * (self.seconds - self.spent), _RECENT_LEAST * self.seconds)

    def fitting(self, step: int, schedule: Schedule) -> int:
        """Return the total number of steps for a run that is at `step`: the number in the schedule, or another number
        if the run would otherwise end too late or too early."""
        total, left, pace = schedule.total_steps, self.seconds - self.spent, self.pace
        measured = pace.parts >= _FEWEST or pace.seconds >= _SUFFICIENT_TIME * self.seconds
        early = self.spent - self._adjusted < _PAUSE * self.seconds
        # Wait until a step after the first ones is measured, as long as there is time for that. Otherwise, the first
        # steps determine the pace.
        waits = pace.missing > 0 and pace.done > 0 and pace.missing * pace.per_unit < left
        if not pace.done or (left > 0 and (early or waits or not measured)):
            return total
        per_step, last = pace.cost()
        late = (total - step) * per_step + last - left
        if abs(late) <= _TOLERANCE * self.seconds:
            return total
        least = max(min(_RUN_DOWN * step, _RUN_DOWN_TIME * self.seconds / per_step), 1)
        fitting = min(step + round(max((left - last) / per_step, least)), schedule.most_steps)
        if fitting == total or (fitting > total) == (late > 0):
            return total
        self._adjusted = self.spent
        return fitting
