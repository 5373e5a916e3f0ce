"""Tuning of block sizes for the present device: the launches of all candidates are timed, and the fastest candidate is
kept.

A kernel is timed within the op in which it takes the most time, so that its inputs are realistic. Only its launches are
timed, each between two time stamps on the device. The host runs far enough ahead that launch overhead is not included.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import m3ae_kernels
import torch
from m3ae_kernels import tuning
from m3ae_kernels.aot import CASES

from benchmarks import results
from benchmarks.alone import ROOT
from benchmarks.gpu import candidates
from benchmarks.gpu.check import check_timed
from benchmarks.gpu.processes import Processes
from benchmarks.gpu.suite import DeviceBroken
from benchmarks.measure import CpuDevice, CudaDevice
from benchmarks.ops import OPS, Sizes, Workload, make
from benchmarks.results import Row

Device = CudaDevice | CpuDevice
GAIN = 0.99  # new settings must take less than this fraction of the best settings' time; a smaller gain may be noise
REPEATS = 7
TUNING = "gpu-tuning"


class Launches:
    """A wrapper of a kernel that records a time stamp of the device before and after each launch."""

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
    """Collect the time stamps of all launches in the `with` block, by the kernel's name in the tuning table."""
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
    """Return the time of each kernel's launches in one forward and backward pass in milliseconds, as the median over
    several passes."""
    work.run(m3ae_kernels)  # compiles the kernels and imports the launchers
    rounds: list[dict[str, float]] = []
    for _ in range(repeats or REPEATS):
        device.head_start()
        with watched(device) as stamps:
            work.run(m3ae_kernels)
        rounds.append({kernel: sum(device.between(pairs)) for kernel, pairs in stamps.items() if pairs})
    return {kernel: statistics.median(r[kernel] for r in rounds) for kernel in rounds[0]}


def busiest(device: Device, sizes: Sizes, dtype: torch.dtype) -> dict[str, str]:
    """Return for each kernel the op in which it takes the most time. Ops that raise errors are ignored."""
    most: dict[str, tuple[float, str]] = {}
    for name in OPS:
        try:
            times = kernel_ms(device, make(name, sizes, dtype, device.device), repeats=1)
        except Exception as error:
            print(f"{name} is left out: {_first_line(error)}", flush=True)
            _raise_if_broken(device, error)
            continue
        for kernel, ms in times.items():
            most[kernel] = max(most.get(kernel, (0.0, name)), (ms, name))
    return {kernel: name for kernel, (_, name) in most.items()}


def tune(
    device: Device,
    sizes: Sizes,
    dtype: torch.dtype,
    folder: Path | None = None,
    try_settings: Callable[..., list[dict[str, int]]] | None = None,
    only: Collection[str] = (),
) -> int:
    """Replace the settings in the device's table by the fastest ones, kernel by kernel, and return the number of
    kernels for which no setting works. `only`: names of the kernels to tune; empty for all.

    Each setting is recorded in gpu-tuning.json in `folder` (None: the folder of this machine) before it is tried. The
    file is read at the start, so that a tuning that ended early, or whose process was terminated by a setting,
    continues with the next setting.

    Raises:
        DeviceBroken: the device has become unusable.
    """
    arch, width = tuning.arch_of(device.device), "16" if dtype.itemsize == 2 else "32"
    table, rows, failed = tuning.table(arch), results.read((folder or results.here()) / f"{TUNING}.json"), 0
    _apply(rows)
    for kernel, op in busiest(device, sizes, dtype).items():
        if only and kernel not in only:
            continue
        search = _Search(device, kernel, arch, width, make(op, sizes, dtype, device.device), rows, folder)
        best = search.run(try_settings or candidates.settings_to_try)
        if best is None:
            failed += 1
            print(f"{kernel}, {width} bits, in {op}: no setting works", flush=True)
            continue
        write(arch, table, tuning.FOLDER)
        first = search.tried[0]["ms"]
        print(f"{kernel}, {width} bits, in {op}: {first} -> {best['ms']} ms, {best['settings']}", flush=True)
    return failed


