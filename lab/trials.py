"""Execution of the trials of an experiment, one after the other, with results that are kept between calls; progress
messages, and the description of the machine in reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks import results


class Laboratory(Protocol):
    """A folder in which trials are performed. A trial has a `name`."""

    def result(self, trial: Any) -> Path:
        """Return the path of a trial's result, which exists if the trial is complete."""

    def perform(self, trial: Any) -> bool:
        """Perform a trial and write its result. Return False if it was stopped."""


def perform_all(
    trials: Iterable[Any], laboratory: Laboratory, minutes: float | None, write: Callable[[], Any] = lambda: None
) -> bool:
    """Perform all trials that are not complete, and call `write` after each. Return False if a trial was stopped.
    `minutes`: time after which no trial is started; None: no limit."""
    started = time.monotonic()
    for trial in trials:
        if laboratory.result(trial).exists():
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            break
        log(trial.name)
        if not laboratory.perform(trial):
            return False
        write()
    return True


def log(text: str) -> None:
    """Print a message with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def machine(about: Mapping[str, Any] | None = None) -> str:
    """Return a description of the machine, of the versions and of the date, for the head of a report. `about`: stored
    result of `benchmarks.results.about`; None: the present one."""
    about = about or results.about()
    return f"{about['device']}, one thread, torch {about['torch']}, m3ae_fast {about['m3ae_fast']}, {about['date']}"
