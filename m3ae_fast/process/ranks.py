"""Ranks and their devices, and host-side communication between ranks."""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import os
import resource
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from m3ae_fast.base.environment import Device
from m3ae_fast.base.errors import UserError, attempt, error_report, raise_shared
from m3ae_fast.base.hardware import uses_gpu
from m3ae_fast.process.agreement import Agreement
from m3ae_fast.process.failure_messages import explain
from m3ae_fast.process.launchers import adopt
from m3ae_fast.process.node_groups import ERROR_KEY, HeartbeatGroup, Sums, heartbeat_groups, node_name
from m3ae_fast.process.workers import allow_open_files

T = TypeVar("T")
Waiting = Callable[[], AbstractContextManager[None]]
# Names of environment variables. They are set by deepspeed and torchrun, and by `adopt` for other launchers, but not by
# plain `python`.
_DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
_OTHER_FILES = 200  # maximum number of further open files, such as those of libraries, shards and logs
_ENDED_KEY = "ended"  # key in the store; its value is the number of ranks that have ended with an error or a stop
# maximum seconds to wait until the other ranks record their end; heartbeats notify them of the error in less time
_OTHERS_S = 10.0
TIMEOUT = timedelta(minutes=30)  # maximum time until the last rank joins
CONTROL_TIMEOUT = timedelta(days=1)  # indexing may take hours; `Heartbeats` ends a run that stalls


class Node(NamedTuple):
    """The ranks of a program on this node."""

    run: str  # a name that is unique among the loaders on the node
    ranks: Sequence[int]


