"""A helper process that is forked before the program has threads, connections or GPU memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from m3ae_fast.process.workers import signals_blocked, start_worker

_forks = multiprocessing.get_context("fork")  # independent of this Python's default start method
_POLL_S = 0.1  # seconds between checks that the parent is still alive


class HelperProcess:
    """A process that waits for a function and runs it. It runs only one function. If it is used as a context manager,
    it is killed at the end of the block.

    A program should create it before anything else, so that it does not inherit threads, connections or GPU memory.
    """

    def __init__(self) -> None:
        theirs, self._work = _forks.Pipe(duplex=False)
        self.process = _forks.Process(target=_run_when_given, args=(theirs, os.getpid()), name="helper", daemon=True)
        with signals_blocked():
            self.process.start()
        theirs.close()

    def start(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run `work(parent, *arguments)` in the helper process, where `parent` is the id of the current process. The
        function and its arguments must be picklable. Does nothing if the helper process has already been given a
        function, or has ended."""
        if not self._work.closed:
            with self._work, contextlib.suppress(BrokenPipeError):
                self._work.send((work, arguments))

    def end(self) -> None:
        """Kill the process."""
        self._work.close()
        self.process.kill()
        self.process.join()

    def __enter__(self) -> HelperProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _run_when_given(given: Connection, parent: int) -> None:
    start_worker(0)
    while not given.poll(_POLL_S):
        if os.getppid() != parent:
            return
    with contextlib.suppress(EOFError):  # the program has ended without giving this process a function
        work, arguments = given.recv()
        work(parent, *arguments)


@dataclass(frozen=True)
class Node:
    """The ranks of a program on this node."""

    run: str  # a name that is unique among the runs on the node
    ranks: Sequence[int]
    # helper process of this rank; the leader of a node downloads shards in its helper process. None: the leader starts
    # a helper process when it starts the loader
    fetcher: HelperProcess | None = None
