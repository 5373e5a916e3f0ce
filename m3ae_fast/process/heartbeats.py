"""Heartbeats between ranks: one that falls silent ends the run, so that it can be restarted."""

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
from m3ae_fast.process.node_groups import Room
from m3ae_fast.process.signals import BY_ANOTHER, StopRequest, kill_children

T = TypeVar("T")
STALL_FOLDER = "stall"
_BUSY = 0.05  # of a core: less is what idle threads use
_WRITING = 1 << 12  # bytes between two looks: a download, a save
_STOP, _STALL = "stop", "stall"  # words between ranks
_HOPS = 3  # beats that a word takes to reach every rank: to the first of a machine, to rank 0, and back
_WRITE_S = 5.0  # for the stacks, at most


@dataclass
class _Other:
    """What is known of another rank."""

    beat: bytes = b""
    silent: float = 0.0  # seconds for which this process was awake and heard nothing new


class Pulse:
    """Tells other ranks that this one is at work, and ends the process if there has been no progress for `timeout`
    seconds.

    At work is a rank whose main thread comes to a `mark`, or whose processes compute or write: a long download, a
    compilation or a large save is not a stall; a frozen process, a dead disk and a deadlock are. Threads do this, since
    the main thread may wait in a collective forever. Use as a context manager.
    """

    def __init__(self, rank: int, rooms: Sequence[Room], store: dist.Store, stop: StopRequest) -> None:
        """Prepare the heartbeat in some rooms; `store` is that of all ranks, for the main thread."""
        self.timeout = float("inf")  # seconds; the config's once it is known
        self.folder: Path | None = None  # for what ranks were at when nothing moved; the run's once it is known
        self._rank, self._rooms, self._store, self._stop = rank, rooms, store, stop
        self._others = {other: _Other() for room in rooms for other in room.heard}
        self._words: set[str] = set()  # that were heard, or are to be passed on
        self._spoken: set[str] = set()
        self._unwritten = threading.Lock()
        self._doing, self._marks, self._loading, self._waiting = "starting", 0, False, False
        self._quiet = 0.0  # seconds for which this process was awake and its main thread came to no mark
        self._idle = 0.0  # seconds of these for which no loader worker moved either
        self._end = threading.Event()

    def __enter__(self) -> Pulse:
        self._threads = [threading.Thread(target=self._judge, name="stalls", daemon=True)]
        if self._others:
            self._threads.append(threading.Thread(target=self._beat, name="pulse", daemon=True))
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
        """Record that the main thread moves on. `doing` is for messages."""
        self._doing, self._loading, self._marks = doing, loading, self._marks + 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which the main thread waits for other ranks that still have work; the wait does not count as a
        stall."""
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

    def tell_stop(self, reason: str) -> bool:
        """Ask every rank to stop; return whether this rank is the first of its machine to ask."""
        for room in self._rooms:
            room.store.set(_STOP, reason)
        return self._rooms[0].store.add(f"{_STOP} told", 1) == 1

    def stop_told(self) -> bool:
        try:
            return self._store.check([_STOP])
        except RuntimeError:  # the process that held the store has left
            return self._stop.asked

    @property
    def _interval(self) -> float:
        return min(1.0, self.timeout / 10)

    def _beat(self) -> None:
        """Send and receive beats. A store that does not answer blocks this thread, not the one that judges."""
        beats, marks, activity = 0, -1, _Activity()
        with contextlib.suppress(RuntimeError):  # the process that holds the store has left, or has been killed
            while not self._end.is_set():
                alive = self._waiting or marks != self._marks or activity.grown(self._loading)
                beats, marks = beats + alive, self._marks
                for room in self._rooms:
                    self._listen(room, f"{beats} {self._doing}")
                self._pass_on()
                self._end.wait(self._interval)

    def _listen(self, room: Room, beat: str) -> None:
        """Publish this rank's heartbeat in a group, and read the heartbeats and messages of the other ranks."""
        store = room.store
        store.set(f"beat {self._rank}", beat)
        others = {f"beat {rank}": self._others[rank] for rank in room.heard}
        known = {key: other for key, other in others.items() if other.beat or store.check([key])}
        for other, new in zip(known.values(), store.multi_get(list(known)) if known else []):
            if new != other.beat:
                other.beat, other.silent = new, 0.0
        self._words |= {word for word in (_STOP, _STALL) if store.check([word])}

    def _pass_on(self) -> None:
        """Act on new messages and forward them to all groups."""
        for word in self._words - self._spoken:
            self._spoken.add(word)
            for room in self._rooms:
                room.store.set(word, "")
            if word == _STOP:
                self._stop.ask(BY_ANOTHER)
            else:
                self._write_stacks()

    def _judge(self) -> None:
        marks, activity, looked = -1, _Activity(), time.monotonic()
        while not self._end.wait(self._interval):
            now = time.monotonic()
            # while the whole process was suspended, nobody else was silent
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
                self._look()

    def _look(self) -> None:
        if self._idle > self.timeout:
            self._end_process(
                "its data-loader workers are idle and return no batches (is the file system with the shards "
                "responding?)"
            )
        silent = {rank: other for rank, other in self._others.items() if other.silent > self.timeout}
        if silent:
            names = ", ".join(map(str, silent))
            last = next(iter(silent.values())).beat.decode("utf-8", "replace").partition(" ")[2] or "joining"
            self._end_process(f"no sign of life from rank {names} (last: {last})")

    def _end_process(self, what: str) -> None:
        text = f"error: rank {self._rank}, {self._doing}: for {self.timeout:g} s, {what}; --resume auto continues"
        text += f"; {self.folder} shows where each rank was\n" if self.folder else "\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        self._words.add(_STALL)
        writing = threading.Thread(target=self._write_stacks, daemon=True)  # the disk may be what does not respond
        writing.start()
        time.sleep(_HOPS * self._interval)
        writing.join(_WRITE_S)
        kill_children()  # a worker that is frozen would never leave
        os._exit(TRY_AGAIN)

    def _write_stacks(self) -> None:
        """Do so once, whichever thread is first: one may wait for a disk."""
        if self.folder and self._unwritten.acquire(blocking=False):
            with contextlib.suppress(OSError):
                write_stacks(self.folder, self._rank)


def write_stacks(folder: Path, rank: int) -> None:
    """Write where all threads are, and NCCL's last collectives for torchfrtrace, into files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank-{rank}.txt", "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    if dist.is_nccl_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        record = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]  # torch for CPUs lacks it
        (folder / f"nccl_trace_rank_{rank}").write_bytes(record)  # the name that torchfrtrace expects


class _Activity:
    """Whether this process or its children computed or wrote since the last look."""

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
