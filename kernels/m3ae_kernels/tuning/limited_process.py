"""A process with a time limit. The process is killed even if it is stuck in C code, where Python handles no signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE = 10.0  # seconds to wait for a killed process, which may never end if a call of a driver hangs
POLL = 0.1


def run(command: Sequence[str], seconds: float, progress: Path | None = None, **options: Any) -> int | None:
    """Run a command and return its exit code. If a signal ended the command, the result is minus the number of the
    signal. If the time limit was exceeded, the command and all processes of its group are killed, and the result is
    None.

    Args:
        command: the program and its arguments.
        seconds: the time limit. It counts from the start or, if `progress` is given, from the last change of this file.
        progress: a file that the command writes whenever it makes progress.
        options: further arguments of `subprocess.Popen`.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        while True:
            try:
                return process.wait(POLL)
            except subprocess.TimeoutExpired:
                if min(time.monotonic() - began, _age(progress)) > seconds:
                    return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def _age(progress: Path | None) -> float:
    """Return the seconds since the last change of a file; infinity if there is no file."""
    with suppress(FileNotFoundError):
        return float("inf") if progress is None else time.time() - progress.stat().st_mtime
    return float("inf")


def end_of(code: int | None, seconds: float) -> str:
    """Return a description of how a process ended, from the result of `run`; empty if it succeeded."""
    if code is None:
        return f"did not end within {seconds:g} s and was killed"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else ""
