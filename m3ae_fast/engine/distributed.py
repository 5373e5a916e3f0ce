"""Ranks and devices, and what ranks agree on before every step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# deepspeed and torchrun both set these; plain `python` sets none
_DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    control: dist.ProcessGroup  # gloo, for host numbers: no GPU ever waits for it

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks, of host numbers."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def from_main(self, value):
        """Rank 0's picklable `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)


def start() -> Ranks:
    """Join the process group: nccl where there is CUDA, else gloo."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun's name for it
        os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    options = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **options)
    control = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
    return Ranks(rank, world, local_rank, int(os.environ["LOCAL_SIZE"]), device, control)


def stop() -> None:
    """Leave the process group; without this a ZeRO-3 run on gloo ends in SIGABRT."""
    if dist.is_initialized():
        dist.destroy_process_group()