@dataclass(frozen=True)
class Ranks:
    """The distributed environment of this process: its rank, its device and its communication with the other ranks."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup  # gloo group for numbers in host memory; GPUs never wait for it
    hosts: list[str]  # the host name of each rank
    of_node: list[int]  # the ranks of this node
    store: dist.Store
    lasting: dist.Store  # store that stays available to the ranks if the launcher dies
    heartbeat_groups: list[HeartbeatGroup]
    sums: Sums
    # numbers of the agreements that use `lasting`
    agreements: Iterator[int] = field(default_factory=itertools.count)

    def __deepcopy__(self, memo: dict) -> Ranks:
        """Return this object itself: a copied module belongs to the same ranks as the original."""
        return self

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which prints and writes files for all ranks."""
        return self.rank == 0

    def node(self) -> Node:
        """Return the ranks of this node, for one of its loaders. Every rank must call this method."""
        return Node(self.from_main(uuid.uuid4().hex), self.of_node)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum of numbers in host memory over all ranks."""
        return self.start_sum(values)()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum a float64 tensor of any shape on the CPU element-wise over all ranks, in place, and return it."""
        return self.sums.start(values)()

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Start a `sum`, and return a function that waits for the result. All ranks must wait in the same order."""
        if self.world == 1:
            alone = [float(value) for value in values]
            return lambda: alone
        wait = self.sums.start(torch.tensor(values, dtype=torch.float64))
        return lambda: wait().tolist()

    def from_main(self, value: T) -> T:
        """Return rank 0's picklable `value` on every rank."""
        if self.world == 1:  # a broadcast could leave gloo's threads in the interpreter while a worker is forked
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's picklable `value` on every rank."""
        return _gather(value, self.world, self.control)

    def require_same(self, options: Mapping[str, object]) -> None:
        """Check that all ranks were started with the same options. Every rank must call this method.

        Args:
            options: options of the program by name. They are compared by their representation as text.

        Raises:
            UserError: an option of another rank differs from that of rank 0. The error is raised on every rank.
        """
        first, *others = self.gather({name: repr(value) for name, value in options.items()})
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise UserError(
                        f"rank {rank} was started with {name}={other[name]}, but rank 0 with {name}={value}: start all "
                        "ranks with the same options"
                    )

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0 while the other ranks wait. Return its result on rank 0 and None elsewhere. An error is
        raised on every rank; see `raise_shared`."""
        result, error = _attempt(work) if self.is_main else (None, None)
        raise_shared(error, [self.from_main(error_report(error, "rank 0"))])
        return result

    def broadcast(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its picklable result on every rank. Errors are raised as in `on_main`."""
        return cast(T, self.from_main(self.on_main(work)))

    def together(self, work: Callable[[], T], waiting: Waiting = nullcontext) -> T:
        """Run `work` on every rank, wait for all ranks, and return the result. An error on any rank is raised on every
        rank; see `raise_shared`.

        `waiting`: context that is entered while this rank waits for other ranks."""
        result, error = _attempt(work)
        with waiting():
            reports = self.gather(error_report(error, f"rank {self.rank}"))
        raise_shared(error, reports)
        return cast(T, result)

    def main_first(self, work: Callable[[], T], waiting: Waiting = nullcontext) -> T:
        """Run `work` on rank 0, then on the other ranks, which can use the files that rank 0 wrote. Wait for all ranks,
        so that no rank is late for later operations with a shorter timeout. Errors and `waiting` are as in
        `together`."""
        first = self.together(lambda: work() if self.is_main else None, waiting)
        return self.together(lambda: cast(T, first) if self.is_main else work(), waiting)

    def first_error(self, exit_code: int, *, of_node: bool = False) -> tuple[bool, int]:
        """Record that this rank ends with an error. Return whether it is the first rank to do so (the first one prints
        its error), and the exit code of the first rank. Raises RuntimeError if the process that holds the store (rank 0
        or the launcher) has ended. `of_node`: whether "first" means the first among the ranks of this node only."""
        store = self.heartbeat_groups[0].store if of_node else self.store
        own = f"{self.rank} {exit_code}"
        first = store.compare_set(ERROR_KEY, "", own).decode()
        store.add(_ENDED_KEY, 1)
        for group in self.heartbeat_groups:
            with contextlib.suppress(RuntimeError):  # the leader of the node has ended
                group.store.compare_set(ERROR_KEY, "", first)
        return first == own, int(first.split()[1])

    def record_end(self) -> None:
        """Record that this rank ends, for `await_ends`."""
        with contextlib.suppress(RuntimeError):  # the process that holds the store has ended
            self.store.add(_ENDED_KEY, 1)

    def agreement(self, leaving: threading.Event) -> Agreement:
        """Return an agreement between background threads of all ranks. `leaving`: see `Agreement`. All ranks must call
        this method equally often."""
        return Agreement(self.rank, self.world, self.lasting, leaving, next(self.agreements))

    def main_has_ended(self) -> bool:
        """Return whether rank 0, and therefore also the store that it hosts, has ended."""
        try:
            self.lasting.check([""])
        except RuntimeError:
            return True
        return False


def await_ends(store: dist.Store, world: int) -> None:
    """Wait until all ranks have recorded their end, but for at most a few seconds. Rank 0 calls this function before it
    exits, because the store ends with its process."""
    # closes the connections of process groups in reference cycles; other ranks may be waiting for this
    gc.collect()
    until = time.monotonic() + _OTHERS_S
    with contextlib.suppress(RuntimeError):  # the launcher, which hosted the store, has ended
        while store.add(_ENDED_KEY, 0) < world and time.monotonic() < until:
            time.sleep(0.05)


