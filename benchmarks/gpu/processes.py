"""Processes that a benchmark starts, none of which outlives it, nor does anything that they start in turn.

Process groups do not tell them: a trainer starts a session of its own. A mark in the environment does, which every
child inherits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

VARIABLE = "BENCHMARK_PROCESSES"  # the marks of a process and of those above it
PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL
POLL = 0.02


class Processes:
    """Context manager: at its end, all that was started in it, directly or not, is ended. SIGTERM to this process is
    an orderly end meanwhile (SystemExit), so that it can do so.

    Args:
        patience: seconds that they have to end by themselves after SIGTERM; 0: they get SIGKILL at once.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.left: list[int] = []  # process ids that SIGKILL did not end, as in a call of a driver that hangs
        self._mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen] = []

    def start(
        self, command: Sequence[str], log: Path | None = None, env: Mapping[str, str] | None = None, **options
    ) -> subprocess.Popen:
        """Start a command, whose output is appended to `log` (None: it is this process's). `env` is added to the
        environment; `options` are those of Popen."""
        marks = "/".join(filter(None, (os.environ.get(VARIABLE), self._mark)))
        with ExitStack() as files:
            if log is not None:
                options |= {"stdout": files.enter_context(log.open("ab")), "stderr": subprocess.STDOUT}
            process = subprocess.Popen(
                command, env=os.environ | dict(env or {}) | {VARIABLE: marks}, stdin=subprocess.DEVNULL, **options
            )
        self._started.append(process)
        return process

    def running(self) -> list[int]:
        """Return the process ids of all that was started and runs still."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is another user's
                if self._mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def end(self) -> None:
        """End all that runs."""
        if self.patience:
            self._kill(signal.SIGTERM)
            self._wait(self.patience)
        until = time.monotonic() + PATIENCE
        while self._kill(signal.SIGKILL) and time.monotonic() < until:  # one may start another in between
            self._wait(POLL)
        self.left = self.running()
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0 if self.left else None)

    def _kill(self, number: int) -> list[int]:
        """Send a signal to all that runs; return the process ids."""
        found = self.running()
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return found

    def _wait(self, seconds: float) -> None:
        """Wait for the end of all that runs, for at most so long."""
        until = time.monotonic() + seconds
        while self.running() and time.monotonic() < until:
            time.sleep(POLL)

    def __enter__(self) -> Processes:
        self._before = signal.signal(signal.SIGTERM, _end)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self.end()
        finally:
            signal.signal(signal.SIGTERM, self._before)


def _end(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)
