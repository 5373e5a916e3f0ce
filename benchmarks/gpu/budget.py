"""A time limit for all of a command, which ends with what it has."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(BaseException):
    """Not an Exception: whoever catches another library's errors must let it pass."""


@contextmanager
def budget(seconds: float) -> Iterator[None]:
    """End the block after `seconds`, wherever it is (in C code, when that returns), and say so. The block must write
    what is to stay as it goes along."""

    def end(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except OutOfTime:
        print(f"--budget: {time.monotonic() - started:.0f} s are over; what was done is written", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
