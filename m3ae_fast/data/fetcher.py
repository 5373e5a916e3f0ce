"""Fetches a node's shards in the order in which they are needed: one process for all ranks of the node.

Nothing depends on it: a worker that finds no copy makes it, or waits for whoever is at it (`ShardStore.path`).
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
from m3ae_fast.data.order import Need, Order
from m3ae_fast.process.helper_process import Node, Standby

T = TypeVar("T")
CONNECTIONS = 16
_LOOK_S = 0.1  # between looks at what is needed
_RETRY_S = 60.0  # a shard that could not be fetched is not tried again sooner


class Shard(NamedTuple):
    """A shard that can be fetched."""

    name: str
    size: int  # bytes; 0: unknown


class Span(NamedTuple):
    """Positions of the order that a node's ranks are at."""

    first: int
    end: int
    begun: bool  # whether every rank has taken a step


@dataclass(frozen=True)
class Needs:
    """Shards that a node reads, and in which steps."""

    corpus: Corpus
    order: Order  # of its samples
    lanes: Sequence[int]  # that the node's ranks read
    start: int  # the step that the run begins with
    stop: int  # the one that it ends before
    positions: float  # of the order, per step; a fraction where `data.repeats` do not divide the batch
    ahead: int  # steps whose batches are made before they are asked for

    def span(self, steps: np.ndarray) -> Span:
        """Return where ranks are that have taken so many steps."""
        slowest, fastest = max(self.start, int(steps.min())), max(self.start, int(steps.max()))
        end = min(self.stop, fastest + 1 + self.ahead) * self.positions
        return Span(int(slowest * self.positions), math.ceil(end), slowest > self.start)

    def near(self, span: Span) -> list[Shard]:
        """Return the shards to download now, as many as fit into the cache, in the order in which they are needed:
        those of the current shuffle windows and, after the first step, those of the following windows."""
        each = self.order.needs(self.lanes, span.first, span.end)
        rest = (self.stop * self.positions - span.end) / self.order.lanes - 1  # not what comes after the run

        def soon(need: Need) -> bool:
            return need.ahead == 0 or (need.ahead <= span.begun and need.wait < rest)

        near = [takewhile(soon, needs) for needs in each]
        return self._fitting(sorted(chain.from_iterable(near)))

    def next(self, span: Span) -> list[Shard]:
        """Return the shards whose copies to keep: the first ones needed that fit."""
        return self._fitting(heapq.merge(*self.order.needs(self.lanes, span.first, span.end)))

    def in_use(self) -> int:
        """Return the bytes of the shards that are in use at a time, at most, in an epoch."""
        each = self.order.needs(self.lanes, 0, 0)
        return sum(max(sum(shard.size for shard in self._named([need])) for need in needs) for needs in each)

    def owned(self) -> int:
        """Return the bytes of all shards that are fetched in an epoch."""
        each = self.order.needs(self.lanes, 0, 0)
        return sum(shard.size for shard in set(self._named(chain.from_iterable(each))))

    def require_room(self) -> None:
        """Raise UserError if the shards that are in use at a time do not fit into the cache. Where some are on a
        network file system, these are read in place then."""
        store = self.corpus.store
        store.staging = store.staging and self.in_use() <= store.room().limit
        limit = store.limit
        if limit < math.inf and (most := self.in_use()) > limit:
            raise UserError(
                f"data.cache_gb {limit / 1e9:g}: shards of {most / 1e9:.3g} GB are in use on a node at a time; "
                "raise it, or lower data.shuffle_shards"
            )

    def _fitting(self, needs: Iterable[Need]) -> list[Shard]:
        room, found = self.corpus.store.room(), {}
        free = room.limit
        for shard in self._named(needs):
            if shard.name not in found:
                free -= shard.size or room.largest
                if free < 0:
                    break
                found[shard.name] = shard
        return list(found.values())

    def _named(self, needs: Iterable[Need]) -> Iterator[Shard]:
        """Return those of the shards that are not read in place."""
        for need in needs:
            shards = self.corpus.sources[need.source].shards
            for entry in map(shards.__getitem__, need.shards):
                if self.corpus.store.is_staged(entry.shard):
                    yield Shard(entry.shard, entry.summary.size)


