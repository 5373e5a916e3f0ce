"""Assignment of samples to ranks. A rank reads a part of each step's batch, and therefore only some shards.

`order.py` splits the sample order into lanes, which take turns and have their own shards; a rank reads some of the
lanes. Within a rank, the workers of the DataLoader take micro-batches in turn.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import TrainConfig


@dataclass(frozen=True)
class Share:
    """The split of each step's batch over ranks and micro-batches, with this rank's part."""

    global_batch: int  # samples per step over all ranks; at least one per rank
    accumulation: int = 1  # micro-batches per rank and step
    rank: int = 0
    world: int = 1

    @property
    def micro_batch(self) -> int:
        """Return the maximum number of samples in a micro-batch."""
        return -(-self.global_batch // (self.world * self.accumulation))


@dataclass(eq=False)
class MicroBatches(Sampler[list[int]]):
    """Sampler of the positions in one rank's micro-batches.

    Step s consists of the positions s * G to (s + 1) * G - 1, where G is the global batch. These positions are sorted
    by lane and split into equal parts, one per rank, so that the consecutive ranks of a node share lanes. If the number
    of ranks does not divide G, the sizes of the parts differ by one. Each part is split into equal micro-batches. There
    are no positions from `end` on, so a micro-batch may be short or empty, but all ranks have the same number of
    micro-batches.
    """

    steps: range  # range of steps to sample
    share: Share
    lanes: int = 1  # number of lanes of the sample order
    repeats: int = 1  # number of consecutive positions that are views of the same sample
    end: int | None = None  # number of positions; None: the order is infinite
    # Function that returns the cost of a position. Costs are balanced over the `ranks` of this node in each step. None:
    # all costs are equal.
    work: Callable[[int], int] | None = None
    ranks: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.steps) * self.share.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for positions in self._balanced(step) if self.work else self._cut(step, self.share.rank):
                yield positions if self.end is None else [p for p in positions if p < self.end]

    def lanes_of(self, ranks: Sequence[int]) -> list[int]:
        """Return the lanes that `ranks` read."""
        period = range(self.repeats // math.gcd(self.repeats, self.share.global_batch))
        own = (position for step in period for rank in ranks for position in self._own(step, rank))
        return sorted({position // self.repeats % self.lanes for position in own})

    def _cut(self, step: int, rank: int) -> list[list[int]]:
        """Return a rank's micro-batches of a step."""
        own, parts = self._own(step, rank), self.share.accumulation
        return [own[len(own) * part // parts : len(own) * (part + 1) // parts] for part in range(parts)]

    def _balanced(self, step: int) -> list[list[int]]:
        """Return this rank's micro-batches of a step after balancing the cost of all micro-batches on the node."""
        assert self.work is not None
        parts = balanced([part for rank in self.ranks for part in self._cut(step, rank)], self.work)
        first = self.ranks.index(self.share.rank) * self.share.accumulation
        return parts[first : first + self.share.accumulation]

    def _own(self, step: int, rank: int) -> list[int]:
        """Return a rank's positions of a step."""
        batch, world = self.share.global_batch, self.share.world
        positions = np.arange(step * batch, (step + 1) * batch)
        if self.lanes > 1:
            positions = positions[np.argsort(positions // self.repeats % self.lanes, kind="stable")]
        return positions[rank * batch // world : (rank + 1) * batch // world].tolist()


def balanced(parts: Sequence[Sequence[int]], work: Callable[[int], int]) -> list[list[int]]:
    """Redistribute the positions over parts of unchanged sizes so that all parts have about the same cost. Greedy: in
    order of decreasing cost, each position goes to the cheapest part that is not yet full."""
    positions = sorted(position for part in parts for position in part)
    costs = {position: work(position) for position in positions}
    shared: list[list[int]] = [[] for _ in parts]
    least = [(0, number) for number, part in enumerate(parts) if part]  # heap of the parts that are not yet full
    for position in sorted(positions, key=costs.__getitem__, reverse=True):
        cost, number = least[0]
        shared[number].append(position)
        if len(shared[number]) < len(parts[number]):
            heapq.heapreplace(least, (cost + costs[position], number))
        else:
            heapq.heappop(least)
    return [sorted(part) for part in shared]


def split_batch(config: TrainConfig, world: int, rank: int = 0) -> Share:
    """Return the split of each step's batch over ranks, with as few micro-batches as `config.micro_batch` allows.
    Raises UserError if there are more ranks than samples in a step."""
    if config.global_batch < world:
        raise UserError(
            f"config: train.global_batch is {config.global_batch}, which leaves some of the {world} ranks "
            "without a sample; raise it, or start fewer ranks"
        )
    most = -(-config.global_batch // world)
    accumulation = -(-most // (config.micro_batch or most))
    return Share(config.global_batch, accumulation, rank, world)
