"""Waiting for the effects of other threads and processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `true()` returns true. Raises AssertionError after this number of seconds."""
    late = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < late
        time.sleep(0.01)


def has_ended(process: int) -> bool:
    """Return whether the process with this ID has ended. After a process is killed, it may take a moment until this is
    true."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
