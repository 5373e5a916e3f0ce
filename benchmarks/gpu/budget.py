"""A time limit for a whole command, which keeps the results obtained so far."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(BaseException):
    """Raised when the time is over. It does not derive from Exception, so it is not caught by code that catches errors
    of other libraries."""


@contextmanager
def budget(seconds: float) -> Iterator[None]:
    """End the `with` block after `seconds`, with a message. C code is not interrupted. The block must write its results
    as it proceeds."""

    def end(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except OutOfTime:
        print(f"--budget: {time.monotonic() - started:.0f} s are over; the results so far are written", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
