"""Loader processes: how many, and what they do with signals."""

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
from torch._utils import ExceptionWrapper  # with which a DataLoader's workers hand over their exceptions
from torch.utils.data import DataLoader

from m3ae_fast.base import forking  # noqa: F401  # for its effect on workers
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.stop_signals import SIGNALS

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
MAX_WORKERS = 16
SHM = Path("/dev/shm")  # where workers put the batches that they hand over
IN_WORKER = "in DataLoader worker process"  # how torch marks an exception that a worker raised
_LEAVING_S = 5.0  # for workers, before they are killed
# Before Python 3.12 a worker never wakes from its fork where a thread that is not Python's, as gloo's that frees the
# tensor of a collective, enters the interpreter in that moment: those at it get the time to leave.
_SETTLING_S = 0.02
_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")


def default_workers() -> int:
    """Return the number of loader processes for a rank: the cores it has to itself but one, 1 to MAX_WORKERS."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MAX_WORKERS, max(1, len(os.sched_getaffinity(0)) // ranks - 1))


def allow_open_files() -> None:
    """Raise the soft limit of open files, usually 1024: a tensor that a worker hands over is one, and a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(1 << 16, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def keep_socket_paths_short() -> None:
    """Have multiprocessing make its sockets in /tmp where TMPDIR is too long: their paths may have 107 bytes."""
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        util.get_temp_dir()  # type: ignore[attr-defined]  # remembered, also by processes forked from here on
        tempfile.tempdir = before


_started: list[BaseProcess] = []  # workers of this process
os.register_at_fork(after_in_child=_started.clear)


@atexit.register  # after multiprocessing's, and so called before it, which waits for a frozen worker for ever
def _end_started() -> None:
    """Terminate all remaining workers at program exit, regardless of their state."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in _started:
        worker.terminate()
    until = time.monotonic() + _LEAVING_S
    for worker in _started:
        worker.join(max(0.0, until - time.monotonic()))
        if worker.is_alive():
            worker.kill()


class Beside(Protocol):
    """A process that is started together with the workers and notified of each batch."""

    def begin(self) -> None: ...
    def watch(self, batches: Iterator[Any]) -> Iterator[Any]: ...


class Loader(DataLoader[T_co]):
    """A DataLoader whose workers leave signals to the main process from their first moment.

    `beside` may be set before the first batch.
    """

    beside: Beside | None = None

    def __iter__(self) -> Any:
        keep_socket_paths_short()
        if self.num_workers:
            time.sleep(_SETTLING_S)
        with signals_blocked():
            if self.beside is not None:
                self.beside.begin()
            batches = super().__iter__()
        _started[:] = {*(worker for worker in _started if worker.is_alive()), *getattr(batches, "_workers", ())}
        raised = _Batches(batches)
        return raised if self.beside is None else self.beside.watch(raised)


class _Batches(Iterator[T]):
    """A DataLoader's batches; a UserError that a worker raises keeps its one line, without torch's traceback."""

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
    """Block signals meanwhile: processes forked in the block inherit the mask, and so do their threads."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker: int) -> None:
    """Ignore signals sent to the whole process group: they are for the main process, which may want to save first.

    A worker that died of one would stop it with an error. All are blocked here already (`Loader`).
    """
    signal.set_wakeup_fd(-1)  # the main process's
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # where workers are spawned
    threading.Thread(target=_await_end, daemon=True).start()
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: Queue[Any], error: Exception, unsent: object) -> None:
    """Send, in place of a batch that cannot be sent, the error, which the DataLoader raises in the main process: the
    queue would drop the batch, and the main process wait for it for ever."""
    try:
        number, _ = cast("tuple[int, Any]", unsent)  # or what was pickled already, if the pipe is lost
        info = torch.utils.data.get_worker_info()
        where = f"{IN_WORKER} {info.id if info else '?'}"
        queue.put((number, ExceptionWrapper((type(error), error, error.__traceback__), where)))
    except BaseException:  # no memory for that either
        os._exit(1)


def _await_end() -> None:
    """End the worker when it is the main process that terminates it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)
