"""Two-level communication between ranks. On each node, the leader (the node's first rank) monitors the heartbeats of
the other ranks; rank 0 monitors the leaders. Host-side sums over ranks use the same hierarchy."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, cast

import torch.distributed as dist
from torch import Tensor

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Room(NamedTuple):
    """Ranks that speak through one store."""

    store: dist.Store  # through a connection of its own, for threads
    heard: Sequence[int]  # the ranks in it whose silence this one notices


def machine() -> str:
    """Return what this machine alone is called: hosts may share a name."""
    boot = _BOOT_ID.read_text(encoding="utf-8").strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot}"


def by_machine(machines: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each node, given the node of each rank. If there is only one level (a single node, or one
    rank per node), return one group with all ranks."""
    groups = [[r for r, other in enumerate(machines) if other == name] for name in dict.fromkeys(machines)]
    return groups if 1 < len(groups) < len(machines) else [[*range(len(machines))]]


def rooms_of(
    rank: int, machines: Sequence[str], store: dist.Store, gather: Callable[[int], list[int]], timeout: timedelta
) -> list[Room]:
    """Return this rank's heartbeat groups: the group of its node and, if it is the node's leader, the group of all
    leaders.

    `machines` and `store` are those of all ranks: the store's process has a connection for each machine from here, not
    one for each rank. `timeout`: for the first rank of this machine to answer. Every rank must call it.
    """
    groups = by_machine(machines)
    own = next(group for group in groups if rank in group)
    if len(groups) == 1:
        return [_among_all(store, range(1, len(machines)) if rank == 0 else [0])]
    leads = rank == own[0]
    local = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if leads else None
    ports = gather(local.port if local else 0)
    if local is None:
        return [Room(dist.TCPStore("127.0.0.1", ports[own[0]], is_master=False, timeout=timeout), own[:1])]
    first = [group[0] for group in groups]
    return [Room(local, own[1:]), _among_all(store, first[1:] if rank == 0 else [0])]


def _among_all(store: dist.Store, heard: Sequence[int]) -> Room:
    return Room(store.clone(), heard)  # type: ignore[attr-defined]  # torch's stubs lack it


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
        work: dist.Work | None
        if not self._apart:
            work = dist.all_reduce(values_N, group=self._near, async_op=True)
        else:
            work = dist.reduce(values_N, self._lead, group=self._near, async_op=True)

        def wait() -> Tensor:
            assert work is not None  # it would be for a rank outside of the group
            work.wait()
            if self._across is not None:
                dist.all_reduce(values_N, group=self._across)
            if self._apart:
                dist.broadcast(values_N, self._lead, group=self._near)
            return values_N

        return wait


def _group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
    return cast(dist.ProcessGroup, group)  # this rank is one of them
