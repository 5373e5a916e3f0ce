"""A process that begins before everything that a fork must not copy, and is told later what to do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from m3ae_fast.data.workers import signals_blocked, start_worker

_forks = multiprocessing.get_context("fork")  # whatever this Python's way is by default
_LOOK_S = 0.2  # between looks at whether the one that made it lives


class Standby:
    """A process forked now: it has none of the threads, connections and GPU memory of later. As a context manager it is
    ended with the block.

    Args:
        work: what it does once there are arguments for it, of which the first is its parent's process id.
        name: of the process.
    """

    def __init__(self, work: Callable[..., None], name: str) -> None:
        theirs, self._arguments = _forks.Pipe(duplex=False)
        self.process = _forks.Process(target=_await, args=(work, theirs, os.getpid()), name=name, daemon=True)
        with signals_blocked():
            self.process.start()
        theirs.close()

    def start(self, *arguments: Any) -> None:
        """Let it work with picklable arguments. Nothing happens where it does already, or has been killed."""
        if not self._arguments.closed:
            with self._arguments, contextlib.suppress(BrokenPipeError):
                self._arguments.send(arguments)

    def end(self) -> None:
        """End the process, whatever it is at."""
        self._arguments.close()
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Standby:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _await(work: Callable[..., None], arguments: Connection, parent: int) -> None:
    start_worker(0)
    while not arguments.poll(_LOOK_S):
        if os.getppid() != parent:
            return
    try:
        received = arguments.recv()
    except EOFError:  # there is nothing to do
        return
    work(parent, *received)
