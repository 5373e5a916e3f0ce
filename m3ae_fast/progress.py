"""A progress bar with the time left, for whatever takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], title: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """The items as they come, with a bar on stderr where that is a terminal and `show` is set."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(
        *columns, console=console, transient=True, disable=not (show and console.is_terminal)
    ) as bar:
        yield from bar.track(items, total=total, description=title)
