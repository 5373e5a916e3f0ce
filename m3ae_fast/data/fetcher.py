"""Downloads of a node's shards in the order of its prefetch schedule, by one process for all ranks of the node.

Correctness does not depend on this process: if a shard is not cached, a loader worker downloads it or waits for the
process that is downloading it (`ShardStore.path`).
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.prefetch_schedule import PrefetchSchedule, Shard, Span
from m3ae_fast.process.ranks import Node
from m3ae_fast.process.workers import start_worker

T = TypeVar("T")
CONNECTIONS = 16
_CHECK_S = 0.1  # seconds between checks of the schedule
_RETRY_S = 60.0  # seconds until a failed download is retried
_forks = multiprocessing.get_context("fork")  # the default start method depends on the version of Python


class FetcherOfNode:
    """A rank's interface to the fetcher of its node. The first rank of the node starts the fetcher as `process`, and
    all ranks report their progress to the fetcher."""

    def __init__(self, schedule: PrefetchSchedule, node: Node, rank: int, accumulation: int):
        self.schedule, self.accumulation = schedule, accumulation
        self.process: BaseProcess | None = None
        self._path = schedule.corpus.store.cache_dir / "locks" / f"steps-{node.run}"
        self._ranks, self._slot = len(node.ranks), list(node.ranks).index(rank)

    def begin(self) -> None:
        """Start the fetcher if this rank is the first of its node. Like the loader workers, the fetcher is forked
        before the first step."""
        self._steps = _shared_steps(self._path, self._ranks)
        self._steps[self._slot] = self.schedule.start
        if self._slot == 0:
            arguments = (os.getpid(), self.schedule, self._path, self._ranks)
            self.process = _forks.Process(target=_serve, args=arguments, name="fetcher", daemon=True)
            self.process.start()

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the micro-batches, which must begin with the first step of the run, and report the number of completed
        steps to the fetcher. The fetcher ends together with the iterator."""
        try:
            for number, batch in enumerate(batches, 1):
                self._steps[self._slot] = self.schedule.start + number // self.accumulation
                yield batch
        finally:
            self.end()

    def end(self) -> None:
        """Kill the process that this rank has started, if any."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self._path.unlink(missing_ok=True)


def _shared_steps(path: Path, ranks: int) -> np.ndarray:
    """Return the number of steps that each rank of the node has taken: int64 [ranks], in shared memory."""
    with open(path, "a+b") as file:
        file.truncate(8 * ranks)
        return np.frombuffer(mmap.mmap(file.fileno(), 8 * ranks), np.int64)


def _serve(parent: int, schedule: PrefetchSchedule, path: Path, ranks: int) -> None:
    """Run the fetcher in this process until the parent process ends."""
    start_worker(0)
    steps = _shared_steps(path, ranks)
    fetcher = Fetcher(schedule)
    try:
        while os.getppid() == parent:
            fetcher.update(schedule.span(steps))
            fetcher.wait()
    finally:
        path.unlink(missing_ok=True)
        os._exit(0)  # exits without waiting for current downloads


class Fetcher:
    """Downloader of scheduled shards, with up to CONNECTIONS parallel downloads."""

    def __init__(self, schedule: PrefetchSchedule):
        self.schedule, self.store = schedule, schedule.corpus.store
        self._pool = ThreadPoolExecutor(CONNECTIONS)
        self._busy: dict[str, Future[bool]] = {}
        self._failed: dict[str, float] = {}  # time of the last failed download, by shard name
        self._span: Span | None = None
        self._near: list[Shard] = []

    def update(self, span: Span) -> None:
        """Start downloading the shards that are needed for `span` and are not cached."""
        if span != self._span:
            before, self._span, self._near = self._near, span, self.schedule.near(span)
            if self._near != before:
                self._keep(span)
        for shard in self._near:
            if len(self._busy) < CONNECTIONS and self._lacks(shard.name):
                self._busy[shard.name] = self._pool.submit(self._download, shard)

    def wait(self) -> None:
        """Wait until a download has finished, or until the next check is due."""
        if len(self._busy) == CONNECTIONS:
            wait(self._busy.values(), _CHECK_S, FIRST_COMPLETED)
        else:
            time.sleep(_CHECK_S)
        for name in [name for name, future in self._busy.items() if future.done()]:
            if not self._busy.pop(name).result():
                self._failed[name] = time.monotonic()

    def _keep(self, span: Span) -> None:
        """If further downloads might exceed the limit of the cache, set the order in which cached shards are
        evicted."""
        limit, used, largest = self.store.space()
        if used + CONNECTIONS * largest > limit:
            self.store.keep([shard.name for shard in self.schedule.next(span)])

    def _lacks(self, name: str) -> bool:
        if name in self._busy or time.monotonic() - self._failed.get(name, -_RETRY_S) < _RETRY_S:
            return False
        try:
            return not self.store.copy(name).exists()
        except OSError:  # the shard has been removed in the meantime
            return False

    def _download(self, shard: Shard) -> bool:
        """Download a shard and create its index. Return False if that fails; the reader of the shard reports the
        reason."""
        try:
            return self.store.fetch_ahead(*shard) and bool(index_shards([shard.name], self.store, lost=[]))
        except UserError:
            return False
