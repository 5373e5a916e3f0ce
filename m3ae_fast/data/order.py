"""Which sample stands at a position of the training stream: a pure function of the seed and the sources' sizes.

The stream is 0, 1, 2, ... without end. Step s of a run with G samples per step takes positions s * G to (s + 1) * G, so
world size, worker count and interruptions change nothing, and resuming needs one number.

Only integer hashes and stable sorts are used: no library's random numbers, whose streams may change between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

BLOCK = 1000  # positions within which the sources' shares are exact
_MASK = (1 << 64) - 1


class Place(NamedTuple):
    """A sample of a source, by its number in file order, and how many times the source was completed before."""

    source: int
    epoch: int
    sample: int


def hash64(*parts: int) -> int:
    """64 well-mixed bits of some integers (splitmix64, Steele et al. 2014, chained)."""
    value = 0
    for part in parts:
        value = ((value ^ (part & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def permutation(length: int, *key: int) -> np.ndarray:
    """A random order of 0 .. length - 1 (int64 [length]) that depends on `key` alone."""
    value = np.arange(length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(hash64(*key))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(value ^ (value >> np.uint64(31)), kind="stable")


class _Latest:
    """Keeps the two results of a function that were needed last. Unlike functools.lru_cache it can be pickled."""

    def __init__(self, make: Callable[..., Any]):
        self.make = make
        self.results: dict[tuple[int, ...], Any] = {}

    def __call__(self, *key: int) -> Any:
        if key not in self.results:
            if len(self.results) == 2:
                del self.results[next(iter(self.results))]
            self.results[key] = self.make(*key)
        return self.results[key]


class SourceOrder:
    """Epoch after epoch of one source: shards in random order, groups of them shuffled sample by sample.

    Args:
        sizes: samples of each shard.
        group: shards that are shuffled together.
        key: what the order depends on.
    """

    def __init__(self, sizes: Sequence[int], group: int, *key: int):
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)))
        self.samples = int(self.starts[-1])
        self.group_size = group
        self.key = key
        self._epoch = _Latest(self._make_epoch)
        self._group = _Latest(self._make_group)

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, sample) of the source's `index`-th sample since the start."""
        epoch, rest = divmod(index, self.samples)
        _, bounds = self._epoch(epoch)
        number = int(np.searchsorted(bounds, rest, side="right")) - 1
        return epoch, int(self._group(epoch, number)[rest - bounds[number]])

    def shards_after(self, index: int) -> tuple[int, ...]:
        """The shards of the group that follows the one `index` lies in."""
        epoch, rest = divmod(index, self.samples)
        shards, bounds = self._epoch(epoch)
        number = int(np.searchsorted(bounds, rest, side="right"))
        if number == len(bounds) - 1:
            (shards, _), number = self._epoch(epoch + 1), 0
        return tuple(shards[number * self.group_size : (number + 1) * self.group_size].tolist())

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of the shards, and where its groups begin and end."""
        shards = permutation(len(self.sizes), *self.key, epoch)
        ends = np.cumsum(self.sizes[shards])
        return shards, np.concatenate(([0], ends[self.group_size - 1 : -1 : self.group_size], ends[-1:]))

    def _make_group(self, epoch: int, number: int) -> np.ndarray:
        shards = self._epoch(epoch)[0][number * self.group_size : (number + 1) * self.group_size]
        samples = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        return samples[permutation(len(samples), *self.key, epoch, number)]


class Order:
    """The training stream of several sources.

    In every BLOCK of positions each source has its exact share (Webster's apportionment, whose seats only ever grow),
    in random order. An epoch is as many positions as there are samples; without weights it holds each exactly once.

    Args:
        sizes: for each source the samples of its shards.
        weights: relative shares of the samples; None: by size.
        group: shards that are shuffled together.
        seed: the run's.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], weights: Sequence[float] | None, group: int, seed: int):
        self.seed = seed
        self.sources = [SourceOrder(shards, group, seed, number) for number, shards in enumerate(sizes)]
        totals = np.array([source.samples for source in self.sources])
        self.samples = int(totals.sum())
        shares = np.asarray(totals if weights is None else weights, dtype=np.float64)
        self.shares = shares / shares.sum()
        self._epoch_seats = self._seats(self.samples)
        self._block = _Latest(self._make_block)

    def locate(self, position: int) -> Place:
        """The sample at `position`."""
        source, index = self.turn(position)
        return Place(source, *self.sources[source].locate(index))

    def turn(self, position: int) -> tuple[int, int]:
        """Whose turn it is at `position`, and how many of its samples came before."""
        epoch, rest = divmod(position, self.samples)
        block, offset = divmod(rest, BLOCK)
        sources, indices = self._block(epoch, block)
        return int(sources[offset]), int(indices[offset])

    def _seats(self, positions: int) -> np.ndarray:
        """How many of the first `positions` of an epoch belong to each source: the lowest (k + 1/2) / share win."""
        seats = np.maximum(0, np.floor((positions - len(self.shares) / 2) * self.shares)).astype(np.int64)
        for _ in range(positions - int(seats.sum())):
            seats[np.argmin((seats + 0.5) / self.shares)] += 1
        return seats

    def _make_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = (self._seats(min(k * BLOCK, self.samples)) for k in (block, block + 1))
        sources = np.repeat(np.arange(len(self.shares)), last - first)
        sources = sources[permutation(len(sources), self.seed, len(self.shares), epoch, block)]
        indices = np.empty_like(sources)
        for source, before in enumerate(epoch * self._epoch_seats + first):
            (mine,) = np.nonzero(sources == source)
            indices[mine] = before + np.arange(len(mine))
        return sources, indices


class FileOrder:
    """Every sample of every source once, as the shards have them, or `count` evenly among them: for evaluation."""

    def __init__(self, sizes: Sequence[Sequence[int]], count: int | None = None):
        self.starts = np.concatenate(([0], np.cumsum([sum(shards) for shards in sizes])))
        self.total = int(self.starts[-1])
        self.samples = self.total if count is None else min(count, self.total)

    def locate(self, position: int) -> Place:
        """The sample at `position`, which lies below `samples`."""
        number = position * self.total // self.samples
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return Place(source, 0, number - int(self.starts[source]))
