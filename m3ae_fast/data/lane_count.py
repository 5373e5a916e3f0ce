"""Choice of the number of lanes (parallel sub-streams of the sample order). This number depends on the data and the
batch size, but never on the number of ranks. `order.py` assigns shards to lanes, and `rank_share.py` assigns lanes to
ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from m3ae_fast.config import DataConfig


class Layout(NamedTuple):
    """Parameters of the sample order in addition to the shards, the source weights and the seed."""

    lanes: int
    window: int  # number of shards (or slices of shards) that a lane shuffles together

    def __str__(self) -> str:
        """Return the name of the layout in checkpoints."""
        if self.lanes == 1:
            return f"groups of {self.window} shards"
        return f"{self.lanes} lanes, windows of {self.window} shards"


def lay_out(config: DataConfig, sizes: Sequence[Sequence[int] | np.ndarray], global_batch: int) -> Layout:
    """Return the layout of the sample order. It has the largest number of lanes, up to `config.lanes`, that meets three
    conditions: each step takes the same number of samples from every lane (on average, if `config.repeats` does not
    divide the batch); few shards are split between lanes; and each lane contains samples of every source. `sizes`:
    number of samples in each shard, by source."""
    divisible = global_batch // math.gcd(global_batch, config.repeats)
    most = min(config.lanes, divisible, sum(map(len, sizes)), *(int(np.sum(shards)) for shards in sizes))
    lanes = next(number for number in range(most, 0, -1) if divisible % number == 0)
    return Layout(lanes, -(-config.shuffle_shards // lanes))
