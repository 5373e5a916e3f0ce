"""The shortest time in which this machine can compute a number of FLOPs and move a number of bytes."""

from __future__ import annotations

import functools
import time

import torch
from m3ae_kernels.tuning.workloads import Cost

from m3ae_fast.base.hardware import data_sheet, peak_flops

COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
ROUNDS = 5


@functools.cache
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of matrix products according to the data sheet, or as measured if there is no data sheet."""
    return peak_flops(device, dtype)


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that memory reads or writes, according to the data sheet, or as measured by a copy if
    there is no data sheet."""
    sheet = data_sheet(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if sheet is not None:
        return sheet.bandwidth
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / min(seconds)


def least_ms(cost: Cost, device: torch.device, dtype: torch.dtype) -> float:
    """Return the shortest possible time in milliseconds. `cost`: FLOPs, and bytes with 16-bit inputs."""
    flops, moved = cost
    return 1e3 * max(flops / peak(device, dtype), moved * dtype.itemsize / 2 / bandwidth(device))
