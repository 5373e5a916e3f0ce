"""The pace of work, measured while the work runs, and the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

Clock = Callable[[], float]  # returns the time in seconds
_RELIABLE_S = 3.0  # seconds of measured work after which the time left is reliable enough to be reported


def duration(seconds: float) -> str:
    """Return a time as H:MM:SS, at least 0:00:01."""
    return str(timedelta(seconds=max(round(seconds), 1)))


class Pace:
    """The seconds per unit of work. Pauses are excluded. The first parts of the work are excluded too, because the
    start of the loader, allocations and compilation make them slow."""

    def __init__(
        self,
        total: float | None = None,
        *,
        first: int = 1,
        report: Callable[[float], None] | None = None,
        now: Clock | None = None,
    ) -> None:
        """Begin the work.

        Args:
            total: units of the whole work; None if that is unknown.
            first: number of calls of `advance` whose time is excluded as soon as later calls have been measured.
            report: called once, with the seconds left, as soon as this estimate is reliable.
            now: the clock; None: `time.monotonic`.
        """
        self.total, self.done = total, 0.0
        self.parts = 0  # number of calls of `advance` that are measured
        self.seconds = 0.0  # duration of these parts
        self.paused = 0.0  # seconds of all pauses
        self.now = now or time.monotonic
        self.missing = first + 1  # calls of `advance` up to and including the first one whose time is kept
        self._report, self._last = report, self.now()
        self._units = self._duration = 0.0  # weighted sums over the measured parts
        self._pauses: dict[str, tuple[float, float]] = {}  # by name: seconds of the last pause, pauses per unit

    def advance(self, units: float = 1.0, recent: float = math.inf) -> None:
        """Count the units that were done since the last call. If there are none, the time since then is added to the
        time of the next units. `recent`: seconds of work within which the weight of earlier units decreases by a
        factor of e."""
        if not units:
            return
        now = self.now()
        took, self._last = now - self._last, now
        if self.missing:
            self.parts, self.seconds, self._units, self._duration = 0, 0.0, 0.0, 0.0
            self.missing -= 1
        weight = math.exp(-took / recent)
        self.done += units
        self.parts, self.seconds = self.parts + 1, self.seconds + took
        self._units, self._duration = weight * self._units + units, weight * self._duration + took
        if self._report and not self.missing and self.seconds >= _RELIABLE_S:
            report, self._report = self._report, None
            report(self.left())

    def skip(self) -> None:
        """Exclude the time since the last call of `advance`."""
        self._last = self.now()

    @contextmanager
    def pause(self, name: str, frequency: float = 0.0, counts: bool = True) -> Iterator[None]:
        """Enter a context whose time is excluded from the pace.

        Args:
            name: name of the pause.
            frequency: number of pauses with this name per unit of work. One more pause follows the last unit.
            counts: whether the duration of this pause is used to estimate the time left. If False, the time in the
                context is only excluded from the pace, for example because no pause was due.
        """
        began = self.now()
        yield
        took = self.now() - began
        self._last += took
        self.paused += took
        if counts:
            self._pauses[name] = took, frequency

    @property
    def per_unit(self) -> float:
        """Return the seconds per unit without pauses. `advance` must have been called."""
        return self._duration / self._units

    def cost(self) -> tuple[float, float]:
        """Return the seconds per unit including pauses, and the seconds of the pauses after the last unit."""
        pauses = self._pauses.values()
        return self.per_unit + sum(took * frequency for took, frequency in pauses), sum(took for took, _ in pauses)

    def left(self, units: float | None = None) -> float:
        """Return the seconds for `units` more units, including pauses; None: for all units that are not done."""
        if units is None:
            assert self.total is not None
            units = self.total - self.done
        each, last = self.cost()
        return units * each + last

    def describe_left(self) -> str:
        """Return ", about H:MM:SS left"; "" if no unit is done, if all are done, or if their number is unknown."""
        if not self.done or self.total is None or math.isclose(self.done, self.total) or self.done > self.total:
            return ""
        return f", about {duration(self.left())} left"
