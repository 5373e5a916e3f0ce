"""Progress and estimated remaining time of long work: a bar on a terminal, occasional lines otherwise."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
Clock = Callable[[], float]  # seconds
_FIRST_S = 3.0  # seconds until the first line; shorter work prints none
# maximum seconds between lines; until this interval is reached, a line is due each time the elapsed time has doubled
_SELDOM_S = 60.0


def duration(seconds: float) -> str:
    """Return a time as H:MM:SS, at least 0:00:01."""
    return str(timedelta(seconds=max(round(seconds), 1)))


class TimeLeft:
    """Estimate of the remaining time of a task with several parts, based on the time that completed parts took."""

    def __init__(
        self,
        total: float,
        report: Callable[[float], None] | None = None,
        now: Clock = time.monotonic,
    ) -> None:
        """Begin the task.

        Args:
            total: the size of the task, in the unit in which the parts are measured.
            report: called once, with the first reliable estimate of the seconds left.
            now: the clock.
        """
        self.total, self.done = total, 0.0
        self._report, self._now, self._started, self._spent = report, now, now(), 0.0

    def after(self, part: float) -> str:
        """Count a part as done and return the result of `left`."""
        self.done, self._spent = self.done + part, self._now() - self._started
        if self.done < self.total:
            self.report_once(self._estimate(self.done, self._spent))
        return self.left()

    def left(self) -> str:
        """Return ", about H:MM:SS left" for the remaining parts; "" after the last part."""
        if not self.done or self.done >= self.total:
            return ""
        return f", about {duration(self._estimate(self.done, self._spent))} left"

    def during(self, done: float, pace: float, sure: bool = True) -> float:
        """Return the seconds left if `done` units of the current part are done, at `pace` seconds per unit. `sure`:
        whether the estimate is reliable enough to report."""
        left = self._estimate(self.done + done, self._spent + pace * done)
        if sure:
            self.report_once(left)
        return left

    def report_once(self, left: float) -> None:
        """Pass an estimate of the seconds left to `report`, unless one has been reported before."""
        report, self._report = self._report, None
        if report:
            report(left)

    def _estimate(self, done: float, spent: float) -> float:
        return spent / done * (self.total - done)


class Lines:
    """Progress lines for work on `total` items: the first after a few seconds, then at growing intervals."""

    def __init__(
        self,
        title: str,
        total: int | None,
        whole: TimeLeft | None = None,
        part: float = 0.0,
        now: Clock = time.monotonic,
    ) -> None:
        """Begin the work. `whole`: the whole task, of which this work is a part of size `part`."""
        self._title, self._total, self._whole, self._part = title, total, whole, part
        self._now, self._done = now, 0
        self._started = self._due = now()
        self._due += _FIRST_S
        self._first: tuple[float, int] | None = None  # time at which the first items were done, and their number

    def advance(self, count: int) -> tuple[str, str] | None:
        """Count items as done. If a line is due, return the progress of this work, and the remaining time of the task
        ("" if this work is the whole task). Otherwise return None."""
        now, self._done = self._now(), self._done + count
        if self._first is None and self._done:
            self._first = now, self._done
        if now < self._due or self._done == self._total or not self._done:
            return None
        self._due = now + min(now - self._started, _SELDOM_S)
        if self._total is None:
            return f"{self._title}: {self._done:,}", ""
        text = f"{self._title}: {self._done:,} of {self._total:,}"
        left = self._pace(now) * (self._total - self._done)
        text += f", about {duration(left)} left"
        if self._whole is None:
            return text, ""
        item = self._part / self._total  # task units per item
        # the time of the first item includes the start-up
        sure = self._first is not None and self._done > self._first[1]
        return text, duration(self._whole.during(item * self._done, self._pace(now) / item, sure))

    def _pace(self, now: float) -> float:
        """Return the seconds per item, without the start-up time if further items are done after the first ones."""
        assert self._first is not None
        when, done = self._first
        if self._done > done:
            return (now - when) / (self._done - done)
        return (now - self._started) / self._done


@contextmanager
def working(title: str, *, show: bool = True, every: float = 5.0) -> Iterator[None]:
    """Print on stderr that work of unknown duration has begun and, every `every` seconds, that it is still running."""
    ended, began = threading.Event(), time.monotonic()

    def report() -> None:
        while not ended.wait(every):
            _print_line(f"{title}: {duration(time.monotonic() - began)} so far")

    if not show:
        yield
        return
    _print_line(title)
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()


def _print_line(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader has closed the pipe, or the disk is full
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(
    title: str, total: int | None = None, *, show: bool = True, whole: TimeLeft | None = None, part: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of items done since its last call. If `show` is set, the main rank
    reports progress on stderr: as a bar if stderr is a terminal, otherwise as a line after a few seconds and further
    lines at growing intervals.

    `whole`: the whole task, of which this work is a part of size `part`. The remaining time of the task is shown
    too."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    show = show and os.environ.get("RANK", "0") in ("", "0")  # launchers set RANK
    columns = (
        bars.TextColumn("{task.description}"),
        bars.MofNCompleteColumn(),
        bars.BarColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("ETA"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[whole]}"),
    )
    lines = Lines(title, total, whole, part)
    with bars.Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total, whole="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            if not show or (said := lines.advance(count)) is None:
                return
            text, of_task = said
            if console.is_terminal:
                bar.update(task, whole=f"whole task {of_task}" if of_task else "")
                return
            _print_line(f"{text}; whole task: about {of_task} left" if of_task else text)

        yield advance


def track(
    items: Iterable[T],
    title: str,
    total: int | None = None,
    *,
    show: bool = True,
    whole: TimeLeft | None = None,
    part: float = 0.0,
) -> Iterator[T]:
    """Yield the items and show progress as `progress` does. By default, `total` is the length of `items` if it has
    one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(title, total, show=show, whole=whole, part=part) as advance:
        for item in items:
            yield item
            advance(1)
