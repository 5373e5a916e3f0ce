"""The sample order: a pure function from a position in the training stream to a sample, given the seed and the sizes of
the sources.

The stream of positions 0, 1, 2, ... is infinite. Step s of a run with G samples per step takes the positions from s * G
to (s + 1) * G - 1. World size, number of workers and interruptions therefore do not change the order, and resuming
requires a single number.

Only integer hashes and stable sorts are used, because random number generators of libraries may change between
versions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from m3ae_fast.base.randomness import hash64

BLOCK = 1000  # number of positions after which the proportions of the sources are exact, up to rounding
# the same for several lanes; this number can be smaller, because the rounding errors of the lanes average out
LANE_BLOCK = 32
# In each epoch, the size of the first window and the order of each window's samples are drawn with hash keys. The last
# integer of a key is this constant if the size is drawn, and the number of the window if the order is drawn.
_STAGGER = -1


class Place(NamedTuple):
    """A sample: its source, the epoch of the source, and the sample's number in file order."""

    source: int
    epoch: int
    sample: int


def permutation(length: int, *key: int) -> np.ndarray:
    """Return a random permutation of 0 .. length - 1 (int64 [length]) that depends only on `key`."""
    value = np.arange(length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(hash64(*key))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(value ^ (value >> np.uint64(31)), kind="stable")


class ShuffleWindow(NamedTuple):
    """A shuffle window: shards whose samples are shuffled together."""

    wait: float  # approximate number of positions in its lane until the window is needed; 0: it is in use
    ahead: int  # 0 for the windows in use, 1 for the next window, and so on
    source: int
    shards: tuple[int, ...]


class _Latest:
    """A cache of the two most recently computed results of a function (first in, first out). Unlike
    functools.lru_cache, it can be pickled."""

    def __init__(self, make: Callable[..., Any]):
        self.make = make
        self.results: dict[tuple[int, ...], Any] = {}

    def __call__(self, *key: int) -> Any:
        if key not in self.results:
            if len(self.results) == 2:
                del self.results[next(iter(self.results))]
            self.results[key] = self.make(*key)
        return self.results[key]


class Pieces(NamedTuple):
    """A lane's part of a source: slices (runs of consecutive samples) of its shards."""

    shards: np.ndarray  # [pieces]
    starts: np.ndarray  # first sample of each slice, by its number in file order
    sizes: np.ndarray  # number of samples in each slice


@dataclass
class SourceOrder:
    """The infinite order of a lane's part of a source. In each epoch, slices are put in random order and grouped into
    windows, whose samples are shuffled."""

    pieces: Pieces
    window: int  # number of slices that are shuffled together
    # whether the first window of an epoch has a random number of slices, so that lanes begin new shards at different
    # times
    staggered: bool
    key: tuple[int, ...]  # seeds of the order

    def __post_init__(self) -> None:
        self.samples = int(self.pieces.sizes.sum())
        self._epoch = _Latest(self._make_epoch)
        self._shuffled = _Latest(self._shuffle)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the epoch of the source's `index`-th sample since the start of the stream, and the sample's number in
        file order."""
        epoch, rest = divmod(index, self.samples)
        _, _, bounds = self._epoch(epoch)
        number = int(np.searchsorted(bounds, rest, side="right")) - 1
        order, ends, starts = self._shuffled(epoch, number)
        place = int(order[rest - bounds[number]])
        piece = bisect_right(ends, place)
        return epoch, starts[piece] + place - (ends[piece - 1] if piece else 0)

    def windows(self, index: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the start index and the shards of each window, beginning with the window that contains `index`. The
        iterator is infinite."""
        epoch, rest = divmod(index, self.samples)
        while True:
            order, cuts, bounds = self._make_epoch(epoch)
            for number in range(int(np.searchsorted(bounds, rest, side="right")) - 1, len(cuts) - 1):
                shards = self.pieces.shards[order[cuts[number] : cuts[number + 1]]]
                yield epoch * self.samples + int(bounds[number]), tuple(shards.tolist())
            epoch, rest = epoch + 1, 0

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the order of the slices in an epoch, and the boundaries of its windows in slices and in samples."""
        order = permutation(len(self.pieces.sizes), *self.key, epoch)
        first = self.window
        if self.staggered and len(order) > self.window:
            first = 1 + hash64(*self.key, epoch, _STAGGER) % self.window
        cuts = np.array([0, *range(first, len(order), self.window), len(order)])
        return order, cuts, np.concatenate(([0], np.cumsum(self.pieces.sizes[order])))[cuts]

    def _shuffle(self, epoch: int, number: int) -> tuple[np.ndarray, list[int], list[int]]:
        """Return the order of a window's samples, as indices into the window; the index at which each slice of the
        window ends; and the first sample of each slice, by its number in file order."""
        order, cuts, bounds = self._epoch(epoch)
        own = order[cuts[number] : cuts[number + 1]]
        shuffled = permutation(int(bounds[number + 1] - bounds[number]), *self.key, epoch, number).astype(np.int32)
        return shuffled, np.cumsum(self.pieces.sizes[own]).tolist(), self.pieces.starts[own].tolist()


@dataclass
class Lane:
    """A sub-stream of the sample order, which consists of a part of each source.

    In each block of positions, the number of samples of each source is in proportion to its weight, up to rounding, and
    the sources are in random order. The numbers are rounded by Webster's method, with which no number decreases when
    positions are added. The method starts again in each epoch. Without weights, an epoch contains each sample exactly
    once.
    """

    sources: Sequence[SourceOrder]
    weights: Sequence[float]  # weights of the sources, which need not sum to 1
    samples: int  # number of positions per epoch
    seed: int
    block: int = BLOCK  # number of positions per block
    # number of the block within an epoch with which the lane begins; it differs between lanes, so that the rounding
    # errors of their proportions differ
    first_block: int = 0

    def __post_init__(self) -> None:
        self.proportions = np.asarray(self.weights, dtype=np.float64) / np.sum(self.weights, dtype=np.float64)
        self._start = self.first_block * self.block
        self._before = self._seats(self._start)
        self._epoch_seats = self._seats(self.samples)
        self._block = _Latest(self._make_block)

    def locate(self, position: int) -> Place:
        """Return the sample at `position`."""
        source, index = self.source_at(position)
        return Place(source, *self.sources[source].locate(index))

    def source_at(self, position: int) -> tuple[int, int]:
        """Return the source at `position`, and the number of samples of this source before the position."""
        if len(self.sources) == 1:
            return 0, position
        epoch, rest = divmod(self._start + position, self.samples)
        block, offset = divmod(rest, self.block)
        sources, indices = self._block(epoch, block)
        return int(sources[offset]), int(indices[offset])

    def before(self, position: int) -> list[int]:
        """Return the number of samples of each source before `position` or, with several sources, before the block that
        contains it."""
        if len(self.sources) == 1:
            return [position]
        epoch, rest = divmod(self._start + position, self.samples)
        seats = self._seats(rest - rest % self.block)
        return np.maximum(0, epoch * self._epoch_seats + seats - self._before).tolist()

    def _seats(self, positions: int) -> np.ndarray:
        """Return the number of samples of each source among an epoch's first `positions`. Webster's method assigns each
        further position to the source with the lowest value of (k + 1/2) / proportion, where k is the number of
        positions that the source already has."""
        seats = np.maximum(0, np.floor((positions - len(self.proportions) / 2) * self.proportions)).astype(np.int64)
        for _ in range(positions - int(seats.sum())):
            seats[np.argmin((seats + 0.5) / self.proportions)] += 1
        return seats

    def _make_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = (self._seats(min(k * self.block, self.samples)) for k in (block, block + 1))
        sources = np.repeat(np.arange(len(self.proportions)), last - first)
        sources = sources[permutation(len(sources), self.seed, len(self.proportions), epoch, block)]
        indices = np.empty_like(sources)
        for source, before in enumerate(epoch * self._epoch_seats + first - self._before):
            (mine,) = np.nonzero(sources == source)
            indices[mine] = before + np.arange(len(mine))
        return sources, indices


@dataclass
class Order:
    """The training stream of several sources, in C lanes: position p of the stream is position p // C of lane p % C.

    Each lane owns a fixed, equal part of each source: the shards are put in random order and split evenly, within
    shards if necessary. A reader of a few lanes therefore reads only a few shards. The split depends on C, but not on
    the number of ranks. With a single lane, nothing is split, so only `SourceOrder` puts the shards in random order.
    """

    # number of samples in each shard, by source; each source has at least one sample per lane
    sizes: Sequence[Sequence[int] | np.ndarray]
    weights: Sequence[float] | None  # weights of the sources, which need not sum to 1; None: the sizes of the sources
    window: int  # number of slices of shards that a lane shuffles together
    seed: int  # seed of the run
    lanes: int = 1  # number of lanes, C

    def __post_init__(self) -> None:
        self._sources = [self._whole(number, np.asarray(shards)) for number, shards in enumerate(self.sizes)]
        self.samples = sum(int(whole.sizes.sum()) for whole in self._sources)
        self._made: dict[int, Lane] = {}

    def locate(self, position: int) -> Place:
        """Return the sample at `position`."""
        index, lane = divmod(position, self.lanes)
        return self._lane(lane).locate(index)

    def upcoming_windows(self, lanes: Iterable[int], first: int, end: int) -> list[Iterator[ShuffleWindow]]:
        """Return the shuffle windows of an epoch in order of use, as one iterator for each lane and source. The lanes
        are at position `first` of the stream, and the windows up to position `end` are already in use."""
        found = []
        for number in lanes:
            lane, last = self._lane(number), -(-end // self.lanes)
            here = lane.before(max(0, first - number) // self.lanes)
            there = lane.before(last + lane.block * (len(here) > 1))
            found += [_windows(lane, source, here[source], there[source]) for source in range(len(here))]
        return found

    def _lane(self, number: int) -> Lane:
        """Return a lane, which is created on first use: most processes read only some lanes."""
        if number not in self._made:
            seed = self.seed if self.lanes == 1 else hash64(self.seed, number)
            sources = [
                SourceOrder(self._piece(whole, number), self.window, self.lanes > 1, (seed, source))
                for source, whole in enumerate(self._sources)
            ]
            own = [source.samples for source in sources]
            proportions, samples = (own, sum(own)) if self.weights is None else (self.weights, self.samples)
            blocks = (BLOCK, 0) if self.lanes == 1 else (LANE_BLOCK, seed % -(-samples // LANE_BLOCK))
            self._made[number] = Lane(sources, proportions, samples, seed, *blocks)
        return self._made[number]

    def _whole(self, source: int, sizes: np.ndarray) -> Pieces:
        """Return all shards of a source in the order in which they are split into lanes."""
        shards = np.arange(len(sizes)) if self.lanes == 1 else permutation(len(sizes), self.seed, source)
        return Pieces(shards, (np.cumsum(sizes) - sizes)[shards], sizes[shards])

    def _piece(self, whole: Pieces, lane: int) -> Pieces:
        ends = np.cumsum(whole.sizes)
        first, last = (k * int(ends[-1]) // self.lanes for k in (lane, lane + 1))
        own = slice(int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last)) + 1)
        ends, sizes = ends[own], whole.sizes[own]
        low, high = np.maximum(ends - sizes, first), np.minimum(ends, last)
        return Pieces(whole.shards[own], whole.starts[own] + low - (ends - sizes), high - low)


def _windows(lane: Lane, source: int, here: int, there: int) -> Iterator[ShuffleWindow]:
    """Yield the shuffle windows of one source in a lane, starting with those that contain the samples from `here` to
    `there`, which are already in use."""
    order, ahead = lane.sources[source], 0
    for start, shards in order.windows(here):
        if start >= here + order.samples:
            return
        ahead += start >= there
        wait = max(0, start - there) / float(lane.proportions[source])
        yield ShuffleWindow(wait if ahead else 0.0, ahead, source, shards)


class FileOrder:
    """The order for evaluation: every sample of every source once, or `count` evenly spaced samples, in file order."""

    def __init__(self, sizes: Sequence[Sequence[int] | np.ndarray], count: int | None = None):
        self.starts = np.concatenate(([0], np.cumsum([int(np.sum(shards)) for shards in sizes])))
        self.total = int(self.starts[-1])
        self.samples = self.total if count is None else min(count, self.total)

    def locate(self, position: int) -> Place:
        """Return the sample at `position`, which must be below `samples`."""
        number = position * self.total // self.samples
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return Place(source, 0, number - int(self.starts[source]))