class _Search:
    """A search for the best settings of one kernel, timed within one op. It starts with the present settings and
    proceeds to settings close to the best settings so far. At any time, the loaded table contains the best settings
    with correct results, which are also marked in the rows."""

    def __init__(
        self, device: Device, kernel: str, arch: str, width: str, work: Workload, rows: list[Row], folder: Path | None
    ) -> None:
        self.device, self.work, self.rows, self.folder = device, work, rows, folder
        self.key = {"kernel": kernel, "bits": width, "arch": arch}
        self.tried = [row for row in rows if row.items() >= self.key.items()]
        self.table = tuning.table(arch)[kernel]

    def run(self, try_settings: Callable[..., list[dict[str, int]]]) -> Row | None:
        """Run the search and return the row of the settings that the table contains at the end; None if no settings
        work."""
        kernel, width, arch = self.key["kernel"], self.key["bits"], self.key["arch"]
        now = json.loads(self.tried[0]["settings"]) if self.tried else self.table[width]
        todo = [now]
        while todo:
            for settings in todo:
                self._time(settings)
            now = json.loads(best["settings"]) if (best := self._keep()) else now
            known = {row["settings"] for row in self.tried}
            todo = [s for s in [now, *try_settings(kernel, now, arch, width)] if json.dumps(s) not in known]
        return best

    def _time(self, settings: dict[str, int]) -> None:
        shown = json.dumps(settings)
        if any(row["settings"] == shown for row in self.tried):
            return
        row: Row = {**self.key, "op": self.work.name, "settings": shown, "ms": None, "kept": "", "verdict": "under way"}
        self.rows.append(row)
        self.tried.append(row)
        self._save()
        self.table[self.key["bits"]] = settings
        try:
            row |= {"ms": kernel_ms(self.device, self.work)[self.key["kernel"]], "verdict": "ok"}
        except Exception as error:  # the settings do not compile, or do not fit this device
            row["verdict"] = _first_line(error)
            self._save()
            _raise_if_broken(self.device, error)
        if self._keep() is row is not self.tried[0] and (problems := check_timed(self.work).problems):
            row["verdict"] = "; ".join(problems)
            self._keep()

    def _keep(self) -> Row | None:
        """Write the best settings so far to the loaded table, and return their row."""
        sound = [row for row in self.tried if row["verdict"] == "ok"]
        best = min(sound, key=lambda row: row["ms"], default=None)
        if best and sound[0] is self.tried[0] and best["ms"] >= GAIN * sound[0]["ms"]:
            best = sound[0]
        self.table[self.key["bits"]] = json.loads((best or self.tried[0])["settings"])
        for row in self.tried:
            row["kept"] = "yes" if row is best else ""
        self._save()
        return best

    def _save(self) -> None:
        results.save(TUNING, f"Block sizes tried, {self.key['arch']}", self.rows, self.folder)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error))


def _raise_if_broken(device: Device, error: Exception) -> None:
    if not device.works():
        raise DeviceBroken from error


def in_processes(command: Sequence[str], folder: Path, seconds: float) -> int:
    """Tune in a separate process; if it ends early, continue in another process. Return the exit code."""
    failed, known, until = 0, -1, time.monotonic() + seconds
    with Processes() as processes:
        while (left := until - time.monotonic()) > 0:
            code = processes.start([*command, "--budget", f"{left:.0f}"], cwd=ROOT).wait()
            if code in (0, 1, 2):
                return failed or code
            failed, before, known = 1, known, len(results.read(folder / f"{TUNING}.json"))
            if known == before:  # this process has tried no new settings
                break
    return failed


def apply(folder: Path) -> None:
    """Write the settings that were kept by the tunings in `folder` to the package's tables; the latest take
    precedence."""
    paths = sorted(folder.glob(f"*/{TUNING}.json"), key=lambda path: path.stat().st_mtime)
    for arch in _apply([row for path in paths for row in results.read(path)]):
        write(arch, tuning.table(arch), tuning.FOLDER)


def _apply(rows: Sequence[Row]) -> list[str]:
    """Apply the kept rows to the loaded tables, and return the names of the tables that have changed."""
    changed = {}
    for row in rows:
        settings, width = json.loads(row["settings"]), row["bits"]
        table = tuning.table(row["arch"])[row["kernel"]]
        if row["kept"] and table[width] != settings:
            table[width] = settings
            changed[row["arch"]] = True
    return list(changed)


def write(arch: str, table: dict, folder: Path = tuning.FOLDER) -> Path:
    """Write a table in the format of the package, and return its path."""
    kernels = []
    for name, widths in table.items():
        lines = ",\n".join(f'    "{width}": {json.dumps(settings)}' for width, settings in widths.items())
        kernels.append(f'  "{name}": {{\n{lines}\n  }}')
    path = folder / f"{arch}.json"
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    return path
