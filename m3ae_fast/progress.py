"""Progress bars with the time left, for whatever takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def progress(title: str, total: int | None = None, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of items done since. Shows nothing where stderr is no terminal."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.MofNCompleteColumn(),
        bars.BarColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("ETA"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def track(items: Iterable[T], title: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """Yield the items as they come, with a bar on stderr where that is a terminal and `show` is set. `total` is the
    length of `items` where that has one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(title, total, show=show) as advance:
        for item in items:
            yield item
            advance(1)


class TimeLeft:
    """The time left of work that consists of parts, judged by the time that the parts so far took."""

    def __init__(self, total: float) -> None:
        """Begin the work. `total`: its size, in whatever the parts are measured in."""
        self.total, self.done, self._started = total, 0.0, time.perf_counter()

    def after(self, part: float) -> str:
        """Count a part as done, and return ", about H:MM:SS left" for the others; "" after the last."""
        self.done += part
        if self.done >= self.total:
            return ""
        seconds = (time.perf_counter() - self._started) / self.done * (self.total - self.done)
        return f", about {timedelta(seconds=round(seconds))} left"
