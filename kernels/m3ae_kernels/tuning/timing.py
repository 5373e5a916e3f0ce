"""Clocks: work on a CUDA device is timed between two events, and work on a CPU by the wall clock."""

import time
from collections.abc import Callable

import torch


class CpuDevice:
    """Measurement of wall-clock time. Peak memory is not measured."""

    device = torch.device("cpu")
    name = "cpu"

    def works(self) -> bool:
        return True

    def clear_cache(self) -> None:
        pass

    def head_start(self) -> None:
        pass

    def stamp(self) -> float:
        return time.perf_counter()

    def between(self, pairs: list[tuple[float, float]]) -> list[float]:
        """Return the times between pairs of stamps in milliseconds."""
        return [1e3 * (end - start) for start, end in pairs]

    def time(self, function: Callable[[], object], repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def peak_mb(self, function: Callable[[], object]) -> float | None:
        function()
        return None


class CudaDevice:
    """Measurement of the time between two events around each call, after the second-level cache has been overwritten.

    Overwriting the cache also gives the host a head start. Calls are therefore measured without gaps even if the GPU
    needs less time for them than the host, which needs about 100 us.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.name = torch.cuda.get_device_name()
        self._scratch = torch.empty(512 << 20, dtype=torch.uint8, device=self.device)

    def works(self) -> bool:
        """Return whether the device can still be used by this process; after some errors, it cannot."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def clear_cache(self) -> None:
        self._scratch.zero_()

    def head_start(self) -> None:
        """Keep the GPU busy for about 20 ms, so that the host can launch the timed work in the meantime."""
        torch.cuda._sleep(40_000_000)  # cycles

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        """Wait for the GPU, and return the times between pairs of events in milliseconds."""
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def time(self, function: Callable[[], object], repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self.clear_cache()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def peak_mb(self, function: Callable[[], object]) -> float | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