class Fetching:
    """A node's fetcher as one of the ranks sees it: the first of them starts it, and all tell it how far they are."""

    def __init__(self, needs: Needs, node: Node, rank: int, accumulation: int):
        self.needs, self.accumulation = needs, accumulation
        self._path = needs.corpus.store.cache_dir / "locks" / f"steps-{node.run}"
        self._ranks, self._slot = len(node.ranks), list(node.ranks).index(rank)
        self._fetcher = node.fetcher
        if self._slot > 0 and self._fetcher:
            self._fetcher.end()

    def begin(self) -> None:
        """Start downloading if this rank owns the node's fetcher. Like loader workers, the fetcher starts before the
        first step."""
        self._steps = _shared_steps(self._path, self._ranks)
        self._steps[self._slot] = self.needs.start
        if self._slot == 0:
            self._fetcher = self._fetcher or Standby()
            self._fetcher.start(serve, self.needs, self._path, self._ranks)

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the micro-batches, starting with those of the first step, and report the number of completed steps to
        the fetcher."""
        for number, batch in enumerate(batches, 1):
            self._steps[self._slot] = self.needs.start + number // self.accumulation
            yield batch


def _shared_steps(path: Path, ranks: int) -> np.ndarray:
    """Return how many steps each rank of the node has taken: int64 [ranks], in memory that all of them share."""
    with open(path, "a+b") as file:
        file.truncate(8 * ranks)
        return np.frombuffer(mmap.mmap(file.fileno(), 8 * ranks), np.int64)


def serve(parent: int, needs: Needs, path: Path, ranks: int) -> None:
    """Fetch, in a process of its own, for as long as its parent lives."""
    steps = _shared_steps(path, ranks)
    fetcher = Fetcher(needs)
    try:
        while os.getppid() == parent:
            fetcher.look(needs.span(steps))
            fetcher.wait()
    finally:
        path.unlink(missing_ok=True)
        os._exit(0)  # not after the downloads under way


class Fetcher:
    """Keeps CONNECTIONS open to what is needed first."""

    def __init__(self, needs: Needs):
        self.needs, self.store = needs, needs.corpus.store
        self._pool = ThreadPoolExecutor(CONNECTIONS)
        self._busy: dict[str, Future[bool]] = {}
        self._failed: dict[str, float] = {}  # when
        self._span: Span | None = None
        self._near: list[Shard] = []

    def look(self, span: Span) -> None:
        """Begin to fetch what is needed at `span` and not there."""
        if span != self._span:
            before, self._span, self._near = self._near, span, self.needs.near(span)
            if self._near != before:
                self._keep(span)
        for shard in self._near:
            if len(self._busy) < CONNECTIONS and self._lacks(shard.name):
                self._busy[shard.name] = self._pool.submit(self._bring, shard)

    def wait(self) -> None:
        """Wait until a shard has come, or it is time to look again."""
        if len(self._busy) == CONNECTIONS:
            wait(self._busy.values(), _LOOK_S, FIRST_COMPLETED)
        else:
            time.sleep(_LOOK_S)
        for name in [name for name, future in self._busy.items() if future.done()]:
            if not self._busy.pop(name).result():
                self._failed[name] = time.monotonic()

    def _keep(self, span: Span) -> None:
        """Say what is needed last, where copies must make room."""
        limit, used, largest = self.store.room()
        if used + CONNECTIONS * largest > limit:
            self.store.keep([shard.name for shard in self.needs.next(span)])

    def _lacks(self, name: str) -> bool:
        if name in self._busy or time.monotonic() - self._failed.get(name, -_RETRY_S) < _RETRY_S:
            return False
        try:
            return not self.store.copy(name).exists()
        except OSError:  # a gzipped shard that is gone
            return False

    def _bring(self, shard: Shard) -> bool:
        """Fetch a shard and make its table. Return False if that fails: who reads it says why."""
        try:
            return self.store.fetch_ahead(*shard) and bool(index_shards([shard.name], self.store, lost=[]))
        except UserError:
            return False
