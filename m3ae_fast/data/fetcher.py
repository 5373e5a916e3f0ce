"""Prefetching of a node's shards, in the order in which they are needed, by one process for all ranks of the node.

Correctness does not depend on prefetching: if a shard is not cached, a worker downloads it or waits for the process
that is downloading it (`ShardStore.path`).
"""

from __future__ import annotations

import heapq
import math
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.order import Order, ShuffleWindow
from m3ae_fast.process.helper_process import HelperProcess, Node

T = TypeVar("T")
CONNECTIONS = 16
_CHECK_S = 0.1  # seconds between checks of the schedule
_RETRY_S = 60.0  # seconds until a failed download is retried


class Shard(NamedTuple):
    """A shard that can be downloaded."""

    name: str
    size: int  # bytes; 0: unknown


class Span(NamedTuple):
    """The range of positions in the sample order that a node's ranks are processing."""

    first: int
    end: int
    begun: bool  # whether every rank has taken a step


@dataclass(frozen=True)
class PrefetchSchedule:
    """The prefetch schedule: the shards that a node reads, ordered by time of use."""

    corpus: Corpus
    order: Order  # the sample order
    lanes: Sequence[int]  # lanes of the sample order that the node's ranks read
    start: int  # first step of the run
    stop: int  # step before which the run ends
    positions: float  # positions of the sample order per step; fractional if `data.repeats` does not divide the batch
    ahead: int  # number of steps whose batches are prepared in advance

    def span(self, steps: np.ndarray) -> Span:
        """Return the range of positions that the ranks are processing, given the number of steps that each rank has
        taken (`steps`: int64 [ranks])."""
        slowest, fastest = max(self.start, int(steps.min())), max(self.start, int(steps.max()))
        end = min(self.stop, fastest + 1 + self.ahead) * self.positions
        return Span(int(slowest * self.positions), math.ceil(end), slowest > self.start)

    def near(self, span: Span) -> list[Shard]:
        """Return the shards to download now, as many as fit into the cache, in the order in which they are needed:
        those of the current shuffle windows and, after the first step, those of the following windows."""
        each = self.order.upcoming_windows(self.lanes, span.first, span.end)
        # number of positions that a lane has left before the end of the run; later windows are not downloaded
        rest = (self.stop * self.positions - span.end) / self.order.lanes - 1

        def soon(window: ShuffleWindow) -> bool:
            return window.ahead == 0 or (window.ahead <= span.begun and window.wait < rest)

        near = [takewhile(soon, windows) for windows in each]
        return self._fitting(sorted(chain.from_iterable(near)))

    def next(self, span: Span) -> list[Shard]:
        """Return the shards that should stay cached: the shards that are needed soonest, as many as fit into the
        cache."""
        return self._fitting(heapq.merge(*self.order.upcoming_windows(self.lanes, span.first, span.end)))

    def in_use(self) -> int:
        """Return an upper bound on the bytes of the shards that are in use at the same time during an epoch."""
        each = self.order.upcoming_windows(self.lanes, 0, 0)
        return sum(max(sum(shard.size for shard in self._named([window])) for window in windows) for windows in each)

    def owned(self) -> int:
        """Return the total size in bytes of all shards that are downloaded in an epoch."""
        each = self.order.upcoming_windows(self.lanes, 0, 0)
        return sum(shard.size for shard in set(self._named(chain.from_iterable(each))))

    def require_space(self) -> None:
        """Check that the shards in use at the same time fit into the cache. If they do not, shards on a network file
        system are no longer cached but read in place. Raises UserError if the remaining shards do not fit either."""
        store = self.corpus.store
        store.staging = store.staging and self.in_use() <= store.space().limit
        limit = store.limit
        if limit < math.inf and (most := self.in_use()) > limit:
            raise UserError(
                f"data.cache_gb {limit / 1e9:g}: the shards that a node uses at once take {most / 1e9:.3g} GB; "
                "raise data.cache_gb, or lower data.shuffle_shards"
            )

    def _fitting(self, windows: Iterable[ShuffleWindow]) -> list[Shard]:
        space, found = self.corpus.store.space(), {}
        free = space.limit
        for shard in self._named(windows):
            if shard.name not in found:
                free -= shard.size or space.largest
                if free < 0:
                    break
                found[shard.name] = shard
        return list(found.values())

    def _named(self, windows: Iterable[ShuffleWindow]) -> Iterator[Shard]:
        """Yield the shards of `windows`, except shards that are read in place."""
        for window in windows:
            shards = self.corpus.sources[window.source].shards
            for entry in map(shards.__getitem__, window.shards):
                if self.corpus.store.is_staged(entry.shard):
                    yield Shard(entry.shard, entry.summary.size)


class Fetching:
    """A rank's interface to its node's fetcher process. The node's leader starts the process, and all ranks report
    their progress to it."""

    def __init__(self, schedule: PrefetchSchedule, node: Node, rank: int, accumulation: int):
        self.schedule, self.accumulation = schedule, accumulation
        self._path = schedule.corpus.store.cache_dir / "locks" / f"steps-{node.run}"
        self._ranks, self._slot = len(node.ranks), list(node.ranks).index(rank)
        self._fetcher = node.fetcher
        if self._slot > 0 and self._fetcher:
            self._fetcher.end()

    def begin(self) -> None:
        """Start downloading if this rank is the leader of its node. Like loader workers, the fetcher starts before the
        first step.
        """
        self._steps = _shared_steps(self._path, self._ranks)
        self._steps[self._slot] = self.schedule.start
        if self._slot == 0:
            self._fetcher = self._fetcher or HelperProcess()
            self._fetcher.start(serve, self.schedule, self._path, self._ranks)

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the micro-batches, starting with those of the first step, and report the number of completed steps to
        the fetcher."""
        for number, batch in enumerate(batches, 1):
            self._steps[self._slot] = self.schedule.start + number // self.accumulation
            yield batch


def _shared_steps(path: Path, ranks: int) -> np.ndarray:
    """Return the number of steps that each rank of the node has taken: int64 [ranks], in shared memory."""
    with open(path, "a+b") as file:
        file.truncate(8 * ranks)
        return np.frombuffer(mmap.mmap(file.fileno(), 8 * ranks), np.int64)


def serve(parent: int, schedule: PrefetchSchedule, path: Path, ranks: int) -> None:
    """Run the fetcher in this process until the parent process ends."""
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
        except OSError:  # the original of a gzipped shard no longer exists
            return False

    def _download(self, shard: Shard) -> bool:
        """Download a shard and create its index. Return False if that fails; the reader of the shard reports the
        reason."""
        try:
            return self.store.fetch_ahead(*shard) and bool(index_shards([shard.name], self.store, lost=[]))
        except UserError:
            return False
