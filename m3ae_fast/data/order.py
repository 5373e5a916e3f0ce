"""Which sample stands at a position of the training stream: a pure function of the seed and the sources' sizes.

The stream is 0, 1, 2, ... without end. Step s of a run with G samples per step takes positions s * G to (s + 1) * G, so
world size, worker count and interruptions change nothing, and resuming needs one number.

Only integer hashes and stable sorts are used: no library's random numbers, whose streams may change between versions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

BLOCK = 1000  # positions within which the sources' proportions are exact
LANE_BLOCK = 32  # the same of a lane of many, whose neighbours' errors level out
_MASK = (1 << 64) - 1
_STAGGER = -1  # in the place of a window's number


class Place(NamedTuple):
    """A sample of a source, by its number in file order, and how many times the source was completed before."""

    source: int
    epoch: int
    sample: int


def hash64(*parts: int) -> int:
    """Return 64 well-mixed bits of some integers (splitmix64, Steele et al. 2014, chained)."""
    value = 0
    for part in parts:
        value = ((value ^ (part & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def permutation(length: int, *key: int) -> np.ndarray:
    """Return a random order of 0 .. length - 1 (int64 [length]) that depends on `key` alone."""
    value = np.arange(length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(hash64(*key))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(value ^ (value >> np.uint64(31)), kind="stable")


class Need(NamedTuple):
    """A window of shards."""

    wait: float  # positions of its lane until it is needed, about; 0: it is in use
    ahead: int  # windows from those in use to this one
    source: int
    shards: tuple[int, ...]


class _Latest:
    """Caches the two most recently computed results of a function (first in, first out). Unlike functools.lru_cache, it
    can be pickled."""

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
    """A lane's part of a source: runs of consecutive samples in its shards."""

    shards: np.ndarray  # [pieces]
    starts: np.ndarray  # the first sample of each, by its number in file order
    sizes: np.ndarray  # samples


