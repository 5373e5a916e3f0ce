"""Progress and estimated remaining time of long work: a bar on a terminal, occasional lines otherwise."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from m3ae_fast.base.pace import Pace, duration

T = TypeVar("T")
_FIRST_S = 3.0  # seconds until the first line; shorter work prints none
# maximum seconds between lines; until this interval is reached, a line is due each time the elapsed time has doubled
_SELDOM_S = 60.0


class Lines:
    """Progress lines for work whose pace is measured: the first after a few seconds, then at growing intervals."""

    def __init__(self, title: str, pace: Pace) -> None:
        """Begin the work."""
        self._title, self._pace, self._began = title, pace, pace.now()
        self._due = self._began + _FIRST_S

    def advance(self, count: int) -> str | None:
        """Count items as done. Return the progress and the time left if a line is due, otherwise None."""
        pace = self._pace
        pace.advance(count)
        now = pace.now()
        if now < self._due or pace.done == pace.total or not pace.done:
            return None
        self._due = now + min(now - self._began, _SELDOM_S)
        done = f"{self._title}: {pace.done:,.0f}"
        return done if pace.total is None else f"{done} of {pace.total:,.0f}{pace.describe_left()}"


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
    title: str, total: int | None = None, *, show: bool = True, whole: Pace | None = None, part: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of items done since its last call. If `show` is set, the main rank
    reports progress on stderr: as a bar if stderr is a terminal, otherwise as a line after a few seconds and further
    lines at growing intervals.

    `whole`: pace of a task that includes this work; `part`: number of the task's units that this work comprises. They
    are counted as done, and the remaining time of the task is also shown, if `total` is known."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    show = show and os.environ.get("RANK", "0") in ("", "0")  # launchers set RANK
    columns = (
        bars.TextColumn("{task.description}"),
        bars.MofNCompleteColumn(),
        bars.BarColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[left]}"),
    )
    pace = Pace(total)
    lines = Lines(title, pace)
    with bars.Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total, left="")

        def advance(count: int) -> None:
            line = lines.advance(count)
            of_task = ""
            if whole is not None and total:
                whole.advance(part * count / total)
                of_task = whole.describe_left() and f"; whole task:{whole.describe_left()[1:]}"
            bar.update(task, advance=count, left=f"{pace.describe_left()}{of_task}".strip(",; "))
            if show and line and not console.is_terminal:
                _print_line(f"{line}{of_task}")

        yield advance


def track(
    items: Iterable[T],
    title: str,
    total: int | None = None,
    *,
    show: bool = True,
    whole: Pace | None = None,
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
