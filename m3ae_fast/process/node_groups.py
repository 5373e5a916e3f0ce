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

# key in a store; its value contains the first rank that ended with an error, and the exit code of this rank
ERROR_KEY = "error"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class HeartbeatGroup(NamedTuple):
    """A group of ranks that exchange heartbeats through one TCPStore."""

    store: dist.Store  # has its own connection, for use by threads
    monitored: Sequence[int]  # the ranks in the group whose heartbeats this rank monitors


def node_name() -> str:
    """Return a name that is unique to this node; host names may not be unique."""
    boot = _BOOT_ID.read_text(encoding="utf-8").strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot}"


def ranks_by_node(nodes: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each node, given the node of each rank. If there is only one level (a single node, or one
    rank per node), return one group with all ranks."""
    groups = [[r for r, other in enumerate(nodes) if other == name] for name in dict.fromkeys(nodes)]
    return groups if 1 < len(groups) < len(nodes) else [[*range(len(nodes))]]


def heartbeat_groups(
    rank: int, nodes: Sequence[str], store: dist.Store, gather: Callable[[int], list[int]], timeout: timedelta
) -> list[HeartbeatGroup]:
    """Return this rank's heartbeat groups: the group of its node and, if it is the node's leader, the group of all
    leaders.

    `nodes`: the node of each rank. `store`: the store of all ranks; for heartbeats, the process that hosts it needs one
    more connection per node instead of one per rank, because only leaders open another connection to it.
    `timeout`: maximum time for the leader of this node to respond. Every rank must call this function.
    """
    groups = ranks_by_node(nodes)
    own = next(group for group in groups if rank in group)
    if len(groups) == 1:
        return [_among_all(store, range(1, len(nodes)) if rank == 0 else [0])]
    leads = rank == own[0]
    local = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if leads else None
    ports = gather(local.port if local else 0)
    if local is None:
        return [HeartbeatGroup(dist.TCPStore("127.0.0.1", ports[own[0]], is_master=False, timeout=timeout), own[:1])]
    leaders = [group[0] for group in groups]
    return [HeartbeatGroup(local, own[1:]), _among_all(store, leaders[1:] if rank == 0 else [0])]


def _among_all(store: dist.Store, monitored: Sequence[int]) -> HeartbeatGroup:
    return HeartbeatGroup(store.clone(), monitored)  # type: ignore[attr-defined]  # torch's stubs lack it


class Sums:
    """Hierarchical all-reduce of numbers in host memory. The number of its sequential steps is small, whereas gloo's
    all-reduce takes two steps per rank."""

    def __init__(self, rank: int, nodes: Sequence[str], control: dist.ProcessGroup, timeout: timedelta) -> None:
        """Create the groups; every rank must do so. `nodes`: the node of each rank. If there is a single node, or one
        rank per node, sums use `control` directly. `timeout`: timeout of the groups."""
        groups = ranks_by_node(nodes)
        own = next(group for group in groups if rank in group)
        leaders = [group[0] for group in groups]
        self._apart, self._lead = len(groups) > 1, own[0]
        self._near = _group(own, timeout) if self._apart else control
        self._across = _group(leaders, timeout) if self._apart and rank in leaders else None

    def start(self, values_N: Tensor) -> Callable[[], Tensor]:
        """Start a sum over ranks of a tensor in host memory, in place, and return a function that waits for the result.
        All ranks must start and wait in the same order.

        The operations after the node's reduction run in the returned function and not in a callback, so that every rank
        runs the operations of each group in the same order. While the host waits, the GPU still computes the previous
        step."""
        work: dist.Work | None
        if not self._apart:
            work = dist.all_reduce(values_N, group=self._near, async_op=True)
        else:
            work = dist.reduce(values_N, self._lead, group=self._near, async_op=True)

        def wait() -> Tensor:
            assert work is not None  # it is None only for ranks outside the group
            work.wait()
            if self._across is not None:
                dist.all_reduce(values_N, group=self._across)
            if self._apart:
                dist.broadcast(values_N, self._lead, group=self._near)
            return values_N

        return wait


def _group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
    return cast(dist.ProcessGroup, group)  # the group is not None, because this rank is a member
