"""The time that each part of a call of `pretrain` takes."""

from __future__ import annotations

import time

from m3ae_fast.base.pace import duration


class TimeSpent:
    """A clock that divides the seconds since the beginning of a call between its parts."""

    def __init__(self, began: float) -> None:
        """Start with the first part. `began`: value of `time.monotonic` at its beginning."""
        self._last = began
        self._seconds: dict[str, float] = {}

    def add(self, part: str) -> None:
        """Add the time since the last call of this method, or since the beginning, to a part."""
        now = time.monotonic()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def move(self, seconds: float, part: str, to: str) -> None:
        """Move some of the seconds of a part to another part."""
        self._seconds[part] -= seconds
        self._seconds[to] = self._seconds.get(to, 0.0) + seconds

    def line(self) -> str:
        """Return a line with the total time, and the share of each part."""
        total = sum(self._seconds.values())
        shares = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in self._seconds.items())
        return f"time: {duration(total)}; {shares}"
