"""What a rank was at when a run stood still, as files for whoever looks for the cause."""

from __future__ import annotations

import faulthandler
from pathlib import Path

import torch
import torch.distributed as dist

RECORDED = "2000"  # collectives that NCCL remembers
_TRACE = "nccl_trace_rank_"  # the name that torch's torchfrtrace expects


def write_stacks(folder: Path, rank: int) -> None:
    """Write where all threads are, and NCCL's last collectives for torchfrtrace, into files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank-{rank}.txt", "w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    if dist.is_nccl_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        record = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]  # torch for CPUs lacks it
        (folder / f"{_TRACE}{rank}").write_bytes(record)
