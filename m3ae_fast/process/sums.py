"""Sums over ranks of host numbers: in each machine, among the first ranks of all machines, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from m3ae_fast.process.rooms import by_machine


class Sums:
    """Groups that sum in few hops: gloo's all-reduce takes two for each rank, one after the other."""

    def __init__(self, rank: int, machines: Sequence[str], control: dist.ProcessGroup, timeout: timedelta) -> None:
        """Join the groups, as every rank must. `machines`: of all ranks, which sum at once in `control` where there is
        one machine, or one rank on each; `timeout`: of the groups."""
        groups = by_machine(machines)
        own = next(group for group in groups if rank in group)
        first = [group[0] for group in groups]
        self._apart, self._lead = len(groups) > 1, own[0]
        self._near = _group(own, timeout) if self._apart else control
        self._across = _group(first, timeout) if self._apart and rank in first else None

    def start(self, values_N: Tensor) -> Callable[[], Tensor]:
        """Begin to sum in place, and return what waits for the result. Ranks must begin and wait in the same order.

        What follows the machine's sum is done where it is waited for, not in a callback: so that it has the same place
        in each group on every rank. A GPU is at work on the step before, and few hops are left."""
        if not self._apart:
            work = dist.all_reduce(values_N, group=self._near, async_op=True)
        else:
            work = dist.reduce(values_N, self._lead, group=self._near, async_op=True)

        def wait() -> Tensor:
            work.wait()
            if self._across is not None:
                dist.all_reduce(values_N, group=self._across)
            if self._apart:
                dist.broadcast(values_N, self._lead, group=self._near)
            return values_N

        return wait


def _group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    return dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