def _attempt(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Return the result of `work`, or its error, as `attempt` does; an error that `explain` recognises becomes a
    UserError."""
    result, error = attempt(work)
    return result, error and (explain(error) or error)


@contextmanager
def join_ranks(device: Device | None = None) -> Iterator[Ranks]:
    """Join the process group (nccl with CUDA, otherwise gloo), yield the ranks, and leave the group at the end.
    Otherwise, a ZeRO-3 run on gloo would end with SIGABRT.

    Args:
        device: the kind of device; None: a GPU if there is one, otherwise the CPU.

    Raises:
        UserError: the launcher's environment variables are inconsistent, this node has too few GPUs, or other ranks
            cannot be reached.
    """
    try:
        yield _joined(device)
    finally:
        if dist.is_initialized():
            # DeepSpeed's function also releases the groups that DeepSpeed has created. Otherwise, a later stage of this
            # program would use these groups, which no longer exist.
            deepspeed = sys.modules.get("deepspeed.comm")
            (deepspeed if deepspeed and deepspeed.is_initialized() else dist).destroy_process_group()
            # gloo's threads end when their group is freed. Reference cycles, such as the trainer's, would keep the
            # groups until the interpreter shuts down. A gloo thread that drops a Python tensor then aborts the process.
            atexit.register(gc.collect)


def _joined(device: Device | None) -> Ranks:
    try:
        return _join(device)
    except ValueError as error:
        raise UserError(f"{error}; start the ranks with deepspeed, torchrun or srun, which set it") from None
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and explain(error) is None:  # gloo's errors have no class of their own
            raise
        who, reason = "rank {RANK} of {WORLD_SIZE}".format_map(os.environ), str(error).strip().splitlines()[0]
        raise UserError(
            f"{who} cannot join the other ranks ({reason}): check that all ranks have been started"
        ) from None


def _join(kind: Device | None = None) -> Ranks:
    adopt(os.environ)
    allow_open_files()  # rank 0 may hold a connection to every other rank
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # torchrun's and deepspeed's variables for the number of ranks on this node
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    rank, world, local_rank = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= world:
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={world} in the environment: ranks must be from 0 to WORLD_SIZE - 1"
        )
    _require_files(rank, world)
    device = torch.device("cpu")
    if uses_gpu(kind):
        if local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"rank {rank} needs GPU {local_rank} of this node, which has only {count}: start fewer ranks"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, _number("LOCAL_WORLD_SIZE"))))
    control, store = _connect(rank, world, device)
    gather = partial(_gather, world=world, group=control)
    hosts, nodes = gather(socket.gethostname()), gather(node_name())
    of_node = [other for other, name in enumerate(nodes) if name == nodes[rank]]
    groups = heartbeat_groups(rank, nodes, store, gather, TIMEOUT)
    sums, lasting = Sums(rank, nodes, control, CONTROL_TIMEOUT), _lasting(store, rank, gather)
    return Ranks(rank, world, local_rank, device, control, hosts, of_node, store, lasting, groups, sums)


def _gather(value: T, world: int, group: dist.ProcessGroup) -> list[T]:
    if world == 1:
        return [value]
    values = [value] * world
    dist.all_gather_object(values, value, group=group)
    return values


def _require_files(rank: int, world: int) -> None:
    """Raise UserError if connections to the other ranks would exceed this process's limit of open files."""
    needed = (4 if rank == 0 else 3) * world + _OTHER_FILES  # connections of groups and of the store's clients
    if (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < needed and limit != resource.RLIM_INFINITY:
        raise UserError(
            f"rank {rank} of {world} opens up to {needed:,} files, but the limit is {limit:,}: raise it with `ulimit "
            f"-n {needed}` before the start, or raise the hard limit (`ulimit -Hn`) in /etc/security/limits.conf"
        )


def _connect(rank: int, world: int, device: torch.device) -> tuple[dist.ProcessGroup, dist.Store]:
    """Return the control group and the store of all ranks (`Ranks.control` and `Ranks.store`)."""
    if world == 1:
        store: dist.Store = dist.HashStore()  # requires no address and no port
    else:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "gloo" if device.type == "cpu" else "nccl"
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # number of collectives in NCCL's flight recorder
    hook = sys.excepthook
    # This module uses the default group as a default argument, which would keep it until the interpreter shuts down if
    # the group existed at the import; see `join_ranks`.
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    if world == 1:
        sys.excepthook = hook  # torch's hook would begin each line of the caller's tracebacks with [rank0]
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return cast(dist.ProcessGroup, control), store


def _lasting(store: dist.Store, rank: int, gather: Callable[[int], list[int]]) -> dist.Store:
    """Return a store that does not depend on the launcher. If torchrun's agent hosts `store`, rank 0 hosts another
    store, because the ranks still have to save after the agent has ended."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = gather(own.port if own else 0)[0]
    return own or dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=TIMEOUT)


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise UserError(f"{name}={value} in the environment: must be an integer; deepspeed and torchrun set it")
    return int(value)
