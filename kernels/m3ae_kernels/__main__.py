"""m3ae-kernels tune [KERNEL ...]: find the fastest block sizes for this machine's GPU, and write them to the package's
file for this kind of GPU."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from . import dispatch, tuning
from .aot import CASES
from .tuning import limited_process, search
from .tuning.timing import CudaDevice
from .tuning.workloads import LARGE

LIMIT_S = 300.0  # a process that makes no progress for this number of seconds is killed
BROKEN = 4  # exit code of a process in which a kernel has failed, so that it can no longer use the GPU
KERNELS = sorted({case.table or case.kernel for case in CASES})
DTYPES = (torch.bfloat16, torch.float32)  # float16 is not tuned, because it uses the settings of bfloat16


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="m3ae-kernels")
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    tune = commands.add_parser(
        "tune",
        help="find the fastest block sizes for this machine's GPU",
        description="Find the fastest block sizes of the Triton kernels for this machine's GPU, at the sizes of "
        "M3AE-Large, and write them to the package's table for this kind of GPU.",
    )
    tune.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"kernels to tune (default: {', '.join(KERNELS)})")
    # internal: with this option, the process measures settings itself; a setting that crashes ends only this process
    tune.add_argument("--trials", type=Path, help=argparse.SUPPRESS)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit code: 0; 1 if no settings of a kernel work, or if a setting ends a process or
    makes it hang; 2 if a kernel's name is unknown, or without a GPU that the Triton kernels support."""
    args = parser().parse_args(arguments)
    if unknown := [name for name in args.kernels if name not in KERNELS]:
        print(f"m3ae-kernels tune: {unknown[0]} must be one of {', '.join(KERNELS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("m3ae-kernels tune: torch finds no GPU on this machine, so there is nothing to tune", file=sys.stderr)
        return 2
    if not tuning.fits(torch.device("cuda")):
        print("m3ae-kernels tune: the Triton kernels do not support this GPU", file=sys.stderr)
        return 2
    if args.trials is not None:
        return _tune(args.kernels, args.trials)
    with tempfile.TemporaryDirectory() as folder:
        trials = Path(folder) / "trials.json"
        return in_processes([sys.executable, "-m", __package__, "tune", *args.kernels, "--trials", str(trials)], trials)


def _tune(kernels: Sequence[str], trials: Path) -> int:
    """Tune in this process, and return the exit code."""
    # this package's attention is tuned, even if the attention of another library is faster on this GPU
    os.environ[dispatch.ENV] = "triton"
    device, failed = CudaDevice(), 0
    print(f"{device.name}, torch {torch.__version__}", flush=True)
    try:
        for dtype in DTYPES:
            failed += search.tune(device, LARGE, dtype, trials, kernels)
    except search.DeviceBroken as error:
        print(f"this process can no longer use the GPU: {error.__cause__}", flush=True)
        return BROKEN
    return 1 if failed else 0


def in_processes(command: Sequence[str], trials: Path, seconds: float = LIMIT_S) -> int:
    """Tune in a separate process, and return the exit code. If a setting ends the process or makes it hang, another
    process continues with the next setting, and the exit code is 1."""
    failed, known = 0, -1
    while True:
        code = limited_process.run(command, seconds, trials)
        if code in (0, 1, 2):
            return failed or code
        print(f"the process {limited_process.end_of(code, seconds)}", flush=True)
        failed, before, known = 1, known, len(search.read(trials))
        if known == before:  # the process tried no new setting, so another process would not get further
            return failed


if __name__ == "__main__":
    sys.exit(main())
