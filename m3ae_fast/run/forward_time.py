"""How long this rank's own part of a step takes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn


class ForwardTime:
    """Measures the forward passes of training: backward ones wait for other ranks, and a whole step takes all of them
    the same time, whichever rank is slow."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._passes: list[tuple[Any, Any]] = []
        self._on_gpu = device.type == "cuda"
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def per_step(self, steps: int) -> float:
        """Return seconds per step since the last call, in which there were so many. The GPU must have come so far."""
        passes = [each for each in self._passes if each[1] is not None]
        self._passes = []
        if self._on_gpu:
            return sum(begun.elapsed_time(ended) for begun, ended in passes) / 1e3 / steps
        return sum(ended - begun for begun, ended in passes) / steps

    def _begin(self, module: nn.Module, *_: Any) -> None:
        if module.training:
            self._passes.append((self._now(), None))

    def _end(self, module: nn.Module, *_: Any) -> None:
        if module.training:
            self._passes[-1] = (self._passes[-1][0], self._now())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
