"""How far long work has come and the time left: a bar on a terminal, a line now and then elsewhere."""

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
_FIRST_S = 3.0  # until the first line: what ends sooner needs none
_SELDOM_S = 60.0  # between lines, at most; until then a line comes whenever the time has doubled


def duration(seconds: float) -> str:
    """Return a time as H:MM:SS."""
    return str(timedelta(seconds=max(round(seconds), 1)))


class TimeLeft:
    """The time left of a task that consists of parts, judged by the time that its parts so far took."""

    def __init__(
        self,
        total: float,
        beside: float = 0.0,
        told: Callable[[float], None] | None = None,
        now: Clock = time.monotonic,
    ) -> None:
        """Begin the task.

        Args:
            total: its size, in whatever unit the parts are measured in.
            beside: seconds that work takes which is no part, see `aside`.
            told: called once, with the first sure estimate of the seconds left.
            now: the clock.
        """
        self.total, self.beside, self.done = total, beside, 0.0
        self._told, self._now, self._started, self._spent = told, now, now(), 0.0

    def after(self, part: float) -> str:
        """Count a part as done, and return what `left` does."""
        self.done, self._spent = self.done + part, self._now() - self._started
        if self.done < self.total:
            self.tell(self._estimate(self.done, self._spent))
        return self.left()

    def left(self) -> str:
        """Return ", about H:MM:SS left" for the other parts and the work beside them; "" after the last."""
        if not self.done or (self.done >= self.total and not self.beside):
            return ""
        return f", about {duration(self._estimate(self.done, self._spent))} left"

    def during(self, done: float, pace: float, sure: bool = True) -> float:
        """Return the seconds left if `done` of the present part is done, at `pace` seconds per unit. `sure`: whether
        that is good enough to be told."""
        left = self._estimate(self.done + done, self._spent + pace * done)
        if sure:
            self.tell(left)
        return left

    def tell(self, left: float) -> None:
        """Pass an estimate of the seconds left to `told`, unless it has one."""
        told, self._told = self._told, None
        if told:
            told(left)

    @contextmanager
    def aside(self, seconds: float) -> Iterator[None]:
        """Do work that is no part, and was expected to take `seconds` of `beside`."""
        began = self._now()
        yield
        self._started += self._now() - began
        self.beside = max(self.beside - seconds, 0.0)

    def _estimate(self, done: float, spent: float) -> float:
        return spent / done * (self.total - done) + self.beside


class Lines:
    """Says how far work on `total` items is: after some seconds, then ever more seldom."""

    def __init__(
        self,
        title: str,
        total: int | None,
        whole: TimeLeft | None = None,
        part: float = 0.0,
        now: Clock = time.monotonic,
    ) -> None:
        """Begin the work. `whole`: the task, of which this work is a part of the size `part`."""
        self._title, self._total, self._whole, self._part = title, total, whole, part
        self._now, self._done = now, 0
        self._started = self._due = now()
        self._due += _FIRST_S
        self._first: tuple[float, int] | None = None  # when the first items were done, and how many

    def advance(self, count: int) -> tuple[str, str] | None:
        """Count items as done. Return where the work is, and the time that the whole task still takes ("" if this is
        all), when it is time to say it; else None."""
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
        item = self._part / self._total  # units of the task
        sure = self._first is not None and self._done > self._first[1]  # the first item has the start in it
        return text, duration(self._whole.during(item * self._done, self._pace(now) / item, sure))

    def _pace(self, now: float) -> float:
        """Return seconds per item, without the start if more than the first items are done."""
        assert self._first is not None
        when, done = self._first
        if self._done > done:
            return (now - when) / (self._done - done)
        return (now - self._started) / self._done


@contextmanager
def working(title: str, *, show: bool = True, every: float = 5.0) -> Iterator[None]:
    """Say on stderr that some work begins whose length is not known, and `every` so many seconds that it goes on."""
    ended, began = threading.Event(), time.monotonic()

    def go_on() -> None:
        while not ended.wait(every):
            _say(f"{title}: {duration(time.monotonic() - began)} so far")

    if not show:
        yield
        return
    _say(title)
    teller = threading.Thread(target=go_on, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever reads it has left, or the disk is full
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(
    title: str, total: int | None = None, *, show: bool = True, whole: TimeLeft | None = None, part: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of items done since. If `show` is set, the main rank shows a bar if
    stderr is a terminal, else a line after some seconds, and then ever more seldom.

    `whole`: the task, of which this work is a part of the size `part`; its time left is shown too."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    show = show and os.environ.get("RANK", "0") in ("", "0")  # as launchers set it
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
            _say(f"{text}; whole task: about {of_task} left" if of_task else text)

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
    """Yield the items as they come, and show progress as `progress` does. `total` is the length of `items` if that has
    one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(title, total, show=show, whole=whole, part=part) as advance:
        for item in items:
            yield item
            advance(1)
