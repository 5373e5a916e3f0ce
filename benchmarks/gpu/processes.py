"""Processes that a benchmark starts. Neither they nor their children outlive the benchmark.

They are not identified by process groups, because a trainer starts its own session, but by an environment variable,
which all children inherit.
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

VARIABLE = "BENCHMARK_PROCESSES"  # contains the marks of all enclosing `Processes`
PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL
POLL = 0.02


class Processes:
    """A context manager that ends all processes that were started in it, directly or indirectly. Inside the `with`
    block, SIGTERM raises SystemExit in this process, so that it can end them.

    Args:
        patience: seconds between SIGTERM and SIGKILL; 0: SIGKILL is sent at once.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        # ids of processes that SIGKILL did not end, for example because a call of a driver hangs
        self.left: list[int] = []
        self._mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen] = []

    def start(
        self, command: Sequence[str], log: Path | None = None, env: Mapping[str, str] | None = None, **options
    ) -> subprocess.Popen:
        """Start a command. `log`: file to which the output is appended, None for the output of this process; `env`:
        additional environment variables; `options`: further arguments of Popen."""
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
        """Return the ids of all running processes that were started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has ended, or belongs to another user
                if self._mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def end(self) -> None:
        """End all running processes."""
        if self.patience:
            self._kill(signal.SIGTERM)
            self._wait(self.patience)
        until = time.monotonic() + PATIENCE
        while self._kill(signal.SIGKILL) and time.monotonic() < until:  # a process may have started another one
            self._wait(POLL)
        self.left = self.running()
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0 if self.left else None)

    def _kill(self, number: int) -> list[int]:
        """Send a signal to all running processes, and return their ids."""
        found = self.running()
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return found

    def _wait(self, seconds: float) -> None:
        """Wait until all processes have ended, but for at most this number of seconds."""
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
