"""The search for the fastest settings of each kernel on the present device.

A kernel is timed within the op in which it takes the most time, so that its inputs are realistic. Only its launches are
timed, each between two time stamps on the device. The host runs far enough ahead that launch overhead is not included.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .. import tuning
from ..aot import CASES
from . import candidates
from .check import LIBRARY, check_timed
from .timing import CpuDevice, CudaDevice
from .workloads import OPS, Sizes, Workload, make

Device = CudaDevice | CpuDevice
Trial = dict[str, Any]
# New settings must take less than this fraction of the time of the settings with which a search starts; a smaller gain
# may be noise.
GAIN = 0.99
REPEATS = 7
# The kernels that are tuned first, in this order, because attention spends most of its time in the backward pass.
FIRST = ("attention_backward", "attention")


class DeviceBroken(Exception):
    """Raised after an error that makes the device unusable for this process, such as an illegal memory access."""


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
    package = f"{LIBRARY.__name__}.triton_impl."
    modules = [module for name, module in sys.modules.items() if name.startswith(package)]
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
    work.run(LIBRARY)  # compiles the kernels and imports the launchers
    rounds: list[dict[str, float]] = []
    for _ in range(repeats or REPEATS):
        device.head_start()
        with watched(device) as stamps:
            work.run(LIBRARY)
        rounds.append({kernel: sum(device.between(pairs)) for kernel, pairs in stamps.items() if pairs})
    return {kernel: statistics.median(r[kernel] for r in rounds) for kernel in rounds[0]}


def busiest(
    device: Device, sizes: Sizes, dtype: torch.dtype, rows: list[Trial], trials: Path
) -> dict[tuple[str, str], str]:
    """Return the op in which each kernel takes the most time. There is one op for each pair of a kernel and a class of
    sample sizes (see `tuning.samples_class`). Ops that raise errors are left out. The op under way is recorded in
    `rows` and in the file `trials`. If this op ends the process, the next process reads the record and leaves the op
    out."""
    most: dict[tuple[str, str], tuple[float, str]] = {}
    for name in OPS:
        row: Trial = {"op": name, "dtype": str(dtype), "kept": False, "verdict": "under way"}
        if row in rows:
            print(f"{name} is left out: in an earlier process, it crashed or did not finish", flush=True)
            continue
        rows.append(row)
        save(trials, rows)
        times: dict[str, float] = {}
        try:
            work = make(name, sizes, dtype, device.device)
            times = kernel_ms(device, work, repeats=1)
        except Exception as error:
            print(f"{name} is left out: {_first_line(error)}", flush=True)
            _raise_if_broken(device, error)
        rows.remove(row)
        save(trials, rows)
        for kernel, ms in times.items():
            entry = kernel, work.samples
            most[entry] = max(most.get(entry, (0.0, name)), (ms, name))
    order = {kernel: number for number, kernel in enumerate(FIRST)}
    return {entry: most[entry][1] for entry in sorted(most, key=lambda entry: order.get(entry[0], len(FIRST)))}


def tune(
    device: Device,
    sizes: Sizes,
    dtype: torch.dtype,
    trials: Path,
    only: Collection[str] = (),
    try_settings: Callable[..., list[dict[str, int]]] = candidates.settings_to_try,
) -> int:
    """Replace the settings in the device's table by the fastest ones, kernel by kernel, and return the number of
    entries for which no setting works. `only`: names of the kernels to tune; empty for all.

    Each setting is recorded in the file `trials` before it is tried. The file is read at the start, so that a search
    whose process was ended by a setting continues with the next setting.

    Raises:
        DeviceBroken: the device has become unusable.
    """
    arch, width = tuning.arch_of(device.device), "16" if dtype.itemsize == 2 else "32"
    table, rows, failed = tuning.table(arch), read(trials), 0
    for row in rows:
        if row["kept"] and row["arch"] == arch:
            table[row["kernel"]][row["entry"]] = row["settings"]
    for (kernel, samples), op in busiest(device, sizes, dtype, rows, trials).items():
        if only and kernel not in only:
            continue
        entry = tuning.entry(width, samples)
        work = make(op, sizes, dtype, device.device)
        search = _Search(device, kernel, arch, entry, width, work, rows, trials)
        best = search.run(try_settings)
        if best is None:
            failed += 1
            print(f"{kernel}, {entry}, in {op}: no setting works", flush=True)
            continue
        write(arch, table, tuning.FOLDER)
        first = search.tried[0]["ms"]
        print(f"{kernel}, {entry}, in {op}: {first} -> {best['ms']} ms, {best['settings']}", flush=True)
    return failed


class _Search:
    """A search for the best settings of one kernel, timed within one op. The search starts with the present settings,
    and proceeds to those that `try_settings` returns for the best ones so far. After each trial, the loaded table
    contains the best settings so far, whose trial is marked as "kept". New settings must also give correct results."""

    def __init__(
        self,
        device: Device,
        kernel: str,
        arch: str,
        entry: str,
        width: str,
        work: Workload,
        rows: list[Trial],
        trials: Path,
    ) -> None:
        self.device, self.work, self.rows, self.trials = device, work, rows, trials
        self.width = width
        self.key = {"kernel": kernel, "entry": entry, "arch": arch}
        self.tried = [row for row in rows if row.items() >= self.key.items()]
        self.table = tuning.table(arch)[kernel]

    def run(self, try_settings: Callable[..., list[dict[str, int]]]) -> Trial | None:
        """Run the search and return the trial of the settings that the table contains at the end; None if no settings
        work."""
        kernel, entry, arch = self.key["kernel"], self.key["entry"], self.key["arch"]
        now = self.tried[0]["settings"] if self.tried else self.table.get(entry, self.table[self.width])
        todo = [now]
        while todo:
            for settings in todo:
                self._time(settings)
            now = best["settings"] if (best := self._keep()) else now
            known = [row["settings"] for row in self.tried]
            todo = [s for s in [now, *try_settings(kernel, now, arch, self.width)] if s not in known]
        return best

    def _time(self, settings: dict[str, int]) -> None:
        if any(row["settings"] == settings for row in self.tried):
            return
        row: Trial = {**self.key, "op": self.work.name, "settings": settings, "ms": None, "kept": False}
        row["verdict"] = "under way"
        self.rows.append(row)
        self.tried.append(row)
        save(self.trials, self.rows)
        self.table[self.key["entry"]] = settings
        try:
            row |= {"ms": kernel_ms(self.device, self.work)[self.key["kernel"]], "verdict": "ok"}
        except Exception as error:  # the settings do not compile, or do not fit this device
            row["verdict"] = _first_line(error)
            save(self.trials, self.rows)
            _raise_if_broken(self.device, error)
        if self._keep() is row is not self.tried[0]:
            row |= {"verdict": "under way", "kept": False}  # in case the check ends this process
            save(self.trials, self.rows)
            row["verdict"] = "; ".join(check_timed(self.work).problems) or "ok"
            self._keep()

    def _keep(self) -> Trial | None:
        """Write the best settings so far to the loaded table, and return their trial."""
        sound = [row for row in self.tried if row["verdict"] == "ok"]
        best = min(sound, key=lambda row: row["ms"], default=None)
        if best and sound[0] is self.tried[0] and best["ms"] >= GAIN * sound[0]["ms"]:
            best = sound[0]
        self.table[self.key["entry"]] = (best or self.tried[0])["settings"]
        for row in self.tried:
            row["kept"] = row is best
        save(self.trials, self.rows)
        return best


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error))


def _raise_if_broken(device: Device, error: Exception) -> None:
    if not device.works():
        raise DeviceBroken from error


def read(trials: Path) -> list[Trial]:
    """Return the recorded trials; empty if there is no file."""
    return json.loads(trials.read_text(encoding="utf-8")) if trials.exists() else []


def save(trials: Path, rows: list[Trial]) -> None:
    """Write the trials atomically, because a setting may end the process at any time."""
    partial = trials.with_name(f".{trials.name}")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(trials)


def write(arch: str, table: tuning.Table, folder: Path) -> Path:
    """Write a table in the format of the package, and return its path."""
    kernels = []
    for name, entries in table.items():
        lines = ",\n".join(f'    "{entry}": {json.dumps(settings)}' for entry, settings in entries.items())
        kernels.append(f'  "{name}": {{\n{lines}\n  }}')
    path = folder / f"{arch}.json"
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n", encoding="utf-8")
    return path
