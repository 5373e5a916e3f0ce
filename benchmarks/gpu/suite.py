"""Checks and timing of all ops, item by item. An item that raises an error does not affect other items. If an item
terminates its process, another process continues with the next item."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.alone import ROOT
from benchmarks.gpu.check import DTYPES, Check, check_small, check_timed
from benchmarks.gpu.processes import Processes
from benchmarks.gpu.timing import line, time_op
from benchmarks.measure import CpuDevice, CudaDevice
from benchmarks.ops import LARGE, ODD, OPS, Sizes, make

BROKEN = 4  # exit code if the device can no longer be used by the process
CHECKS, TIMES = "gpu-checks", "gpu-ops"
AT = ".at"  # name of the file with the number of the current item


class DeviceBroken(Exception):
    """Raised after an error that makes the device unusable for this process, such as an illegal memory access."""


@dataclass(frozen=True)
class Item:
    """An item of work for an op: a check of the inputs that are timed ("timed"), the timing ("times"), or a check of
    odd sizes."""

    kind: str
    op: str
    dtype: torch.dtype

    def failed(self, problem: str) -> Check:
        return Check(self.op, self.kind, str(self.dtype).removeprefix("torch."), None, [problem])


SMALL = "small, odd"


def items(*, quick: bool = False, odd: bool = False, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Item]:
    """Return the checks and timings to run, in order. `quick`: nothing is timed. `odd`: large inputs,
    which are in bf16, are not checked either."""
    kinds = () if odd or torch.bfloat16 not in dtypes else ("timed",) if quick else ("timed", "times")
    large = [Item(kind, name, torch.bfloat16) for name in OPS for kind in kinds]
    return large + [Item(SMALL, name, dtype) for dtype in dtypes for name in OPS]


def check_and_time(
    device: CpuDevice | CudaDevice,
    work: Sequence[Item],
    checks: list[Check],
    folder: Path | None = None,
    *,
    first: int = 0,
    sizes: Sizes = LARGE,
    small: Sizes = ODD,
    compiled: bool = True,
    rounds: int = 5,
    repeats: int = 10,
) -> None:
    """Process the items from number `first` on. The results of checks are appended to `checks`, and the rows to
    gpu-checks.json and gpu-ops.json in `folder` (None: the folder of this machine) after each item.

    Raises:
        DeviceBroken: the device has become unusable.
    """
    folder = folder or results.here()
    folder.mkdir(parents=True, exist_ok=True)
    before, times = (results.read(folder / f"{name}.json") if first else [] for name in (CHECKS, TIMES))
    where = sizes_of(sizes)

    def checked(check: Check) -> None:
        checks.append(check)
        print(line_of(check), flush=True)
        save_checks([*before, *(c.row() for c in checks)], folder, where)

    for number, item in enumerate(work[first:], first):
        (folder / AT).write_text(str(number))
        try:
            if item.kind == SMALL:
                checked(check_small(item.op, item.dtype, device.device, small))
                continue
            inputs = make(item.op, sizes, item.dtype, device.device)
            if item.kind == "timed":
                checked(check_timed(inputs))
                continue
            for row in time_op(device, inputs, compiled, rounds, repeats):
                times.append(row)
                print(line(row), flush=True)
            title = f"Ops in bf16, {where} (loss ops compute their gradients in the forward pass)"
            results.save(TIMES, title, times, folder)
            torch._dynamo.reset()
        except Exception as error:  # any error, because the other items are not affected
            traceback.print_exc()
            checked(item.failed(f"raises {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"))
            if not device.works():
                raise DeviceBroken from error


def sizes_of(sizes: Sizes) -> str:
    return f"M3AE-Large at {sizes.samples} samples"


def save_checks(rows: Sequence[results.Row], folder: Path, where: str) -> None:
    title = f"Checks of the ops: odd sizes against float64, {where} against float32"
    results.save(CHECKS, title, rows, folder)


def line_of(check: Check) -> str:
    """Return a line that describes the result of a check."""
    verdict = "; ".join(check.problems) or f"ok, {check.worst:.2f} of the allowed error"
    return f"{check.op:28} {check.sizes:11} {check.dtype:9} {verdict}"


def in_processes(
    command: Callable[[int], Sequence[str]], work: Sequence[Item], folder: Path, seconds: float, where: str
) -> int:
    """Process the items in a separate process. If an item terminates its process, another process continues with the
    next item. Return the exit code.

    Args:
        command: function from the number of the first item to the command of a process.
        work: the items.
        folder: folder of the results.
        seconds: time limit, after which no process is started and a running one is asked to end.
        where: description of the sizes of the large inputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in {CHECKS} | {TIMES for item in work if item.kind == "times"}:  # results of an earlier run
        (folder / f"{name}.json").unlink(missing_ok=True)
    first, failed, until = 0, 0, time.monotonic() + seconds
    with Processes() as processes:
        while first < len(work) and (left := until - time.monotonic()) > 0:
            (folder / AT).write_text(str(first))
            code = processes.start([*command(first), "--budget", f"{left:.0f}"], cwd=ROOT).wait()
            if code in (0, 1, 2):
                return failed or code
            failed, at = 1, int((folder / AT).read_text())
            if code != BROKEN:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                check = work[at].failed(f"the process ended with {how}")
                print(line_of(check), flush=True)
                save_checks([*results.read(folder / f"{CHECKS}.json"), check.row()], folder, where)
            first = at + 1
    return failed
