"""Measurement of the time and the peak memory of functions that do the same work."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from m3ae_kernels.tuning.timing import CpuDevice, CudaDevice


@dataclass
class Timing:
    """The 20th, 50th and 80th percentiles of the times in milliseconds, and the peak memory in MB, without the memory
    that was in use before."""

    p20: float
    p50: float
    p80: float
    peak_mb: float | None = None


def measure(
    device: CpuDevice | CudaDevice, functions: dict[str, Callable[[], object]], rounds: int = 5, repeats: int = 10
) -> dict[str, Timing]:
    """Time functions that do the same work, and return the timings by name. The functions alternate, so that a change
    of the clock rate affects all of them."""
    for function in functions.values():
        device.time(function, 3)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name] += device.time(function, repeats)
    return {name: Timing(*_percentiles(t), device.peak_mb(functions[name])) for name, t in times.items()}


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    ordered = torch.tensor(times, dtype=torch.float64)
    return tuple(ordered.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())
