"""Heartbeats between ranks. If the heartbeat of a rank stops, the run ends, so that it can be restarted."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from m3ae_fast.base.errors import TRY_AGAIN
from m3ae_fast.config import RunConfig
from m3ae_fast.process.how_to_resume import effect_of_resuming
from m3ae_fast.process.node_groups import ERROR_KEY, HeartbeatGroup
from m3ae_fast.process.stop_request import BY_ANOTHER, StopRequest, kill_children

T = TypeVar("T")
STALL_FOLDER = "stall"
_BUSY = 0.05  # fraction of a core that counts as computing; idle threads use less
_WRITING = 1 << 12  # bytes per interval that count as writing; a download or a save writes more
_STOP, _STALL = "stop", "stall"  # messages between ranks
_INTERVALS = 3  # intervals until a message has reached every rank: via the leader of its node and rank 0
_WRITE_S = 5.0  # maximum number of seconds for writing the stack traces


@dataclass
class _Other:
    """State of a monitored rank."""

    beat: bytes = b""
    silent: float = 0.0  # seconds without a new heartbeat while this process was awake


class Heartbeats:
    """Sender and monitor of heartbeats. It ends the process if a rank has made no progress for `timeout` seconds.

    A rank makes progress if its main thread calls `mark`, or if its processes compute or write. A long download, a
    compilation or a large save is therefore not a stall; a frozen process, an unresponsive disk and a deadlock are
    stalls. Separate threads send and monitor the heartbeats, because the main thread may wait in a collective forever.
    Use as a context manager.
    """

    def __init__(self, rank: int, groups: Sequence[HeartbeatGroup], store: dist.Store, stop: StopRequest) -> None:
        """Prepare the heartbeats in `groups`. `store` is the store of all ranks, for use by the main thread."""
        self.timeout = float("inf")  # stall timeout in seconds; set once the config is known
        self.folder: Path | None = None  # folder for stack traces at a stall; set once the run folder is known
        self.first_error: int | None = None  # exit code of the first rank that has ended with an error
        self._rank, self._groups, self._store, self._stop = rank, groups, store, stop
        self._others = {other: _Other() for group in groups for other in group.monitored}
        self._messages: set[str] = set()  # messages that were received or are to be forwarded
        self._forwarded: set[str] = set()
        self._error = ""  # error that was received and is to be forwarded
        self._unwritten = threading.Lock()
        self._doing, self._marks, self._loading, self._waiting = "starting", 0, False, False
        self._quiet = 0.0  # seconds since the last call of `mark`, counted only while this process was awake
        self._idle = 0.0  # the part of these seconds in which the loader workers were idle too
        self._end = threading.Event()

    def __enter__(self) -> Heartbeats:
        self._threads = [threading.Thread(target=self._detect_stalls, name="stalls", daemon=True)]
        if self._others:
            self._threads.append(threading.Thread(target=self._beat, name="heartbeats", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(1.0)

    def watch_over(self, run: RunConfig) -> None:
        """Set the run's stall timeout and the folder for the stack traces that are written when the run stalls."""
        self.timeout, self.folder = run.stall_timeout, run.dir / STALL_FOLDER

    def mark(self, doing: str, *, loading: bool = False) -> None:
        """Record that the main thread has made progress. `doing`: description of its current work, for messages."""
        self._doing, self._loading, self._marks = doing, loading, self._marks + 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Enter a context in which the main thread waits for other ranks that still have work. This wait does not count
        as a stall."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
            self.mark("starting")

    def watch(self, loader: Iterable[T], doing: str) -> Iterator[T]:
        """Yield the batches of `loader`, with stall detection."""
        self.mark("starting its loader", loading=True)
        batches = iter(loader)
        while True:
            self.mark("waiting for its loader", loading=True)
            batch = next(batches, None)
            self.mark(doing)
            if batch is None:
                return
            yield batch

    def request_stop(self, reason: str) -> bool:
        """Ask every rank to stop. Return whether this rank is the first of its heartbeat group to ask."""
        for group in self._groups:
            group.store.set(_STOP, reason)
        return self._groups[0].store.add(f"{_STOP} requests", 1) == 1

    def stop_requested(self) -> bool:
        """Return whether a rank has been asked to stop, as far as this rank knows."""
        try:
            return self._store.check([_STOP])
        except RuntimeError:  # the process that hosts the store has exited
            return self._stop.requested

    @property
    def _interval(self) -> float:
        return min(1.0, self.timeout / 10)

    def _beat(self) -> None:
        """Send and receive heartbeats. A store that does not respond blocks this thread, but not the thread that
        detects stalls."""
        beats, marks, activity = 0, -1, _Activity()
        with contextlib.suppress(RuntimeError):  # the process that hosts the store has exited or been killed
            while not self._end.is_set():
                alive = self._waiting or marks != self._marks or activity.grown(self._loading)
                beats, marks = beats + alive, self._marks
                for group in self._groups:
                    self._exchange(group, f"{beats} {self._doing}")
                self._forward()
                self._end.wait(self._interval)

    def _exchange(self, group: HeartbeatGroup, beat: str) -> None:
        """Publish this rank's heartbeat in a group, and read the heartbeats and messages of the other ranks."""
        store = group.store
        store.set(f"beat {self._rank}", beat)
        others = {f"beat {rank}": self._others[rank] for rank in group.monitored}
        known = {key: other for key, other in others.items() if other.beat or store.check([key])}
        for other, new in zip(known.values(), store.multi_get(list(known)) if known else []):
            if new != other.beat:
                other.beat, other.silent = new, 0.0
        self._messages |= {message for message in (_STOP, _STALL) if store.check([message])}
        if self.first_error is None and store.check([ERROR_KEY]):
            self._error = store.get(ERROR_KEY).decode()
            self.first_error = int(self._error.split()[1])

    def _forward(self) -> None:
        """Act on new messages and forward them to all groups."""
        for message in self._messages - self._forwarded:
            self._forwarded.add(message)
            for group in self._groups:
                group.store.set(message, "")
            if message == _STOP:
                self._stop.request(BY_ANOTHER)
            else:
                self._write_stacks()
        if self._error:
            for group in self._groups:
                group.store.compare_set(ERROR_KEY, "", self._error)
            self._error = ""

    def _detect_stalls(self) -> None:
        marks, activity, looked = -1, _Activity(), time.monotonic()
        while not self._end.wait(self._interval):
            now = time.monotonic()
            # time in which this process was suspended does not count
            awake, looked = min(now - looked, 2 * self._interval), now
            self._quiet += awake
            self._idle += awake
            if marks != self._marks:
                marks, self._quiet, self._idle = self._marks, 0.0, 0.0
            elif not self._loading or activity.grown(True):
                self._idle = 0.0
            for other in self._others.values():
                other.silent += awake
            if self._quiet > self.timeout:
                self._check()

    def _check(self) -> None:
        if self._idle > self.timeout:
            self._end_process(
                "its data-loader workers have been idle and have returned no batches (is the file system with the "
                "shards responding?)"
            )
        silent = {rank: other for rank, other in self._others.items() if other.silent > self.timeout}
        if silent:
            names = ", ".join(map(str, silent))
            last = next(iter(silent.values())).beat.decode("utf-8", "replace").partition(" ")[2] or "joining"
            self._end_process(f"no heartbeat from rank {names} (last activity: {last})")

    def _end_process(self, what: str) -> None:
        text = f"error: rank {self._rank}, {self._doing}: for {self.timeout:g} s, {what}; {effect_of_resuming()}"
        text += f"; {self.folder} contains the stack traces of all ranks that respond\n" if self.folder else "\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        self._messages.add(_STALL)
        writing = threading.Thread(target=self._write_stacks, daemon=True)  # the disk may be the cause of the stall
        writing.start()
        time.sleep(_INTERVALS * self._interval)
        writing.join(_WRITE_S)
        kill_children()  # a frozen worker would never exit
        os._exit(TRY_AGAIN)

    def _write_stacks(self) -> None:
        """Write the stack traces. Only the first thread that calls this method writes them, because an unresponsive
        disk may block the thread."""
        if self.folder and self._unwritten.acquire(blocking=False):
            with contextlib.suppress(OSError):
                write_stacks(self.folder, self._rank)


def write_stacks(folder: Path, rank: int) -> None:
    """Write the stack traces of all threads, and NCCL's last collectives for torchfrtrace, to files. Raises OSError if
    that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank-{rank}.txt", "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    if dist.is_nccl_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        # this function does not exist in CPU builds of torch
        record = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
        (folder / f"nccl_trace_rank_{rank}").write_bytes(record)  # the file name that torchfrtrace expects


class _Activity:
    """Detector of computation and disk writes by this process or its children since the last check."""

    def __init__(self) -> None:
        self._last, self._cpu, self._written = time.monotonic(), 0.0, 0

    def grown(self, children_alone: bool) -> bool:
        cpu, written, own = 0.0, 0, psutil.Process()
        for process in own.children(recursive=True) + ([] if children_alone else [own]):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                cpu += times.user + times.system
                written += process.io_counters().write_chars
        now = time.monotonic()
        moved = cpu - self._cpu > _BUSY * (now - self._last) or written - self._written > _WRITING
        self._last, self._cpu, self._written = now, cpu, written
        return moved
