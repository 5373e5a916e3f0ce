"""Data-loader worker processes: their number, their signals and their end."""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import util
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch._utils import ExceptionWrapper  # carries exceptions from DataLoader workers to the main process
from torch.utils.data import DataLoader

from m3ae_fast.base import forking  # noqa: F401  # imported for its effect on forked workers
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.signal_numbers import SIGNALS

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
MAX_WORKERS = 16
SHM = Path("/dev/shm")  # folder in which workers place batches for the main process
IN_WORKER = "in DataLoader worker process"  # text that torch adds to an exception raised in a worker
_LEAVING_S = 5.0  # seconds for workers to exit before they are killed
# Before Python 3.12, a forked worker hangs if a non-Python thread, such as gloo's thread that frees the tensor of a
# collective, enters the interpreter during the fork. This pause gives these threads time to leave the interpreter.
_BEFORE_FORK_S = 0.02
_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")


def default_workers() -> int:
    """Return the default number of loader processes per rank: one less than the rank's share of the cores, from 1 to
    MAX_WORKERS."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MAX_WORKERS, max(1, len(os.sched_getaffinity(0)) // ranks - 1))


def allow_open_files() -> None:
    """Raise the soft limit on open files, usually 1024: each tensor from a worker and each connection is an open
    file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(1 << 16, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def keep_socket_paths_short() -> None:
    """Make multiprocessing create its sockets in /tmp if TMPDIR is too long: socket paths are limited to 107 bytes."""
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        util.get_temp_dir()  # type: ignore[attr-defined]  # cached, also in processes that are forked later
        tempfile.tempdir = before


_started: list[BaseProcess] = []  # the workers that this process has started
os.register_at_fork(after_in_child=_started.clear)


# This handler is registered after multiprocessing's handler and therefore runs before it. Multiprocessing's handler
# would wait for a frozen worker forever.
@atexit.register
def _end_started() -> None:
    """Terminate all remaining workers at program exit, regardless of their state."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises if a worker is killed
    for worker in _started:
        worker.terminate()
    until = time.monotonic() + _LEAVING_S
    for worker in _started:
        worker.join(max(0.0, until - time.monotonic()))
        if worker.is_alive():
            worker.kill()


class Companion(Protocol):
    """A process that is started with the workers, and is notified of each batch."""

    def begin(self) -> None:
        """Start the process. Called before the workers start."""

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and notify the process of each."""


class Loader(DataLoader[T_co]):
    """A DataLoader whose workers ignore signals from their start on; only the main process handles them.

    `companion` may be set before the first batch.
    """

    companion: Companion | None = None

    def __iter__(self) -> Any:
        keep_socket_paths_short()
        if self.num_workers or self.companion is not None:
            time.sleep(_BEFORE_FORK_S)
        with signals_blocked():
            if self.companion is not None:
                self.companion.begin()
            batches = super().__iter__()
        _started[:] = {*(worker for worker in _started if worker.is_alive()), *getattr(batches, "_workers", ())}
        raised = _Batches(batches)
        return raised if self.companion is None else self.companion.watch(raised)


class _Batches(Iterator[T]):
    """Iterator over a DataLoader's batches. A UserError raised in a worker keeps its one-line message, without torch's
    traceback."""

    def __init__(self, batches: Iterator[T]) -> None:
        self._batches = batches

    def __next__(self) -> T:
        try:
            return next(self._batches)
        except UserError as error:
            if IN_WORKER not in str(error):
                raise
            name = f"{type(error).__module__}.{type(error).__qualname__}: "
            raise UserError(str(error).rpartition(name)[2].strip()) from None


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block signals within the context. Processes forked in it inherit the signal mask, and so do their threads."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker: int) -> None:
    """Ignore signals sent to the whole process group. They are meant for the main process, which may save first.

    If such a signal killed a worker, the main process would fail. `Loader` has already blocked these signals.
    """
    signal.set_wakeup_fd(-1)  # inherited from the main process
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # needed only if workers are spawned
    threading.Thread(target=_await_end, daemon=True).start()
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: Queue[Any], error: Exception, unsent: object) -> None:
    """Send an error in place of a batch that could not be sent. The DataLoader raises the error in the main process.
    Otherwise, the queue would drop the batch, and the main process would wait for it forever."""
    try:
        number, _ = cast("tuple[int, Any]", unsent)  # fails if the pipe is lost: `unsent` is then already pickled
        info = torch.utils.data.get_worker_info()
        where = f"{IN_WORKER} {info.id if info else '?'}"
        queue.put((number, ExceptionWrapper((type(error), error, error.__traceback__), where)))
    except BaseException:  # the error cannot be sent either, for example for lack of memory
        os._exit(1)


def _await_end() -> None:
    """Exit when the main process sends SIGTERM; SIGTERM from other processes is ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)
