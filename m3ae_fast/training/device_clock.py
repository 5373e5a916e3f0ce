"""Clock for computations on a device."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """Clock that measures when a device has executed a computation. On a GPU, which executes computations after their
    calls have returned, it uses CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def now(self) -> Any:
        """Return the present time, to be passed to `seconds`. On a GPU, this is the time at which all previous calls
        have been executed."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, began: Any, ended: Any) -> float:
        """Return the seconds between two times. On a GPU, all calls made before the second time must have been
        completed."""
        return began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began
