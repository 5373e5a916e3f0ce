"""Block sizes for the device at hand: each candidate's launches are timed by themselves, and the fastest is kept.

A kernel runs inside the op that keeps it busiest, so that its inputs are real; what is timed are its launches alone,
between two stamps each, with the host so far ahead that no gap of its own lies between them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import m3ae_kernels
import torch
from m3ae_kernels import tuning
from m3ae_kernels.aot import CASES

from benchmarks import results
from benchmarks.gpu import candidates
from benchmarks.measure import CpuDevice, CudaDevice
from benchmarks.ops import OPS, Sizes, Workload, make

Device = CudaDevice | CpuDevice
GAIN = 0.99  # of the time of the settings so far: less would be noise
REPEATS = 7


class Launches:
    """Stands in for a kernel and stamps the device's time before and after each launch."""

    def __init__(self, kernel: Any, device: Device, stamps: list[tuple[Any, Any]]) -> None:
        self.kernel, self.device, self.stamps = kernel, device, stamps

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        launch = self.kernel[grid]

        def stamped(*args: Any, **kwargs: Any) -> None:
            before = self.device.stamp()
            launch(*args, **kwargs)
            self.stamps.append((before, self.device.stamp()))

        return stamped


@contextmanager
def watched(device: Device) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Collect by the name of its settings the stamps of every kernel that is launched meanwhile."""
    stamps: dict[str, list[tuple[Any, Any]]] = {}
    names = {f"{case.kernel}_kernel": case.table or case.kernel for case in CASES}
    modules = [module for name, module in sys.modules.items() if name.startswith("m3ae_kernels.triton_impl.")]
    patches = [
        mock.patch.object(module, name, Launches(kernel, device, stamps.setdefault(names[name], [])))
        for module in modules
        for name, kernel in vars(module).items()
        if name in names
    ]
    for patch in patches:
        patch.start()
    try:
        yield stamps
    finally:
        for patch in patches:
            patch.stop()


def kernel_ms(device: Device, work: Workload, repeats: int | None = None) -> dict[str, float]:
    """Return what the launches of each kernel take in one forward and backward pass; the median of some."""
    work.run(m3ae_kernels)  # compiled, and the launchers imported
    rounds: list[dict[str, float]] = []
    for _ in range(repeats or REPEATS):
        device.head_start()
        with watched(device) as stamps:
            work.run(m3ae_kernels)
        rounds.append({kernel: sum(device.between(pairs)) for kernel, pairs in stamps.items() if pairs})
    return {kernel: statistics.median(r[kernel] for r in rounds) for kernel in rounds[0]}


def busiest(device: Device, sizes: Sizes, dtype: torch.dtype) -> dict[str, str]:
    """Return by kernel the op that keeps it busiest."""
    most: dict[str, tuple[float, str]] = {}
    for name in OPS:
        for kernel, ms in kernel_ms(device, make(name, sizes, dtype, device.device), repeats=1).items():
            most[kernel] = max(most.get(kernel, (0.0, name)), (ms, name))
    return {kernel: name for kernel, (_, name) in most.items()}


def tune(
    device: Device,
    sizes: Sizes,
    dtype: torch.dtype,
    folder: Path | None = None,
    try_settings: Callable[..., list[dict[str, int]]] | None = None,
) -> None:
    """Replace the device's table by the fastest settings, kernel by kernel.

    Every setting that was timed stands in gpu-tuning.json in `folder` (None: this machine's). Kernels that are in it
    are done: it is read at the start, so that a tuning which ended early goes on.
    """
    try_settings = try_settings or candidates.settings_to_try
    arch, width = tuning.arch_of(device.device), "16" if dtype.itemsize == 2 else "32"
    table = tuning.table(arch)
    rows = results.read((folder or results.here()) / "gpu-tuning.json")
    for row in rows:
        if row["kept"] == "yes":
            table[row["kernel"]][row["bits"]] = json.loads(row["settings"])
    done = {row["kernel"] for row in rows if row["bits"] == width}
    todo = {kernel: op for kernel, op in busiest(device, sizes, dtype).items() if kernel not in done}
    for kernel, op in todo.items():
        work, before = make(op, sizes, dtype, device.device), table[kernel][width]
        times: list[tuple[dict[str, int], float]] = []
        for settings in [before, *(s for s in try_settings(kernel, before, arch, width) if s != before)]:
            table[kernel][width] = settings
            try:
                times.append((settings, kernel_ms(device, work)[kernel]))
            except Exception as error:  # what does not compile or fit here is no candidate
                if settings == before:
                    raise
                print(f"{kernel}: {json.dumps(settings)} left out: {next(iter(str(error).splitlines()), '')}")
        best, least = min(times, key=lambda pair: pair[1])
        kept = best if least < GAIN * times[0][1] else before
        table[kernel][width] = kept
        for settings, ms in times:
            row: results.Row = {"kernel": kernel, "bits": width, "op": op, "settings": json.dumps(settings)}
            rows.append(row | {"ms": ms, "kept": "yes" if settings == kept else ""})
        results.save("gpu-tuning", f"Block sizes tried, {arch}", rows, folder)
        write(arch, table, tuning.FOLDER)
        print(f"{kernel}, {width} bits, in {op}: {times[0][1]:.3f} -> {least:.3f} ms, {json.dumps(kept)}", flush=True)


def write(arch: str, table: dict, folder: Path = tuning.FOLDER) -> Path:
    """Write a table as the package keeps it."""
    kernels = []
    for name, widths in table.items():
        lines = ",\n".join(f'    "{width}": {json.dumps(settings)}' for width, settings in widths.items())
        kernels.append(f'  "{name}": {{\n{lines}\n  }}')
    path = folder / f"{arch}.json"
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    return path
