"""python -m benchmarks.gpu [--quick | --tune | --step] [--budget SECONDS]: checks every kernel on the GPU and times it
beside the baselines; or finds block sizes; or times whole training steps.

Results are written after each op, kernel or step, so that a run which ends early has what it measured. Exit code 1
where a check fails, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.gpu.budget import budget
from benchmarks.gpu.check import DTYPES, Check, check_small, check_timed
from benchmarks.gpu.timing import line, time_op
from benchmarks.gpu.tune import tune
from benchmarks.measure import CpuDevice, CudaDevice
from benchmarks.ops import LARGE, ODD, OPS, Sizes, make

BUDGET = 480  # seconds


def check_and_time(
    device: CpuDevice | CudaDevice,
    checks: list[Check],
    folder: Path | None = None,
    *,
    sizes: Sizes = LARGE,
    small: Sizes = ODD,
    quick: bool = False,
    compiled: bool = True,
    rounds: int = 5,
    repeats: int = 10,
) -> None:
    """Check the inputs of every op, then time it on them; then check `small` odd sizes in all dtypes.

    `quick`: nothing is timed. Fills `checks`, and writes gpu-checks.json and gpu-ops.json into `folder` (None: this
    machine's) as it goes.
    """
    rows: list[results.Row] = []
    where = f"M3AE-Large at {sizes.samples} samples"

    def checked(check: Check) -> None:
        checks.append(check)
        print(f"{check.op:28} {check.sizes:11} {check.dtype:9} {_verdict(check)}", flush=True)
        title = f"Checks of the ops: odd sizes against float64, {where} against float32"
        results.save("gpu-checks", title, [c.row() for c in checks], folder)

    for name in OPS:
        work = make(name, sizes, torch.bfloat16, device.device)
        checked(check_timed(work))
        if quick:
            continue
        for row in time_op(device, work, compiled, rounds, repeats):
            rows.append(row)
            print(line(row), flush=True)
        title = f"Ops in bf16, {where} (loss ops make their gradients forward)"
        results.save("gpu-ops", title, rows, folder)
        torch._dynamo.reset()
    for dtype in DTYPES:
        for name in OPS:
            checked(check_small(name, dtype, device.device, small))


def _verdict(check: Check) -> str:
    return "; ".join(check.problems) or f"ok, {check.worst:.2f} of the allowed error"


def main(arguments: list[str] | None = None, **options: Any) -> int:
    """Run the benchmarks; `options` are those of `check_and_time`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="checks alone, no timing")
    what.add_argument("--tune", action="store_true", help="find block sizes for this GPU and write its table")
    what.add_argument("--step", action="store_true", help="whole training steps; needs m3ae_fast installed")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"end after so long (default {BUDGET})"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="where to write (default benchmarks/results/GPU)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device on this machine; nothing to measure", file=sys.stderr)
        return 2
    print(f"{results.device_name()}, torch {torch.__version__}", flush=True)
    checks: list[Check] = []
    with budget(args.budget):
        if args.step:
            from benchmarks.gpu.step import run

            run(args.results)
        elif args.tune:
            for dtype in (torch.bfloat16, torch.float32):
                tune(CudaDevice(), options.get("sizes", LARGE), dtype, args.results)
        else:
            check_and_time(CudaDevice(), checks, args.results, quick=args.quick, **options)
    return 1 if any(c.problems for c in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
