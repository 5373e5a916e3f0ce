"""Loader processes: how many, and what they do with signals."""

from __future__ import annotations

import os
import resource
import signal
import threading

MAX_WORKERS = 16


def default_workers() -> int:
    """Loader processes for a rank: the cores it has to itself but one, 1 to MAX_WORKERS."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MAX_WORKERS, max(1, len(os.sched_getaffinity(0)) // ranks - 1))


def allow_open_files() -> None:
    """Workers hand over each tensor as an open file: many batches ahead are more than the usual soft limit of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(1 << 16, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def start_worker(worker: int) -> None:
    """Signals that a whole process group gets are the main process's business, which may want to save first.

    A worker that died of one would stop it with an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_end, daemon=True).start()


def _await_end() -> None:
    """End the worker when it is the main process that terminates it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)