@dataclass
class SourceOrder:
    """Epoch after epoch of a lane's part of a source: pieces in random order, windows of them shuffled by sample."""

    pieces: Pieces
    window: int  # pieces that are shuffled together
    staggered: bool  # an epoch's first window is a random number of pieces: lanes differ in when they begin a shard
    key: tuple[int, ...]  # what the order depends on

    def __post_init__(self) -> None:
        self.samples = int(self.pieces.sizes.sum())
        self._epoch = _Latest(self._make_epoch)
        self._shuffled = _Latest(self._shuffle)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (epoch, sample) of the source's `index`-th sample since the start."""
        epoch, rest = divmod(index, self.samples)
        _, _, bounds = self._epoch(epoch)
        number = int(np.searchsorted(bounds, rest, side="right")) - 1
        order, ends, starts = self._shuffled(epoch, number)
        place = int(order[rest - bounds[number]])
        piece = bisect_right(ends, place)
        return epoch, starts[piece] + place - (ends[piece - 1] if piece else 0)

    def windows(self, index: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the index at which a window begins, and its shards: from the one that `index` lies in, without end."""
        epoch, rest = divmod(index, self.samples)
        while True:
            order, cuts, bounds = self._make_epoch(epoch)
            for number in range(int(np.searchsorted(bounds, rest, side="right")) - 1, len(cuts) - 1):
                shards = self.pieces.shards[order[cuts[number] : cuts[number + 1]]]
                yield epoch * self.samples + int(bounds[number]), tuple(shards.tolist())
            epoch, rest = epoch + 1, 0

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epoch's order of the pieces; where its windows begin and end, in pieces and in samples."""
        order = permutation(len(self.pieces.sizes), *self.key, epoch)
        first = self.window
        if self.staggered and len(order) > self.window:
            first = 1 + hash64(*self.key, epoch, _STAGGER) % self.window
        cuts = np.array([0, *range(first, len(order), self.window), len(order)])
        return order, cuts, np.concatenate(([0], np.cumsum(self.pieces.sizes[order])))[cuts]

    def _shuffle(self, epoch: int, number: int) -> tuple[np.ndarray, list[int], list[int]]:
        """Return the order of a window's samples, counted from its begin, and its pieces' ends and first samples."""
        order, cuts, bounds = self._epoch(epoch)
        own = order[cuts[number] : cuts[number + 1]]
        shuffled = permutation(int(bounds[number + 1] - bounds[number]), *self.key, epoch, number).astype(np.int32)
        return shuffled, np.cumsum(self.pieces.sizes[own]).tolist(), self.pieces.starts[own].tolist()


@dataclass
class Lane:
    """A stream of its own, of a part of each source.

    In every block of positions each source has its exact part (Webster's apportionment, whose seats only ever grow),
    in random order. Parts are counted anew with each epoch; without weights it holds each sample exactly once.
    """

    sources: Sequence[SourceOrder]
    weights: Sequence[float]  # of the sources; their sum does not matter
    samples: int  # positions of an epoch
    seed: int
    block: int = BLOCK  # positions
    first_block: int = 0  # of the epoch, with which the lane begins, so that lanes do not round at the same time

    def __post_init__(self) -> None:
        self.proportions = np.asarray(self.weights, dtype=np.float64) / np.sum(self.weights, dtype=np.float64)
        self._start = self.first_block * self.block
        self._before = self._seats(self._start)
        self._epoch_seats = self._seats(self.samples)
        self._block = _Latest(self._make_block)

    def locate(self, position: int) -> Place:
        """Return the sample at `position`."""
        source, index = self.turn(position)
        return Place(source, *self.sources[source].locate(index))

    def turn(self, position: int) -> tuple[int, int]:
        """Return the source that `position` belongs to, and how many of its samples came before."""
        if len(self.sources) == 1:
            return 0, position
        epoch, rest = divmod(self._start + position, self.samples)
        block, offset = divmod(rest, self.block)
        sources, indices = self._block(epoch, block)
        return int(sources[offset]), int(indices[offset])

    def before(self, position: int) -> list[int]:
        """Return how many samples of each source come before `position`, or before the block it lies in."""
        if len(self.sources) == 1:
            return [position]
        epoch, rest = divmod(self._start + position, self.samples)
        seats = self._seats(rest - rest % self.block)
        return np.maximum(0, epoch * self._epoch_seats + seats - self._before).tolist()

    def _seats(self, positions: int) -> np.ndarray:
        """Return how many of an epoch's first `positions` are each source's: the lowest (k + 1/2) / proportion win."""
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
    """The training stream of several sources, in lanes: position p is lane p % C's number p // C.

    A lane owns an equal piece of each source, for good: of a random order of its shards, cut inside shards. A reader of
    a few lanes therefore needs only a few shards. Which ones depends on C, not on the number of ranks. With one lane a
    source is the shards as they come.
    """

    sizes: Sequence[Sequence[int] | np.ndarray]  # by source: samples of its shards, at least one for each lane
    weights: Sequence[float] | None  # proportions of the samples; None: by size
    window: int  # pieces of shards that a lane shuffles together
    seed: int  # the run's
    lanes: int = 1  # C

    def __post_init__(self) -> None:
        self._sources = [self._whole(number, np.asarray(shards)) for number, shards in enumerate(self.sizes)]
        self.samples = sum(int(whole.sizes.sum()) for whole in self._sources)
        self._made: dict[int, Lane] = {}

    def locate(self, position: int) -> Place:
        """Return the sample at `position`."""
        index, lane = divmod(position, self.lanes)
        return self._lane(lane).locate(index)

    def needs(self, lanes: Iterable[int], first: int, end: int) -> list[Iterator[Need]]:
        """Return the shards that `lanes` need in an epoch, the soonest first: an iterator for each lane and source.
        They are at position `first`, and shards up to position `end` are in use already."""
        found = []
        for number in lanes:
            lane, last = self._lane(number), -(-end // self.lanes)
            here = lane.before(max(0, first - number) // self.lanes)
            there = lane.before(last + lane.block * (len(here) > 1))
            found += [_needs(lane, source, here[source], there[source]) for source in range(len(here))]
        return found

    def _lane(self, number: int) -> Lane:
        """Return the lane, made when it is needed: most processes read some lanes only."""
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
        """Return all shards in the order in which lanes cut them."""
        shards = np.arange(len(sizes)) if self.lanes == 1 else permutation(len(sizes), self.seed, source)
        return Pieces(shards, (np.cumsum(sizes) - sizes)[shards], sizes[shards])

    def _piece(self, whole: Pieces, lane: int) -> Pieces:
        ends = np.cumsum(whole.sizes)
        first, last = (k * int(ends[-1]) // self.lanes for k in (lane, lane + 1))
        own = slice(int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last)) + 1)
        ends, sizes = ends[own], whole.sizes[own]
        low, high = np.maximum(ends - sizes, first), np.minimum(ends, last)
        return Pieces(whole.shards[own], whole.starts[own] + low - (ends - sizes), high - low)


def _needs(lane: Lane, source: int, here: int, there: int) -> Iterator[Need]:
    """Yield the shuffle windows of one source in a lane, starting with those that contain the samples from `here` to
    `there`, which are in use already."""
    order, ahead = lane.sources[source], 0
    for start, shards in order.windows(here):
        if start >= here + order.samples:
            return
        ahead += start >= there
        wait = max(0, start - there) / float(lane.proportions[source])
        yield Need(wait if ahead else 0.0, ahead, source, shards)


class FileOrder:
    """Every sample of every source once, as the shards have them, or `count` evenly among them: for evaluation."""

    def __init__(self, sizes: Sequence[Sequence[int] | np.ndarray], count: int | None = None):
        self.starts = np.concatenate(([0], np.cumsum([int(np.sum(shards)) for shards in sizes])))
        self.total = int(self.starts[-1])
        self.samples = self.total if count is None else min(count, self.total)

    def locate(self, position: int) -> Place:
        """Return the sample at `position`, which lies below `samples`."""
        number = position * self.total // self.samples
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return Place(source, 0, number - int(self.starts[source]))
