"""The shards that a node will read, in the order in which it needs them, as a function of the progress of its ranks.
`order.py` defines the lanes and the shuffle windows of the sample order."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import NamedTuple

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import DataConfig
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.lane_count import lay_out
from m3ae_fast.data.order import Order, ShuffleWindow
from m3ae_fast.data.rank_share import MicroBatches, Share


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
    positions: float  # number of positions per step; not an integer if `data.repeats` does not divide the batch
    ahead: int  # number of steps whose batches are prepared in advance

    @classmethod
    def of(
        cls, corpus: Corpus, order: Order, batches: MicroBatches, ranks: Sequence[int], ahead: int = 0
    ) -> PrefetchSchedule:
        """Return the schedule of the node with these ranks. `batches`: the micro-batches of one of the ranks."""
        positions, steps = batches.share.global_batch / batches.repeats, batches.steps
        return cls(corpus, order, batches.lanes_of(ranks), steps.start, steps.stop, positions, ahead)

    @classmethod
    def of_config(
        cls, config: DataConfig, corpus: Corpus, global_batch: int, world: int, ranks: Sequence[int], seed: int
    ) -> PrefetchSchedule:
        """Return the schedule of the node with these ranks, for the first step of a run."""
        lanes, window = lay_out(config, corpus.sizes, global_batch)
        order = Order(corpus.sizes, corpus.weights, window, seed, lanes)
        batches = MicroBatches(range(1), Share(global_batch, world=world), lanes, config.repeats)
        return cls.of(corpus, order, batches, ranks)

    def span(self, steps: np.ndarray) -> Span:
        """Return the range of positions that the ranks are processing, given the number of steps that each rank has
        taken (`steps`: int64 [ranks])."""
        slowest, fastest = max(self.start, int(steps.min())), max(self.start, int(steps.max()))
        end = min(self.stop, fastest + 1 + self.ahead) * self.positions
        return Span(int(slowest * self.positions), math.ceil(end), slowest > self.start)

    def near(self, span: Span) -> list[Shard]:
        """Return the shards to download now, as many as fit into the cache, in the order in which they are needed:
        those of the current shuffle windows and, after the first step, those of the next window of each lane and
        source."""
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
        system are no longer cached but read in place. Raises UserError if the other shards exceed `data.cache_gb`."""
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
